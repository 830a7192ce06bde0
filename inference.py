"""Predicts the class of every parcel of a dataset with trained weights, of one fold or of all together."""

import learning  # isort: skip  # noqa: F401  # before torch, see there

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dataset import (
    UNKNOWN,
    BatchSampler,
    PixelSetData,
    PixelSetData_preloaded,
    batch_loader,
    find_norm,
)
from learning.attention import PICTURES, choose_bands, mean_attention, write_attention
from learning.distributed import is_main, join_ranks, main_first, together
from learning.errors import UserError, as_user_error, run_cli
from learning.export import export_run
from learning.maps import check_picture, match_outlines, write_map
from learning.options import (
    ARCHITECTURE,
    CLASSES_20,
    EXTRA_FEATURE,
    LABELS,
    NPIXEL,
    Parser,
    add_architecture_options,
    add_data_options,
    check_typed,
    classifier_name,
    has_attention,
    natural,
    read_preset,
    resolve_architecture,
    typed_architecture,
)
from learning.predictions import TABLE, predict, report, score_batches
from learning.results import (
    CONFIG,
    NORMALISATION,
    load_normalisation,
    prepare_output,
    read_config,
)
from learning.runs import load_classifiers
from learning.runtime import (
    count_workers,
    describe_device,
    keep_freed_memory,
)
from models.stclassifier import Ensemble
from models.weights import choose_folds
from preprocessing.classes import read_class_names
from preprocessing.metadata import check_norm, read_info, read_nomenclatures
from preprocessing.parcels import OUTLINES, read_outlines
from preprocessing.simulate import embedded_dataset

if TYPE_CHECKING:
    from geopandas import GeoDataFrame


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(
        description=__doc__,
        epilog="Architecture, classes and normalisation are those of the run in weight_dir (conf.json); flags override.",
    )
    group = parser.add_argument_group("inference")
    group.add_argument(
        "--weight_dir", required=True, help="results folder of train.py, with Fold_k/model.pth.tar"
    )
    group.add_argument("--fold", default="all", help="number of one fold, from 1, or all for the mean of all")
    group.add_argument("--output_dir", default="./output", help="where to write the predictions")
    group.add_argument(
        "--parcels",
        help="vector file with the parcels' outlines: also writes predictions.gpkg and predictions.parquet",
    )
    group.add_argument("--id_column", default="id", help="column with the dataset's ids in --parcels")
    group.add_argument(
        "--map", help="picture to draw a map in; without --parcels, the dataset's META/parcels.gpkg is used"
    )
    group.add_argument(
        "--attention",
        action="store_true",
        help="also write each class's mean attention by head and date: attention.npz and a picture per class",
    )
    group.add_argument(
        "--ndvi_bands",
        type=natural,
        nargs=2,
        metavar=("RED", "NIR"),
        help="channels, counted from 0, of the NDVI in those pictures (default: B4 and B8 by the names in "
        "META/info.json, else 2 6 of the published 10 channels)",
    )
    group.add_argument(
        "--export",
        metavar="FILE",
        help="only write the model, in one file that other programs run: FILE.onnx or FILE.pt2",
    )
    add_data_options(parser)
    add_architecture_options(parser)
    return parser.parse_args()


def main() -> None:
    """Loads weights and data, predicts, and writes the predictions."""
    args = parse_args()
    keep_freed_memory()
    device = join_ranks(args.device)
    with as_user_error(FileNotFoundError, ValueError, prefix="--weight_dir: "):
        choose_folds(args.weight_dir, args.fold)  # before the data are read, which can take long
    if args.export:
        if is_main():
            typed, preset = typed_architecture(args), read_preset(args.preset)
            print(export_run(Path(args.export), Path(args.weight_dir), args.fold, typed, preset))
        return
    output = prepare_output(args.output_dir) if is_main() else Path(args.output_dir)
    run = read_run(Path(args.weight_dir))
    if args.sub_classes and len(set(args.sub_classes)) < len(args.sub_classes):
        raise UserError("--sub_classes names a label twice; name as many labels as the model tells apart.")
    classes = args.sub_classes or run.get("sub_classes") or list(CLASSES_20)
    outlines = open_outlines(args)
    described = (read_preset(args.preset) or run) | typed_architecture(args)
    if args.attention and not has_attention(described):
        raise UserError(f"--attention: a {classifier_name(described)} has no attention; L-TAE and TAE do.")
    with main_first():
        dataset = open_dataset(args, run, classes)
    if outlines is not None:
        outlines = match_outlines(outlines, dataset.pid)
    config = read_architecture(args, run, dataset, len(classes))
    names = run.get("class_names")
    if not names and (args.attention or outlines is not None):
        names = read_class_names(dataset.folder, args.labels or run.get("labels", LABELS))
    if args.attention:
        channels = read_info(dataset.folder).get("bands") or []
        bands = choose_bands(args.ndvi_bands, channels, dataset.n_channels)
    ensemble = load_ensemble(args, config, dataset, device)
    if dataset.fits_on(device):
        dataset = dataset.to(device)
    print(
        f"Device: {describe_device(device)}\n"
        f"Model: {classifier_name(config)}, {len(ensemble.members)} fold(s) of {args.weight_dir}, {len(classes)} classes\n"
        f"Data: {len(dataset)} parcels of {dataset.folder}"
    )
    if not is_main():
        for _ in score_batches(ensemble, dataset, len(classes), args.batch_size, args.num_workers, device):
            pass
        return
    predicted = predict(ensemble, dataset, classes, args.batch_size, args.num_workers, device, output)
    report(dataset, predicted, len(classes), output)
    if args.attention:
        show_attention(ensemble, dataset, predicted, classes, names, bands, args, device, output)
    if outlines is not None:
        written = write_map(outlines, output / TABLE, output, args.map and Path(args.map), names)
        print(f"Map: {', '.join(map(str, written))}")


def open_outlines(args: argparse.Namespace) -> "GeoDataFrame | None":
    """The outlines that the flags ask for, checked; None if they ask for none."""
    if args.map:
        check_picture(args.map)
        if not (args.parcels or args.dataset_folder):
            raise UserError("--map needs outlines, which the embedded dataset does not have; give --parcels.")
    if args.parcels or args.map:
        return read_outlines(args.parcels or Path(args.dataset_folder) / "META" / OUTLINES, args.id_column)
    return None


def read_run(weight_dir: Path) -> dict[str, Any]:
    """The configuration of a training run; empty for bare weights, such as the published ones."""
    if (weight_dir / CONFIG).exists():
        return read_config(weight_dir)
    print(f"Configuration: {weight_dir} has no {CONFIG}, so published defaults and flags")
    return {}


def open_dataset(args: argparse.Namespace, run: dict[str, Any], classes: list[int]) -> PixelSetData:
    """The dataset to predict, prepared as the training data were; labels and classes are optional there."""
    folder = args.dataset_folder
    if folder is None:
        folder = embedded_dataset()
        print(f"Dataset: the embedded simulated one, in {folder}; --dataset_folder chooses another")
    folder = Path(folder)
    labels = args.labels
    if labels is None and (folder / "META" / "labels.json").exists():
        usual = run.get("labels", LABELS)
        labels = usual if usual in read_nomenclatures(folder) else None
    has_extra = (folder / "META" / f"{EXTRA_FEATURE}.json").exists()
    wants_extra = run.get("n_extra", 0) > 0 if run else has_extra
    extra = EXTRA_FEATURE if args.geomfeat or (args.geomfeat is None and wants_extra) else None
    weight_dir = Path(args.weight_dir)
    norm, extra_stats = load_normalisation(weight_dir)
    expected = 2 * [(run["n_extra"],)] if run and run["n_extra"] else []
    if run and norm is not None and [values.shape for values in extra_stats or ()] != expected:
        raise UserError(
            f"{weight_dir / NORMALISATION} does not hold the statistics of {run['n_extra']} extra features; "
            "copy it again from the training."
        )
    kind = PixelSetData_preloaded if args.preload else PixelSetData
    any_dates = bool(run) and run["lms"] is None
    dataset = kind(
        folder,
        labels,
        getattr(args, "npixel", run.get("npixel", NPIXEL)),
        classes if labels else None,
        extra_feature=extra,
        cache_dir=args.cache_dir,
        keep_all=True,
        extra_stats=extra_stats,
        nodata=args.nodata,
        season_start=run.get("season_start"),
        varying=any_dates,
    ).evaluation(run.get("rdm_seed", 1))
    if dataset.varying and not any_dates:
        raise UserError(
            f"the model was trained on dates that all parcels share, but {folder} has other dates for each parcel, or "
            "observations are missing; train one with --varying_dates."
        )
    if run:
        trained = {"channels": run["input_dim"], "dates": run["lms"], "extra features": run["n_extra"]}
        found = (dataset.n_channels, None if any_dates else dataset.n_dates, dataset.n_extra)
        for (what, expected), number in zip(trained.items(), found):
            if number != expected:
                raise UserError(f"the model was trained on {expected} {what} but {folder} has {number}.")
        if not any_dates and dataset.date_positions != run.get("date_positions", dataset.date_positions):
            print(
                "Dates: not those of the training; the model takes each for the training's date of the same rank"
            )
    if norm is not None and args.norm is None:
        dataset.set_norm(check_norm(norm, dataset.norm_shape, weight_dir / NORMALISATION), in_order=True)
    else:
        norm, source = find_norm(dataset, args.norm)
        dataset.set_norm(norm)
        print(f"Normalisation: {source}")
    return dataset


def read_architecture(
    args: argparse.Namespace, run: dict[str, Any], dataset: PixelSetData, n_classes: int
) -> dict[str, Any]:
    """The architecture of the run, where flags override it; of published defaults and flags for bare weights."""
    typed = typed_architecture(args)
    n_dates = None if dataset.varying else dataset.n_dates
    if run and args.preset is None:
        config = {name: run[name] for name in (*ARCHITECTURE, "grid")} | typed
        check_typed(typed, config, dataset.n_channels, n_dates, n_classes)
        if n_classes != config["mlp4"][-1]:
            raise UserError(
                f"--sub_classes names {n_classes} labels but the model tells {config['mlp4'][-1]} apart; leave it out "
                "or name as many."
            )
        return config
    return resolve_architecture(
        typed, read_preset(args.preset), dataset.n_channels, n_dates, dataset.n_extra, n_classes
    )


def load_ensemble(
    args: argparse.Namespace, config: dict[str, Any], dataset: PixelSetData, device: torch.device
) -> Ensemble:
    """The trained classifiers of the folds asked for."""
    with as_user_error(FileNotFoundError, ValueError, TypeError, prefix="--weight_dir: "):
        return load_classifiers(
            args.weight_dir, config, dataset.n_extra, dataset.date_positions, device, args.fold
        )


def show_attention(
    ensemble: Ensemble,
    dataset: PixelSetData,
    predicted: np.ndarray,
    classes: list[int | str],
    names: dict[str, str],
    bands: tuple[int, int] | None,
    args: argparse.Namespace,
    device: torch.device,
    output: Path,
) -> None:
    """Writes the mean attention of each true class or, where no label is known, of each predicted one."""
    known = (dataset.target != UNKNOWN).any()
    sampler = BatchSampler(range(len(dataset)), args.batch_size)
    loader = batch_loader(dataset, sampler, count_workers(args.num_workers), device.type == "cuda")
    groups = dataset.target if known else predicted
    attention = mean_attention(ensemble, dataset, loader, groups, len(classes), bands, device)
    folds = list(choose_folds(args.weight_dir, args.fold))
    written = write_attention(output, attention, dataset, classes, names, folds)
    print(
        f"Attention by {'true' if known else 'predicted'} class: {written[0]}, {len(written) - 1} pictures in "
        f"{output / PICTURES}"
        + ("" if bands else "; no NDVI, since nothing tells its bands: give --ndvi_bands")
    )


if __name__ == "__main__":
    run_cli(together(main))
