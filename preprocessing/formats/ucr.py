"""Series of the UCR and UEA archive: .ts files with a header, or .tsv files without.

Read here, since libraries that read .ts bring a compiler (numba) along.
"""

from pathlib import Path

import numpy as np

from common.errors import UserError, as_user_error
from preprocessing.formats.source import Pixels, Source, require, to_numbers

FIRST_DAY = np.datetime64("2001-01-01")
Series = tuple[list[list[str]], str]  # values of each channel, class


def open_source(folder: Path) -> Source:
    """Opens a dataset's folder with NAME_TRAIN and NAME_TEST, .ts, or .tsv where there is no .ts."""
    found = sorted(folder.glob("*_TRAIN.ts")) or sorted(folder.glob("*_TRAIN.tsv"))
    if len(found) != 1:
        raise UserError(
            f"{folder} has {len(found)} files *_TRAIN.ts or *_TRAIN.tsv; give the folder of one dataset."
        )
    test = found[0].with_name(found[0].name.replace("_TRAIN.", "_TEST."))
    parts = {"train": found[0], "test": require(test, "the official test part")}
    parse = _parse_ts if test.suffix == ".ts" else _parse_tsv
    series, labels, groups = [], [], []
    for part, path in parts.items():
        with as_user_error(ValueError, prefix=f"{path} is not as expected: "):
            rows = parse(path.read_text(encoding="utf-8"))
            if not rows or not all(label.strip() for _, label in rows):
                raise ValueError("expected series, each of a class.")
            for channels, label in rows:
                values = np.full((max(map(len, channels)), len(channels)), np.nan)
                for k, own in enumerate(channels):
                    values[: len(own), k] = own
                series.append(values)
                labels.append(str(int(float(label))) if _is_whole(label) else label)
                groups.append(part)

    def read(i: int) -> Pixels:
        return series[i], to_numbers(FIRST_DAY + np.arange(len(series[i])))

    return Source(
        range(len(series)),
        read,
        {"class": [int(label) for label in labels] if all(map(_is_whole, labels)) else labels},
        [f"channel{k + 1}" for k in range(series[0].shape[1])],
        groups=groups,
        splits=[{part: [part] for part in parts}],
        assumed=[
            f"series have no dates: their values stand for the days from {FIRST_DAY} on",
            "ids count the series from 0, those of the training part first",
            "a fifth of the training part, drawn by train.py, is for validation",
        ],
    )


def _parse_tsv(text: str) -> list[Series]:
    """Lines of class and values."""
    rows = [line.split("\t") for line in text.splitlines() if line.strip()]
    return [([values], label) for label, *values in rows]


def _parse_ts(text: str) -> list[Series]:
    """Lines of channels and class, separated by colons, after a header of lines that begin with @."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    start = [line.lower() for line in lines].index("@data")
    header = dict([*line.lower().split(), "", ""][:2] for line in lines[:start])
    if header.get("@timestamps", "false") != "false" or header.get("@classlabel", "true") != "true":
        raise ValueError("expected @timeStamps false and @classLabel true in its header.")
    rows = [line.replace("?", "nan").split(":") for line in lines[start + 1 :]]
    return [([channel.split(",") for channel in channels], label) for *channels, label in rows]


def _is_whole(label: str) -> bool:
    """Whether a class is a whole number, which may be written as 1.0 or 1.0e+00."""
    try:
        return float(label).is_integer()
    except ValueError:
        return False
