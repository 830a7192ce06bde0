"""Packs a dataset folder: every file of DATA is checked once, and all pixels go to one file that `data/store.py` reads."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from common.errors import UserError
from common.progress import progress_bar
from data.missing import presence
from data.store import PixelStore, missing_file, remove_unless_read

FORMAT = 4  # part of every store's name: raise it when the layout changes


def open_store(
    folder: str | Path,
    cache_dir: str | Path | None = None,
    in_memory: bool = False,
    nodata: float | None = None,
    n_dates: int | Mapping[int, int] | None = None,
) -> PixelStore:
    """Opens the store of a dataset folder, packing the folder first if there is none or the folder has changed.

    Args:
        folder: dataset folder, with one DATA/<id>.npy of shape (L, C, S), or (L, C), per parcel.
        cache_dir: where to keep the store; beside DATA if not given.
        in_memory: whether to read all pixels into memory.
        nodata: value that, in all channels of a pixel, says that it is missing on a date, as NaN does.
        n_dates: dates that each parcel must have, for all or by id; None to ask for no number.

    Raises:
        UserError: if the folder or one of its files is not as expected, or the store cannot be written.
    """
    folder = Path(folder)
    files = _list_files(folder)
    parent = folder
    if cache_dir is not None:  # several datasets may share it
        whose = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        parent = Path(cache_dir) / f"{folder.resolve().name}-{whose}"
    path = parent / f"PACKED-{_fingerprint(files)}"
    if not path.exists():
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with FileLock(parent / ".PACKED.lock"):  # one process packs, others wait for it
                if not path.exists():
                    _pack(folder, list(files), path, nodata, n_dates)
        except OSError as error:
            raise UserError(
                f"the packed copy of {folder} cannot be written in {parent} ({error.strerror or error}); "
                "make room there or choose another folder with --cache_dir."
            ) from error
    try:
        store = PixelStore(path, in_memory, nodata)
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"the pixels of {folder} do not fit into memory; leave --preload out.") from None
    except Exception as error:  # damaged bytes can fail in any way
        raise UserError(
            f"the packed copy {path} is damaged ({error}); remove it, it is made again from the files of DATA."
        ) from error
    _check_dates(folder, store.ids, store.dates, n_dates)
    if not store.observed.any():
        meaning = (
            "NaN means missing" if nodata is None else f"NaN and, as --nodata says, {nodata:g} mean missing"
        )
        raise UserError(f"no pixel of {folder} is present on any date; {meaning}.")
    return store


def list_parcels(folder: Path) -> list[int]:
    """Ids of the parcels of a dataset folder, in increasing order."""
    return list(_list_files(folder))


def check_folder(folder: Path) -> None:
    """Raises a UserError unless the folder is there and contains DATA."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a dataset folder that contains DATA and META.")
    if not (folder / "DATA").is_dir():
        raise UserError(f"{folder} contains no folder DATA; expected one file DATA/<id>.npy per parcel.")


def _list_files(folder: Path) -> dict[int, os.stat_result]:
    """Size and time of every DATA/<id>.npy by id, in increasing order."""
    check_folder(folder)
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


def _fingerprint(files: dict[int, os.stat_result]) -> str:
    """Changes whenever a file of DATA is added, removed or written."""
    digest = hashlib.sha256(f"format {FORMAT}\n".encode())
    for parcel, stat in files.items():
        digest.update(f"{parcel} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _pack(
    folder: Path, ids: list[int], path: Path, nodata: float | None, n_dates: int | Mapping[int, int] | None
) -> None:
    """Checks every file and writes the store under a temporary name, renamed once complete."""
    for leftover in path.parent.glob(".PACKED-*"):  # of a packing that was killed; nobody else packs here now
        shutil.rmtree(leftover)
    files = read_headers(folder, ids)
    dates, (n_channels, *_), sizes = files.shapes.T
    _check_dates(folder, files.ids, dates, n_dates)
    dtype = np.result_type(*set(files.dtypes)).newbyteorder("=")
    first = np.concatenate([[0], np.cumsum(files.shapes.prod(1))])
    needed = int(first[-1]) * dtype.itemsize
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"packing {folder} needs {needed / 1e9:.1f} GB in {path.parent}, where {free / 1e9:.1f} GB are free; "
            "make room there or choose another folder with --cache_dir."
        )
    complete, observed = np.ones(len(sizes), bool), sizes > 0
    temporary = Path(tempfile.mkdtemp(prefix=".PACKED-", dir=path.parent))
    try:
        # A last pixel stays 0: that of parcels without any.
        shape = (int(first[-1]) + int(dates.max()) * int(n_channels),)
        pixels = np.lib.format.open_memmap(temporary / "pixels.npy", mode="w+", dtype=dtype, shape=shape)
        _reserve(temporary / "pixels.npy")
        for i, name in enumerate(progress_bar(files.paths, "packing files", "files")):
            values = files.read(i)
            pixels[first[i] : first[i + 1]] = values.transpose(2, 0, 1).reshape(-1)
            complete[i], observed[i] = presence(name, values, nodata)
        pixels.flush()
        np.savez(temporary / "index.npz", ids=files.ids, sizes=sizes, dates=dates, n_channels=n_channels)
        np.savez(temporary / missing_file(nodata), complete=complete, observed=observed)
        temporary.chmod(0o755)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for outdated in set(path.parent.glob("PACKED-*")) - {path}:
        remove_unless_read(outdated)


def _check_dates(
    folder: Path, ids: np.ndarray, found: np.ndarray, n_dates: int | Mapping[int, int] | None
) -> None:
    """Raises a UserError unless every parcel has as many dates as `n_dates` says."""
    if n_dates is None:
        return
    expected = np.array([n_dates[i] for i in ids.tolist()]) if isinstance(n_dates, Mapping) else n_dates
    if (wrong := found != expected).any():
        i = int(np.argmax(wrong))
        listed = f"{expected[i]} dates for it" if isinstance(n_dates, Mapping) else f"{n_dates} dates"
        raise UserError(
            f"{folder / 'DATA' / f'{ids[i]}.npy'} has {found[i]} dates, but {folder / 'META' / 'dates.json'} lists {listed}; "
            "they must agree."
        )


def _reserve(path: Path) -> None:
    """Takes all the room of a file now: without any left, writing to a memory-mapped one would end the process."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


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

    def read(self, i: int) -> np.ndarray:
        """The pixels of a parcel, (L, C, S), whose header was read before."""
        try:
            values = np.load(self.paths[i], allow_pickle=False)
        except (OSError, ValueError):
            values = None
        shape = tuple(self.shapes[i].tolist())
        if values is None or ((*values.shape, 1)[:3], values.dtype) != (shape, self.dtypes[i]):
            raise UserError(
                f"{self.paths[i]} changed or vanished while it was read; start again once the dataset is complete."
            )
        return values.reshape(shape)


def read_headers(folder: Path, ids: list[int] | None = None) -> Files:
    """What the headers of the files of these parcels say; without ids, of all that DATA has.

    Raises:
        UserError: if a file holds no pixels by date and channel, their channels differ, or no file has a pixel.
    """
    ids = list_parcels(folder) if ids is None else ids
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
