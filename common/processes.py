"""The processes of a run, started by torchrun, that train or predict together; without torchrun there is one.

In training, every process takes a part of each batch; batch statistics (`models/batchnorm.py`), gradients and scores are
those of the whole batch. In evaluation, every process takes some of the batches. The first process alone writes and
prints.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import UserError
from common.machine import choose_device, prepare_device

_PATIENCE = timedelta(minutes=10)  # with a process that may have been lost; a packing is not waited for here
_SECONDS_TO_AGREE = 3
_NO_ROOM = "a batch does not fit into memory; give a lower --batch_size or --npixel."

_is_alone = False


def n_ranks() -> int:
    """Number of processes that compute together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() and not _is_alone else 1


@contextmanager
def alone(is_alone: bool) -> Iterator[None]:
    """Lets this process compute by itself for a while, if `is_alone`."""
    global _is_alone
    _is_alone = is_alone
    yield
    _is_alone = False


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of the processes' tensors, of one shape; the gradient of each is the sum of all processes' gradients."""
    return _Sum.apply(x) if n_ranks() > 1 else x


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if n_ranks() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def share_bytes(make: Callable[[], bytes]) -> bytes:
    """What `make` gives in the first process, in all of them."""
    if n_ranks() == 1:
        return make()
    data = bytearray(make()) if is_main() else bytearray()
    size = torch.tensor(len(data))
    dist.broadcast(size, 0)
    if not size:
        return b""
    values = torch.frombuffer(data, dtype=torch.uint8) if is_main() else torch.empty(size, dtype=torch.uint8)
    dist.broadcast(values, 0)
    return values.numpy().tobytes()


def add_up(sums: Tensor) -> Tensor:
    """Sum of the processes' tensors, of one shape, in place."""
    if n_ranks() > 1:
        dist.all_reduce(sums)
    return sums


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


def join_ranks(device_name: str | None, tf32: bool = False) -> torch.device:
    """Joins the other processes, if torchrun started this one; gives its device, which is prepared and the current one.

    Args:
        device_name: what `choose_device` takes.
        tf32: see `prepare_device`.

    Raises:
        UserError: if there are fewer GPUs than processes on this machine, or the device is unknown.
    """
    device = choose_device(device_name)
    is_one_of_several = dist.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1"
    if is_one_of_several and device.type == "cuda":
        n_local = int(os.environ["LOCAL_WORLD_SIZE"])
        if device.index is not None or n_local > torch.cuda.device_count():
            raise UserError(
                f"torchrun started {n_local} processes on a machine with {torch.cuda.device_count()} GPUs; start one "
                "process per GPU and leave --device out, or give --device cpu."
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    prepare_device(device, tf32)
    if is_one_of_several:
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
            if not is_main():  # the first process finds the same, unless this one alone has a fault
                time.sleep(_SECONDS_TO_AGREE)
            raise
        except KeyboardInterrupt:
            if not is_main():
                os._exit(1)
            raise
        except MemoryError as error:
            raise UserError(_NO_ROOM) from error
        except RuntimeError as error:
            if any(words in str(error) for words in ("can't allocate memory", "out of memory")):
                raise UserError(_NO_ROOM) from error
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
            _leave()

    return run


def _leave() -> None:
    """Ends this process, whose work is done, at once.

    A process with threads of gloo can abort while Python and its libraries are taken down; torchrun would then end the
    first one, which may still write the report.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def _is_lost_peer(error: RuntimeError) -> bool:
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
