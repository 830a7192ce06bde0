"""Pixel-set datasets: the pixels of agricultural parcels at every date, their labels and features."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data import prepare
from data.batch import Batch, send, take_dates
from data.classes import UNKNOWN  # noqa: F401  # where people look for it
from data.device import OnDevice
from data.draws import choose_pixels, noise_places, noise_values, parcel_keys, stream_key, uniform_values
from data.loader import batch_loader  # noqa: F401  # likewise
from data.metadata import Arrays, check_norm
from data.moments import find_norm  # noqa: F401  # likewise
from data.packing import check_folder
from data.parcels import Parcels
from data.settings import DataSettings


class PixelSetData(Parcels, OnDevice, Dataset):
    """Parcels as sets of pixels with a time series each (Garnot et al., CVPR 2020, section 4.1).

    On first use the folder is checked and packed (`data/packing.py`). Every access draws npixel pixels of a
    parcel, and jitter, anew from torch's generator; `epoch_draws` and `evaluation` give draws that can be repeated.

    Where parcels have dates of their own, or observations are missing, the dataset is `varying`: its batches are
    `data.batch.Batch`, in which pixels and dates that are missing are masked, and dates are in order.

    Args:
        folder: dataset folder with DATA/<id>.npy (L, C, S) or PIXELS, and META/labels.json, dates.json, <extra>.json.
        labels: nomenclature of META/labels.json to use, or labels by parcel id; None for a dataset without labels (targets
            are then -1). Parcels without a label are left out, unless `keep_all` is set.
        npixel: number of pixels of a set. A larger parcel is sampled without replacement; a smaller one filled up
            with copies of its first pixel, whose mask is 0.
        sub_classes: labels to keep, mapped to 0, 1, ... in this order; None keeps all, as they are.
        norm: mean and standard deviation that pixels are normalised with: two numbers, two arrays (C,), or two
            (L, C) where dates are shared; None for pixels as they are.
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
        temporal_truncation: probability with which `epoch_draws` ends a parcel's series (of a varying dataset) after one of
            its dates, any of them as likely.
        temporal_shift: days, at most, by which `epoch_draws` moves a parcel's calendar (of a varying dataset).
        augment: function (batch, keys) -> batch, or several in their order, that change what `epoch_draws` gives. They get
            a `data.batch.Batch` of a few parcels at a time, normalised and jittered, from several threads, and a random
            number for each parcel, (B,) int64, from which all that they draw is to follow; see `data.draws`.

    Attributes:
        extra: extra features, (N, F), in the memory of `device`; None without any. For others see `data.parcels.Parcels`.

    Raises:
        UserError: saying which file of the folder is not as expected.
    """

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
        temporal_truncation: float = 0.0,
        augment: prepare.Step | Sequence[prepare.Step] | None = None,
    ) -> None:
        self.npixel, self.jitter, self.return_id = npixel, jitter, return_id
        self.temporal_dropout, self.temporal_shift = temporal_dropout, temporal_shift
        self.temporal_truncation = temporal_truncation
        self.augment = (augment,) if callable(augment) else tuple(augment or ())
        super().__init__(
            folder, labels, sub_classes, extra_feature,
            cache_dir, keep_all, extra_stats, nodata, season_start, until, varying,
        )  # fmt: skip
        self._places, self._target = torch.from_numpy(self.places), torch.from_numpy(self.target)
        self._ids, self._sizes = (
            torch.from_numpy(x[self.places]) for x in (self.store.ids, self.store.sizes)
        )
        if not self.varying:
            days, order = (torch.from_numpy(values) for values in self.calendar(0))
            self._days, self._order = days.float(), order
        self.extra = None if self.features is None else torch.from_numpy(self.features).float()
        self._draw: tuple[int | str, ...] | None = None
        self._own: Sequence[prepare.Step] = ()  # `augment`, in epochs alone
        self._scale, self._shift, self._noise = None, None, None
        self._drawn: dict[str, Tensor] | None = None  # for all parcels, on a device
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
        dataset = cls(folder, keep_all=keep_all, **settings.arguments(folder, keep_all), **options)
        settings.check_shape(folder, dataset.varying, dataset.n_dates, dataset.n_channels)
        if settings.norm is not None:
            norm = check_norm(settings.norm, dataset.norm_shape, "the run's normalisation")
            dataset.set_norm(norm, in_order=True)
        return dataset

    def set_norm(self, norm: Arrays | Sequence[float] | None, in_order: bool = False) -> None:
        """Normalises with another mean and standard deviation; see `norm`.

        Rows of (L, C) arrays are those of the files, or with `in_order` those of the dates in order, as in
        `self.norm`; this differs only where META/dates.json lists shared dates out of order.
        """
        self.norm = None if norm is None else check_norm(norm, self.norm_shape)
        if self.norm is None:
            return
        if not in_order:
            by_date, order = [values.ndim == 2 for values in self.norm], self.calendar(0)[1]
            self.norm = tuple(values[order] if by else values for values, by in zip(self.norm, by_date))
        n_dates = max((len(values) for values in self.norm if values.ndim == 2), default=self.n_dates)
        mean, std = np.broadcast_arrays(*self.norm, np.empty((n_dates, self.n_channels)))[:2]
        self._scale = torch.from_numpy(1 / std).float().to(self.device)
        self._shift = torch.from_numpy(-mean / std).float().to(self.device)

    def epoch_draws(self, *words: int | str) -> "PixelSetData":
        """The same parcels with the draws of one epoch: pure functions of `words` (say seed, fold, epoch) and parcel."""
        view = copy.copy(self)
        view._noise = view._drawn = None
        view.redraw(*words)
        return view

    def redraw(self, *words: int | str) -> None:
        """Gives what `epoch_draws` returned the draws of another epoch, in the same memory."""
        self._draw, self._own = words, self.augment
        self._make_noise(*words)
        if self.device.type != "cpu":
            # All at once: walking to the end of a draw makes the host wait, and a batch then takes a few kernels.
            drawn, earlier = self._draw_for(self._ids, self._sizes, words), self._drawn or {}
            self._drawn = {name: _renew(earlier.get(name), new) for name, new in drawn.items()}

    def evaluation(self, seed: int) -> "PixelSetData":
        """The same parcels as they are, their pixels drawn by seed and parcel alone: the same at every call."""
        view = copy.copy(self)
        view.jitter, view.temporal_dropout, view.temporal_shift, view.augment = None, 0.0, 0, ()
        view.temporal_truncation = 0.0
        return view.epoch_draws("evaluation", seed)

    def _make_noise(self, *words: int | str) -> None:
        if self.jitter is not None:
            noise = noise_values(stream_key("noise", *words), *self.jitter)
            self._noise = _renew(self._noise, noise.to(self.device))

    def _draw_for(self, ids: Tensor, sizes: Tensor, words: tuple[int | str, ...]) -> dict[str, Tensor]:
        """All that is drawn for parcels, (B, ...) each."""

        def keys(stream: str) -> Tensor:
            return parcel_keys(stream_key(stream, *words), ids)

        drawn = {"pixels": choose_pixels(keys("pixels"), sizes, self.npixel)}
        if self.jitter is not None:
            n_places = len(self._noise) - self.n_dates * self.n_channels + 1
            drawn["noise"] = noise_places(keys("jitter"), self.npixel, n_places).view(-1, self.npixel)
        if self.varying and self.temporal_dropout:
            drawn["left out"] = uniform_values(keys("dates"), self.n_dates) < self.temporal_dropout
        if self.varying and self.temporal_truncation:
            numbers = uniform_values(keys("end"), 1) / self.temporal_truncation
            drawn["end"] = numbers.clamp(max=1)
        if self.varying and self.temporal_shift:
            numbers = uniform_values(keys("dates") + 1, 1) * (2 * self.temporal_shift + 1)
            drawn["moved"] = numbers.long() - self.temporal_shift
        return drawn | {f"augment {i}": keys(f"augment {i}") for i in range(len(self._own))}

    def __getitem__(self, item: int) -> tuple[Any, ...]:
        """One parcel: (((pixels, mask), extra), target), without extra if there are none, with the id if asked for.

        pixels (L, C, npixel) float32, mask (L, npixel) of 0 and 1, extra (L, F), target int64 scalar. In a varying
        dataset a `Batch` of these takes the place of the tuple, L being the dates that are present.
        """
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[tuple[Any, ...]]:
        """Several parcels as `__getitem__` gives them, loaded at once."""
        data, *others = self._load(items)
        sets = [data.of(i) for i in range(len(items))]
        sets = sets if self.varying else [each.published() for each in sets]
        return [(each, *(column[i] for column in others)) for i, each in enumerate(sets)]

    def batch(self, items: Sequence[int] | Tensor) -> tuple[Any, ...]:
        """Several parcels as one batch: data, targets (B,) and, if asked for, a list of ids.

        Data are ((pixels, mask), extra), or (pixels, mask) without extra features; of a varying dataset a `Batch`,
        in which dates that are present come first. pixels (B, L, C, npixel) is a view of pixel-major memory,
        (B, npixel, L, C); mask (B, L, npixel) and extra (B, L, F) repeat one row per parcel where they can.
        """
        data, *others = self._load(items)
        return (data if self.varying else data.published(), *others)

    def _load(self, items: Sequence[int] | Tensor, is_raw: bool = False) -> tuple[Any, ...]:
        """`batch`, its data a `Batch` in any case."""
        items = send(torch.as_tensor(items), self.device)
        if self._drawn is None:
            words = self._draw if self._draw is not None else (int(torch.randint(2**62, ())),)
            drawn = self._draw_for(self._ids[items], self._sizes[items], words)
        else:
            drawn = {name: values[items] for name, values in self._drawn.items()}
        data, target = self._prepare(items, drawn, is_raw), self._target[items]
        return (data, target, [self.pid[i] for i in items.tolist()]) if self.return_id else (data, target)

    def _prepare(self, items: Tensor, drawn: dict[str, Tensor], is_raw: bool) -> Batch | prepare.Raw:
        """Reads the pixels that are drawn, and takes them through all steps, or only those on raw numbers."""
        places, sizes, B, L = self._places[items], self._sizes[items], len(items), self.n_dates
        begin = self.store.locate(places, drawn["pixels"])
        slots = torch.arange(self.npixel, device=self.device)
        if self.varying:
            n_rows = self.store.dates[places.numpy()]
            L, n_dates = int(n_rows.max()), self._calendar.count(items.numpy())
            days, rows = self._calendar.of_many(items.numpy(), L)
            present = np.arange(L) < np.where(sizes > 0, n_dates, 0)[:, None]
            mask = (slots < sizes.unsqueeze(1)).unsqueeze(1) & torch.from_numpy(present).unsqueeze(2)
            days, changed = torch.from_numpy(days).float(), ["mask", "days", "present"]
        else:
            n_dates, present, changed = np.full(B, L), np.ones((B, L), bool), []
            mask = (slots < sizes.clamp(min=1).unsqueeze(1)).float().unsqueeze(1).expand(-1, L, -1)
            days = self._days.expand(B, -1)
        extra = None if self.extra is None else self.extra[items].unsqueeze(1).expand(-1, L, -1)
        if self._own:
            changed = ["mask", "days", "present"] + ([] if extra is None else ["extra"])

        def read(part: prepare.Part, most: int) -> Tensor:
            if self._calendar.in_order:
                return self.store.read(begin[part], most).permute(0, 2, 3, 1)
            if not self.varying:
                return self.store.read(begin[part], L).index_select(2, self._order).permute(0, 2, 3, 1)
            pixels = self.store.read(begin[part], int(n_rows[part].max())).permute(0, 2, 3, 1)
            return take_dates(pixels, torch.from_numpy(rows[part][:, :most].clip(max=pixels.shape[1] - 1)))

        frame, (decide, steps) = Batch(None, mask, extra, days, present), self._steps(drawn)
        if not is_raw:
            return prepare.prepare(frame, read, decide, steps, n_dates, self.n_channels, changed)
        raw = prepare.prepare(frame, read, decide, (), n_dates, self.n_channels, changed, self.store.sent_as)
        return prepare.Raw(prepare.once(raw), drawn.get("noise"), drawn.get("moved"))

    def _steps(self, drawn: dict[str, Tensor]) -> tuple[prepare.Steps, prepare.Steps]:
        """What is done with raw numbers, and then with floats."""
        norm = None if self.norm is None else (self._scale, self._shift)
        by_date = norm is not None and max(values.ndim for values in self.norm) == 2
        nodata = () if self.complete else (self.store.nodata,)
        return prepare.list_steps(drawn, nodata, norm, by_date, self._noise, self._own, self.varying)


class PixelSetData_preloaded(PixelSetData):
    """The same with all pixels in memory; pixels and jitter are drawn anew at every access just the same."""

    in_memory = True


def _renew(old: Tensor | None, new: Tensor) -> Tensor:
    """The new values, in the memory of the old ones if there are any."""
    return new if old is None else old.copy_(new)
