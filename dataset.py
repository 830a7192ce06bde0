"""Pixel-set datasets: the pixels of agricultural parcels at every date, their labels and features."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from common.machine import free_memory, map_tensors
from common.threads import share
from data.batch import Series
from data.device import DeviceLoader
from data.draws import (
    add_noise,
    choose_pixels,
    noise_places,
    noise_values,
    parcel_keys,
    stream_key,
    uniform_values,
)
from data.metadata import (
    Arrays,
    check_norm,
    find_used,
    read_days,
    read_extra_features,
    read_info,
    read_nomenclature,
    read_norm,
    season_start_before,
)
from data.moments import NORM, PUBLISHED_NORM, Moments
from data.packing import check_folder, list_parcels, open_store
from data.samplers import BatchSampler
from data.settings import EXTRA_FEATURE, DataSettings
from data.store import find_missing

PARCELS_PER_PART = 32  # a batch is prepared in parts that stay in the cache
UNKNOWN = -1  # target of a parcel without a label among the classes


class PixelSetData(Dataset):
    """Parcels as sets of pixels with a time series each (Garnot et al., CVPR 2020, section 4.1).

    On first use the folder is checked and packed (`data/store.py`). Every access draws npixel pixels of a
    parcel, and jitter, anew from torch's generator; `epoch_draws` and `evaluation` give draws that can be repeated.

    Where parcels have dates of their own, or observations are missing, the dataset is `varying`: its batches are
    `data.batch.Series`, in which pixels and dates that are missing are masked, and dates are in order.

    Args:
        folder: dataset folder with DATA/<id>.npy (T, C, S), META/labels.json, META/dates.json and META/<extra>.json.
        labels: nomenclature of META/labels.json to use, or labels by parcel id; None for a dataset without labels (targets
            are then -1). Parcels without a label are left out, unless `keep_all` is set.
        npixel: number of pixels of a set. A larger parcel is sampled without replacement; a smaller one filled up
            with copies of its first pixel, whose mask is 0.
        sub_classes: labels to keep, mapped to 0, 1, ... in this order; None keeps all, as they are.
        norm: mean and standard deviation that pixels are normalised with: two numbers, two arrays (C,), or two
            (T, C) where dates are shared; None for pixels as they are.
        extra_feature: name of a file META/<extra_feature>.json with a number or a list for each parcel, standardised
            with the mean and sample standard deviation over all parcels in the file; None for no extra features.
        jitter: (sigma, clip) of the noise clip(sigma N(0, 1), -clip, clip) added to normalised values; None for none.
        return_id: whether items end with the parcel's id.
        cache_dir: where the packed copy is kept; beside DATA if not given.
        keep_all: with `sub_classes`, also keeps the parcels of other labels and without a label, as target -1, and in
            a varying dataset those without any observation.
        extra_stats: mean and standard deviation to standardise the extra features with, instead of the file's own.
        nodata: value that, in all channels of a pixel, says that it is missing on a date, as NaN does; if not given,
            that of META/info.json.
        season_start: (month, day) that the days of a parcel are counted from, the last before its first date; if not
            given, they are counted from the first date of the dataset.
        until: last day whose pixels are used, YYYYMMDD or MM-DD; such a dataset is varying.
        varying: whether to treat the dataset as varying in any case.
        temporal_dropout: probability with which `epoch_draws` leaves out a date (of a varying dataset).
        temporal_shift: days, at most, by which `epoch_draws` moves a parcel's calendar (of a varying dataset).

    Attributes:
        pid: ids of the parcels, in increasing order, as text.
        target: their targets, int64; labels that are text are numbered in alphabetical order without sub_classes.
        classes: the labels that targets number, None where targets are labels.
        date_positions: days of the dates in order, since the first one or a season's start; None if not shared.
        n_dates: T, the most of any parcel.
        n_channels, n_extra: C and the number of extra features F.
        varying: see above.
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
        npixel: int,
        sub_classes: Sequence[int | str] | None = None,
        norm: Arrays | Sequence[float] | None = None,
        extra_feature: str | None = None,
        jitter: tuple[float, float] | None = (0.01, 0.05),
        return_id: bool = False,
        *,
        cache_dir: str | Path | None = None,
        keep_all: bool = False,
        extra_stats: Arrays | None = None,
        nodata: float | None = None,
        season_start: tuple[int, int] | None = None,
        until: str | None = None,
        varying: bool = False,
        temporal_dropout: float = 0.0,
        temporal_shift: int = 0,
    ) -> None:
        self.folder, self.npixel, self.jitter, self.return_id = Path(folder), npixel, jitter, return_id
        self.temporal_dropout, self.temporal_shift = temporal_dropout, temporal_shift
        check_folder(self.folder)  # and META: packing can take long, what can be wrong is looked at before
        days = read_days(self.folder, list_parcels(self.folder))
        shared = isinstance(days, np.ndarray)
        if isinstance(labels, str):
            labels = read_nomenclature(self.folder, labels)
        nomenclature = labels or {}
        nodata = read_info(self.folder).get("nodata") if nodata is None else nodata
        n_dates = len(days) if shared else {parcel: len(own) for parcel, own in days.items()}
        self.store = open_store(folder, cache_dir, self.in_memory, nodata, n_dates)
        self.n_dates, self.n_channels = int(self.store.dates.max()), self.store.n_channels

        codes = [nomenclature.get(str(parcel)) for parcel in self.store.ids]
        self.n_unlabelled = codes.count(None) if labels is not None else 0
        self.classes = None if sub_classes is None else list(sub_classes)
        if sub_classes is None and any(isinstance(code, str) for code in codes):
            self.classes = sorted({code for code in codes if code is not None})
        if self.classes is not None:
            index = {code: i for i, code in enumerate(self.classes)}
            codes = [index.get(code) for code in codes]
        kept = [i for i, code in enumerate(codes) if keep_all or labels is None or code is not None]
        if not kept:
            what = "a label" if self.classes is None else f"one of the labels {self.classes}"
            raise UserError(f"no parcel of {folder} has {what}; choose other --labels or --sub_classes.")
        self.until, used = until, None if until is None else find_used(days, season_start, until)
        self.varying = varying or until is not None or not shared or not self.store.complete[kept].all()
        self.n_unobserved = 0
        if self.varying and not keep_all:
            observed = [i for i in kept if self.store.observed[i]]
            if used is not None:
                observed = [i for i in observed if self._is_seen(i, used)]
            self.n_unobserved, kept = len(kept) - len(observed), observed
        self._places = np.array(kept, np.int64)
        self._ids, self._sizes, self._first = (
            torch.from_numpy(values[kept])
            for values in (self.store.ids, self.store.sizes, self.store.first_rows)
        )
        self.target = np.array([UNKNOWN if codes[i] is None else codes[i] for i in kept], dtype=np.int64)
        self.pid = [str(parcel) for parcel in self.store.ids[kept]]
        self._set_days(days, season_start, used)

        self._target = torch.from_numpy(self.target)
        self.extra, self.extra_stats = None, None
        if extra_feature is not None:
            extra, self.extra_stats = read_extra_features(self.folder, extra_feature, self.pid, extra_stats)
            self.extra = torch.from_numpy(extra).float()
        self.n_extra = 0 if self.extra is None else self.extra.shape[1]
        self._draw: tuple[int | str, ...] | None = None
        self._scale, self._shift, self._noise = None, None, None
        self._chosen, self._jittered = None, None  # of all parcels, on a device
        self.set_norm(norm)
        self._make_noise(int(torch.randint(2**62, ())))

    @classmethod
    def for_run(
        cls, folder: str | Path, settings: DataSettings, *, keep_all: bool = False, **options: Any
    ) -> "PixelSetData":
        """A dataset read as a run reads it, and normalised as it does if that is known yet.

        Args:
            folder: the dataset; that of the training, or another to predict.
            settings: of the run.
            keep_all: see the class; a dataset without the run's labels is then one without labels.
            options: other keyword arguments of the class.

        Raises:
            UserError: saying which file of the folder is not as expected.
        """
        folder = Path(folder)
        check_folder(folder)
        settings.check_units(folder)
        labels = settings.labels_in(folder, optional=keep_all)
        dataset = cls(
            folder,
            labels,
            settings.npixel,
            None if labels is None else settings.classes,
            extra_feature=EXTRA_FEATURE if settings.n_extra else None,
            extra_stats=settings.extra_stats,
            nodata=settings.nodata_in(folder),
            season_start=settings.season_start,
            until=settings.until,
            varying=settings.varying,
            keep_all=keep_all,
            **options,
        )
        if dataset.varying and settings.n_dates is not None:
            raise UserError(
                f"the model was trained on dates that all parcels share, but {folder} has other dates for each parcel, or "
                "observations are missing; train one with --varying_dates."
            )
        for what in ("channels", "dates"):
            expected, found = getattr(settings, f"n_{what}"), getattr(dataset, f"n_{what}")
            if expected not in (None, found):
                raise UserError(f"the model was trained on {expected} {what} but {folder} has {found}.")
        if settings.norm is not None:
            dataset.set_norm(
                check_norm(settings.norm, dataset.norm_shape, "the run's normalisation"), in_order=True
            )
        return dataset

    def _is_seen(self, place: int, used: np.ndarray | dict[int, np.ndarray]) -> bool:
        """Whether a pixel of the parcel at this place of the store is present on a date that is used."""
        rows = used if isinstance(used, np.ndarray) else used[int(self.store.ids[place])]
        if not rows.any() or self.store.complete[place]:
            return bool(rows.any())
        missing = find_missing(self.store.parcel(place)[:, rows], self.store.nodata, axis=2)
        return missing is None or not missing.all()

    def _set_days(
        self,
        days: np.ndarray | dict[int, np.ndarray],
        season_start: tuple[int, int] | None,
        used: np.ndarray | dict[int, np.ndarray] | None,
    ) -> None:
        """Positions of the dates in order, and the rows of the files that they are in; shared, or by parcel."""

        def since(own: np.ndarray, first: int, used: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
            order = np.argsort(own, kind="stable")
            order = order if used is None else order[used[order]]
            start = first if season_start is None else season_start_before(int(own.min()), season_start)
            return own[order] - start, order

        self._order = None  # rows of the files in the order of shared dates, where that is another one
        if isinstance(days, np.ndarray):
            self._calendar: Any = since(days, int(days.min()), used)
            self.date_positions = self._calendar[0].tolist()
            if _is_unordered(self._calendar[1]):
                self._order = torch.from_numpy(self._calendar[1])
        else:
            first = min(int(own.min()) for own in days.values())
            parcels = [int(parcel) for parcel in self.pid]
            self._calendar = [since(days[i], first, None if used is None else used[i]) for i in parcels]
            self.date_positions = None

    def calendar(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Days of a parcel's dates in order, (T,), and the row of its file that each of them is in, (T,)."""
        return self._calendar if self.date_positions is not None else self._calendar[item]

    @property
    def day_range(self) -> tuple[int, int]:
        """First and last day of any parcel."""
        calendars = [self._calendar] if self.date_positions is not None else self._calendar
        calendars = [calendar for calendar in calendars if len(calendar[0])]
        return min(int(days[0]) for days, _ in calendars), max(int(days[-1]) for days, _ in calendars)

    @property
    def norm_shape(self) -> tuple[int | None, int]:
        """Largest shape that mean and standard deviation can have: (T, C), or (None, C) where dates are not shared."""
        return None if self.date_positions is None else self.n_dates, self.n_channels

    def set_norm(self, norm: Arrays | Sequence[float] | None, in_order: bool = False) -> None:
        """Normalises with another mean and standard deviation; see `norm`.

        Rows of (T, C) arrays are those of the files, or with `in_order` those of the dates in order, as in
        `self.norm`; this differs only where META/dates.json lists shared dates out of order.
        """
        self.norm = None if norm is None else check_norm(norm, self.norm_shape)
        if self.norm is None:
            return
        shared = self.date_positions is not None
        if shared:
            order = self._calendar[1]
            by_file = order.argsort() if in_order else np.arange(len(order))
            rows = [values[by_file] if values.shape == self.norm_shape else values for values in self.norm]
            self.norm = tuple(values[order] if values.shape == self.norm_shape else values for values in rows)
        else:
            rows = self.norm
        mean, std = (np.broadcast_to(x, self.norm_shape if shared else (1, self.n_channels)) for x in rows)
        self._scale = torch.from_numpy(1 / std).float().to(self.device)
        self._shift = torch.from_numpy(-mean / std).float().to(self.device)

    def fits_on(self, device: torch.device) -> bool:
        """Whether the pixels take at most half of the memory that is free on a CUDA device, and can be used there."""
        return device.type == "cuda" and not self.varying and 2 * self.store.n_bytes < free_memory(device)

    def to(self, device: torch.device) -> "PixelSetData":
        """The same parcels, and draws, with all they need on a device, where batches are then prepared."""
        view = copy.copy(self)
        view.store = self.store.to(device)
        for name in ("_ids", "_sizes", "_first", "_target", "_order", "extra", "_scale", "_shift", "_noise"):
            value = getattr(self, name)
            setattr(view, name, None if value is None else value.to(device))
        return view if self._draw is None else view.epoch_draws(*self._draw)

    @property
    def device(self) -> torch.device:
        """Where batches are prepared."""
        return self._target.device

    def epoch_draws(self, *words: int | str) -> "PixelSetData":
        """The same parcels with the draws of one epoch: pure functions of `words` (say seed, fold, epoch) and parcel."""
        view = copy.copy(self)
        view._noise = view._chosen = view._jittered = None
        view.redraw(*words)
        return view

    def redraw(self, *words: int | str) -> None:
        """Gives what `epoch_draws` returned the draws of another epoch, in the same memory."""
        self._draw = words
        self._make_noise(*words)
        if self.device.type == "cpu":
            return
        # All at once: walking to the end of a draw makes the host wait, and a batch then takes a few kernels.
        self._chosen = _renew(self._chosen, self._choose(self._ids, self._sizes, words))
        if self.jitter is not None:
            self._jittered = _renew(self._jittered, self._noise_places(self._ids, words))

    def _make_noise(self, *words: int | str) -> None:
        if self.jitter is not None:
            noise = noise_values(stream_key("noise", *words), *self.jitter)
            self._noise = _renew(self._noise, noise.to(self.device))

    def _noise_places(self, ids: Tensor, draw: tuple[int | str, ...]) -> Tensor:
        n_places = len(self._noise) - self.n_dates * self.n_channels + 1
        places = noise_places(parcel_keys(stream_key("jitter", *draw), ids), self.npixel, n_places)
        return places.view(len(ids), -1)

    def _choose(self, ids: Tensor, sizes: Tensor, draw: tuple[int | str, ...]) -> Tensor:
        return choose_pixels(parcel_keys(stream_key("pixels", *draw), ids), sizes, self.npixel)

    def evaluation(self, seed: int) -> "PixelSetData":
        """The same parcels as they are, their pixels drawn by seed and parcel alone: the same at every call."""
        view = copy.copy(self)
        view.jitter, view.temporal_dropout, view.temporal_shift = None, 0.0, 0
        return view.epoch_draws("evaluation", seed)

    def __len__(self) -> int:
        return len(self.pid)

    def __getitem__(self, item: int) -> tuple[Any, ...]:
        """One parcel: (((pixels, mask), extra), target), without extra if there are none, with the id if asked for.

        pixels (T, C, npixel) float32, mask (T, npixel) of 0 and 1, extra (T, F), target int64 scalar. In a varying
        dataset a `Series` of these takes the place of the tuple, T being the dates that are present.
        """
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[tuple[Any, ...]]:
        """Several parcels as `__getitem__` gives them, loaded at once."""
        data, target, *ids = self.batch(items)
        return [(self._one(data, i), target[i], *(column[i] for column in ids)) for i in range(len(items))]

    def _one(self, data: Any, i: int) -> Any:
        """What one parcel has in a batch."""
        if isinstance(data, Series):
            n = int((data.mask[i] != 0).any(1).sum())
            return Series(*(None if x is None else x[i, :n] for x in data))
        (pixels, mask), extra = data if self.extra is not None else (data, None)
        return (pixels[i], mask[i]) if extra is None else ((pixels[i], mask[i]), extra[i])

    def batch(self, items: Sequence[int] | Tensor) -> tuple[Any, ...]:
        """Several parcels as one batch: data, targets (B,) and, if asked for, a list of ids.

        Data are ((pixels, mask), extra), or (pixels, mask) without extra features; of a varying dataset a `Series`,
        in which dates that are present come first. pixels (B, T, C, npixel) is a view of pixel-major memory,
        (B, npixel, T, C), the order in which the store keeps and the models use them; mask (B, T, npixel) and extra
        (B, T, F) repeat one row per parcel where they can.
        """
        items = torch.as_tensor(items)
        if self.device.type == "cuda" and items.device.type == "cpu":
            items = items.pin_memory()  # or else the host would wait for all that the device has still to do
        items = items.to(self.device, non_blocking=True)
        draw = self._draw if self._draw is not None else (int(torch.randint(2**62, ())),)
        data = self._series(items, draw) if self.varying else self._sets(items, draw)
        target = self._target[items]
        return (data, target, [self.pid[i] for i in items.tolist()]) if self.return_id else (data, target)

    def _pixels(self, items: Tensor, draw: tuple[int | str, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sizes (B,), the pixels chosen (B, S), and where each row of them reads its noise, (B, S)."""
        sizes = self._sizes[items]
        if self._chosen is not None:
            return sizes, self._chosen[items], None if self.jitter is None else self._jittered[items]
        ids = self._ids[items]
        chosen = self._choose(ids, sizes, draw)
        return sizes, chosen, None if self.jitter is None else self._noise_places(ids, draw)

    def _sets(self, items: Tensor, draw: tuple[int | str, ...]) -> Any:
        """The data of a batch with fixed dates."""
        sizes, chosen, places = self._pixels(items, draw)
        B, S, L, C = len(items), self.npixel, self.n_dates, self.n_channels
        rows = self._first[items].unsqueeze(1) + chosen
        x = torch.empty(B, S, L * C, device=self.device)
        scale, shift = (None, None) if self.norm is None else (self._scale.view(-1), self._shift.view(-1))
        step = PARCELS_PER_PART if self.device.type == "cpu" else B

        def fill(part: int) -> None:
            here = slice(part * step, (part + 1) * step)
            values = x[here].flatten(0, 1)
            self.store.read(rows[here].flatten(), out=values)
            if scale is not None:
                torch.addcmul(shift, values, scale, out=values)
            if places is not None:
                add_noise(values, places[here].flatten(), self._noise)

        if self.device.type == "cpu":
            share(-(-B // step), fill)
        else:
            fill(0)
        x = x.view(B, S, L, C)
        if self._order is not None:
            x = x.index_select(2, self._order)
        filled = torch.arange(S, device=self.device) < sizes.clamp(min=1).unsqueeze(1)
        data = x.permute(0, 2, 3, 1), filled.float().unsqueeze(1).expand(-1, L, -1)
        return data if self.extra is None else (data, self.extra[items].unsqueeze(1).expand(-1, L, -1))

    def _series(self, items: Tensor, draw: tuple[int | str, ...]) -> Series:
        """The data of a batch whose parcels have dates of their own."""
        sizes, chosen, places = self._pixels(items, draw)
        B, S, C = len(items), self.npixel, self.n_channels
        numbers, pixels = items.tolist(), chosen.numpy()
        parcels = self._places[numbers]
        L = int(self.store.dates[parcels].max())
        keys = parcel_keys(stream_key("dates", *draw), self._ids[items])
        left_out = (uniform_values(keys, L) < self.temporal_dropout).numpy()
        moved = (uniform_values(keys + 1, 1) * (2 * self.temporal_shift + 1)).long() - self.temporal_shift
        x, moved = torch.empty(B, S, L * C), moved.flatten().tolist()
        mask, days = np.zeros((B, L, S), np.float32), np.zeros((B, L), np.float32)
        scale, shift = None, None
        if self.norm is not None:
            scale, shift = (values.expand(self.n_dates, C).flatten() for values in (self._scale, self._shift))
        per_date = self.norm is not None and len(self._scale) > 1

        def write(i: int, size: int) -> int:
            """Writes a parcel's dates that are present, in order, and returns their number."""
            place, (own_days, rows) = parcels[i], self.calendar(numbers[i])
            T, n = int(self.store.dates[place]), len(rows)
            if not n:
                return 0
            raw = self.store.parcel(place).reshape(-1, T * C).take(pixels[i], axis=0)
            missing = None
            if self.temporal_dropout or not self.store.complete[place]:
                there = np.ones(n, bool)
                if not self.store.complete[place]:
                    missing = _fill_missing(raw.reshape(S, T, C), self.store.nodata)[:size, rows]
                    there = ~missing.all(0)
                    if not there.any():
                        return 0
                kept = there & ~left_out[i, :n]
                if not kept.any():  # one is left in any case
                    kept[np.argmax(there)] = True
                n, rows, own_days = int(kept.sum()), rows[kept], own_days[kept]
            if n < T or _is_unordered(rows):
                raw = raw.reshape(S, T, C).take(rows, axis=1).reshape(S, n * C)
            values, read = x[i, :, : n * C], torch.from_numpy(raw).float()
            if scale is None:
                values.copy_(read)
            else:
                here = slice(0, n * C)
                if per_date:
                    here = torch.from_numpy(rows[:, None] * C + np.arange(C)).flatten()
                torch.addcmul(shift[here], read, scale[here], out=values)
            if places is not None:
                add_noise(values, places[i], self._noise)
            mask[i, :n, :size] = 1 if missing is None else ~missing[:, kept].T
            days[i, :n] = own_days + moved[i]
            return n

        def write_all(_: int) -> None:
            for i, size in enumerate(sizes.tolist()):
                n = write(i, size) if size else 0
                if n < L:
                    x[i, :, n * C :] = 0

        share(1, write_all)  # much of it is Python's own work, which threads cannot share
        mask, days = torch.from_numpy(mask), torch.from_numpy(days)
        extra = None if self.extra is None else self.extra[items].unsqueeze(1).expand(-1, L, -1)
        return Series(x.view(B, S, L, C).permute(0, 2, 3, 1), mask, extra, days)

    def statistics(self) -> Arrays:
        """Mean and standard deviation per channel, (C,) each, of all pixels that are present on the dates that are used."""
        moments = Moments("channel")
        for item, place in enumerate(self._places):
            pixels = self.store.parcel(place)[:, self.calendar(item)[1]]
            if pixels.size:
                missing = find_missing(pixels, self.store.nodata, axis=2)
                moments.add(pixels.transpose(1, 2, 0), None if missing is None else missing.T)
        return moments.result()

    def mean_series(self, item: int) -> np.ndarray:
        """Mean over all pixels of one parcel that are present, not normalised, (T, C) in the order of dates.

        A date without a pixel is NaN; a parcel without pixels of a dataset with fixed dates is 0.
        """
        pixels = self.store.parcel(self._places[item]).astype(np.float64)[:, self.calendar(item)[1]]
        if not len(pixels):
            return np.full(pixels.shape[1:], np.nan if self.varying else 0.0)
        missing = find_missing(pixels, self.store.nodata, axis=2)
        if missing is not None:
            n = (~missing).sum(0)[:, None]
            total = np.where(missing[:, :, None], 0, pixels).sum(0)
            return np.where(n > 0, total / np.maximum(n, 1), np.nan)
        return pixels.mean(0)


def _fill_missing(pixels: np.ndarray, nodata: float | None) -> np.ndarray:
    """Which pixels (S, T, C), contiguous, are missing on which date, (S, T): NaN or `nodata` in all their channels.

    As where a set is filled up, a copy of one that is present is put in the place of each.
    """
    T, C = pixels.shape[1:]

    def is_missing(values: np.ndarray) -> np.ndarray:
        found = values == nodata if nodata is not None else np.zeros(values.shape, bool)
        return found | np.isnan(values) if values.dtype.kind == "f" else found

    missing = is_missing(pixels[:, :, 0])  # the first channel tells of most that they are not
    rows, places = pixels.reshape(-1, C), np.flatnonzero(missing)
    in_all = is_missing(rows[places]).all(1)
    missing.reshape(-1)[places[~in_all]] = False
    places = places[in_all]
    first_present = (~missing).argmax(0) * T + np.arange(T)  # of every date, among the rows
    rows[places] = rows[first_present[places % T]]
    return missing


def _is_unordered(rows: np.ndarray) -> bool:
    """Whether the rows of a file are not in the order of their dates."""
    return bool((rows[:-1] > rows[1:]).any())


class PixelSetData_preloaded(PixelSetData):
    """The same with all pixels in memory; pixels and jitter are drawn anew at every access just the same."""

    in_memory = True


class _Batches(Dataset):
    """A dataset whose items are whole batches, asked for by lists of indices.

    Args:
        dataset: the parcels.
        dense: writes out the rows that masks and extra features repeat: memory that is shared cannot be pinned.
    """

    def __init__(self, dataset: PixelSetData, dense: bool) -> None:
        self.dataset, self.dense = dataset, dense

    def __getitem__(self, items: list[int]) -> tuple[Any, ...]:
        batch = self.dataset.batch(items)
        return map_tensors(_write_out, batch) if self.dense else batch


def _write_out(x: Tensor) -> Tensor:
    """The same tensor, none of whose elements share memory."""
    return x.contiguous() if 0 in x.stride() else x


def _renew(old: Tensor | None, new: Tensor) -> Tensor:
    """The new values, in the memory of the old ones if there are any."""
    return new if old is None else old.copy_(new)


def batch_loader(
    dataset: PixelSetData, sampler: BatchSampler, num_workers: int, pin_memory: bool = False
) -> DataLoader | DeviceLoader:
    """A loader of whole batches as `PixelSetData.batch` builds them; num_workers does not change them.

    A dataset on a GPU prepares its batches there, without worker processes.
    """
    if dataset.device.type != "cpu":
        return DeviceLoader(dataset, sampler)
    return DataLoader(
        _Batches(dataset, dense=pin_memory),
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


def find_norm(dataset: PixelSetData, path: str | Path | None = None) -> tuple[Arrays, str]:
    """Mean and standard deviation to normalise a dataset with, and a line that says where they come from.

    From `path` if given, else from the dataset folder, else computed: per date and channel, or per channel for a
    varying dataset, so that they serve other dates.
    """
    candidates = [dataset.folder / name for name in (PUBLISHED_NORM, NORM)] if path is None else [Path(path)]
    if dataset.until is not None and path is None:  # the folder's know of later dates
        return (
            dataset.statistics(),
            f"mean and standard deviation computed per channel, until {dataset.until}",
        )
    for candidate in candidates:
        if path is not None or candidate.exists():
            norm = read_norm(candidate, dataset.norm_shape)
            if not dataset.varying or all(values.ndim < 2 for values in norm):
                return norm, f"mean and standard deviation from {candidate}"
            if path is not None:
                raise UserError(
                    f"--norm {candidate} has values per date, which do not serve varying dates; give one value per channel."
                )
            break
    per = "channel" if dataset.varying else "date"
    mean, std = dataset.store.statistics(per)
    described = "per channel, to serve any dates" if dataset.varying else "per date and channel"
    return (mean, np.where(std > 0, std, 1)), f"mean and standard deviation computed {described}"
