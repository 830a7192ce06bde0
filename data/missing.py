"""Which pixels are missing on which date, and values that no model can compute with."""

from pathlib import Path

import numpy as np

from common.errors import UserError


def find_missing(pixels: np.ndarray, nodata: float | None) -> np.ndarray | None:
    """Which pixels are missing on which date: NaN or `nodata` in all their channels.

    Args:
        pixels: with the channels last, (..., C).
        nodata: the value that means missing, besides NaN; None if there is none.

    Returns:
        Truth values (...); None if none is missing.
    """
    if nodata is not None and pixels.dtype.kind in "ui" and float(nodata).is_integer():
        nodata = int(nodata)  # or else all values would be converted to be compared

    def is_missing(values: np.ndarray) -> np.ndarray:
        found = values == nodata if nodata is not None else np.zeros(values.shape, bool)
        return found | np.isnan(values) if values.dtype.kind == "f" else found

    missing = is_missing(pixels[..., 0])  # the first channel tells of most that they are not
    places = np.flatnonzero(missing)
    if not len(places):
        return None
    rows = pixels.reshape(-1, pixels.shape[-1]).take(places, axis=0)
    in_all = np.ones(len(rows), bool)
    for channel in range(1, rows.shape[1]):  # many times as fast as `all`, of few channels
        in_all &= is_missing(rows[:, channel])
    missing.reshape(-1)[places] = in_all
    return missing if in_all.any() else None


def presence(name: Path, values: np.ndarray, nodata: float | None) -> tuple[bool, bool]:
    """Whether no pixel of a parcel (L, C, S) is missing on any date, and whether some pixel is present on some date.

    Raises:
        UserError: naming the file, if it holds values that no model can compute with.
    """
    check_values(name, values, nodata)
    missing = find_missing(values.transpose(2, 0, 1), nodata)
    return (True, values.shape[2] > 0) if missing is None else (False, not missing.all())


def check_values(name: Path, values: np.ndarray, nodata: float | None) -> None:
    """Raises a UserError if a parcel (L, C, S) holds infinity, or pixels that are NaN in some channels only."""
    if values.dtype.kind != "f":
        return
    with np.errstate(over="ignore"):
        infinite = np.isinf(values.astype(np.float32, copy=False))  # what the models compute with
    if nodata is not None:
        infinite &= values != nodata
    if infinite.any():
        date, channel, _ = np.argwhere(infinite)[0]
        raise UserError(
            f"{name} contains infinity or a number beyond 3e38 (first at date {date}, channel {channel}); write NaN "
            "in all channels of a pixel that is missing on a date."
        )
    undefined = np.isnan(values)
    partly = undefined.any(1) != undefined.all(1)
    if partly.any():
        date, pixel = np.argwhere(partly)[0]
        raise UserError(
            f"{name} has a pixel that is NaN in some of its channels only (date {date}, pixel {pixel}); write NaN in "
            "all channels of a pixel that is missing on a date, or leave the channel out."
        )
