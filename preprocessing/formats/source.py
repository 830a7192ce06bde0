"""What a format tells of a dataset: all about its parcels at once, their pixels one by one."""

import csv
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import UserError

ALL_S2 = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
TEN_S2 = tuple(band for band in ALL_S2 if band not in ("B01", "B09", "B10"))  # those of 10 and 20 m
Pixels = tuple[np.ndarray, Sequence[int]]


@dataclass
class Source:
    """A published dataset of N parcels, opened.

    Attributes:
        names: ids of the parcels, all different: whole numbers from 0, which become the ids of the dataset folder; or
            text, which is kept beside ids from 1 to N.
        read: pixels (L, C) or (L, C, S) of the parcel at a place in `names`, and its L days as YYYYMMDD.
        labels: {nomenclature: N labels, None where a parcel has none}.
        bands: names of the C channels.
        units: what a number is in reflectance; None if it is none, or unknown.
        nodata: value that means missing in all channels of a pixel, besides NaN; None for none.
        classes: {nomenclature: {label as text: name}}.
        groups: what splits go by, such as the region of each parcel, N; None for none.
        splits: for each split the groups of "train", "validation" (may be left out) and "test"; None where there is no
            official one, so that whole groups are dealt to parts.
        extra: extra features of each parcel, (N, F); None for none.
        extra_names: F names.
        norm: official mean and deviation, (C,) each; None for none.
        assumed: what the files do not say, or what was changed; parts of sentences.
    """

    names: Sequence[int | str]
    read: Callable[[int], Pixels]
    labels: dict[str, Sequence[int | str | None]]
    bands: Sequence[str]
    units: float | None = None
    nodata: float | None = None
    classes: dict[str, dict[str, str]] = field(default_factory=dict)
    groups: Sequence[Hashable] | None = None
    splits: Sequence[dict[str, Collection[Hashable]]] | None = None
    extra: Sequence[Sequence[float]] | None = None
    extra_names: Sequence[str] = ()
    norm: tuple[np.ndarray, np.ndarray] | None = None
    assumed: list[str] = field(default_factory=list)


def require(path: Path, what: str) -> Path:
    """The path; a UserError if nothing is there, saying what was expected."""
    if not path.exists():
        raise UserError(f"{path} is not there; expected {what}.")
    return path


def require_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Paths of files in a folder; a UserError if one is not there."""
    present = {path.name for path in require(folder, "a folder with a file per parcel").iterdir()}
    if missing := [name for name in names if name not in present]:
        raise UserError(
            f"{folder / missing[0]} is not there ({len(missing)} missing in all); unpack all of the archive."
        )
    return [folder / name for name in names]


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file with a line of column names; a UserError unless `columns` are there, and a row."""
    with open(require(path, f"a table with the columns {', '.join(columns)}"), encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    missing = [column for column in columns if not rows or column not in rows[0]]
    if missing:
        found = ", ".join(rows[0]) if rows else "no row"
        raise UserError(f"{path} has no column {missing[0]!r}; it has {found}.")
    return rows


def to_numbers(days: np.ndarray) -> list[int]:
    """Days, datetime64 of any unit, as YYYYMMDD."""
    return [int(day.replace("-", "")) for day in np.datetime_as_string(days, unit="D").tolist()]
