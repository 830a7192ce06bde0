"""Days of the dates of a dataset's parcels: dates that all share, or those of each."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import date, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError, as_user_error
from common.files import read_json
from data.metadata import DAYS, PIXELS

_DATES = '{"0": YYYYMMDD, "1": YYYYMMDD, ...}, or {parcel id: [date, ...]}'
_CHUNK = 2**20  # dates at a time: a country's parcels have many


class Days(NamedTuple):
    """Something of every date, such as its day.

    Attributes:
        values: of dates that all parcels share, (L,); else of those of N parcels, one parcel after the other.
        counts: how many dates each parcel has, (N,); None where they are shared.
    """

    values: np.ndarray
    counts: np.ndarray | None = None

    @property
    def begin(self) -> np.ndarray:
        """Where the dates of each parcel begin among `values`, (N,), and where the last ones end."""
        counts = np.array([len(self.values)]) if self.counts is None else self.counts
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def take(self, places: np.ndarray) -> "Days":
        """Those of some of the parcels."""
        if self.counts is None or np.array_equal(places, np.arange(len(self.counts))):
            return self
        first, counts = self.begin[places], self.counts[places]
        return Days(self.values[np.repeat(first, counts) + count_up(counts)], counts)


def count_up(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... as often as each of the counts says, one after the other."""
    found = np.arange(counts.sum(), dtype=np.int32)
    found -= np.repeat((np.cumsum(counts) - counts).astype(np.int32), counts)
    return found


def read_days(folder: Path, parcels: Sequence[int]) -> Days:
    """Days of META/dates.json, or without it of PIXELS/days.npy, counted from year 1, of the parcels in their order."""
    path = folder / "META" / "dates.json"
    if not path.exists() and (folder / PIXELS / DAYS).exists():
        return _read_packed_days(folder / PIXELS, np.array(parcels, np.int64))
    dates = read_json(path, _DATES)
    if not isinstance(dates, dict) or not dates:
        raise UserError(f"{path} is something else; expected {_DATES}.")
    if not any(isinstance(value, list) for value in dates.values()):
        wrong = [number for number in dates if number not in {str(i) for i in range(len(dates))}]
        if wrong:
            raise UserError(f"{path} has a date {wrong[0]!r} among {len(dates)}; expected {_DATES}.")
        return Days(
            np.array([_to_day(dates[str(i)], f"{path}: date {i}") for i in range(len(dates))], np.int32)
        )
    days, counts = [], []
    for parcel in parcels:
        own = dates.get(str(parcel))
        if not isinstance(own, list):
            raise UserError(
                f"{path} has no list of dates for parcel {parcel}; expected one date for each row of its array."
            )
        days += [_to_day(value, f"{path}: date {i} of parcel {parcel}") for i, value in enumerate(own)]
        counts.append(len(own))
    return Days(np.array(days, np.int32), np.array(counts, np.int64))


def _read_packed_days(folder: Path, parcels: np.ndarray) -> Days:
    """Days of days.npy, the dates (YYYYMMDD) of all parcels in the order of their ids, one after the other."""
    path = folder / DAYS
    with as_user_error(Exception, prefix=f"{path} is damaged; copy it again: "):
        days = np.load(path, allow_pickle=False)
        with np.load(folder / "index.npz", allow_pickle=False) as index:
            ids, counts = index["ids"], index["dates"]
        if days.dtype.kind != "i" or days.shape != (counts.sum(),):
            raise ValueError(f"it does not hold {counts.sum()} dates")
        days = days.astype(np.int32, copy=False)
        for start in range(0, len(days), _CHUNK):
            chunk = days[start : start + _CHUNK]
            found, which = np.unique(chunk, return_inverse=True)
            chunk[:] = np.array([_to_day(int(each), f"{path}: a date") for each in found])[which]
        return Days(days, counts).take(np.searchsorted(ids, parcels))


def _to_day(value: Any, where: str) -> int:
    """The day, counted from year 1, of YYYYMMDD (a number or text) or YYYY-MM-DD."""
    day = None if isinstance(value, bool | float) else _parse_day(str(value))
    if day is None:
        raise UserError(f"{where} is {value!r}; expected a day as YYYYMMDD or YYYY-MM-DD, such as 20170131.")
    return day


@lru_cache(2**16)  # parcels have millions of dates, on few different days
def _parse_day(text: str) -> int | None:
    for length, form in ((8, "%Y%m%d"), (10, "%Y-%m-%d")):
        if len(text) == length:
            with suppress(ValueError):
                return datetime.strptime(text, form).toordinal()
    return None


def season_start_before(day: int, month_day: tuple[int, int]) -> int:
    """The last start of a season, (month, day), that is not after a day; days are counted from year 1."""
    first = date.fromordinal(day)
    start = date(first.year, *month_day)
    return (start if start <= first else date(first.year - 1, *month_day)).toordinal()


def season_starts(days: Days, season_start: tuple[int, int] | None) -> np.ndarray:
    """The day that the season of each parcel begins with, (N,), or (1,) where dates are shared.

    Args:
        days: of the parcels.
        season_start: (month, day) that a season starts with; None for the first date of any parcel.
    """
    if season_start is None or not len(days.values):
        return np.full(len(days.begin) - 1, days.values.min(initial=2**31 - 1), np.int32)
    firsts, which = np.unique(np.minimum.reduceat(days.values, days.begin[:-1]), return_inverse=True)
    return np.array([season_start_before(int(day), season_start) for day in firsts], np.int32)[which]


def find_used(days: Days, season_start: tuple[int, int] | None, until: str) -> Days:
    """Which dates are used, as truth values, where a season is followed up to a day alone.

    Args:
        days: from `read_days`.
        season_start: (month, day) that a season starts with; None for the first date of any parcel.
        until: the last day, YYYYMMDD; or MM-DD, for the first such day from the start of a parcel's season on.

    Raises:
        UserError: if no date is used.
    """
    if "-" in until:
        day, counts = tuple(map(int, until.split("-"))), np.diff(days.begin)
        starts, which = np.unique(season_starts(days, season_start), return_inverse=True)
        before = (season_start_before(int(start) - 1, day) for start in starts)
        last = np.array([season_start_before(each + 366, day) for each in before])  # the next one after
        last = np.repeat(last[which], counts)
    else:
        last = _to_day(until, "the last day")
    used = days.values <= last
    if not used.any():
        begin = date.fromordinal(int(days.values.min())).strftime("%Y%m%d")
        raise UserError(f"--until {until} leaves no date, since the first one is {begin}; give a later day.")
    return Days(used, days.counts)
