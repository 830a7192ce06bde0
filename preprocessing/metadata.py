"""What stands beside the pixels in a dataset folder: labels, dates, extra features, mean and standard deviation."""

import reprlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from learning.errors import UserError
from learning.files import read_json
from learning.safe_pickle import load_arrays

Arrays = tuple[np.ndarray, np.ndarray]
_LABELS = "{nomenclature: {parcel id: label}}"
_DATES = '{"0": YYYYMMDD, "1": YYYYMMDD, ...}'
_EXTRA = "{parcel id: number or list of numbers}"


def read_nomenclatures(folder: Path) -> dict[str, dict[str, Any]]:
    """All of META/labels.json, {nomenclature: {parcel id: label}}."""
    path = folder / "META" / "labels.json"
    nomenclatures = read_json(path, _LABELS)
    if not isinstance(nomenclatures, dict) or not all(
        isinstance(labels, dict) for labels in nomenclatures.values()
    ):
        raise UserError(f"{path} is something else; expected {_LABELS}.")
    return nomenclatures


def read_nomenclature(folder: Path, name: str) -> dict[str, int]:
    """Labels by parcel id in one nomenclature of META/labels.json."""
    path = folder / "META" / "labels.json"
    nomenclatures = read_nomenclatures(folder)
    if name not in nomenclatures:
        raise UserError(
            f"{path} has no nomenclature {name!r}; it has {', '.join(nomenclatures) or 'none'}: "
            "choose one with --labels."
        )
    for parcel, code in nomenclatures[name].items():
        if isinstance(code, bool) or not isinstance(code, int | None) or abs(code or 0) >= 2**63:
            raise UserError(
                f"parcel {parcel} has the label {code!r} in {path}; expected a whole number, without quotes or point."
            )
    return nomenclatures[name]


def read_date_positions(folder: Path) -> list[int]:
    """Days of the dates in META/dates.json, {"0": YYYYMMDD, ...}, since the first one."""
    path = folder / "META" / "dates.json"
    dates = read_json(path, _DATES)
    if not isinstance(dates, dict) or set(dates) != {str(i) for i in range(len(dates))}:
        raise UserError(f"{path} is something else; expected {_DATES}.")
    days = []
    for i in range(len(dates)):
        text = str(dates[str(i)])
        try:
            days.append(datetime.strptime(text if len(text) == 8 else "", "%Y%m%d"))
        except ValueError:
            raise UserError(
                f"{path}: date {i} is {dates[str(i)]!r}; expected a day as YYYYMMDD, such as 20170131."
            ) from None
    return [(day - days[0]).days for day in days]


def read_extra_features(
    folder: Path, name: str, pid: Sequence[str], stats: Arrays | None = None
) -> tuple[np.ndarray, Arrays]:
    """Standardised features (parcels, F) from META/<name>.json, and the mean and deviation they were standardised with.

    The statistics are those of all parcels in the file (deviation with n - 1), unless given.
    """
    path = folder / "META" / f"{name}.json"
    values = read_json(path, f"{_EXTRA}, or the flag --geomfeat 0")
    if not isinstance(values, dict):
        raise UserError(f"{path} is something else; expected {_EXTRA}.")
    missing = [parcel for parcel in pid if parcel not in values]
    if missing:
        raise UserError(
            f"{path} has no entry for parcel {missing[0]} ({len(missing)} missing in all); add it or train with --geomfeat 0."
        )
    table = {parcel: _to_vector(value) for parcel, value in values.items()}
    first, width = next((parcel, len(vector)) for parcel, vector in table.items())
    for parcel, vector in table.items():
        if not len(vector):
            raise UserError(
                f"{path}: parcel {parcel} has {reprlib.repr(values[parcel])}; expected a finite number or a list of such."
            )
        if len(vector) != width:
            raise UserError(
                f"{path}: parcel {parcel} has {len(vector)} number(s), parcel {first} has {width}; all must agree."
            )
    everything = np.stack(list(table.values()))
    if stats is None:
        std = everything.std(0, ddof=1) if len(everything) > 1 else np.ones(everything.shape[1])
        stats = everything.mean(0), np.where(std > 0, std, 1)  # a feature that never varies says nothing
    mean, std = stats
    if len(mean) != everything.shape[1]:
        raise UserError(
            f"{path} has {everything.shape[1]} numbers per parcel, but the model was trained with {len(mean)}."
        )
    return (np.stack([table[parcel] for parcel in pid]) - mean) / std, stats


def _to_vector(value: Any) -> np.ndarray:
    """A finite number, or a list of such, as a vector; an empty one for anything else."""
    try:
        vector = np.atleast_1d(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError, OverflowError):
        return np.empty(0)
    return vector if vector.ndim == 1 and np.isfinite(vector).all() else np.empty(0)


def check_norm(norm: Any, shape: tuple[int, int], source: str | Path = "norm") -> Arrays:
    """Mean and standard deviation as two float64 arrays that broadcast to `shape`, (T, C)."""
    expected = f"expected two numbers, two arrays ({shape[1]},), or two ({shape[0]}, {shape[1]}): mean, standard deviation"
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


def read_norm(path: str | Path, shape: tuple[int, int]) -> Arrays:
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
