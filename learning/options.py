"""The flags that train.py and inference.py share, and how they become an architecture.

Every setting comes from, in this order: what is typed; what the data tell; a preset of `config_fig2.json` (or the
configuration of a trained run); the published default. A size that is not typed follows from those that are.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import UserError, as_user_error
from common.flags import (
    fraction,
    natural,
    parse_labels,
    parse_number,
    parse_optional,
    parse_until,
    parse_widths,
    positive,
)
from data.metadata import LabelsTable, choose_nomenclature, read_units
from data.packing import check_folder
from data.prepare import AUGMENTATIONS
from data.settings import CLASSES_20, EXTRA_FEATURE, LABELS, NPIXEL, DataSettings
from dataset import PixelSetData, PixelSetData_preloaded, find_norm
from models.architecture import (
    Architecture,
    DataShape,
    Size,
    chosen_encoder,
    default_settings,
    describe_default,
    flags,
    known_encoders,
)

# What training changes at random in series; each of them needs, and makes, a model for varying dates.
TEMPORAL = ("temporal_dropout", "temporal_truncation", "temporal_shift")


def add_data_options(
    parser: argparse.ArgumentParser, otherwise: str = "the embedded simulated dataset"
) -> None:
    """Flags on the dataset and on how it is read; `otherwise` says in words which one is read without a flag."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_folder", help=f"dataset folder; without it {otherwise}")
    group.add_argument(
        "--labels", help=f"nomenclature of META/labels.json; without it {LABELS}, or the only one there is"
    )
    group.add_argument(
        "--labels_table", metavar="FILE.csv", help="labels from a table, in place of META/labels.json"
    )
    group.add_argument("--label_column", default="label", help="column with the labels in --labels_table")
    group.add_argument(
        "--id_column",
        default="id",
        help="column with the ids, the dataset's or the parcels' own, in --labels_table or in outlines",
    )
    group.add_argument(
        "--sub_classes",
        type=parse_labels,
        help="labels to tell apart, as [1,3,4] or [wheat,maize]; without it the published 20 where the dataset has them all, else "
        "every label present",
    )
    group.add_argument(
        "--norm",
        help="pickled mean and standard deviation; without it the dataset folder's own, else computed",
    )
    group.add_argument(
        "--geomfeat",
        type=int,
        choices=(0, 1),
        help="use the extra features META/geomfeat.json; without it, if they are there",
    )
    group.add_argument(
        "--cache_dir", help="where to keep the packed copy of the pixels; without it, in the dataset folder"
    )
    group.add_argument(
        "--npixel",
        type=positive,
        default=argparse.SUPPRESS,
        help=f"pixels drawn per parcel (default: {NPIXEL}, or as many as the largest parcel has)",
    )
    group.add_argument(
        "--nodata",
        type=parse_number,
        help="value that, in all channels of a pixel, says that it is missing on a date, as NaN does; without it that of "
        "META/info.json",
    )
    group.add_argument(
        "--until",
        type=parse_until,
        metavar="DAY",
        help="use no date later than this day, YYYYMMDD or, in any year, MM-DD; needs, and in training makes, a model for "
        "varying dates",
    )
    group.add_argument(
        "--batch_size",
        type=positive,
        help="parcels per batch; without it inference takes 128, and 1024 where a GPU holds the pixels",
    )
    group.add_argument(
        "--num_workers",
        type=natural,
        default=8,
        help="most loading processes to use; no influence on results",
    )
    group.add_argument("--preload", action="store_true", help="read all pixels into memory first")
    group.add_argument(
        "--device", help="cpu, cuda or cuda:N; without it CUDA if there is a GPU, else the CPU"
    )
    group.add_argument(
        "--tf32", action="store_true", help="let a GPU round factors of products to TF32: faster, less exact"
    )


def resolve_data(args: argparse.Namespace, folder: Path) -> tuple[PixelSetData, DataSettings, str]:
    """The dataset that flags of training ask for, checked and normalised.

    Args:
        args: parsed flags of train.py.
        folder: the dataset.

    Returns:
        The dataset, how it is read, and in words where its normalisation is from.

    Raises:
        UserError: if the folder, or a flag for it, is not as expected.
    """
    check_folder(folder)
    table = args.labels_table and LabelsTable(args.labels_table, args.id_column, args.label_column)
    temporal = {name: getattr(args, name) for name in TEMPORAL}
    asked = DataSettings(
        labels=LABELS if table else choose_nomenclature(folder, args.labels, LABELS),
        labels_table=table,
        n_extra=0,
        nodata=args.nodata,
        season_start=args.season_start,
        until=args.until,
        varying=bool(args.varying_dates or args.season_start or any(temporal.values())),
        seed=args.rdm_seed,
    )
    every_label = PixelSetData(
        folder,
        asked.labels_in(folder),
        NPIXEL,
        cache_dir=args.cache_dir,
        nodata=asked.nodata_in(folder),
        season_start=args.season_start,
    )
    names = every_label.classes
    present = [names[i] for i in every_label.target] if names else every_label.target.tolist()
    has_extra = (folder / "META" / f"{EXTRA_FEATURE}.json").exists()
    settings = replace(
        asked,
        classes=tuple(choose_classes(present, args.sub_classes)),
        npixel=args.npixel or min(NPIXEL, int(every_label.store.sizes.max())),
        n_extra=int(args.geomfeat or (args.geomfeat is None and has_extra)),
    )
    del every_label, present  # of many parcels they take much memory
    dataset = (PixelSetData_preloaded if args.preload else PixelSetData).for_run(
        folder,
        settings,
        cache_dir=args.cache_dir,
        augment=AUGMENTATIONS,
        **temporal,
    )
    norm, source = find_norm(dataset, args.norm)
    dataset.set_norm(norm)
    settings = replace(
        settings,
        n_extra=dataset.n_extra,
        nodata=dataset.store.nodata,
        units=read_units(folder),
        nodata_declared=args.nodata is None and dataset.store.nodata is not None,
        varying=dataset.varying,
        norm=dataset.norm,
        extra_stats=dataset.extra_stats,
    )
    return dataset, settings, source


def add_architecture_options(parser: argparse.ArgumentParser) -> None:
    """Flags of the network; only those that are typed appear in the parsed arguments."""
    names = [f"--{name}" for name in flags()]
    group = parser.add_argument_group(
        "architecture", f"PSE + L-TAE unless {', '.join(names[:-1])} or {names[-1]} is given"
    )

    def add(name: str, help: str, **kwargs: Any) -> None:
        text = f"{help} (default: {describe_default(name)})"
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **kwargs)

    group.add_argument(
        "--preset", help="a configuration of config_fig2.json, such as LTAE/9k; other flags win over it"
    )
    add("input_dim", "channels of a pixel", type=positive)
    add("mlp1", "widths of the PSE's first MLP", type=parse_widths)
    add("pooling", "statistics over pixels: mean, std, max, min, joined by _")
    add("mlp2", "widths of the PSE's second MLP", type=parse_widths)
    add("mlp4", "widths of the decoder", type=parse_widths)
    add("num_classes", "number of classes", type=positive)
    add("lms", "longest sequence of dates", type=positive)
    add(
        "positions",
        "bespoke: days since the first date; order: the dates' numbers",
        choices=("bespoke", "order"),
    )
    for encoder in known_encoders().values():
        if encoder.name in flags():
            group.add_argument(
                f"--{encoder.name}", default=argparse.SUPPRESS, action="store_true", help=encoder.title
            )
    sizes = {
        name: size for encoder in reversed(known_encoders().values()) for name, size in encoder.sizes.items()
    }
    for name, size in sizes.items():
        add(name, size.help, type=_reader(size))


def _reader(size: Size) -> Callable[[str], Any]:
    """What reads a size from the command line."""
    if size.optional:
        return parse_optional
    return {list: parse_widths, float: fraction, int: positive}[type(size.default)]


def typed_architecture(args: argparse.Namespace) -> dict[str, Any]:
    """The architecture flags that were typed."""
    known = default_settings()
    return {name: value for name, value in vars(args).items() if name in known}


def choose_classes(present: Sequence[int | str], asked: Sequence[int | str] | None) -> list[int] | list[str]:
    """The labels to tell apart: those asked for, else the published 20 if all are present, else all present.

    Raises:
        UserError: if there are fewer than two, or one asked for twice or not present.
    """
    present = sorted(set(present))
    if asked is not None:
        asked = [type(present[0])(code) if str(code).lstrip("-").isdigit() else code for code in asked]
        missing = [code for code in asked if code not in present]
        if missing or len(set(asked)) < len(asked):
            what = f"contains {missing[0]}, which no parcel has" if missing else "names a label twice"
            raise UserError(f"--sub_classes {what}; the dataset's labels are {_brief(present)}.")
    classes = list(asked or (CLASSES_20 if set(CLASSES_20) <= set(present) else present))
    if len(classes) < 2:
        raise UserError(f"there is only one class, {classes[0]}; a classifier needs at least two.")
    return classes


def check_typed(typed: dict[str, Any], positions: str, data: DataShape) -> None:
    """Checks the flags that were typed, and how dates are encoded, against the data.

    Raises:
        UserError: if a flag contradicts the data.
    """
    for flag, told, what in (
        ("input_dim", data.n_channels, "channels"),
        ("lms", data.n_dates, "dates"),
        ("num_classes", data.n_classes, "classes"),
    ):
        if typed.get(flag, told) != told:
            number = "varying" if told is None else told
            raise UserError(
                f"--{flag} is {typed[flag]} but the dataset has {number} {what}; leave --{flag} out."
            )
    if data.n_dates is None and positions == "order":
        raise UserError(
            "--positions order numbers the dates, which says nothing where they vary; leave it out."
        )


def check_sizes(typed: dict[str, Any], preset: dict[str, Any]) -> None:
    """Looks for sizes that contradict each other whatever the data are, before these are read.

    Raises:
        UserError: naming them.
    """
    settings = {**default_settings(), **preset, **typed}
    n_dates = typed.get("lms", 24)
    data = DataShape(settings["mlp1"][0], n_dates, 0, settings["mlp4"][-1], range(n_dates))
    sizes = {name: value for name, value in typed.items() if name not in ("input_dim", "num_classes", "lms")}
    if "mlp2" in typed:  # how it has to start depends on the extra features of the data
        pooled = len(settings["pooling"].split("_")) * settings["mlp1"][-1]
        sizes["mlp2"] = [pooled, *typed["mlp2"][1:]]
    resolve_architecture(sizes, preset, data).build()


def resolve_architecture(typed: dict[str, Any], preset: dict[str, Any], data: DataShape) -> Architecture:
    """The architecture, from what is typed, the data and a preset; see the head of this file.

    Raises:
        UserError: if a typed flag contradicts the data. Sizes that contradict each other are found by the model.
    """
    encoder = known_encoders()[chosen_encoder({**preset, **typed})]
    every_size = {name for kind in known_encoders().values() for name in kind.sizes}
    for name in typed:
        if name in every_size and name not in encoder.sizes:
            raise UserError(f"--{name} has no effect on {encoder.title}; leave it out.")
    sizes = {**default_settings(encoder.name), **preset, **typed}
    check_typed(typed, sizes["positions"], data)

    def follow(name: str, place: int, value: int) -> None:
        """Sets one width of a list, or a number, that was not typed."""
        if name not in typed:
            widths = sizes[name]
            sizes[name] = [*widths] if isinstance(widths, list) else value
            if isinstance(widths, list):
                sizes[name][place] = value

    follow("mlp1", 0, data.n_channels)
    follow("mlp2", 0, len(sizes["pooling"].split("_")) * sizes["mlp1"][-1] + data.n_extra)
    with as_user_error(ValueError):
        encoder.agree(sizes, typed)
    output = sizes[encoder.output]
    if "mlp4" in typed and (not isinstance(output, list) or len(output) > 1):
        follow(encoder.output, -1, sizes["mlp4"][0])
    output = sizes[encoder.output]
    follow("mlp4", 0, output[-1] if isinstance(output, list) else output)
    if "mlp4" in typed and sizes["mlp4"][-1] != data.n_classes:
        raise UserError(
            f"--mlp4 ends with {sizes['mlp4'][-1]} but there are {data.n_classes} classes; end it with {data.n_classes}."
        )
    follow("mlp4", -1, data.n_classes)
    first, last = data.day_range
    grid_days = sizes["grid_days"]
    dates = {
        "input_dim": data.n_channels,
        "lms": data.n_dates,
        "n_extra": data.n_extra,
        "date_positions": None if data.date_positions is None else list(data.date_positions),
        "grid": list(range(first, last + grid_days, grid_days)) if data.n_dates is None else None,
    }
    return Architecture.from_dict(sizes | dates)


def _brief(values: Sequence[int | str], most: int = 30) -> str:
    text = ", ".join(map(str, values[:most]))
    return text + (", ..." if len(values) > most else "")
