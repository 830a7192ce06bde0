"""A loader of batches for a dataset that a GPU holds."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data.batch import send
from data.samplers import RankBatches

if TYPE_CHECKING:
    from torch.utils.data import Dataset


class DeviceLoader:
    """Whole batches as `PixelSetData.batch` builds them, on the GPU that holds the pixels.

    Args:
        dataset: the parcels, on a device.
        sampler: gives the indices of every batch.
    """

    def __init__(self, dataset: "Dataset", sampler: RankBatches) -> None:
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
