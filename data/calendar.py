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
        first = int((days if is_shared else np.concatenate(list(days.values()))).min())
        n = np.fromiter(map(len, own), np.int64, len(own))
        begin = np.concatenate([[0], np.cumsum(n)])
        days = np.concatenate([np.empty(0, np.int32), *own], dtype=np.int32)  # not larger: there can be many
        starts = np.full(len(own), first, np.int32)
        if season_start is not None and len(own):
            seasons, which = np.unique(np.minimum.reduceat(days, begin[:-1]), return_inverse=True)
            starts = np.array([season_start_before(int(day), season_start) for day in seasons])[which]
        rows, owner = _count(n), np.repeat(np.arange(len(own), dtype=np.int32), n)
        chosen = None
        if used is not None:
            chosen = [used] if is_shared else [used[parcel] for parcel in parcels]
            chosen = np.concatenate([np.empty(0, bool), *chosen])
        if ((np.diff(days) < 0) & (owner[1:] == owner[:-1])).any():
            order = np.lexsort((days, owner))
            rows, days, chosen = rows[order], days[order], None if chosen is None else chosen[order]
        days -= np.repeat(starts.astype(np.int32), n)
        if chosen is not None:
            rows, days, n = rows[chosen], days[chosen], np.bincount(owner[chosen], minlength=len(own))
        self.n_dates, self._days, self._rows = n, days, rows
        self._begin = np.concatenate([[0], np.cumsum(n)])  # of each parcel's dates among all
        self.in_order = bool((rows == _count(n)).all())
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
        return self._days[places], self._rows[places].astype(np.int64)

    @property
    def range(self) -> tuple[int, int]:
        """First and last day of any parcel."""
        return int(self._days.min()), int(self._days.max())


def _count(n: np.ndarray) -> np.ndarray:
    """0, 1, ... as often as each of n says, one after the other."""
    return np.arange(n.sum(), dtype=np.int32) - np.repeat((np.cumsum(n) - n).astype(np.int32), n)
