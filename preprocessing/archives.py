"""Archives from elsewhere, unpacked without writing anything outside the folder they are unpacked into."""

import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from common.errors import UserError, as_user_error
from common.files import write_bytes
from common.progress import progress_bar

MOST_GROWTH = 50  # times the archive's size; pixels do not shrink more than that
MOST_BASE = 2**27  # bytes that even a small archive may hold
MOST_FILES = 2_000_000
_DAMAGE = tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError


def is_archive(path: Path) -> bool:
    """Whether a file is a zip or tar archive, compressed or not; checkpoints, model.pth.tar, are none."""
    named = path.name.endswith((".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz"))
    return named and not path.name.endswith(".pth.tar")


def unpack(archive: Path, folder: Path, checksum: str = "") -> list[Path]:
    """Unpacks an archive into a folder, all of it or nothing, and removes the archive.

    Only files and folders with relative names are accepted: no links, no devices, no `..`. What is new is noted before it
    is moved into the folder, so that a process that was killed is gone on with: see `unpacked`.

    Args:
        archive: the archive.
        folder: where to.
        checksum: of the archive.

    Returns:
        What is new in the folder.

    Raises:
        UserError: if the archive is hostile or damaged, is too large, or contains what the folder already has.
    """
    note, inside = _places(archive.name, folder)
    try:
        inside.mkdir()
        with zipfile.ZipFile(archive) if archive.suffix == ".zip" else tarfile.open(archive) as file:
            most = min(MOST_BASE + MOST_GROWTH * archive.stat().st_size, shutil.disk_usage(folder).free)
            how = {"filter": "data"} if isinstance(file, tarfile.TarFile) else {}
            members = _members(file, archive.name, most)
            for member in progress_bar(members, f"unpacking {archive.name}", "files"):
                file.extract(member, inside, **how)
        names = sorted(path.name for path in inside.iterdir())
        for name in names:
            if (folder / name).exists():
                raise UserError(f"{folder / name} exists already; remove it or choose another folder.")
        write_bytes(note, "\n".join([checksum, *names]).encode())
    except BaseException as error:
        shutil.rmtree(inside, ignore_errors=True)
        if isinstance(error, _DAMAGE):
            raise UserError(
                f"{archive.name} is damaged ({error}); remove it and download it again."
            ) from error
        if isinstance(error, OSError):
            raise UserError(
                f"{archive.name} cannot be unpacked in {folder} ({error.strerror or error})."
            ) from error
        raise
    return unpacked(archive.name, folder, checksum)


def unpacked(name: str, folder: Path, checksum: str) -> list[Path] | None:
    """What an archive that `unpack` unpacked held, after moving what a killed process left; None if it did not get so far.

    Args:
        name: of the archive.
        folder, checksum: as given to `unpack`.
    """
    note, inside = _places(name, folder)
    lines = note.read_text(encoding="utf-8").splitlines() if note.exists() else []
    if lines[:1] != [checksum]:
        shutil.rmtree(inside, ignore_errors=True)
        return None
    new = [folder / name for name in lines[1:]]
    with as_user_error(OSError, prefix=f"what {name} held cannot be moved into {folder}: "):
        for path in new:
            if (inside / path.name).exists():
                (inside / path.name).rename(path)
    shutil.rmtree(inside, ignore_errors=True)
    (folder / name).unlink(missing_ok=True)
    return new


def _places(name: str, folder: Path) -> tuple[Path, Path]:
    """Where it is noted what an archive held, and where it is unpacked."""
    return folder / f".{name}.unpacked", folder / f".unpacking-{name}"


def _members(
    file: zipfile.ZipFile | tarfile.TarFile, archive: str, most: int
) -> Iterator[zipfile.ZipInfo | tarfile.TarInfo]:
    """Members to be unpacked one after the other; a UserError for one that is hostile or one too many."""
    total = 0
    for number, member in enumerate(file if isinstance(file, tarfile.TarFile) else file.infolist()):
        if isinstance(member, tarfile.TarInfo):
            name, size, is_plain = member.name, member.size, member.isreg() or member.isdir()
        else:  # a zip's Unix modes also tell links and devices; other systems write none
            kind = stat.S_IFMT(member.external_attr >> 16)
            name, size = member.orig_filename, member.file_size
            is_plain = kind in (0, stat.S_IFREG, stat.S_IFDIR)
        hostile = f"{archive} is hostile: it contains {name!r}"
        if name.startswith("/") or ".." in PurePosixPath(name).parts or any(c in name for c in "\\:\0"):
            raise UserError(f"{hostile}, outside its folder; nothing of it was kept.")
        if not is_plain:
            raise UserError(f"{hostile}, neither a file nor a folder; nothing of it was kept.")
        total += size
        if total > most or number >= MOST_FILES:
            raise UserError(
                f"{archive} unpacks to more than {most / 1e9:.1f} GB or {MOST_FILES:,} files, more than such data or "
                "the disk can hold; nothing of it was kept."
            )
        yield member
