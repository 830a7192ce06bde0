"""What stands beside the pixels in a dataset folder: labels, dates, what is known of the pixels, mean and deviation."""

import csv
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.arrays import load_arrays
from common.errors import UserError
from common.files import read_json

Arrays = tuple[np.ndarray, np.ndarray]
PIXELS, DAYS = "PIXELS", "days.npy"  # the packed pixels of a folder without DATA, and dates by parcel there
_LABELS = "{nomenclature: {parcel id: label}}"
_INFO = '{"nodata": number or null, "units": number above 0 or null, "bands": [names], ...}'


def read_nomenclatures(folder: Path) -> dict[str, dict[str, Any]]:
    """All of META/labels.json, {nomenclature: {parcel id: label}}."""
    path = folder / "META" / "labels.json"
    nomenclatures = read_json(path, _LABELS)
    if not isinstance(nomenclatures, dict) or not all(
        isinstance(labels, dict) for labels in nomenclatures.values()
    ):
        raise UserError(f"{path} is something else; expected {_LABELS}.")
    return nomenclatures


def choose_nomenclature(folder: Path, asked: str | None, default: str) -> str:
    """The nomenclature to use: the one asked for, else the default or, if the file has only one, that one."""
    if asked is not None:
        return asked
    names = list(read_nomenclatures(folder))
    return names[0] if len(names) == 1 else default


def read_nomenclature(folder: Path, name: str) -> dict[str, int | str]:
    """Labels by parcel id, whole numbers or text, in one nomenclature of META/labels.json."""
    path = folder / "META" / "labels.json"
    nomenclatures = read_nomenclatures(folder)
    if name not in nomenclatures:
        raise UserError(
            f"{path} has no nomenclature {name!r}; it has {', '.join(nomenclatures) or 'none'}: "
            "choose one with --labels."
        )
    labels = nomenclatures[name]
    if set(map(type, labels.values())) == {str}:  # all of them at once
        return labels
    if set(map(type, labels.values())) == {int} and max(map(abs, labels.values())) < 2**63:
        return labels
    by_kind: dict[type, str] = {}
    for parcel, label in labels.items():
        if label is None:
            continue
        if (
            isinstance(label, bool)
            or not isinstance(label, int | str)
            or (isinstance(label, int) and abs(label) >= 2**63)
        ):
            raise UserError(
                f"parcel {parcel} has the label {label!r} in {path}; expected a whole number, without a point, or text."
            )
        by_kind.setdefault(type(label), parcel)
    if len(by_kind) > 1:
        word, number = by_kind[str], by_kind[int]
        raise UserError(
            f"{path}: parcel {word} has the label {labels[word]!r} but parcel {number} has {labels[number]!r}; expected whole "
            "numbers, without quotes, for all or text for all."
        )
    return labels


class LabelsTable(NamedTuple):
    """A table of labels, in a CSV file of its own.

    Attributes:
        path: the file, with a line of column names; separated by commas, semicolons or tabs.
        id_column: column of the ids, the dataset's or the parcels' own.
        label_column: column of the labels; empty where a parcel has none.
    """

    path: str
    id_column: str
    label_column: str

    def read(self) -> dict[str, int | str]:
        """Labels by parcel id: whole numbers if all are, else text.

        Raises:
            UserError: if the file or a column is missing, or a parcel has two labels.
        """
        labels = read_column("--labels_table", self.path, self.id_column, "--label_column", self.label_column)
        if all(re.fullmatch(r"-?\d{1,18}", label) for label in labels.values()):
            return {parcel: int(label) for parcel, label in labels.items()}
        return labels


def read_column(flag: str, path: str | Path, id_column: str, column_flag: str, column: str) -> dict[str, str]:
    """A column of a CSV file by parcel id, as text; parcels without a value are left out.

    Args:
        flag, column_flag: what names the file and the column, for messages.
        path: the file, with a line of column names; separated by commas, semicolons or tabs.
        id_column, column: names of the columns.

    Raises:
        UserError: if the file or a column is missing or empty, or a parcel has two values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path} cannot be read ({error}); expected a CSV file in UTF-8.") from error
    header = text.partition("\n")[0]
    rows = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=header.count))
    for which, name in (("--id_column", id_column), (column_flag, column)):
        if name not in (rows.fieldnames or []):
            raise UserError(
                f"{flag} {path} has no column {name!r}; it has {', '.join(rows.fieldnames or ['none'])}: "
                f"name one with {which}."
            )
    values: dict[str, str] = {}
    for row in rows:
        parcel, value = (row[id_column] or "").strip(), (row[column] or "").strip()
        if value and values.setdefault(parcel, value) != value:
            raise UserError(
                f"{flag} {path}: parcel {parcel} has {values[parcel]!r} and {value!r} in column {column!r}; leave one."
            )
    if not values:
        raise UserError(f"{flag} {path} has nothing in column {column!r}; name another with {column_flag}.")
    return values


def read_info(folder: Path) -> dict[str, Any]:
    """META/info.json: what is known of the pixels, {"nodata": ..., "bands": [...], ...}; empty without the file."""
    path = folder / "META" / "info.json"
    if not path.exists():
        return {}
    info = read_json(path, _INFO)
    if not isinstance(info, dict):
        raise UserError(f"{path} is something else; expected {_INFO}.")
    for name in ("nodata", "units"):
        value = info.get(name)
        is_number = isinstance(value, int | float | None) and not isinstance(value, bool)
        if not is_number or (name == "units" and value is not None and not value > 0):
            raise UserError(f"{path}: {name} is {value!r}; expected {_INFO}.")
    return info


def read_units(folder: Path) -> float | None:
    """What a number of the pixels is in reflectance, by META/info.json; None if unknown."""
    units = read_info(folder).get("units")
    return None if units is None else float(units)


def check_norm(norm: Any, shape: tuple[int | None, int], source: str | Path = "norm") -> Arrays:
    """Mean and standard deviation as two float64 arrays that broadcast to `shape`, (L, C), or (None, C) without dates."""
    per_date = "" if shape[0] is None else f", or two ({shape[0]}, {shape[1]})"
    expected = f"expected two numbers, two arrays ({shape[1]},){per_date}: mean, standard deviation"
    try:
        mean, std = (np.asarray(values, dtype=np.float64) for values in norm)
    except (TypeError, ValueError):
        raise UserError(f"{source} is not a mean and a standard deviation; {expected}.") from None
    for values in (mean, std):
        if values.shape not in ((), (1,), shape[1:], shape):
            raise UserError(f"{source} contains an array of shape {values.shape}; {expected}.")
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise UserError(
            f"{source} contains a value that is not finite, or a standard deviation that is not above 0; {expected}."
        )
    return mean, std


def read_norm(path: str | Path, shape: tuple[int | None, int]) -> Arrays:
    """Mean and standard deviation from a pickle of two arrays."""
    try:
        return check_norm(load_arrays(path), shape, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected a pickled mean and standard deviation."
        ) from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
