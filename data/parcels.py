"""The parcels of a dataset folder: their labels, dates and extra features, and the store of their pixels."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.progress import progress_bar
from data.calendar import Calendar
from data.classes import UNKNOWN, number_labels
from data.days import find_used, read_days
from data.features import read_extra_features
from data.metadata import Arrays, read_info, read_nomenclature
from data.moments import Moments
from data.packing import check_folder, list_parcels, open_store


class Parcels:
    """Parcels with a label, and what a folder says of them; for the arguments see `dataset.PixelSetData`.

    On first use the folder is checked and packed (`data/packing.py`).

    Attributes:
        folder, until: as given.
        store: the pixels.
        places: of the parcels in the store, (N,) int64.
        pid: ids of the parcels, in increasing order, as text.
        target: their targets, int64; labels that are text are numbered in alphabetical order without sub_classes.
        classes: the labels that targets number, None where targets are labels.
        date_positions: days of the dates in order, since the first one or a season's start; None if not shared.
        n_dates: L, the most of any parcel.
        n_channels, n_extra: C and the number of extra features F.
        features, extra_stats: the extra features, (N, F), and what they were standardised with; None without any.
        varying: whether parcels have dates of their own, or observations are missing.
        complete: whether none is missing.
        n_unlabelled: parcels without a label.
        n_unobserved: parcels left out since they have no observation at all.

    Raises:
        UserError: saying which file of the folder is not as expected.
    """

    in_memory = False

    def __init__(
        self,
        folder: str | Path,
        labels: str | Mapping[str, int | str] | None,
        sub_classes: Sequence[int | str] | None = None,
        extra_feature: str | None = None,
        cache_dir: str | Path | None = None,
        keep_all: bool = False,
        extra_stats: Arrays | None = None,
        nodata: float | None = None,
        season_start: tuple[int, int] | None = None,
        until: str | None = None,
        varying: bool = False,
    ) -> None:
        self.folder, self.until = Path(folder), until
        check_folder(self.folder)  # and META: packing can take long, what can be wrong is looked at before
        days = read_days(self.folder, list_parcels(self.folder))
        shared = days.counts is None
        if isinstance(labels, str):
            labels = read_nomenclature(self.folder, labels)
        nodata = read_info(self.folder).get("nodata") if nodata is None else nodata
        n_dates = len(days.values) if shared else days.counts
        self.store = open_store(folder, cache_dir, self.in_memory, nodata, n_dates)
        self.n_dates, self.n_channels = int(self.store.dates.max()), self.store.n_channels

        found = [None] * len(self.store.ids)
        if labels is not None:
            found = list(map(labels.get, map(str, self.store.ids.tolist())))
        self.n_unlabelled = found.count(None) if labels is not None else 0
        self.classes, found = number_labels(found, sub_classes)
        every = keep_all or labels is None
        labels = None  # of many parcels they take much memory
        kept = np.array([i for i, target in enumerate(found) if every or target is not None], np.int64)
        if not len(kept):
            what = "a label" if self.classes is None else f"one of the labels {self.classes}"
            raise UserError(f"no parcel of {folder} has {what}; choose other --labels or --sub_classes.")
        self.complete = bool(self.store.complete[kept].all())
        self.varying = varying or until is not None or not shared or not self.complete
        n, only_observed = len(kept), self.varying and not keep_all
        if only_observed:
            kept = kept[self.store.observed[kept]]
        self.features, self.extra_stats = None, None
        if extra_feature is not None:  # before the calendar is made, which takes as much memory for a while
            self.features, self.extra_stats = read_extra_features(
                self.folder, extra_feature, self.store.ids[kept], extra_stats
            )
        used = None if until is None else find_used(days, season_start, until)
        self._calendar = Calendar(days, kept, season_start, used)
        if only_observed:
            observed = self._find_observed(kept)
            if not observed.all():
                kept, self.features = (
                    kept[observed],
                    None if self.features is None else self.features[observed],
                )
                self._calendar = Calendar(days, kept, season_start, used)
        self.n_unobserved = n - len(kept)
        del days, n_dates, used
        self.target = np.array([UNKNOWN if found[i] is None else found[i] for i in kept], dtype=np.int64)
        self.pid, self.places = list(map(str, self.store.ids[kept].tolist())), kept
        self.date_positions = self._calendar.positions
        self.n_extra = 0 if self.features is None else self.features.shape[1]

    def _find_observed(self, places: np.ndarray) -> np.ndarray:
        """Whether some pixel of each parcel of the calendar is present on a date that is used, (N,); see `places`."""
        counts = self._calendar.count(np.arange(len(places)))
        observed = self.store.observed[places] & (counts > 0)
        for k in np.flatnonzero(
            observed & ~self.store.complete[places] & (counts < self.store.dates[places])
        ):
            missing = self.store.look(places[k], self._calendar.of(k)[1])[1]
            observed[k] = missing is None or not missing.all()
        return observed

    def __len__(self) -> int:
        return len(self.pid)

    def calendar(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Days of a parcel's dates in order, (L,), and the row of its file that each of them is in, (L,)."""
        return self._calendar.of(item)

    @property
    def day_range(self) -> tuple[int, int]:
        """First and last day of any parcel."""
        return self._calendar.range

    @property
    def norm_shape(self) -> tuple[int | None, int]:
        """Largest shape that mean and standard deviation can have: (L, C), or (None, C) where dates are not shared."""
        return None if self.date_positions is None else self.n_dates, self.n_channels

    def statistics(self) -> Arrays:
        """Mean and standard deviation per channel, (C,) each, of all pixels that are present on the dates that are used."""
        moments = Moments("channel")
        for item in progress_bar(range(len(self)), "mean and standard deviation", "parcels"):
            pixels, missing = self.store.look(self.places[item], self.calendar(item)[1])
            if pixels.size:
                moments.add(pixels.transpose(1, 2, 0), None if missing is None else missing.T)
        return moments.result()

    def mean_series(self, item: int) -> np.ndarray:
        """Mean over all pixels of one parcel that are present, not normalised, (L, C) in the order of dates.

        A date without a pixel is NaN; a parcel without pixels of a dataset with fixed dates is 0.
        """
        pixels, missing = self.store.look(self.places[item], self.calendar(item)[1])
        if not len(pixels):
            return np.full(pixels.shape[1:], np.nan if self.varying else 0.0)
        if missing is None:
            return pixels.mean(0, dtype=np.float64)
        n = (~missing).sum(0)[:, None]
        total = np.where(missing[:, :, None], 0, pixels).sum(0, dtype=np.float64)
        return np.where(n > 0, total / np.maximum(n, 1), np.nan)
