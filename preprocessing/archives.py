"""Archives from elsewhere, unpacked without writing anything outside the folder they are unpacked into."""

import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from common.errors import UserError
from common.progress import progress_bar

MOST_GROWTH = 50  # times the archive's size; pixels do not shrink more than that
MOST_BASE = 2**27  # bytes that even a small archive may hold
MOST_FILES = 2_000_000


class _Member(NamedTuple):
    name: str
    size: int
    is_folder: bool
    is_file: bool
    open: Callable[[], BinaryIO | None]


def is_archive(path: Path) -> bool:
    """Whether a file is a zip or tar archive, compressed or not; checkpoints, model.pth.tar, are none."""
    named = path.name.endswith((".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz"))
    return named and not path.name.endswith(".pth.tar")


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Unpacks an archive into a folder: all of it, or nothing.

    Only files and folders with relative names are accepted: no links, no devices, no `..`.

    Returns:
        What is new in the folder.

    Raises:
        UserError: if the archive is hostile or damaged, is too large, or contains what the folder already has.
    """
    most = min(MOST_BASE + MOST_GROWTH * archive.stat().st_size, shutil.disk_usage(folder).free)
    temporary = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder))
    try:
        with _members(archive) as members:
            total = 0
            for number, member in enumerate(progress_bar(members, f"unpacking {archive.name}", "files")):
                total += member.size
                _check(member, archive.name)
                if total > most or number >= MOST_FILES:
                    raise UserError(
                        f"{archive.name} unpacks to more than {most / 1e9:.1f} GB or {MOST_FILES:,} files, more than "
                        "such data or the disk can hold; nothing of it was kept."
                    )
                _write(member, temporary)
        new = [folder / path.name for path in sorted(temporary.iterdir())]
        for path in new:
            if path.exists():
                raise UserError(f"{path} exists already; remove it or choose another folder.")
        for path in new:
            (temporary / path.name).rename(path)
        return new
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        EOFError,
        zlib.error,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise UserError(f"{archive.name} is damaged ({error}); remove it and download it again.") from error
    except OSError as error:
        raise UserError(
            f"{archive.name} cannot be unpacked in {folder} ({error.strerror or error})."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[_Member]]:
    """The members of an archive, one after the other, to be read before the next."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            yield (
                _Member(
                    info.filename, info.file_size, info.is_dir(), _is_plain(info), lambda i=info: file.open(i)
                )
                for info in file.infolist()
            )
    else:
        with tarfile.open(archive) as tar:
            yield (
                _Member(info.name, info.size, info.isdir(), info.isreg(), lambda i=info: tar.extractfile(i))
                for info in tar
            )


def _is_plain(info: zipfile.ZipInfo) -> bool:
    """Whether a zip's member is a file; Unix modes also tell links and devices, other systems write none."""
    mode = info.external_attr >> 16
    return not info.is_dir() and (stat.S_IFMT(mode) in (0, stat.S_IFREG))


def _check(member: _Member, archive: str) -> None:
    """Raises a UserError for a member that could write elsewhere or is neither a file nor a folder."""
    parts = PurePosixPath(member.name).parts
    escapes = member.name.startswith("/") or ".." in parts or any(c in member.name for c in "\\:\0")
    if escapes:
        raise UserError(
            f"{archive} is hostile: it contains {member.name!r}, outside its folder; nothing of it was kept."
        )
    if not (member.is_file or member.is_folder):
        raise UserError(
            f"{archive} is hostile: {member.name!r} is neither a file nor a folder; nothing of it was kept."
        )


def _write(member: _Member, folder: Path) -> None:
    """Writes a member; only its name and bytes are taken over, no owner, no permissions."""
    path = folder / member.name
    if member.is_folder:
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with member.open() as source, open(path, "xb") as target:
        shutil.copyfileobj(source, target, 2**20)
