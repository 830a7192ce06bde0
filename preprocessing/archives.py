"""Archives from elsewhere, unpacked without writing anything outside the folder they are unpacked into."""

import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from common.errors import UserError
from common.progress import progress_bar

MOST_GROWTH = 50  # times the archive's size; pixels do not shrink more than that
MOST_BASE = 2**27  # bytes that even a small archive may hold
MOST_FILES = 2_000_000
_DAMAGE = tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError


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
    temporary = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder))
    try:
        with zipfile.ZipFile(archive) if archive.suffix == ".zip" else tarfile.open(archive) as file:
            most = min(MOST_BASE + MOST_GROWTH * archive.stat().st_size, shutil.disk_usage(folder).free)
            for member in progress_bar(
                _members(file, archive.name, most), f"unpacking {archive.name}", "files"
            ):
                if isinstance(file, tarfile.TarFile):
                    file.extract(member, temporary, filter="data")
                else:
                    file.extract(member, temporary)
        new = [folder / path.name for path in sorted(temporary.iterdir())]
        for path in new:
            if path.exists():
                raise UserError(f"{path} exists already; remove it or choose another folder.")
        for path in new:
            (temporary / path.name).rename(path)
        return new
    except _DAMAGE as error:
        raise UserError(f"{archive.name} is damaged ({error}); remove it and download it again.") from error
    except OSError as error:
        raise UserError(
            f"{archive.name} cannot be unpacked in {folder} ({error.strerror or error})."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
            name, size, is_plain = (
                member.orig_filename,
                member.file_size,
                kind in (0, stat.S_IFREG, stat.S_IFDIR),
            )
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
