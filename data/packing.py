"""Opens and writes the pixels of a dataset folder, which are files of DATA, or PIXELS.

Every file of DATA is checked once, and all pixels are packed into a store, which `data/store.py` reads. PIXELS is such
a store already. It is the original: nothing removes it or writes it again.
"""

import hashlib
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock

from common.errors import UserError, as_user_error
from common.files import read_json, write_json
from common.progress import progress_bar
from data.files import Files, list_files, read_headers
from data.metadata import DAYS, PIXELS
from data.missing import presence
from data.store import PixelStore, missing_file, remove_unless_read

FORMAT = 4  # part of the name of every copy of DATA: raise it when the layout changes
FORM, VERSION = "format.json", 1  # of PIXELS: raise the number when older code cannot read what is written
_HEADER = 128  # bytes of a file of pixels before the pixels
Add = Callable[..., None]


def open_store(
    folder: str | Path,
    cache_dir: str | Path | None = None,
    in_memory: bool = False,
    nodata: float | None = None,
    n_dates: int | np.ndarray | None = None,
) -> PixelStore:
    """Opens the store of a dataset folder, packing DATA first if there is none or files have changed.

    Args:
        folder: dataset folder, with PIXELS or with one DATA/<id>.npy of shape (L, C, S), or (L, C), per parcel.
        cache_dir: where to keep the store; beside DATA if not given.
        in_memory: whether to read all pixels into memory.
        nodata: value that, in all channels of a pixel, says that it is missing on a date, as NaN does.
        n_dates: dates that each parcel must have, for all or, (N,), in the order of ids; None to ask for no number.

    Raises:
        UserError: if the folder or one of its files is not as expected, or the store cannot be written.
    """
    folder = Path(folder)
    check_folder(folder)
    if is_packed(folder):
        path, remedy = folder / PIXELS, "copy it again"
    else:
        path = _packed_copy(folder, cache_dir, nodata, n_dates)
        remedy = "remove it, it is made again from the files of DATA"
    try:
        store = PixelStore(path, in_memory, nodata)
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"the pixels of {folder} do not fit into memory; leave --preload out.") from None
    except Exception as error:  # damaged bytes can fail in any way
        raise UserError(f"{path} is damaged ({error}); {remedy}.") from error
    _check_dates(folder, store, n_dates)
    if not store.observed.any():
        meaning = (
            "NaN means missing" if nodata is None else f"NaN and, as --nodata says, {nodata:g} mean missing"
        )
        raise UserError(f"no pixel of {folder} is present on any date; {meaning}.")
    return store


def _packed_copy(
    folder: Path,
    cache_dir: str | Path | None,
    nodata: float | None,
    n_dates: int | np.ndarray | None,
) -> Path:
    """The store of the files of DATA as they are now, made if it is not there."""
    files = list_files(folder)
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
    return path


def list_parcels(folder: Path) -> list[int]:
    """Ids of the parcels of a dataset folder, in increasing order."""
    check_folder(folder)
    if not is_packed(folder):
        return list(list_files(folder))
    path = folder / PIXELS / "index.npz"
    with as_user_error(Exception, prefix=f"{path} is damaged; copy it again: "), np.load(path) as index:
        return index["ids"].tolist()


def is_packed(folder: Path) -> bool:
    """Whether the pixels of a dataset folder are in PIXELS."""
    return (folder / PIXELS).is_dir()


def check_folder(folder: Path) -> None:
    """Raises a UserError unless the folder is there and contains DATA, or PIXELS of a version that can be read."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a dataset folder that contains DATA and META.")
    has_files = (folder / "DATA").is_dir()
    if is_packed(folder) and has_files:
        raise UserError(
            f"{folder} contains both DATA and {PIXELS}, which hold the pixels each in a form of its own; remove one."
        )
    if is_packed(folder):
        path = folder / PIXELS / FORM
        content = read_json(path, f'{{"version": {VERSION}}}')
        version = content.get("version") if isinstance(content, dict) else None
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            raise UserError(
                f"{path} tells of version {version!r} of the format, but this program knows versions up to {VERSION}; "
                "use a later release of it."
            )
    elif not has_files:
        raise UserError(
            f"{folder} contains no folder DATA; expected one file DATA/<id>.npy per parcel, or {PIXELS}."
        )


def _fingerprint(files: dict[int, os.stat_result]) -> str:
    """Changes whenever a file of DATA is added, removed or written."""
    digest = hashlib.sha256(f"format {FORMAT}\n".encode())
    for parcel, stat in files.items():
        digest.update(f"{parcel} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _pack(
    folder: Path, ids: list[int], path: Path, nodata: float | None, n_dates: int | np.ndarray | None
) -> None:
    """Checks every file and writes the store under a temporary name, renamed once complete."""
    for leftover in path.parent.glob(".PACKED-*"):  # of a packing that was killed; nobody else packs here now
        shutil.rmtree(leftover)
    files = read_headers(folder, ids)
    _check_dates(folder, files, n_dates)
    dtype = np.result_type(*set(files.dtypes))
    needed = int(files.shapes.prod(1).sum()) * dtype.itemsize
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"packing {folder} needs {needed / 1e9:.1f} GB in {path.parent}, where {free / 1e9:.1f} GB are free; "
            "make room there or choose another folder with --cache_dir."
        )
    temporary = Path(tempfile.mkdtemp(prefix=".PACKED-", dir=path.parent))
    try:
        with _write_store(temporary, dtype, nodata) as add:
            for i in progress_bar(range(len(ids)), "packing files", "files"):
                add(ids[i], files.parcel(i).transpose(1, 2, 0), files.paths[i])
        temporary.chmod(0o755)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for outdated in set(path.parent.glob("PACKED-*")) - {path}:
        remove_unless_read(outdated)


@contextmanager
def write_pixels(folder: Path, packed: bool, dtype: np.dtype, nodata: float | None) -> Iterator[Add]:
    """Writes the pixels of a new dataset folder; what is given adds a parcel, id and pixels (L, C, S) or (L, C), in any order.

    Args:
        folder: the dataset folder.
        packed: whether to write PIXELS, which does not need a file for each parcel, and not DATA.
        dtype: of the pixels.
        nodata: value that, in all channels of a pixel, says that it is missing on a date, as NaN does.
    """
    place = folder / (PIXELS if packed else "DATA")
    place.mkdir(parents=True)
    if packed:
        with _write_store(place, dtype, nodata) as add:
            yield add
        write_json(place / FORM, {"version": VERSION})
    else:
        yield lambda parcel, values: np.save(place / f"{parcel}.npy", values)


@contextmanager
def _write_store(folder: Path, dtype: np.dtype, nodata: float | None) -> Iterator[Add]:
    """Writes a store into an empty folder as `write_pixels` does; no pixels are kept in memory."""
    dtype, rows, n_channels, n = dtype.newbyteorder("="), array("q"), 0, 0
    with open(folder / "pixels.npy", "wb", buffering=2**20) as file:
        file.write(bytes(_HEADER))  # the number of pixels is not known yet

        def add(parcel: int, values: np.ndarray, name: Path | None = None) -> None:
            nonlocal n_channels, n
            values = np.atleast_3d(values)
            n_dates, n_channels, size = values.shape
            present = presence(name or Path(f"parcel {parcel}"), values, nodata)
            rows.extend((parcel, size, n_dates, n, *present))
            file.write(np.ascontiguousarray(values.transpose(2, 0, 1), dtype))
            n += values.size

        yield add
        table = np.array(rows).reshape(-1, 6)
        ids, sizes, dates, first, complete, observed = table[np.argsort(table[:, 0])].T
        n_spare = int(dates.max()) * n_channels  # a last pixel is 0: that of parcels without any
        file.write(bytes(n_spare * dtype.itemsize))
        file.seek(0)
        form = {"descr": dtype.str, "fortran_order": False, "shape": (n + n_spare,)}
        np.lib.format.write_array_header_1_0(file, form)
        if file.tell() != _HEADER:
            raise ValueError("NumPy writes headers of another length")
    index = {"ids": ids, "sizes": sizes, "dates": dates, "n_channels": n_channels, "first": first}
    np.savez(folder / "index.npz", **index)
    np.savez(folder / missing_file(nodata), complete=complete > 0, observed=observed > 0)


def write_days(folder: Path, days: Sequence[Sequence[int]]) -> None:
    """Writes dates that differ from parcel to parcel beside PIXELS, YYYYMMDD, in the order of ids."""
    np.save(folder / PIXELS / DAYS, np.concatenate(days, dtype=np.int32, casting="unsafe"))


def _check_dates(folder: Path, found: PixelStore | Files, n_dates: int | np.ndarray | None) -> None:
    """Raises a UserError unless every parcel has as many dates as `n_dates` says."""
    if n_dates is None:
        return
    if (wrong := found.dates != n_dates).any():
        i = int(np.argmax(wrong))
        listed = f"{n_dates} dates" if isinstance(n_dates, int) else f"{n_dates[i]} dates for it"
        raise UserError(
            f"{folder / found.name(i)} has {found.dates[i]} dates, but {folder / 'META' / 'dates.json'} lists {listed}; "
            "they must agree."
        )
