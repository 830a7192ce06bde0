"""The processes of a run, started by torchrun: how many there are, and sums over them; without torchrun there is one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

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


def count_over_ranks(n: int) -> int:
    """Sum of the processes' numbers."""
    return int(sum_over_ranks(torch.tensor(n)))


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if n_ranks() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


@contextmanager
def main_first() -> Iterator[None]:
    """Lets the other processes in once the first one has come through."""
    if not is_main():
        dist.barrier()
    yield
    if n_ranks() > 1 and is_main():
        dist.barrier()


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
