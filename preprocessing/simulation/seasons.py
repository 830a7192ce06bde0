"""When simulated parcels are seen, through how many clouds, and how well they grow: the published year, and others."""

from collections.abc import Sequence
from datetime import date, timedelta
from typing import NamedTuple

import numpy as np

from common.errors import UserError

PUBLISHED_YEAR = 2017
DATES = [
    20170103, 20170113, 20170212, 20170314, 20170403, 20170423, 20170513, 20170602,
    20170612, 20170622, 20170702, 20170707, 20170712, 20170717, 20170722, 20170806,
    20170821, 20170826, 20170905, 20170910, 20170920, 20171005, 20171010, 20171015,
]  # fmt: skip
T = len(DATES)
REVISIT = 5  # days from one possible date of a year to the next
FEWEST_DATES, MOST_DATES = 20, 35
_YEAR, _DATES, _OWN_DATES = 1, 2, 3  # keep draws apart that start from the same seed


class Season(NamedTuple):
    """The dates of one or of all parcels, and the year around them.

    Attributes:
        dates: in order, as YYYYMMDD.
        days: the same as days of the year, (T,).
        haze: share of cloud that is mixed into everything, by date (T,).
        cloudiness: how often a parcel has a cloud or its shadow, by date (T,).
        year: of the dates.
        later: days by which everything happens later than in the published year.
        vigour: leaf cover relative to the published year.
    """

    dates: list[int]
    days: np.ndarray
    haze: np.ndarray
    cloudiness: np.ndarray
    year: int = PUBLISHED_YEAR
    later: float = 0
    vigour: float = 1


DAYS = np.array([date.fromisoformat(str(day)).timetuple().tm_yday for day in DATES], np.float64)
HAZE = np.array([0.14, 0.14, 0.14, 0.05] + [0] * 20)
CLOUDINESS = np.full(T, 0.05)
CLOUDINESS[[0, 1, 2, 3, 5, 12, 17, 19, 21]] = 0.15
PUBLISHED = Season(DATES, DAYS, HAZE, CLOUDINESS)


def draw_season(year: int, seed: int) -> Season:
    """The dates that all parcels of a year share: those published for 2017, else 20 to 35 drawn ones."""
    if year == PUBLISHED_YEAR:
        return PUBLISHED
    rng = np.random.default_rng((seed, year, _DATES))
    possible = np.arange(rng.integers(REVISIT), 365, REVISIT)
    chosen = rng.choice(possible, rng.integers(FEWEST_DATES, MOST_DATES + 1), replace=False)
    return _season_on(chosen, year, seed)


def draw_own_season(year: int, seed: int, index: int, fewest: int, most: int) -> Season:
    """The dates of parcel number `index` alone, `fewest` to `most` days of the year."""
    rng = np.random.default_rng((seed, year, _OWN_DATES, index))
    return _season_on(rng.choice(365, rng.integers(fewest, most + 1), replace=False), year, seed)


def _season_on(days: np.ndarray, year: int, seed: int) -> Season:
    """The season on some days of a year, counted from 0; weather and clouds of a day depend on seed and year alone."""
    rng = np.random.default_rng((seed, year, _YEAR))
    later, vigour = rng.choice((-1, 1)) * rng.uniform(5, 12), np.exp(rng.normal(0, 0.1))
    haze, cloudiness = rng.choice((0, 0.05, 0.14), 365, p=(0.8, 0.05, 0.15)), rng.uniform(0, 0.2, 365)
    if year == PUBLISHED_YEAR:
        later, vigour = PUBLISHED.later, PUBLISHED.vigour
    days = np.sort(days)
    dates = [int(f"{date(year, 1, 1) + timedelta(days=int(day)):%Y%m%d}") for day in days]
    return Season(dates, days + 1.0, haze[days], cloudiness[days], year, later, vigour)


def check_seasons(year: int, irregular: Sequence[int] | None) -> None:
    """Raises a UserError unless year and numbers of dates can be simulated."""
    if not 1000 <= year <= 9999:
        raise UserError(f"year is {year}; give one of four digits, such as 2018.")
    if irregular is not None and not 1 <= irregular[0] <= irregular[1] <= 365:
        raise UserError(
            f"irregular is {irregular[0]} to {irregular[1]} dates; give 1 to 365, the smaller number first."
        )
