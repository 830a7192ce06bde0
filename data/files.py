"""The files of a dataset folder's DATA: one per parcel, listed, their headers checked, read."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from common.progress import progress_bar


def list_files(folder: Path) -> dict[int, os.stat_result]:
    """Size and time of every DATA/<id>.npy by id, in increasing order."""
    files = {}
    with os.scandir(folder / "DATA") as entries:
        for entry in entries:
            name, suffix = os.path.splitext(entry.name)
            if suffix != ".npy" or name.startswith("."):
                continue
            if not (name.isascii() and name.isdigit() and str(int(name)) == name and int(name) < 2**63):
                raise UserError(
                    f"{entry.path}: a parcel's file is named by its id, a whole number such as 17.npy."
                )
            try:
                files[int(name)] = entry.stat()
            except OSError as error:  # such as a link that leads nowhere
                raise UserError(f"{entry.path} cannot be read ({error.strerror}).") from error
    if not files:
        raise UserError(f"{folder / 'DATA'} contains no .npy file; expected one <id>.npy per parcel.")
    return dict(sorted(files.items()))


class Files(NamedTuple):
    """The files of DATA as their headers describe them, in the order of ids.

    Attributes:
        ids: of the parcels, (N,) int64.
        paths: N.
        shapes: dates, channels and pixels of each, (N, 3) int64.
        dtypes: N.
    """

    ids: np.ndarray
    paths: list[Path]
    shapes: np.ndarray
    dtypes: list[np.dtype]

    @property
    def dates(self) -> np.ndarray:
        """Dates L of each parcel, (N,)."""
        return self.shapes[:, 0]

    @property
    def sizes(self) -> np.ndarray:
        """Pixels S of each parcel, (N,)."""
        return self.shapes[:, 2]

    def name(self, i: int) -> Path:
        """What messages call a parcel."""
        return self.paths[i]

    def parcel(self, i: int) -> np.ndarray:
        """The pixels of a parcel, (S, L, C), whose header was read before."""
        try:
            values = np.load(self.paths[i], allow_pickle=False)
        except (OSError, ValueError):
            values = None
        shape = tuple(self.shapes[i].tolist())
        if values is None or ((*values.shape, 1)[:3], values.dtype) != (shape, self.dtypes[i]):
            raise UserError(
                f"{self.paths[i]} changed or vanished while it was read; start again once the dataset is complete."
            )
        return values.reshape(shape).transpose(2, 0, 1)


def read_headers(folder: Path, ids: list[int] | None = None) -> Files:
    """What the headers of the files of these parcels say; without ids, of all that DATA has.

    Raises:
        UserError: if a file holds no pixels by date and channel, their channels differ, or no file has a pixel.
    """
    ids = list(list_files(folder)) if ids is None else ids
    paths = [folder / "DATA" / f"{parcel}.npy" for parcel in ids]
    headers = [_read_header(path) for path in progress_bar(paths, "checking files", "files")]
    shapes, dtypes = np.array([shape for shape, _ in headers], np.int64), [dtype for _, dtype in headers]
    channels = shapes[:, 1]
    if (channels != channels[0]).any():
        other = int(np.argmax(channels != channels[0]))
        raise UserError(
            f"{paths[other]} has {channels[other]} channels, but {paths[0]} has {channels[0]}; all parcels of a dataset "
            "must agree."
        )
    if not shapes[:, 2].any():
        raise UserError(f"no file in {folder / 'DATA'} contains a pixel.")
    return Files(np.array(ids, np.int64), paths, shapes, dtypes)


_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _read_header(name: Path) -> tuple[tuple[int, int, int], np.dtype]:
    """Shape (L, C, S) and type of a parcel's file, without its values."""
    try:
        with open(name, "rb") as file:
            shape, _, dtype = _HEADER_READERS[np.lib.format.read_magic(file)](file)
            present = os.fstat(file.fileno()).st_size - file.tell()
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}).") from error
    except Exception as error:  # a damaged header can fail in any way
        raise UserError(
            f"{name} is not a NumPy array file, or its beginning is damaged; write it again with numpy.save."
        ) from error
    if dtype.kind not in "uifb" or dtype.itemsize > 8:
        raise UserError(
            f"{name} holds values of type {dtype}; expected numbers, integers or floats of at most 64 bits."
        )
    if len(shape) not in (2, 3) or 0 in shape[:2]:
        raise UserError(
            f"{name} has shape {shape}; expected three axes: dates, channels, pixels (or two, for a single pixel)."
        )
    expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if present < expected:
        raise UserError(
            f"{name} is truncated: expected {expected} bytes of values, found {present}; copy it again."
        )
    return (*shape, 1)[:3], dtype
