"""Pixel-set datasets: the pixels of agricultural parcels at every date, their labels and features."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import KFold
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from learning.draws import add_noise, choose_pixels, noise_places, noise_values, parcel_keys, stream_key
from learning.errors import UserError
from preprocessing.metadata import (
    Arrays,
    check_norm,
    read_date_positions,
    read_extra_features,
    read_nomenclature,
    read_norm,
)
from preprocessing.store import check_folder, open_store

STATISTICS_FILES = ("S2-2017-T31TFM-meanstd.pkl", "normalisation_values.pkl")
PARCELS_PER_CHUNK = 8  # a batch is prepared in pieces that stay in the cache
UNKNOWN = -1  # target of a parcel without a label among the classes


class PixelSetData(Dataset):
    """Parcels as sets of pixels with a time series each (Garnot et al., CVPR 2020, section 4.1).

    On first use the folder is checked and packed (`preprocessing/store.py`). Every access draws npixel pixels of a
    parcel, and jitter, anew from torch's generator; `epoch_draws` and `evaluation` give draws that can be repeated.

    Args:
        folder: dataset folder with DATA/<id>.npy (T, C, S), META/labels.json, META/dates.json and META/<extra>.json.
        labels: nomenclature of META/labels.json to use; None for a dataset without labels (targets are then -1).
        npixel: number of pixels of a set. A larger parcel is sampled without replacement; a smaller one filled up
            with copies of its first pixel, whose mask is 0.
        sub_classes: labels to keep, mapped to 0, 1, ... in this order; None keeps all, as they are.
        norm: mean and standard deviation that pixels are normalised with: two numbers, two arrays (C,), or two
            (T, C); None for pixels as they are.
        extra_feature: name of a file META/<extra_feature>.json with a number or a list for each parcel, standardised
            with the mean and sample standard deviation over all parcels in the file; None for no extra features.
        jitter: (sigma, clip) of the noise clip(sigma N(0, 1), -clip, clip) added to normalised values; None for none.
        return_id: whether items end with the parcel's id.
        cache_dir: where the packed copy is kept; beside DATA if not given.
        keep_all: with `sub_classes`, also keeps the parcels of other labels and without a label, as target -1.
        extra_stats: mean and standard deviation to standardise the extra features with, instead of the file's own.

    Attributes:
        pid: ids of the parcels, in increasing order, as text.
        target: their targets, int64.
        date_positions: days of the dates since the first one.
        n_dates, n_channels, n_extra: T, C and the number of extra features F.

    Raises:
        UserError: saying which file of the folder is not as expected.
    """

    in_memory = False

    def __init__(
        self,
        folder: str | Path,
        labels: str | None,
        npixel: int,
        sub_classes: Sequence[int] | None = None,
        norm: Arrays | Sequence[float] | None = None,
        extra_feature: str | None = None,
        jitter: tuple[float, float] | None = (0.01, 0.05),
        return_id: bool = False,
        *,
        cache_dir: str | Path | None = None,
        keep_all: bool = False,
        extra_stats: Arrays | None = None,
    ) -> None:
        self.folder, self.npixel, self.jitter, self.return_id = Path(folder), npixel, jitter, return_id
        check_folder(self.folder)  # and META: packing can take long, what can be wrong is looked at before
        self.date_positions = read_date_positions(self.folder)
        nomenclature = {} if labels is None else read_nomenclature(self.folder, labels)
        self.store = open_store(folder, cache_dir, self.in_memory)
        self.n_dates, self.n_channels = self.store.n_dates, self.store.n_channels
        if len(self.date_positions) != self.n_dates:
            raise UserError(
                f"{self.folder / 'META' / 'dates.json'} lists {len(self.date_positions)} dates but the parcels have "
                f"{self.n_dates}; they must agree."
            )
        self._draw: tuple[int | str, ...] | None = None

        codes = [nomenclature.get(str(parcel)) for parcel in self.store.ids]
        if labels is not None and not keep_all and None in codes:
            raise UserError(
                f"parcel {self.store.ids[codes.index(None)]} has no label in {labels!r} of "
                f"{self.folder / 'META' / 'labels.json'}; add it or remove the parcel's file."
            )
        if sub_classes is not None:
            index = {code: i for i, code in enumerate(sub_classes)}
            codes = [index.get(code) for code in codes]
        kept = [i for i, code in enumerate(codes) if keep_all or labels is None or code is not None]
        if not kept:
            raise UserError(
                f"no parcel of {folder} has one of the labels {list(sub_classes)}; choose other --sub_classes."
            )
        self._ids, self._sizes, self._first = (
            torch.from_numpy(values[kept])
            for values in (self.store.ids, self.store.sizes, self.store.first_rows)
        )
        self.target = np.array([UNKNOWN if codes[i] is None else codes[i] for i in kept], dtype=np.int64)
        self.pid = [str(parcel) for parcel in self.store.ids[kept]]

        self._target = torch.from_numpy(self.target)
        self.extra, self.extra_stats = None, None
        if extra_feature is not None:
            extra, self.extra_stats = read_extra_features(self.folder, extra_feature, self.pid, extra_stats)
            self.extra = torch.from_numpy(extra).float()
        self.n_extra = 0 if self.extra is None else self.extra.shape[1]
        self._scale, self._shift, self._noise, self._chosen = None, None, None, None
        self.set_norm(norm)
        self._make_noise(int(torch.randint(2**62, ())))

    def set_norm(self, norm: Arrays | Sequence[float] | None) -> None:
        """Normalises with another mean and standard deviation; see `norm`."""
        shape = self.n_dates, self.n_channels
        self.norm = None if norm is None else check_norm(norm, shape)
        if self.norm is not None:
            mean, std = (np.broadcast_to(values, shape).reshape(-1) for values in self.norm)
            self._scale = torch.from_numpy(1 / std).float()
            self._shift = torch.from_numpy(-mean / std).float()

    def fits_on(self, device: torch.device) -> bool:
        """Whether the pixels take at most half of the memory that is free on a CUDA device."""
        return device.type == "cuda" and 2 * self.store.n_bytes < torch.cuda.mem_get_info(device)[0]

    def to(self, device: torch.device) -> "PixelSetData":
        """The same parcels with pixels and all else on a device, where batches are then drawn and prepared."""
        view = copy.copy(self)
        view.store = self.store.to(device)
        for name in ("_ids", "_sizes", "_first", "_target", "extra", "_scale", "_shift", "_noise"):
            value = getattr(self, name)
            setattr(view, name, None if value is None else value.to(device))
        return view

    @property
    def device(self) -> torch.device:
        """Where batches are prepared."""
        return self._target.device

    def epoch_draws(self, *words: int | str) -> "PixelSetData":
        """The same parcels with the draws of one epoch: pure functions of `words` (say seed, fold, epoch) and parcel."""
        view = copy.copy(self)
        view._draw = words
        view._make_noise(*words)
        if self.device.type != "cpu":  # all at once, since walking to the end of a draw makes the host wait
            view._chosen = view._choose(view._ids, view._sizes, words)
        return view

    def _make_noise(self, *words: int | str) -> None:
        self._noise = None
        if self.jitter is not None:
            self._noise = noise_values(stream_key("noise", *words), *self.jitter).to(self.device)

    def _choose(self, ids: Tensor, sizes: Tensor, draw: tuple[int | str, ...]) -> Tensor:
        return choose_pixels(parcel_keys(stream_key("pixels", *draw), ids), sizes, self.npixel)

    def evaluation(self, seed: int) -> "PixelSetData":
        """The same parcels without jitter, their pixels drawn by seed and parcel alone: the same at every call."""
        view = copy.copy(self)
        view.jitter = None
        return view.epoch_draws("evaluation", seed)

    def __len__(self) -> int:
        return len(self.pid)

    def __getitem__(self, item: int) -> tuple[Any, ...]:
        """One parcel: (((pixels, mask), extra), target), without extra if there are none, with the id if asked for.

        pixels (T, C, npixel) float32, mask (T, npixel) of 0 and 1, extra (T, F), target int64 scalar.
        """
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[tuple[Any, ...]]:
        """Several parcels as `__getitem__` gives them, loaded at once."""
        inputs, target, *ids = self.batch(items)
        (pixels, mask), extra = inputs if self.extra is not None else (inputs, None)
        result = []
        for i in range(len(items)):
            data = (pixels[i], mask[i]) if extra is None else ((pixels[i], mask[i]), extra[i])
            result.append((data, target[i], *(column[i] for column in ids)))
        return result

    def batch(self, items: Sequence[int] | Tensor) -> tuple[Any, ...]:
        """Several parcels as one batch: ((pixels, mask), extra), targets (B,) and, if asked for, a list of ids.

        pixels (B, T, C, npixel) is a view of pixel-major memory, (B, npixel, T, C), the order in which the store
        keeps and the models use them; mask (B, T, npixel) and extra (B, T, F) repeat one row per parcel.
        """
        items = torch.as_tensor(items, device=self.device)
        B, S, L, C = len(items), self.npixel, self.n_dates, self.n_channels
        ids, sizes, first = self._ids[items], self._sizes[items], self._first[items]
        draw = self._draw if self._draw is not None else (int(torch.randint(2**62, ())),)
        chosen = self._choose(ids, sizes, draw) if self._chosen is None else self._chosen[items]
        rows = first.unsqueeze(1) + chosen
        if self.jitter is not None:
            places = noise_places(
                parcel_keys(stream_key("jitter", *draw), ids), S, len(self._noise) - L * C + 1
            )
        x = torch.empty(B * S, L * C, device=self.device)
        step = S * (PARCELS_PER_CHUNK if self.device.type == "cpu" else B)
        for chunk in (slice(start, start + step) for start in range(0, B * S, step)):
            self.store.read(rows.view(-1)[chunk], out=x[chunk])
            if self.norm is not None:
                torch.addcmul(self._shift, x[chunk], self._scale, out=x[chunk])
            if self.jitter is not None:
                add_noise(x[chunk], places[chunk], self._noise)
        pixels = x.view(B, S, L, C).permute(0, 2, 3, 1)
        filled = torch.arange(S, device=self.device) < sizes.clamp(min=1).unsqueeze(1)
        data: Any = (pixels, filled.float().unsqueeze(1).expand(-1, L, -1))
        if self.extra is not None:
            data = data, self.extra[items].unsqueeze(1).expand(-1, L, -1)
        target = self._target[items]
        return (data, target, [self.pid[i] for i in items.tolist()]) if self.return_id else (data, target)

    def mean_series(self, item: int) -> np.ndarray:
        """Mean over all pixels of one parcel, not normalised, (T, C); zeros for a parcel without pixels."""
        first, size = int(self._first[item]), int(self._sizes[item])
        pixels = torch.empty(size, self.n_dates * self.n_channels, dtype=torch.float64)
        self.store.read(torch.arange(first, first + size), out=pixels)
        mean = pixels.mean(0) if size else pixels.sum(0)
        return mean.view(self.n_dates, self.n_channels).numpy()


class PixelSetData_preloaded(PixelSetData):
    """The same with all pixels in memory; pixels and jitter are drawn anew at every access just the same."""

    in_memory = True


class BatchSampler(Sampler[list[int]]):
    """Batches of dataset indices, in the given order or shuffled by a pure function of `shuffle_key`.

    Args:
        indices: dataset indices of one part of a fold.
        batch_size: parcels per batch.
        shuffle_key: key of the order; None keeps the order of `indices`.
        drop_single: leaves out a last batch of a single parcel, whose batch statistics are undefined.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        shuffle_key: int | None = None,
        drop_single: bool = False,
    ) -> None:
        self.indices, self.batch_size, self.shuffle_key = np.asarray(indices), batch_size, shuffle_key
        self._n = len(self.indices) - (drop_single and len(self.indices) % batch_size == 1)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.indices
        if self.shuffle_key is not None:
            order = np.random.default_rng(self.shuffle_key % 2**64).permutation(order)
        for start in range(0, self._n, self.batch_size):
            yield order[start : min(start + self.batch_size, self._n)].tolist()

    def __len__(self) -> int:
        return -(-self._n // self.batch_size)


class _Batches(Dataset):
    """A dataset whose items are whole batches, asked for by lists of indices."""

    def __init__(self, dataset: PixelSetData) -> None:
        self.dataset = dataset

    def __getitem__(self, items: list[int]) -> tuple[Any, ...]:
        return self.dataset.batch(items)


def batch_loader(
    dataset: PixelSetData, sampler: BatchSampler, num_workers: int, pin_memory: bool = False
) -> DataLoader:
    """A loader of whole batches as `PixelSetData.batch` builds them; num_workers does not change them.

    A dataset on a GPU prepares its batches there, without worker processes.
    """
    if dataset.device.type != "cpu":
        num_workers, pin_memory = 0, False
    return DataLoader(
        _Batches(dataset), sampler=sampler, batch_size=None, num_workers=num_workers, pin_memory=pin_memory
    )


def fold_splits(n_parcels: int, kfold: int, seed: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Train, validation and test indices of every fold, exactly as published.

    The shuffled parcels are cut into kfold test parts; of the rest, the last as many as the first test part holds
    are for validation.
    """
    if kfold < 3:
        raise UserError(
            f"--kfold is {kfold}; at least 3 are needed, one part each for training, validation and test."
        )
    if n_parcels < kfold:
        raise UserError(
            f"the dataset has {n_parcels} parcels for --kfold {kfold}; use more parcels or fewer folds."
        )
    order = np.arange(n_parcels)
    np.random.RandomState(seed).shuffle(order)
    folds = list(KFold(n_splits=kfold, shuffle=False).split(order))
    n_val = len(folds[0][1])
    if n_parcels - 2 * n_val < 2:
        raise UserError(
            f"the dataset has {n_parcels} parcels for --kfold {kfold}, which leaves fewer than two to train on; "
            "use more parcels."
        )
    return [
        (order[rest[:-n_val]].tolist(), order[rest[-n_val:]].tolist(), order[test].tolist())
        for rest, test in folds
    ]


def find_norm(dataset: PixelSetData, path: str | Path | None = None) -> tuple[Arrays, str]:
    """Mean and standard deviation to normalise a dataset with, and a line that says where they come from.

    From `path` if given, else from the dataset folder, else computed per date and channel.
    """
    shape = dataset.n_dates, dataset.n_channels
    candidates = [dataset.folder / name for name in STATISTICS_FILES] if path is None else [Path(path)]
    for candidate in candidates:
        if path is not None or candidate.exists():
            return read_norm(candidate, shape), f"mean and standard deviation from {candidate}"
    mean, std = dataset.store.statistics()
    source = "mean and standard deviation computed per date and channel, since no file gives them"
    return (mean, np.where(std > 0, std, 1)), source
