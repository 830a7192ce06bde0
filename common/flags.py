"""Readers of the command line: lists, numbers, days; and a parser whose mistakes end in one sentence."""

import argparse
import csv
import difflib
import math
import re
from datetime import datetime
from typing import Any


def parse_labels(text: str) -> list[int] | list[str]:
    """Reads a list of labels, whole numbers or text, typed as [1,3] or [wheat,maize]."""
    labels = [x.strip() for x in next(csv.reader([strip_brackets(text)], skipinitialspace=True), [""])]
    if not labels or not all(labels):
        raise argparse.ArgumentTypeError(
            f'{text!r} is not a list of labels such as [1,3] or [wheat,"oats, green"]'
        )
    return [int(label) for label in labels] if all(re.fullmatch(r"-?\d+", x) for x in labels) else labels


def strip_brackets(text: str) -> str:
    """What stands in a pair of brackets, or the text if there is none; nothing of a pair that lacks one."""
    inner = text.strip()
    if inner.startswith("[") != inner.endswith("]"):
        return ""
    return inner.removeprefix("[").removesuffix("]").strip()


def parse_month_day(text: str) -> tuple[int, int]:
    """Reads a day of the year typed as MM-DD."""
    try:
        day = datetime.strptime(f"2001-{text}", "%Y-%m-%d")  # of a common year, so that every year has it
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a day of the year such as 10-01") from None
    return day.month, day.day


def is_until(value: Any) -> bool:
    """Whether a value is the last day of a season: text, YYYYMMDD or MM-DD."""
    text = f"2001{value.replace('-', '')}" if re.fullmatch(r"\d\d-\d\d", str(value)) else str(value)
    try:
        return isinstance(value, str) and datetime.strptime(text, "%Y%m%d").strftime("%Y%m%d") == text
    except ValueError:
        return False


def parse_until(text: str) -> str:
    """Reads the last day of a season, YYYYMMDD or MM-DD, which stays text."""
    if not is_until(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a day such as 06-30 or 20170630")
    return text


def parse_number(text: str) -> float:
    """Reads a number, infinities included; nan is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number; leave the flag out if there is none (NaN means missing in any case)"
        )
    return value


def finite(text: str) -> float:
    """Reads a number that is neither infinite nor nan."""
    if not math.isfinite(parse_number(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not finite")
    return float(text)


def parse_widths(text: str) -> list[int]:
    """Reads a list of layer widths, all of at least 1, typed as [128,64]."""
    if not re.fullmatch(r"\d+(\s*,\s*\d+)*", strip_brackets(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as [128,64]")
    widths = [int(number) for number in re.findall(r"\d+", text)]
    if min(widths) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} contains a 0; every layer needs at least one number")
    return widths


def parse_optional(text: str) -> int | None:
    """Reads a number, or null."""
    return None if text.lower() in ("null", "none") else positive(text)


def positive(text: str) -> int:
    """Reads a whole number of at least 1."""
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """Reads a whole number of at least 0."""
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def seed(text: str) -> int:
    """Reads a seed that NumPy's published shuffle of the folds takes."""
    if natural(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def fraction(text: str) -> float:
    """Reads a number from 0 up to, not including, 1."""
    value = non_negative(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return value


def non_negative(text: str) -> float:
    """Reads a number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that only say that a flag is not given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes end in one sentence, exit code 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)

    def error(self, message: str) -> None:
        unknown = re.fullmatch(r"unrecognized arguments: (--[^\s=]+).*", message, flags=re.S)
        close = difflib.get_close_matches(unknown[1], self._option_string_actions) if unknown else []
        suggestion = f"; did you mean {close[0]}?" if close else ";"
        self.exit(2, f"error: {message}{suggestion} --help lists all options.\n")
