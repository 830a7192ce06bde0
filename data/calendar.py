"""Which days the dates of a dataset's parcels are."""

import numpy as np

from data.days import Days, count_up, season_starts


class Calendar:
    """Days of the parcels' dates in order, and the row of a parcel's file that each of them is in.

    Args:
        days: from `read_days`, of all parcels of a dataset.
        places: which of these parcels, (N,).
        season_start: (month, day) that days are counted from, the last before a parcel's first date; None for the first
            date of any parcel.
        used: which dates are used; None for all.

    Attributes:
        positions: shared days, L numbers; None where parcels have dates of their own.
        n_dates: how many dates are used of each parcel, (N,), or (1,) where they are shared.
        in_order: whether these are the first ones of all files, in order.
    """

    def __init__(
        self, days: Days, places: np.ndarray, season_start: tuple[int, int] | None, used: Days | None = None
    ) -> None:
        first, days = int(days.values.min()), days.take(places)
        chosen = None if used is None else used.take(places).values
        begin, numbers = days.begin, days.values.copy()
        n = np.diff(begin)
        rows, owner = count_up(n), None
        numbers -= first if season_start is None else np.repeat(season_starts(days, season_start), n)
        falls, ends = np.diff(numbers) < 0, begin[1:-1]
        falls[ends[(ends > 0) & (ends < len(numbers))] - 1] = False  # from one parcel to the next
        if falls.any():
            owner = np.repeat(np.arange(len(n), dtype=np.int32), n)
            order = np.lexsort((numbers, owner))
            rows, numbers, chosen = rows[order], numbers[order], None if chosen is None else chosen[order]
        if chosen is not None:
            kept = np.concatenate([[0], np.cumsum(chosen)])
            rows, numbers, n = rows[chosen], numbers[chosen], np.diff(kept[begin])
        self.n_dates, self._days, self._rows = n, numbers, rows
        self._begin = np.concatenate([[0], np.cumsum(n)])  # of each parcel's dates among all
        self.in_order = (owner is None and chosen is None) or bool((rows == count_up(n)).all())
        self.positions = numbers.tolist() if days.counts is None else None

    def of(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Days of the dates of the parcel at a place in `parcels`, (L,), and the row that each is in, (L,)."""
        owner = item if self.positions is None else 0
        here = slice(self._begin[owner], self._begin[owner + 1])
        return self._days[here], self._rows[here]

    def count(self, items: np.ndarray) -> np.ndarray:
        """How many dates several parcels have, (B,)."""
        return self.n_dates[self._owners(items)]

    def _owners(self, items: np.ndarray) -> np.ndarray:
        """Whose dates are those of the parcels at some places."""
        return items if self.positions is None else np.zeros_like(items)

    def of_many(self, items: np.ndarray, n_dates: int) -> tuple[np.ndarray, np.ndarray]:
        """Days and rows of several parcels, (B, n_dates) each; those beyond a parcel's own dates are without meaning."""
        first = self._begin[self._owners(items)]
        places = (first[:, None] + np.arange(n_dates)).clip(max=len(self._days) - 1)
        return self._days[places], self._rows[places].astype(np.int64)

    @property
    def range(self) -> tuple[int, int]:
        """First and last day of any parcel."""
        return int(self._days.min()), int(self._days.max())
