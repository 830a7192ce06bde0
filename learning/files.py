"""Files written completely or not at all, and read with errors that name them."""

import json
import math
import os
from pathlib import Path
from typing import Any

from learning.errors import UserError


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file completely or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON; undefined numbers (nan) become null."""
    write_bytes(path, (json.dumps(_without_nan(value), indent=2) + "\n").encode())


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
