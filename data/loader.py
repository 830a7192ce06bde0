"""A PyTorch loader of whole batches."""

import os
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from common.machine import map_tensors
from data.device import DeviceLoader
from data.samplers import BatchSampler


class _Batches(Dataset):
    """A dataset whose items are whole batches, asked for by lists of indices.

    Args:
        dataset: the parcels.
        dense: writes out the rows that masks and extra features repeat: memory that is shared cannot be pinned.
    """

    def __init__(self, dataset: Dataset, dense: bool) -> None:
        self.dataset, self.dense = dataset, dense

    def __getitem__(self, items: list[int]) -> tuple[Any, ...]:
        batch = self.dataset.batch(items)
        return map_tensors(_write_out, batch) if self.dense else batch


def _write_out(x: Tensor) -> Tensor:
    """The same tensor, none of whose elements share memory."""
    return x.contiguous() if 0 in x.stride() else x


def _as_it_is(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is in the host's memory stays there; PyTorch would make tensors of it."""
    return batch


def batch_loader(
    dataset: Dataset, sampler: BatchSampler, num_workers: int, pin_memory: bool = False
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
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


def check_batch(dataset: Dataset, batch_size: int) -> None:
    """Looks whether a batch has room in the machine's memory; systems that promise more than they have end the process.

    Args:
        dataset: a `PixelSetData`.
        batch_size: parcels per batch.

    Raises:
        UserError: if the pixels, and what is computed of them at once, are larger.
    """
    n_numbers = min(batch_size, len(dataset)) * dataset.n_dates * dataset.n_channels * dataset.npixel
    needed = 4 * n_numbers * 4  # pixels as they are read and prepared, and what the first layers keep: float32
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise UserError(
            f"batches of {batch_size} parcels with {dataset.npixel} pixels need some {needed / 1e9:.0f} GB of memory, the "
            f"machine has {memory / 1e9:.0f}; the largest parcel has {dataset.store.sizes.max()} pixels: give a lower "
            "--npixel or --batch_size."
        )
