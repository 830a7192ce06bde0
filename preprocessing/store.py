"""The packed store: all pixels of a dataset in one memory-mapped file, checked once and read as fast as memory allows.

A dataset folder has one file per parcel, (T, C, S). Training reads a random subset of the pixels of random parcels,
so the store keeps pixels together, (pixels, T, C), in the type of the files; a batch is then one gather of rows.
"""

import copy
import hashlib
import io
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from learning.errors import UserError
from learning.files import write_bytes
from learning.progress import progress_bar

FORMAT = 2  # part of every store's name: raise it when the layout changes
_CHUNK = 2**24  # numbers that statistics take at a time


class PixelStore:
    """The pixels of all parcels of a dataset folder.

    Attributes:
        ids: parcel ids in increasing order, (N,) int64.
        offsets: the pixels of parcel i are rows offsets[i]:offsets[i + 1], (N + 1,).
        n_dates, n_channels: T and C.

    Args:
        path: folder that `open_store` wrote.
        in_memory: whether to read all pixels now; otherwise the file is memory-mapped.
    """

    def __init__(self, path: Path, in_memory: bool = False) -> None:
        self.path, self.in_memory = path, in_memory
        index = np.load(path / "index.npz")
        self.ids, self.offsets = index["ids"], index["offsets"]
        pixels = np.load(path / "pixels.npy", mmap_mode=None if in_memory else "r")
        _, self.n_dates, self.n_channels = pixels.shape
        self._rows = pixels.reshape(len(pixels), -1)
        self._on_device: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that does not fork opens the file; a copy of its content would be sent to it otherwise.
        return PixelStore, (self.path, self.in_memory)

    @property
    def sizes(self) -> np.ndarray:
        """Number of pixels of each parcel, (N,)."""
        return np.diff(self.offsets)

    @property
    def first_rows(self) -> np.ndarray:
        """Row of each parcel's first pixel, (N,); for a parcel without pixels a row of zeros, the store's last."""
        return np.where(self.sizes > 0, self.offsets[:-1], self.offsets[-1])

    @property
    def n_bytes(self) -> int:
        """Room that the pixels take."""
        return self._rows.nbytes

    def read(self, rows: Tensor, out: Tensor) -> None:
        """Reads the pixels at the given rows into `out`, (len(rows), T * C), of any floating type."""
        if self._on_device is None:
            out.copy_(torch.from_numpy(self._rows.take(rows.numpy(), axis=0)))
        elif self._rows.dtype == np.uint16:
            out.copy_(self._on_device.index_select(0, rows).int().bitwise_and_(0xFFFF))
        else:
            out.copy_(self._on_device.index_select(0, rows))

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

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation over all pixels per date and channel, two (T, C) float32 arrays.

        Computed in one pass with float64 sums about the first pixels' mean, and kept beside the pixels.
        """
        cached = self.path / "statistics.npz"
        if not cached.exists():
            n, step = int(self.offsets[-1]), max(1, _CHUNK // self._rows.shape[1])
            centre = self._rows[: min(step, n)].mean(0, dtype=np.float64)
            total, squares = np.zeros_like(centre), np.zeros_like(centre)
            for start in progress_bar(range(0, n, step), "mean and standard deviation", "chunks"):
                deviation = self._rows[start : min(start + step, n)] - centre
                total += deviation.sum(0)
                squares += np.einsum("ij,ij->j", deviation, deviation)
            variance = np.maximum(squares / n - (total / n) ** 2, 0)
            shape = self.n_dates, self.n_channels
            mean = (centre + total / n).reshape(shape).astype(np.float32)
            std = np.sqrt(variance).reshape(shape).astype(np.float32)
            buffer = io.BytesIO()
            np.savez(buffer, mean=mean, std=std)
            with suppress(OSError):  # the folder of somebody else may be read, not written
                write_bytes(cached, buffer.getvalue())
            return mean, std
        with np.load(cached) as arrays:
            return arrays["mean"], arrays["std"]


def open_store(
    folder: str | Path, cache_dir: str | Path | None = None, in_memory: bool = False
) -> PixelStore:
    """Opens the store of a dataset folder, packing the folder first if there is none or the folder has changed.

    Args:
        folder: dataset folder, with one DATA/<id>.npy of shape (T, C, S) per parcel.
        cache_dir: where to keep the store; beside DATA if not given.
        in_memory: whether to read all pixels into memory.

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
                    _pack(folder, files, path)
        except OSError as error:
            raise UserError(
                f"the packed copy of {folder} cannot be written in {parent} ({error.strerror or error}); "
                "make room there or choose another folder with --cache_dir."
            ) from error
    try:
        return PixelStore(path, in_memory)
    except MemoryError:
        raise UserError(f"the pixels of {folder} do not fit into memory; leave --preload out.") from None
    except Exception as error:  # damaged bytes can fail in any way
        raise UserError(
            f"the packed copy {path} is damaged ({error}); remove it, it is made again from the files of DATA."
        ) from error


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


def _pack(folder: Path, files: dict[int, os.stat_result], path: Path) -> None:
    """Checks every file and writes the store under a temporary name, renamed once complete."""
    for leftover in path.parent.glob(".PACKED-*"):  # of a packing that was killed; nobody else packs here now
        shutil.rmtree(leftover)
    names = {parcel: folder / "DATA" / f"{parcel}.npy" for parcel in files}
    headers = {
        parcel: _read_header(name) for parcel, name in progress_bar(names.items(), "checking files", "files")
    }
    T, C, _ = next(iter(headers.values()))[0]
    for parcel, (shape, _) in headers.items():
        if shape[:2] != (T, C):
            raise UserError(
                f"{names[parcel]} has {shape[0]} dates x {shape[1]} channels, but {next(iter(names.values()))} has "
                f"{T} x {C}; all parcels of a dataset must agree."
            )
    dtype = np.result_type(*{dtype for _, dtype in headers.values()}).newbyteorder("=")
    offsets = np.cumsum([0] + [shape[2] for shape, _ in headers.values()])
    if offsets[-1] == 0:
        raise UserError(f"no file in {folder / 'DATA'} contains a pixel.")
    needed = int(offsets[-1]) * T * C * dtype.itemsize
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"packing {folder} needs {needed / 1e9:.1f} GB in {path.parent}, where {free / 1e9:.1f} GB are free; "
            "make room there or choose another folder with --cache_dir."
        )
    temporary = Path(tempfile.mkdtemp(prefix=".PACKED-", dir=path.parent))
    try:
        shape = (int(offsets[-1]) + 1, T, C)  # the last one stays 0, see `first_rows`
        pixels = np.lib.format.open_memmap(temporary / "pixels.npy", mode="w+", dtype=dtype, shape=shape)
        for i, (parcel, name) in enumerate(progress_bar(names.items(), "packing files", "files")):
            values = _read_values(name, headers[parcel])
            pixels[offsets[i] : offsets[i + 1]] = values.transpose(2, 0, 1)
        pixels.flush()
        np.savez(temporary / "index.npz", ids=np.fromiter(names, np.int64), offsets=offsets)
        temporary.chmod(0o755)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for outdated in set(path.parent.glob("PACKED-*")) - {path}:
        shutil.rmtree(outdated, ignore_errors=True)


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
    if len(shape) != 3 or 0 in shape[:2]:
        raise UserError(f"{name} has shape {shape}; expected three axes: dates, channels, pixels.")
    expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if present < expected:
        raise UserError(
            f"{name} is truncated: expected {expected} bytes of values, found {present}; copy it again."
        )
    return shape, dtype


def _read_values(name: Path, header: Header) -> np.ndarray:
    """The values of a file whose header was read before."""
    try:
        values = np.load(name, allow_pickle=False)
    except (OSError, ValueError):
        values = None
    if values is None or (values.shape, values.dtype) != header:
        raise UserError(
            f"{name} changed or vanished while it was read; start again once the dataset is complete."
        )
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            finite = np.isfinite(values.astype(np.float32, copy=False))  # what the models compute with
        if not finite.all():
            date, channel, _ = np.argwhere(~finite)[0]
            raise UserError(
                f"{name} contains NaN, infinity or a number beyond 3e38 (first at date {date}, channel {channel}); "
                "fill the gap or leave the parcel out."
            )
    return values
