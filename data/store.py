"""The packed store: all pixels of a dataset in one memory-mapped file, checked once and read as fast as memory allows.

A dataset folder has one file per parcel, (T, C, S). Training reads a random subset of the pixels of random parcels,
so the store keeps pixels together, (S, T, C) parcel after parcel, in the type of the files; a batch is then a gather of
rows, a single one where all parcels have equally many dates.

The pixels do not depend on which value means that one is missing. What does, is kept beside them for every such value:
which parcels are complete, and mean and deviation. Whoever reads a store holds a shared lock on it, and what somebody
reads is never removed.
"""

import copy
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from common.errors import UserError
from common.files import write_bytes
from common.progress import progress_bar
from data.moments import Moments

try:
    import fcntl
except ImportError:  # on Windows, which does not remove files that are open
    fcntl = None

FORMAT = 4  # part of every store's name: raise it when the layout changes
_CHUNK = 2**24  # numbers copied to a device at a time


def find_missing(values: np.ndarray, nodata: float | None) -> np.ndarray | None:
    """Which pixels of values (T, C, S) are missing on which date, (T, S): NaN or `nodata` in all their channels.

    None if there are none.

    Raises:
        ValueError: if a pixel is NaN in some of its channels only.
    """
    missing = np.zeros(values.shape, bool)
    if values.dtype.kind == "f":
        missing = np.isnan(values)
        if (missing.any(1) != missing.all(1)).any():
            date, pixel = np.argwhere(missing.any(1) != missing.all(1))[0]
            raise ValueError(f"date {date}, pixel {pixel}")
    if nodata is not None:
        missing |= values == nodata
    missing = missing.all(1)
    return missing if missing.any() else None


class PixelStore:
    """The pixels of all parcels of a dataset folder.

    Attributes:
        ids: parcel ids in increasing order, (N,) int64.
        sizes: pixels S of each parcel, (N,).
        dates: dates T of each parcel, (N,).
        complete: whether no pixel of a parcel is missing on any date, (N,).
        observed: whether some pixel of a parcel is present on some date, (N,).
        n_dates: T where all parcels have the same, else None.
        n_channels: C.

    Args:
        path: folder that `open_store` wrote.
        in_memory: whether to read all pixels now; otherwise the file is memory-mapped.
        nodata: value that, in all channels of a pixel, says that it is missing on a date, as NaN does.
    """

    def __init__(self, path: Path, in_memory: bool = False, nodata: float | None = None) -> None:
        self.path, self.in_memory, self.nodata = path, in_memory, nodata
        self._lock = _Hold(path)
        with np.load(path / "index.npz", allow_pickle=False) as index:
            self.ids, self.sizes, self.dates = index["ids"], index["sizes"], index["dates"]
            self.n_channels = int(index["n_channels"])
        self._check_index()
        self.n_dates = int(self.dates[0]) if (self.dates == self.dates[0]).all() else None
        self._first = np.concatenate([[0], np.cumsum(self.sizes * self.dates * self.n_channels)])
        self._values = np.load(path / "pixels.npy", mmap_mode=None if in_memory else "r", allow_pickle=False)
        if self._values.shape != (self._first[-1] + max(self.dates) * self.n_channels,):
            raise ValueError("pixels.npy does not hold what index.npz says")
        self._state = _file_state(path / "pixels.npy")
        if self.n_dates is not None:
            self._rows = self._values.reshape(-1, self.n_dates * self.n_channels)
        self._on_device: Tensor | None = None
        self.complete, self.observed = self._find_missing()

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that does not fork opens the file; a copy of its content would be sent to it otherwise.
        return PixelStore, (self.path, self.in_memory, self.nodata)

    def _check_index(self) -> None:
        """Raises a ValueError if the index is damaged."""
        columns = self.ids, self.sizes, self.dates
        kinds = [getattr(values, "dtype", np.dtype("O")).kind for values in columns]
        if kinds != ["i", "i", "i"] or {values.shape for values in columns} != {(len(self.ids),)}:
            raise ValueError("index.npz does not hold three columns of numbers")
        if (
            (np.diff(self.ids) <= 0).any()
            or (self.ids < 0).any()
            or (self.sizes < 0).any()
            or (self.dates < 1).any()
        ):
            raise ValueError("index.npz holds impossible numbers")

    def _find_missing(self) -> tuple[np.ndarray, np.ndarray]:
        """`complete` and `observed`: as kept beside the pixels, else by looking at all of them.

        Raises:
            UserError: if a parcel holds values that no model can compute with.
        """
        path = self.path / _missing_file(self.nodata)
        if path.exists():
            with np.load(path, allow_pickle=False) as found:
                complete, observed = found["complete"], found["observed"]
            if {complete.shape, observed.shape} != {self.ids.shape} or {complete.dtype, observed.dtype} != {
                np.dtype(bool)
            }:
                raise ValueError(f"{path.name} does not hold two columns of truth values")
            return complete, observed
        complete, observed = np.ones(len(self.ids), bool), self.sizes > 0
        if self._values.dtype.kind == "f" or self.nodata is not None:
            for i in progress_bar(range(len(self.ids)), "looking for missing pixels", "parcels"):
                name, values = Path("DATA", f"{self.ids[i]}.npy"), self.parcel(i).transpose(1, 2, 0)
                complete[i], observed[i] = _presence(name, values, self.nodata)
            _keep(path, complete=complete, observed=observed)
        return complete, observed

    def check_unchanged(self) -> None:
        """Raises a UserError if the file was changed or removed after it was opened; see `_file_state`."""
        if not self.in_memory and _file_state(self.path / "pixels.npy") != self._state:
            raise UserError(
                f"{self.path / 'pixels.npy'} was changed or removed while it was read; leave the dataset folder alone "
                "and start again, training with --resume."
            )

    @property
    def first_rows(self) -> np.ndarray:
        """Row of each parcel's first pixel, (N,); for a parcel without pixels a row of zeros, the store's last."""
        rows = np.concatenate([[0], np.cumsum(self.sizes)])
        return np.where(self.sizes > 0, rows[:-1], rows[-1])

    @property
    def n_bytes(self) -> int:
        """Room that the pixels take."""
        return self._values.nbytes

    def read(self, rows: Tensor, out: Tensor) -> None:
        """Reads the pixels at the given rows into `out`, (len(rows), T * C), of any floating type.

        For stores whose parcels have equally many dates; rows count the pixels of all parcels.
        """
        if self._on_device is None:
            out.copy_(torch.from_numpy(self._rows.take(rows.numpy(), axis=0)))
        elif self._rows.dtype == np.uint16:
            out.copy_(self._on_device.index_select(0, rows).int().bitwise_and_(0xFFFF))
        else:
            out.copy_(self._on_device.index_select(0, rows))

    def parcel(self, place: int) -> np.ndarray:
        """The pixels of the parcel at a place in `ids`, (S, T, C), in the type of the files."""
        values = np.asarray(self._values)[
            self._first[place] : self._first[place + 1]
        ]  # a plain array: less overhead
        return values.reshape(self.sizes[place], self.dates[place], self.n_channels)

    def to(self, device: torch.device) -> "PixelStore":
        """The same store with its pixels in the memory of a device, where `read` then works."""
        view = copy.copy(self)
        if self._rows.dtype == np.uint16:
            rows = self._rows.view(np.int16)  # same bits: devices select rows of signed types only
        elif self._rows.dtype.kind == "u" and self._rows.dtype.itemsize > 1:
            rows = self._rows.astype(np.float32)
        else:
            rows = self._rows
        view._on_device = torch.empty(
            rows.shape, dtype=torch.from_numpy(rows[:1].copy()).dtype, device=device
        )
        step = max(1, _CHUNK // rows.shape[1])
        for start in progress_bar(range(0, len(rows), step), f"pixels to {device}", "chunks"):
            view._on_device[start : start + step] = torch.from_numpy(np.array(rows[start : start + step]))
        return view

    def statistics(self, per: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation over all pixels that are present, float32; kept beside the pixels.

        Args:
            per: "date", for two (T, C) where all parcels have equally many dates, or "channel" for two (C,).
        """
        cached = self.path / f"statistics-{per}-{_nodata_name(self.nodata)}.npz"
        if not cached.exists():
            moments = Moments(per)
            for i in progress_bar(range(len(self.ids)), "mean and standard deviation", "parcels"):
                values = self.parcel(i).transpose(1, 2, 0)
                moments.add(values, None if self.complete[i] else find_missing(values, self.nodata))
            mean, std = moments.result()
            _keep(cached, mean=mean, std=std)
            return mean, std
        with np.load(cached, allow_pickle=False) as arrays:
            return arrays["mean"], arrays["std"]


def open_store(
    folder: str | Path,
    cache_dir: str | Path | None = None,
    in_memory: bool = False,
    nodata: float | None = None,
    n_dates: int | Mapping[int, int] | None = None,
) -> PixelStore:
    """Opens the store of a dataset folder, packing the folder first if there is none or the folder has changed.

    Args:
        folder: dataset folder, with one DATA/<id>.npy of shape (T, C, S), or (T, C), per parcel.
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
                    _pack(folder, files, path, nodata, n_dates)
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


class _Hold:
    """A shared lock on a store, held until this object is gone in this process and in those forked from it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path / "index.npz", os.O_RDONLY)
        if fcntl is not None:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(self.descriptor, fcntl.LOCK_SH)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _remove_unless_read(path: Path) -> None:
    """Removes a store that nobody has open."""
    try:
        with open(path / "index.npz", "rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
    except FileNotFoundError:  # it never was complete
        shutil.rmtree(path, ignore_errors=True)
    except OSError:  # somebody reads it, or there are no locks to tell
        pass


def _keep(path: Path, **arrays: np.ndarray) -> None:
    """Keeps arrays in a file beside the pixels, if it can be written: the folder of somebody else may be read only."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with suppress(OSError, UserError):
        write_bytes(path, buffer.getvalue())


def _file_state(path: Path) -> tuple[int, ...] | None:
    """What changes with a file; reading a memory-mapped one that became shorter would end the process at once."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


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
    folder: Path,
    files: dict[int, os.stat_result],
    path: Path,
    nodata: float | None,
    n_dates: int | Mapping[int, int] | None,
) -> None:
    """Checks every file and writes the store under a temporary name, renamed once complete."""
    for leftover in path.parent.glob(".PACKED-*"):  # of a packing that was killed; nobody else packs here now
        shutil.rmtree(leftover)
    names = {parcel: folder / "DATA" / f"{parcel}.npy" for parcel in files}
    headers = {
        parcel: _read_header(name) for parcel, name in progress_bar(names.items(), "checking files", "files")
    }
    dtype = np.result_type(*{dtype for _, dtype in headers.values()}).newbyteorder("=")
    dates, channels, sizes = np.array([shape for shape, _ in headers.values()], np.int64).T
    if (channels != channels[0]).any():
        parcels = list(names)
        other = parcels[int(np.argmax(channels != channels[0]))]
        raise UserError(
            f"{names[other]} has {headers[other][0][1]} channels, but {names[parcels[0]]} has {channels[0]}; all parcels "
            "of a dataset must agree."
        )
    _check_dates(folder, np.fromiter(names, np.int64), dates, n_dates)
    first = np.concatenate([[0], np.cumsum(dates * channels * sizes)])
    if first[-1] == 0:
        raise UserError(f"no file in {folder / 'DATA'} contains a pixel.")
    needed = int(first[-1]) * dtype.itemsize
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"packing {folder} needs {needed / 1e9:.1f} GB in {path.parent}, where {free / 1e9:.1f} GB are free; "
            "make room there or choose another folder with --cache_dir."
        )
    complete, observed = np.ones(len(names), bool), sizes > 0
    temporary = Path(tempfile.mkdtemp(prefix=".PACKED-", dir=path.parent))
    try:
        # A last pixel stays 0, see `first_rows`.
        shape = (int(first[-1]) + int(dates.max()) * int(channels[0]),)
        pixels = np.lib.format.open_memmap(temporary / "pixels.npy", mode="w+", dtype=dtype, shape=shape)
        _reserve(temporary / "pixels.npy")
        for i, (parcel, name) in enumerate(progress_bar(names.items(), "packing files", "files")):
            values = _read_values(name, headers[parcel])
            pixels[first[i] : first[i + 1]] = values.transpose(2, 0, 1).reshape(-1)
            complete[i], observed[i] = _presence(name, values, nodata)
        pixels.flush()
        np.savez(
            temporary / "index.npz",
            ids=np.fromiter(names, np.int64),
            sizes=sizes,
            dates=dates,
            n_channels=channels[0],
        )
        np.savez(temporary / _missing_file(nodata), complete=complete, observed=observed)
        temporary.chmod(0o755)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for outdated in set(path.parent.glob("PACKED-*")) - {path}:
        _remove_unless_read(outdated)


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


Header = tuple[tuple[int, int, int], np.dtype]
_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _read_header(name: Path) -> Header:
    """Shape (T, C, S) and type of a parcel's file, without its values."""
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


def _read_values(name: Path, header: Header) -> np.ndarray:
    """The values of a file whose header was read before."""
    try:
        values = np.load(name, allow_pickle=False)
    except (OSError, ValueError):
        values = None
    if values is None or ((*values.shape, 1)[:3], values.dtype) != header:
        raise UserError(
            f"{name} changed or vanished while it was read; start again once the dataset is complete."
        )
    return values.reshape(header[0])


def _nodata_name(nodata: float | None) -> str:
    """Part of the names of the files that depend on which value means missing."""
    return "nan" if nodata is None else f"{nodata:.17g}"


def _missing_file(nodata: float | None) -> str:
    """Name of the file of `PixelStore.complete` and `PixelStore.observed`."""
    return f"missing-{_nodata_name(nodata)}.npz"


def _presence(name: Path, values: np.ndarray, nodata: float | None) -> tuple[bool, bool]:
    """Whether no pixel of a parcel (T, C, S) is missing on any date, and whether some pixel is present on some date."""
    missing = _check_values(name, values, nodata)
    return (True, values.shape[2] > 0) if missing is None else (False, not missing.all())


def _check_values(name: Path, values: np.ndarray, nodata: float | None) -> np.ndarray | None:
    """`find_missing`, after a look for values that no model can compute with."""
    if values.dtype.kind == "f":
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
    try:
        return find_missing(values, nodata)
    except ValueError as error:
        raise UserError(
            f"{name} has a pixel that is NaN in some of its channels only ({error}); write NaN in all channels of a "
            "pixel that is missing on a date, or leave the channel out."
        ) from error
