"""Extra features of parcels, such as geometrical ones, in a JSON file of META."""

import reprlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import read_json
from data.metadata import Arrays

_EXTRA = "{parcel id: number or list of numbers}"


def read_extra_features(
    folder: Path, name: str, ids: np.ndarray, stats: Arrays | None = None
) -> tuple[np.ndarray, Arrays]:
    """Standardised features (parcels, F) from META/<name>.json, and the mean and deviation they were standardised with.

    The statistics are those of all parcels in the file (deviation with n - 1), unless given.
    """
    path = folder / "META" / f"{name}.json"
    remedy = "train with --geomfeat 0" if stats is None else "use a model that was trained with --geomfeat 0"
    values = read_json(path, f"{_EXTRA}; add it, or {remedy}")
    if not isinstance(values, dict):
        raise UserError(f"{path} is something else; expected {_EXTRA}.")
    missing = [parcel for parcel in map(str, ids.tolist()) if parcel not in values]
    if missing:
        raise UserError(
            f"{path} has no entry for parcel {missing[0]} ({len(missing)} missing in all); add it, or {remedy}."
        )
    everything, names = _stack_features(path, values), list(values)
    del values  # of many parcels they take much memory
    if stats is None:
        with np.errstate(over="ignore", invalid="ignore"):
            std = everything.std(0, ddof=1) if len(everything) > 1 else np.ones(everything.shape[1])
            stats = everything.mean(0), np.where(std > 0, std, 1)  # a feature that never varies says nothing
    mean, std = stats
    if len(mean) != everything.shape[1]:
        raise UserError(
            f"{path} has {everything.shape[1]} numbers per parcel, but the model was trained with {len(mean)}."
        )
    chosen, wanted = everything, list(map(str, ids.tolist()))
    if names != wanted:
        rows = dict(zip(names, range(len(names))))
        chosen = everything[[rows[parcel] for parcel in wanted]]
    del wanted
    with np.errstate(over="ignore", invalid="ignore"):
        found = (chosen - mean) / std
        fits = all(np.isfinite(np.asarray(each, np.float32)).all() for each in (found, mean, std))
    if not fits:
        row, column = np.unravel_index(np.abs(everything).argmax(), everything.shape)
        raise UserError(
            f"{path}: parcel {names[row]} has {everything[row, column]:g}, too large a number to standardise; correct "
            "it, or give the feature in another unit."
        )
    return found, stats


def _stack_features(path: Path, values: dict[str, Any]) -> np.ndarray:
    """Extra features of parcels, (parcels, F); raises a UserError that names one that has others."""
    with suppress(TypeError, ValueError, OverflowError):  # all at once, where nothing is wrong
        found = np.array(list(values.values()), np.float64)
        found = found[:, None] if found.ndim == 1 else found
        if found.ndim == 2 and found.shape[1] and np.isfinite(found).all():
            return found
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
    return np.stack(list(table.values()))


def _to_vector(value: Any) -> np.ndarray:
    """A finite number, or a list of such, as a vector; an empty one for anything else."""
    try:
        vector = np.atleast_1d(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError, OverflowError):
        return np.empty(0)
    return vector if vector.ndim == 1 and np.isfinite(vector).all() else np.empty(0)
