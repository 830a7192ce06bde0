"""Loaders of batches for a GPU: of a dataset that it holds, and of one that is sent to it batch by batch."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.machine import free_memory, recursive_todevice
from data import prepare
from data.batch import send
from data.samplers import RankBatches


class OnDevice:
    """What of `dataset.PixelSetData` is about GPUs: that one holds the pixels, or gets them batch by batch."""

    def fits_on(self, device: torch.device) -> bool:
        """Whether the pixels take at most half of the memory that is free on a CUDA device, and can be used there."""
        return device.type == "cuda" and not self.varying and 2 * self.store.n_bytes < free_memory(device)

    def to(self, device: torch.device) -> Self:
        """The same parcels, and draws, with all they need on a device, where batches are then prepared."""
        view = copy.copy(self)
        view.store = self.store.to(device)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(view, name, value.to(device))
        return view if self._draw is None else view.epoch_draws(*self._draw)

    @property
    def device(self) -> torch.device:
        """Where batches are prepared."""
        return self._target.device

    @property
    def has_own_steps(self) -> bool:
        """Whether a user's own functions change the batches."""
        return bool(self._own)

    def raw_batch(self, items: Sequence[int]) -> tuple[Any, ...]:
        """`batch`, its data a `data.prepare.Raw`, of which `finish` makes the same on a device."""
        return self._load(items, is_raw=True)

    def for_device(self, device: torch.device) -> Self:
        """The same parcels with all that `finish` needs on a device, where no pixels go."""
        view = copy.copy(self)
        view._scale, view._shift, view._noise = (
            None if x is None else send(x, device) for x in (self._scale, self._shift, self._noise)
        )
        return view

    def finish(self, raw: prepare.Raw) -> Any:
        """What `batch` gives as data, of a `Raw` that was sent to the device that this is for."""
        data = prepare.finish(raw, self._steps(raw.drawn)[1])
        return data if self.varying else data.published()


class DeviceLoader:
    """Whole batches as `PixelSetData.batch` builds them, on the GPU that holds the pixels.

    Args:
        dataset: the parcels, on a device.
        sampler: gives the indices of every batch.
    """

    def __init__(self, dataset: Dataset, sampler: RankBatches) -> None:
        self.dataset, self.sampler = dataset, sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def items(self) -> tuple[Tensor, ...]:
        """The indices of every batch, as parts of an order that is copied to the device once."""
        batches = list(self.sampler)
        order = torch.tensor([item for batch in batches for item in batch], dtype=torch.int64)
        return send(order, self.dataset.device).split([len(batch) for batch in batches])

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return map(self.dataset.batch, self.items())


class SendingLoader:
    """Whole batches as `PixelSetData.batch` builds them, on a GPU, where the raw numbers that are sent become floats.

    Args:
        loader: of `PixelSetData.raw_batch`, in pinned memory.
        dataset: the parcels, in the host's memory.
        device: the GPU.
    """

    def __init__(self, loader: DataLoader, dataset: Dataset, device: torch.device) -> None:
        self.loader, self.sampler, self.dataset, self.device = loader, loader.sampler, dataset, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        there = self.dataset.for_device(self.device)
        for raw, *others in self.loader:
            raw, *others = recursive_todevice((raw, *others), self.device)
            yield there.finish(raw), *others
