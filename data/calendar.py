"""Which days the dates of a dataset's parcels are."""

from collections.abc import Sequence

import numpy as np

from data.metadata import season_start_before


class Calendar:
    """Days of the parcels' dates in order, and the row of a parcel's file that each of them is in.

    Args:
        days: from `read_days`: those that all parcels share, (L,), or those of each by id.
        parcels: ids of the parcels, (N,).
        season_start: (month, day) that days are counted from, the last before a parcel's first date; None for the first
            date of any parcel.
        used: which dates are used, in the form of `days`; None for all.

    Attributes:
        positions: shared days, L numbers; None where parcels have dates of their own.
        n_dates: how many dates are used of each parcel, (N,), or (1,) where they are shared.
        in_order: whether these are the first ones of all files, in order.
    """

    def __init__(
        self,
        days: np.ndarray | dict[int, np.ndarray],
        parcels: Sequence[int],
        season_start: tuple[int, int] | None,
        used: np.ndarray | dict[int, np.ndarray] | None = None,
    ) -> None:
        is_shared = isinstance(days, np.ndarray)
        own = [days] if is_shared else [days[parcel] for parcel in parcels]
        first = min(int(each.min()) for each in ([days] if is_shared else days.values()))
        starts = [
            first if season_start is None else season_start_before(int(each.min()), season_start)
            for each in own
        ]
        n = np.array([len(each) for each in own], np.int64)
        together, owner = np.concatenate([np.empty(0, np.int64), *own]), np.repeat(np.arange(len(own)), n)
        begin = np.concatenate([[0], np.cumsum(n)])
        order = np.lexsort((together, owner))
        rows, days = order - begin[owner], (together - np.repeat(np.array(starts, np.int64), n))[order]
        if used is not None:
            chosen = np.concatenate([used] if is_shared else [used[parcel] for parcel in parcels])[order]
            rows, days, n = rows[chosen], days[chosen], np.bincount(owner[chosen], minlength=len(own))
        self.n_dates, self._days, self._rows = n, days, rows
        self._begin = np.concatenate([[0], np.cumsum(n)])  # of each parcel's dates among all
        self.in_order = bool((rows == np.arange(len(rows)) - np.repeat(self._begin[:-1], n)).all())
        self.positions = days.tolist() if is_shared else None

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
        return self._days[places], self._rows[places]

    @property
    def range(self) -> tuple[int, int]:
        """First and last day of any parcel."""
        return int(self._days.min()), int(self._days.max())
