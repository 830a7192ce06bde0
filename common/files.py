"""Files and folders written completely or not at all, and read with errors that name them."""

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import UserError

_UNFINISHED = ".unfinished"


def write_bytes(path: Path, data: bytes, durable: bool = False) -> None:
    """Writes a file completely or not at all.

    Args:
        path: the file.
        data: its content.
        durable: waits until it is on the disk, so that it also survives a power failure.

    Raises:
        UserError: if it cannot be written, for want of room say.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_UNFINISHED}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); make room, or make the folder writable, and start again."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what `write_bytes` leaves in a folder, and in those within, if its process is killed."""
    for path in folder.rglob(f".*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


def check_new(folder: Path) -> None:
    """Raises a UserError unless a folder is empty or not there yet."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; name a new one or remove it.")


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside a new one, to write into; it takes the new one's name once it is complete, else it goes."""
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        complete = Path(temporary) / folder.name
        complete.mkdir()
        yield complete
        complete.rename(folder)


def write_csv(path: Path, rows: Iterable[Sequence[Any]], line_end: str = "\r\n") -> None:
    """Writes a table, the first row of which has the names of the columns; None becomes an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator=line_end).writerows(rows)
    write_bytes(path, text.getvalue().encode())


def write_json(path: Path, value: Any) -> None:
    """Writes JSON; undefined numbers (nan) become null."""
    write_bytes(path, (json.dumps(_without_nan(value), indent=2) + "\n").encode())


def write_json_line(path: Path, value: Any) -> None:
    """Writes JSON of many parcels, in one line: indenting takes many times as long, and much memory."""
    write_bytes(path, (json.dumps(value) + "\n").encode())


def read_json(path: Path, expected: str = "a JSON file") -> Any:
    """Reads a JSON file.

    Args:
        path: the file; in UTF-8, with or without a byte order mark.
        expected: what it holds, for the message.

    Raises:
        UserError: naming the file and what is expected there, if it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected {expected}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); expected {expected}.") from error


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
