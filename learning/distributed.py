"""Several processes, started by torchrun, that train or predict together; without torchrun there is one.

In training, every process takes a part of each batch; batch statistics (`models/batchnorm.py`), gradients and scores are
those of the whole batch. In evaluation, every process takes some of the batches. The first process alone writes and
prints.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from common.errors import UserError
from common.machine import choose_device
from common.processes import add_up, is_main, n_ranks, rank

if TYPE_CHECKING:
    from data.samplers import BatchSampler

_PATIENCE = timedelta(days=2)  # with the first process, which packs a dataset while the others wait
_SECONDS_TO_AGREE = 3


def join_ranks(device_name: str | None) -> torch.device:
    """Joins the other processes, if torchrun started this one; gives its device.

    Raises:
        UserError: if there are fewer GPUs than processes on this machine, or the device is unknown.
    """
    device = choose_device(device_name)
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        return device
    n_local = int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type == "cuda":
        if device.index is not None or n_local > torch.cuda.device_count():
            raise UserError(
                f"torchrun started {n_local} processes on a machine with {torch.cuda.device_count()} GPUs; start one "
                "process per GPU and leave --device out, or give --device cpu."
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    if not is_main():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device


def together(main: Callable[[], None]) -> Callable[[], None]:
    """A main function of which torchrun may run several: what goes wrong is said once, and ends all of them."""

    def run() -> None:
        try:
            main()
        except UserError:
            if (
                not is_main()
            ):  # the first process finds the same, unless something is wrong with this one alone
                time.sleep(_SECONDS_TO_AGREE)
            raise
        except KeyboardInterrupt:
            if not is_main():
                os._exit(1)
            raise
        except RuntimeError as error:
            if "DataLoader worker" in str(error):
                raise UserError(
                    "a loading process ended before its time, perhaps for want of memory; give a lower --num_workers. "
                    "train.py goes on from the last finished epoch with --resume."
                ) from error
            if n_ranks() == 1 or not _is_lost_peer(error):
                raise
            if not is_main():
                os._exit(1)
            raise UserError(
                "another process of this run ended or cannot be reached, see above; train.py goes on from the last "
                "finished epoch with --resume."
            ) from error
        if n_ranks() > 1:
            dist.destroy_process_group()

    return run


def _is_lost_peer(error: RuntimeError) -> bool:
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def backward(loss: Tensor, model: nn.Module, n_parcels: int) -> None:
    """Gradients of the mean loss over a batch, `loss` being the mean over this process's n_parcels of it."""
    if n_ranks() == 1:
        loss.backward()
        return
    (loss * n_parcels).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [loss.new_tensor([n_parcels])])
    flat = add_up(flat)
    flat /= flat[-1].clone()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients] + [1])):
        gradient.copy_(mean.view_as(gradient))


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


def leaves_to_first(loader: DataLoader, step: int) -> bool:
    """Whether a step, from 1 on, over the loader of a `RankBatches` is one of the first process by itself."""
    return n_ranks() > 1 and step == len(loader) and loader.sampler.last_is_small


def copy_from_first(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Gives all processes the weights and the optimiser's state of the first one."""
    states = optimizer.state_dict()["state"].values()
    for tensor in (*model.state_dict().values(), *(values[name] for values in states for name in values)):
        dist.broadcast(tensor, 0)


def gather_rows(rows: Tensor, most: int) -> list[Tensor]:
    """The processes' tables (r, width), r up to `most`, in the order of their ranks; in the others than the first, [].

    A process that has no table left gives one of (0, width).
    """
    if n_ranks() == 1:
        return [rows]
    padded = rows.new_zeros(most + 1, rows.shape[1])
    padded[: len(rows)], padded[most] = rows, len(rows)
    tables = [torch.empty_like(padded) for _ in range(n_ranks())] if is_main() else None
    dist.gather(padded, tables)
    return [table[: int(table[most, 0])] for table in tables or ()]
