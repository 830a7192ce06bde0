"""A PyTorch loader of whole batches."""

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from common.machine import map_tensors
from data.device import DeviceLoader, SendingLoader
from data.samplers import BatchSampler

Loader = DataLoader | DeviceLoader | SendingLoader


class _Batches(Dataset):
    """A dataset whose items are whole batches, asked for by lists of indices.

    Args:
        dataset: the parcels.
        is_raw: asks for raw numbers.
        dense: writes out the rows that masks and extra features repeat: memory that is shared cannot be pinned.
    """

    def __init__(self, dataset: Dataset, is_raw: bool, dense: bool) -> None:
        self.dataset, self.is_raw, self.dense = dataset, is_raw, dense

    def __getitem__(self, items: list[int]) -> tuple[Any, ...]:
        batch = self.dataset.raw_batch(items) if self.is_raw else self.dataset.batch(items)
        return map_tensors(_write_out, batch) if self.dense else batch


def _write_out(x: Tensor) -> Tensor:
    """The same tensor, none of whose elements share memory."""
    return x.contiguous() if 0 in x.stride() else x


def _as_it_is(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is in the host's memory stays there; PyTorch would make tensors of it."""
    return batch


def batch_loader(
    dataset: Dataset, sampler: BatchSampler, num_workers: int, device: torch.device = torch.device("cpu")
) -> Loader:
    """A loader of whole batches as `PixelSetData.batch` builds them; num_workers does not change them.

    A dataset on a GPU prepares its batches there, without worker processes. To another GPU they come as raw numbers, or in
    pinned memory where a user's own functions change them, which are for the host.

    Args:
        dataset: the parcels.
        sampler: gives the indices of every batch.
        num_workers: loading processes.
        device: where the batches are to be used.
    """
    if dataset.device.type != "cpu":
        return DeviceLoader(dataset, sampler)
    is_sent = device.type == "cuda"
    is_raw = is_sent and not dataset.has_own_steps
    loader = DataLoader(
        _Batches(dataset, is_raw, dense=is_sent),
        sampler=sampler,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=is_sent,
    )
    return SendingLoader(loader, dataset, device) if is_raw else loader


def check_batch(dataset: Dataset, batch_size: int) -> None:
    """Looks whether a batch has room in the machine's memory; systems that promise more than they have end the process.

    Args:
        dataset: a `PixelSetData`.
        batch_size: parcels per batch.

    Raises:
        UserError: if the pixels, and what is computed of them at once, are larger.
    """
    # A GPU says so itself; Windows does not promise.
    if dataset.device.type != "cpu" or not hasattr(os, "sysconf"):
        return
    n_numbers = min(batch_size, len(dataset)) * dataset.n_dates * dataset.n_channels * dataset.npixel
    needed = (
        4 * n_numbers * 4
    )  # pixels as they are read and prepared, and what the first layers keep: float32
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise UserError(
            f"batches of {batch_size} parcels with {dataset.npixel} pixels need some {needed / 1e9:.0f} GB of memory, the "
            f"machine has {memory / 1e9:.0f}; the largest parcel has {dataset.store.sizes.max()} pixels: give a lower "
            "--npixel or --batch_size."
        )
