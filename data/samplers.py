"""The order in which parcels are taken, batch by batch."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from common.processes import n_ranks, rank


def evaluation_batch(device: torch.device, batch_size: int = 128) -> int:
    """Parcels per batch where nothing is learned; results do not depend on it.

    A GPU that holds the pixels takes eight times as many as in training: a batch is then no longer computed before the
    host has asked for all of it, and needs about as much memory as one whose activations are kept for the gradients.

    Args:
        device: where batches are prepared.
        batch_size: of training; the published one if not given.
    """
    return 8 * batch_size if device.type == "cuda" else batch_size


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

    @property
    def last_size(self) -> int:
        """Parcels of the last batch."""
        return (self._n - 1) % self.batch_size + 1


class RankBatches(Sampler[list[int]]):
    """What this process takes of the batches of another sampler.

    Args:
        batches: the sampler of a single process.
        divide: takes a part of every batch; the last one, if it is smaller than there are processes, is left to the
            first of them. Otherwise takes every n-th batch.
    """

    def __init__(self, batches: BatchSampler, divide: bool) -> None:
        self.batches, self.divide = batches, divide

    @property
    def last_is_small(self) -> bool:
        """Whether the last batch is smaller than there are processes."""
        return self.batches.last_size < n_ranks()

    def __iter__(self) -> Iterator[list[int]]:
        k, n = rank(), n_ranks()
        for i, batch in enumerate(self.batches):
            if self.divide and len(batch) < n:
                if k == 0:
                    yield batch
            elif self.divide:
                yield batch[k * len(batch) // n : (k + 1) * len(batch) // n]
            elif i % n == k:
                yield batch

    def __len__(self) -> int:
        total = len(self.batches)
        return total if self.divide else len(range(rank(), total, n_ranks()))
