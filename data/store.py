"""The store of a dataset folder's pixels, read as fast as memory allows; `data/packing.py` writes it.

A dataset folder has one file per parcel, (L, C, S). Training reads a random subset of the pixels of random parcels,
so the store keeps pixels together, (S, L, C) parcel after parcel, in the type of the files; a batch is then a gather of
rows, a single one where all parcels have equally many dates. It is a copy of the files or, as PIXELS, in their place.

The pixels do not depend on which value means that one is missing. What does, is kept beside them for every such value:
which parcels are complete, and mean and deviation. Whoever reads a store holds a shared lock on it, and what somebody
reads is never removed.
"""

import copy
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from common.errors import UserError
from common.files import write_bytes
from common.progress import progress_bar
from data.metadata import PIXELS
from data.missing import find_missing, presence
from data.moments import Moments

try:
    import fcntl
except ImportError:  # on Windows, which does not remove files that are open
    fcntl = None

_CHUNK = 2**24  # numbers copied to a device at a time


class PixelStore:
    """The pixels of all parcels of a dataset folder.

    Attributes:
        ids: parcel ids in increasing order, (N,) int64.
        sizes: pixels S of each parcel, (N,).
        dates: dates L of each parcel, (N,).
        complete: whether no pixel of a parcel is missing on any date, (N,).
        observed: whether some pixel of a parcel is present on some date, (N,).
        n_dates: L where all parcels have the same, else None.
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
            first = index["first"] if "first" in index else None  # older stores have the order of the ids
        self._check_index()
        self.n_dates = int(self.dates[0]) if (self.dates == self.dates[0]).all() else None
        counts = self.sizes * self.dates * self.n_channels
        first, end = np.cumsum(counts) - counts if first is None else first, int(counts.sum())
        self._values = np.load(path / "pixels.npy", mmap_mode=None if in_memory else "r", allow_pickle=False)
        if self._values.shape != (end + int(self.dates.max()) * self.n_channels,):
            raise ValueError("pixels.npy does not hold what index.npz says")
        if first.shape != counts.shape or (first < 0).any() or (first + counts > end).any():
            raise ValueError("index.npz points beyond pixels.npy")
        self._state = _file_state(path / "pixels.npy")
        self._first = np.where(self.sizes > 0, first, end)
        if self.n_dates is not None:
            self._rows = self._values.reshape(-1, self.n_dates * self.n_channels)
            self._first_rows = torch.from_numpy(self._first // self._rows.shape[1])
        self._on_device: Tensor | None = None
        with _one_at_a_time(path / missing_file(nodata)):
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
        path = self.path / missing_file(self.nodata)
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
                complete[i], observed[i] = presence(
                    self.name(i), self.parcel(i).transpose(1, 2, 0), self.nodata
                )
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
    def sent_as(self) -> torch.dtype:
        """The type in which pixels go to a device: that of the files if it is small, else float32."""
        small = self._values.dtype.itemsize <= 2 and self._values.dtype.kind != "f"
        return torch.from_numpy(np.empty(0, self._values.dtype)).dtype if small else torch.float32

    @property
    def n_bytes(self) -> int:
        """Room that the pixels take."""
        return self._values.nbytes

    def locate(self, places: Tensor, pixels: Tensor) -> Tensor:
        """Where pixels begin, for `read`: (B, S), on the device of the store.

        Args:
            places: of the parcels in `ids`, (B,).
            pixels: which of each parcel's, (B, S); the first one of a parcel without pixels is 0 everywhere.
        """
        if self.n_dates is not None:
            return self._first_rows[places].unsqueeze(1) + pixels
        n_numbers = torch.from_numpy(self.dates[places.numpy()] * self.n_channels)
        return torch.from_numpy(self._first[places.numpy()]).unsqueeze(1) + pixels * n_numbers.unsqueeze(1)

    def read(self, begin: Tensor, n_dates: int) -> Tensor:
        """Reads pixels, in the type of the files, into the memory of the device of the store.

        Args:
            begin: from `locate`, (B, S).
            n_dates: how many dates L of each; those beyond a parcel's own are without meaning.

        Returns:
            (B, S, L, C).
        """
        if self._on_device is not None:
            values = self._on_device.index_select(0, begin.flatten()).view(self._dtype)
        elif self.n_dates is not None:
            values = torch.from_numpy(self._rows.take(begin.numpy(), axis=0))
        else:  # windows on all numbers, one beginning at each
            numbers, width = np.asarray(self._values), n_dates * self.n_channels
            shape, strides = (len(numbers) - width + 1, width), 2 * numbers.strides
            windows = np.ndarray(shape, numbers.dtype, numbers, strides=strides)
            values = torch.from_numpy(windows[begin.numpy()])
        values = values.view(*begin.shape, -1, self.n_channels)
        return values if values.shape[2] == n_dates else values[:, :, :n_dates]

    def parcel(self, place: int) -> np.ndarray:
        """The pixels of the parcel at a place in `ids`, (S, L, C), in the type of the files."""
        shape = self.sizes[place], self.dates[place], self.n_channels
        first, n_numbers = self._first[place], np.prod(shape)
        return np.asarray(self._values)[first : first + n_numbers].reshape(
            shape
        )  # a plain array: less overhead

    def name(self, place: int) -> Path:
        """What messages call the parcel at a place in `ids`."""
        parcel = self.ids[place]
        return Path(PIXELS, f"parcel {parcel}") if self.path.name == PIXELS else Path("DATA", f"{parcel}.npy")

    def look(
        self, place: int, rows: np.ndarray | slice = slice(None)
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The pixels of a parcel on some of its dates, (S, L, C), and which are missing, (S, L); None if none is."""
        pixels = self.parcel(place)[:, rows]
        return pixels, None if self.complete[place] else find_missing(pixels, self.nodata)

    def to(self, device: torch.device) -> "PixelStore":
        """The same store with its pixels in the memory of a device, where `read` then works."""
        view, rows = copy.copy(self), self._rows
        if rows.dtype.kind == "u" and rows.dtype.itemsize > 2:
            rows = rows.astype(np.float32)
        elif rows.dtype == np.uint16:
            rows = rows.view(np.int16)  # same bits: devices select rows of signed types only
        view._dtype = (
            torch.uint16 if self._rows.dtype == np.uint16 else torch.from_numpy(rows[:1].copy()).dtype
        )
        view._on_device = torch.empty(
            rows.shape, dtype=torch.from_numpy(rows[:1].copy()).dtype, device=device
        )
        view._first_rows = self._first_rows.to(device)
        step = max(1, _CHUNK // rows.shape[1])
        for start in progress_bar(range(0, len(rows), step), f"pixels to {device}", "chunks"):
            view._on_device[start : start + step] = torch.from_numpy(np.array(rows[start : start + step]))
        return view

    def statistics(self, per: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation over all pixels that are present, float32; kept beside the pixels.

        Args:
            per: "date", for two (L, C) where all parcels have equally many dates, or "channel" for two (C,).
        """
        cached = self.path / f"statistics-{per}-{_nodata_name(self.nodata)}.npz"
        with _one_at_a_time(cached):
            if not cached.exists():
                return self._compute_statistics(per, cached)
        with np.load(cached, allow_pickle=False) as arrays:
            return arrays["mean"], arrays["std"]

    def _compute_statistics(self, per: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
        moments = Moments(per)
        for i in progress_bar(range(len(self.ids)), "mean and standard deviation", "parcels"):
            pixels, missing = self.look(i)
            moments.add(pixels.transpose(1, 2, 0), None if missing is None else missing.T)
        mean, std = moments.result()
        _keep(path, mean=mean, std=std)
        return mean, std


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Lets processes that want a file one after the other to it, until it is there: the first one makes it for all.

    In the folder of somebody else, where none can be kept, each makes its own.
    """
    with ExitStack() as stack:
        if not path.exists():
            with suppress(OSError):
                stack.enter_context(FileLock(path.with_name(".lock")))
        yield


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


def remove_unless_read(path: Path) -> None:
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


def _nodata_name(nodata: float | None) -> str:
    """Part of the names of the files that depend on which value means missing."""
    return "nan" if nodata is None else f"{nodata:.17g}"


def missing_file(nodata: float | None) -> str:
    """Name of the file of `PixelStore.complete` and `PixelStore.observed`."""
    return f"missing-{_nodata_name(nodata)}.npz"
