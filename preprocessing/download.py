"""Downloads the published dataset or weights from Zenodo, checks and unpacks them.

    python -m preprocessing.download sentinel-agri|weights DIR

A download that breaks off goes on where it stopped, also when the command is given again.
"""

import hashlib
import http.client
import json
import re
import shlex
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError, run_cli
from common.flags import Parser
from common.progress import progress_bar
from learning.results import prepare_output
from preprocessing.archives import is_archive, unpack, unpacked

SERVER = "https://zenodo.org"
RECORDS = {"sentinel-agri": 5815488, "weights": 3929717}
ATTEMPTS = 5  # in a row without a byte
PATIENCE, TIMEOUT = 2.0, 60.0  # seconds between attempts, and without an answer
CHUNK = 2**20


class File(NamedTuple):
    """A file of a record: its name, size in bytes, checksum such as md5:d41d8..., and where it is."""

    name: str
    size: int
    checksum: str
    url: str


def download(what: str, folder: str | Path, server: str = SERVER) -> list[Path]:
    """Downloads all files of a record into a folder, checks and unpacks them.

    Args:
        what: a key of RECORDS.
        folder: where to; made if it is not there.
        server: address of a service with Zenodo's record interface.

    Returns:
        What is in the folder of the record: files, and what archives held.

    Raises:
        UserError: if the service cannot be reached or answers otherwise, or a file is not what its record says.
    """
    folder = prepare_output(folder)
    files = read_record(RECORDS[what], server)
    print(
        f"Record {RECORDS[what]}: {len(files)} file(s), {_size(sum(file.size for file in files))}, to {folder}"
    )
    done = {file: unpacked(file.name, folder, file.checksum) for file in files}
    left = [file for file in files if done[file] is None]
    needed = sum(file.size for file in left)
    present = sum(path.stat().st_size for file in left for path in _places(folder, file) if path.is_file())
    free = shutil.disk_usage(folder).free
    if needed - present > free:
        raise UserError(
            f"{folder} has {_size(free)} free, the files take {_size(needed)}; make room or choose another."
        )
    result: list[Path] = []
    for file, new in done.items():
        if new is not None:
            print(f"{file.name}: already there, unpacked")
        else:
            path = fetch(file, folder)
            new = unpack(path, folder, file.checksum) if is_archive(path) else [path]
        result += new
    return result


def read_record(number: int, server: str = SERVER) -> list[File]:
    """The files of a record.

    Raises:
        UserError: if the service cannot be reached or answers otherwise than expected.
    """
    url = f"{server}/api/records/{number}"
    try:
        with _open(url) as answer:
            record = json.loads(answer.read(2**24))
        files = [_read_file(entry, server) for entry in record["files"]]
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} answers {error.code} ({error.reason}); look at it in a browser.") from error
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} cannot be reached ({_reason(error)}); check the connection.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{url} does not describe files as expected ({error}); download them with a browser and unpack them."
        ) from error
    if not files:
        raise UserError(f"{url} lists no file; look at the record in a browser.")
    return files


def _read_file(entry: dict[str, Any], server: str) -> File:
    """An entry of a record; its name becomes a file's name, its address is asked, so neither is taken on trust."""
    file = File(entry["key"], int(entry["size"]), entry["checksum"], entry["links"]["self"])
    patterns = {
        "name": r"\w[\w .()+-]*",
        "checksum": r"(md5|sha1|sha256|sha512):[0-9a-f]+",
        "url": re.escape(server.split(":")[0]) + "://.*",
    }
    for what, pattern in patterns.items():
        if not re.fullmatch(pattern, getattr(file, what)):
            raise ValueError(f"the {what} of {file.name} is {getattr(file, what)!r}")
    return file


def fetch(file: File, folder: Path) -> Path:
    """Downloads one file, or the rest of it, and checks it; a file that is there already and right is left alone.

    Raises:
        UserError: if the download keeps breaking off, or the file is not what its record says.
    """
    path, part = _places(folder, file)
    if path.exists():
        if path.stat().st_size == file.size and _is_right(path, file):
            print(f"{file.name}: already there")
            return path
        path.replace(part)
    if part.exists() and part.stat().st_size > file.size:
        part.unlink()
    part.touch()
    failures = 0
    while (before := part.stat().st_size) < file.size:
        reason = _fetch_rest(file, part)
        present = part.stat().st_size
        failures = 0 if present > before else failures + 1
        if failures == ATTEMPTS:
            raise UserError(
                f"{file.name}: {_size(present)} of {_size(file.size)} are there, but no more come ({reason}); give the "
                "command again to go on."
            )
        if present < file.size:
            time.sleep(PATIENCE)
    if not _is_right(part, file):
        part.unlink()
        raise UserError(
            f"{file.name} was damaged on its way: its checksum is not {file.checksum}; give the command again."
        )
    part.replace(path)
    return path


def _fetch_rest(file: File, part: Path) -> str:
    """Appends what is missing as far as it comes; says why it ended."""
    start = part.stat().st_size
    try:
        with _open(file.url, {"Range": f"bytes={start}-"} if start else {}) as answer:
            if start and answer.status != 206:  # a server that cannot go on sends all of it
                start = 0
            with open(part, "r+b") as target:
                target.truncate(start)
                target.seek(start)
                places = progress_bar(range(start, file.size, CHUNK), file.name, "MiB")
                target.writelines(answer.read(min(CHUNK, file.size - place)) for place in places)
    except urllib.error.HTTPError as error:
        if error.code in (408, 429) or error.code >= 500:  # those that waiting helps
            return f"{error.code} {error.reason}"
        raise UserError(
            f"{file.url} answers {error.code} ({error.reason}); look at it in a browser."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        return _reason(error)
    return "the connection ended early"


def _is_right(path: Path, file: File) -> bool:
    """Whether a file has the checksum of its record."""
    name, expected = file.checksum.split(":")
    digest = hashlib.new(name, usedforsecurity=False)
    with open(path, "rb") as content:
        for _ in progress_bar(range(0, file.size, CHUNK), f"checking {file.name}", "MiB"):
            digest.update(content.read(CHUNK))
    return digest.hexdigest() == expected


def _places(folder: Path, file: File) -> tuple[Path, Path]:
    """Where a file is kept, complete and while it is incomplete."""
    return folder / file.name, folder / f".{file.name}.part"


def _open(url: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=TIMEOUT)


def _reason(error: Exception) -> str:
    """What went wrong with a connection, in one line."""
    return " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__


def _size(n_bytes: float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit in ("bytes", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


def next_step(what: str, folder: Path) -> str:
    """The command to go on with, with the folder that the dataset or the weights are in."""
    inside, script = ("DATA", "train.py") if what == "sentinel-agri" else ("Fold_1", "inference.py")
    depths = ("", "*/", "*/*/")
    found = next((path.parent for depth in depths for path in sorted(folder.glob(depth + inside))), None)
    if found is None:
        return f"Next: {folder} has no folder {inside}; look where it is, and give the folder around it to {script}"
    path = shlex.quote(str(found))
    if what == "sentinel-agri":
        return f"Next: python train.py --dataset_folder {path} --res_dir results/ltae"
    return f"Next: python inference.py --weight_dir {path} --dataset_folder path/to/dataset"


def main() -> None:
    """Command line: python -m preprocessing.download sentinel-agri|weights DIR."""
    parser = Parser(description="Downloads the published dataset or weights from Zenodo.")
    parser.add_argument("what", choices=list(RECORDS), help="the dataset, or the trained weights")
    parser.add_argument("folder", metavar="DIR", help="where to; new, or one that an earlier download began")
    args = parser.parse_args()
    for path in download(args.what, args.folder):
        print(path)
    print(next_step(args.what, Path(args.folder)))


if __name__ == "__main__":
    run_cli(main)
