"""The flags that train.py and inference.py share, and how they become a model.

Every setting comes from, in this order: what is typed; what the data tell; a preset of `config_fig2.json` (or the
configuration of a trained run); the published default. A size that is not typed follows from those that are.
"""

import argparse
import json
import math
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from learning.errors import UserError, as_user_error
from learning.files import read_json
from models import stclassifier
from models.layers import DAYS
from models.stclassifier import PseClassifier
from preprocessing.settings import CLASSES_20, LABELS, NPIXEL

PRESETS = Path(__file__).resolve().parent.parent / "config_fig2.json"
# Published defaults of the architecture. TAE alone takes those of its own class: the published ones do not fit it.
ARCHITECTURE = {
    "input_dim": 10,
    "mlp1": [10, 32, 64],
    "pooling": "mean_std",
    "mlp2": [132, 128],
    "n_head": 16,
    "d_k": 8,
    "mlp3": [256, 128],
    "T": 1000,
    "positions": "bespoke",
    "lms": 24,
    "dropout": 0.2,
    "d_model": 256,
    "mlp4": [128, 64, 32, 20],
    "num_classes": 20,
    "tae": False,
    "gru": False,
    "hidden_dim": 156,
    "tcnn": False,
    "nker": [32, 32, 128],
    "grid_days": 10,
}
# Published defaults of the training, and of what was added to it.
TRAINING = {
    "kfold": 5,
    "epochs": 100,
    "batch_size": 128,
    "lr": 0.001,
    "gamma": 1.0,
    "rdm_seed": 1,
    "temporal_dropout": 0.0,
    "temporal_shift": 0,
    "preset": None,
}
TAE_DEFAULTS = {"n_head": 4, "d_k": 32, "mlp3": [512, 128, 128], "d_model": None}


def parse_list(text: str) -> list[int]:
    """Reads a list typed as [128,64]."""
    if not re.fullmatch(r"\[?\s*\d+(\s*,\s*\d+)*\s*\]?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as [128,64]")
    return [int(number) for number in re.findall(r"\d+", text)]


def parse_labels(text: str) -> list[int] | list[str]:
    """Reads a list of labels, whole numbers or text, typed as [1,3] or [wheat,maize]."""
    labels = [label.strip() for label in text.strip().removeprefix("[").removesuffix("]").split(",")]
    if not all(labels):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of labels such as [1,3] or [wheat,maize]")
    return [int(label) for label in labels] if all(re.fullmatch(r"-?\d+", x) for x in labels) else labels


def parse_month_day(text: str) -> tuple[int, int]:
    """Reads a day of the year typed as MM-DD."""
    try:
        day = datetime.strptime(f"2001-{text}", "%Y-%m-%d")  # of a common year, so that every year has it
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a day of the year such as 10-01") from None
    return day.month, day.day


def parse_number(text: str) -> float:
    """Reads a number, infinities included; nan is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number (NaN means missing in any case)")
    return value


def parse_widths(text: str) -> list[int]:
    """Reads a list of layer widths, all of at least 1."""
    widths = parse_list(text)
    if min(widths) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} contains a 0; every layer needs at least one number")
    return widths


def parse_optional(text: str) -> int | None:
    """Reads a number, or null."""
    return None if text.lower() in ("null", "none") else positive(text)


def positive(text: str) -> int:
    """Reads a whole number of at least 1."""
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """Reads a whole number of at least 0."""
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def seed(text: str) -> int:
    """Reads a seed that NumPy's published shuffle of the folds takes."""
    if natural(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def fraction(text: str) -> float:
    """Reads a number from 0 up to, not including, 1."""
    value = non_negative(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return value


def non_negative(text: str) -> float:
    """Reads a number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that only say that a flag is not given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes end in one sentence, exit code 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}; --help lists all options.\n")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Flags on the dataset and on how it is read."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_folder", help="dataset folder; without it the embedded simulated dataset")
    group.add_argument(
        "--labels", help=f"nomenclature of META/labels.json; without it {LABELS}, or the only one there is"
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
    group.add_argument("--batch_size", type=positive, default=128, help="parcels per batch")
    group.add_argument(
        "--num_workers",
        type=natural,
        default=8,
        help="most loading processes to use; no influence on results",
    )
    group.add_argument("--preload", action="store_true", help="read all pixels into memory first")
    group.add_argument("--device", help="cpu or cuda; without it CUDA if there is a GPU, else the CPU")


def add_architecture_options(parser: argparse.ArgumentParser) -> None:
    """Flags of the network; only those that are typed appear in the parsed arguments."""
    group = parser.add_argument_group("architecture", "PSE + L-TAE unless --tae, --gru or --tcnn is given")

    def add(name: str, help: str, **kwargs: Any) -> None:
        default = ARCHITECTURE[name]
        shown = (
            ""
            if default is False
            else f" (default: {json.dumps(default, separators=(',', ':'))})".replace('"', "")
        )
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=help + shown, **kwargs)

    group.add_argument(
        "--preset", help="a configuration of config_fig2.json, such as LTAE/9k; other flags win over it"
    )
    add("input_dim", "channels of a pixel", type=positive)
    add("mlp1", "widths of the PSE's first MLP", type=parse_widths)
    add("pooling", "statistics over pixels: mean, std, max, min, joined by _")
    add("mlp2", "widths of the PSE's second MLP", type=parse_widths)
    add("n_head", "attention heads", type=positive)
    add("d_k", "size of keys and queries", type=positive)
    add("mlp3", "widths of the MLP after the attention, or of TempCNN's linear layers", type=parse_widths)
    add("T", "period of the positional encoding", type=positive)
    add(
        "positions",
        "bespoke: days since the first date; order: the dates' numbers",
        choices=("bespoke", "order"),
    )
    add("lms", "longest sequence of dates", type=positive)
    add("dropout", "dropout after mlp3", type=fraction)
    add("d_model", "channels the attention works on, null for those of the PSE", type=parse_optional)
    add("num_classes", "number of classes", type=positive)
    add("mlp4", "widths of the decoder", type=parse_widths)
    add("tae", "PSE + TAE", action="store_true")
    add("gru", "PSE + GRU", action="store_true")
    add("hidden_dim", "size of the GRU's hidden state", type=positive)
    add("tcnn", "PSE + TempCNN", action="store_true")
    add("nker", "kernels of TempCNN's convolutions", type=parse_widths)
    add("grid_days", "days between the dates that TempCNN interpolates varying dates to", type=positive)


def typed_architecture(args: argparse.Namespace) -> dict[str, Any]:
    """The architecture flags that were typed."""
    return {name: value for name, value in vars(args).items() if name in ARCHITECTURE}


def read_preset(name: str | None) -> dict[str, Any]:
    """A configuration of config_fig2.json by its name, ARCHITECTURE/SIZE."""
    if name is None:
        return {}
    presets = read_json(PRESETS)
    architecture, _, size = name.partition("/")
    if size not in presets.get(architecture, {}):
        known = ", ".join(f"{a}/{s}" for a in presets for s in presets[a])
        raise UserError(f"--preset {name} is unknown; expected one of {known}.")
    values = presets[architecture][size]
    return {key: parse_list(value) if isinstance(value, str) else value for key, value in values.items()}


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


def check_typed(
    typed: dict[str, Any], config: dict[str, Any], n_channels: int, n_dates: int | None, n_classes: int
) -> None:
    """Checks the flags that were typed, and the configuration that they made, against the data.

    n_dates is None for dates that vary.

    Raises:
        UserError: if a flag contradicts the data, or two architectures are asked for.
    """
    if sum(bool(config[name]) for name in ("tae", "gru", "tcnn")) > 1:
        raise UserError("more than one of --tae, --gru and --tcnn is given; choose one.")
    for flag, told, what in (
        ("input_dim", n_channels, "channels"),
        ("lms", n_dates, "dates"),
        ("num_classes", n_classes, "classes"),
    ):
        if typed.get(flag, told) != told:
            number = "varying" if told is None else told
            raise UserError(
                f"--{flag} is {typed[flag]} but the dataset has {number} {what}; leave --{flag} out."
            )
    if n_dates is None and config["positions"] == "order":
        raise UserError(
            "--positions order numbers the dates, which says nothing where they vary; leave it out."
        )


def resolve_architecture(
    typed: dict[str, Any],
    preset: dict[str, Any],
    n_channels: int,
    n_dates: int | None,
    n_extra: int,
    n_classes: int,
) -> dict[str, Any]:
    """All architecture settings, from what is typed, the data and a preset; see the head of this file.

    n_dates is None for dates that vary.

    Raises:
        UserError: if a typed flag contradicts the data. Sizes that contradict each other are found by the model.
    """
    config = {**ARCHITECTURE, **(TAE_DEFAULTS if {**preset, **typed}.get("tae") else {}), **preset, **typed}
    check_typed(typed, config, n_channels, n_dates, n_classes)
    config |= {"input_dim": n_channels, "lms": n_dates, "num_classes": n_classes}

    def follow(name: str, position: int, value: int) -> None:
        """Sets one width of a list that was not typed."""
        if name not in typed:
            config[name] = list(config[name])
            config[name][position] = value

    follow("mlp1", 0, n_channels)
    follow("mlp2", 0, len(config["pooling"].split("_")) * config["mlp1"][-1] + n_extra)
    if config["gru"]:
        if "mlp4" in typed and "hidden_dim" not in typed:
            config["hidden_dim"] = config["mlp4"][0]
        follow("mlp4", 0, config["hidden_dim"])
    else:
        if not config["tcnn"]:
            _resolve_attention(config, typed, follow)
        if "mlp4" in typed and len(config["mlp3"]) > 1:
            follow("mlp3", -1, config["mlp4"][0])
        follow("mlp4", 0, config["mlp3"][-1])
    if "mlp4" in typed and config["mlp4"][-1] != n_classes:
        raise UserError(
            f"--mlp4 ends with {config['mlp4'][-1]} but there are {n_classes} classes; end it with {n_classes}."
        )
    follow("mlp4", -1, n_classes)
    return config


def _resolve_attention(config: dict[str, Any], typed: dict[str, Any], follow: Any) -> None:
    """Makes d_model and mlp3[0] agree: L-TAE's heads share d_model channels, each of TAE's gives them all."""
    in_channels = config["mlp2"][-1]
    n_head = config["n_head"]
    copies = n_head if config["tae"] else 1
    if "mlp3" not in typed:
        follow("mlp3", 0, copies * (config["d_model"] or in_channels))
    elif typed.get("d_model") is None:
        if config["mlp3"][0] % n_head:
            raise UserError(
                f"--mlp3 starts with {config['mlp3'][0]}, which --n_head {n_head} does not divide; start it with a "
                "multiple, an equal part for every head."
            )
        d_model = config["mlp3"][0] // copies
        config["d_model"] = None if d_model == in_channels else d_model


def hyperparameters(
    config: dict[str, Any], n_extra: int, date_positions: Sequence[int] | None
) -> dict[str, Any]:
    """Constructor arguments of the classifier that a resolved configuration describes.

    `lms` is None in a configuration for varying dates: `grid` then lists the days TempCNN interpolates to.
    """
    varying = config["lms"] is None
    positions = list(date_positions) if config["positions"] == "bespoke" and not varying else None
    positions = DAYS if varying else positions
    kwargs = {name: config[name] for name in ("input_dim", "mlp1", "pooling", "mlp2", "mlp4")}
    kwargs |= {"with_extra": n_extra > 0, "extra_size": n_extra, "positions": positions}
    if config["gru"]:
        return kwargs | {"hidden_dim": config["hidden_dim"]}
    if config["tcnn"]:
        kwargs |= {"nker": config["nker"], "mlp3": config["mlp3"], "seq_len": config["lms"]}
        grid = config.get("grid")
        return kwargs | ({"positions": grid, "grid": grid, "seq_len": len(grid)} if varying else {})
    kwargs |= {name: config[name] for name in ("n_head", "d_k", "d_model", "mlp3", "dropout", "T")}
    return kwargs | {"len_max_seq": config["lms"]}


def classifier_name(config: dict[str, Any]) -> str:
    """Name of the class in models.stclassifier that a configuration describes."""
    names = {"tae": "PseTae", "gru": "PseGru", "tcnn": "PseTempCNN"}
    return next((name for flag, name in names.items() if config.get(flag)), "PseLTae")


def has_attention(config: dict[str, Any]) -> bool:
    """Whether a configuration describes a classifier with attention."""
    return classifier_name(config) in ("PseLTae", "PseTae")


def build_model(config: dict[str, Any], n_extra: int, date_positions: Sequence[int] | None) -> PseClassifier:
    """The classifier that a resolved configuration describes.

    Raises:
        UserError: if its sizes do not fit together.
    """
    with as_user_error(ValueError):
        return getattr(stclassifier, classifier_name(config))(
            **hyperparameters(config, n_extra, date_positions)
        )


def _brief(values: Sequence[int | str], most: int = 30) -> str:
    text = ", ".join(map(str, values[:most]))
    return text + (", ..." if len(values) > most else "")
