"""Where a run happens and with which randomness."""

import ctypes
import os
import platform
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from common.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """The device asked for; CUDA if there is a GPU, else the CPU, where none is.

    Raises:
        UserError: if the device is unknown or missing.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {name!r}; expected cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device {name} was asked for but PyTorch finds no GPU; leave --device out to use the CPU."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name} was asked for but there are {torch.cuda.device_count()} GPUs, from cuda:0 on."
        )
    return device


def prepare_device(device: torch.device, tf32: bool = False) -> None:
    """Makes a GPU compute in one precision, and the same results every time.

    By default PyTorch multiplies matrices in float32, but lets cuDNN, which computes GRU and TempCNN, round to TF32.

    Args:
        device: nothing is done for a CPU.
        tf32: whether all products may round to TF32: faster, with 10 bits of mantissa instead of 23.
    """
    if device.type == "cuda":
        _set_rules(tf32, tf32, True, False)  # nothing here reads memory that was not filled


@contextmanager
def prepared_device(device: torch.device, tf32: bool = False) -> Iterator[None]:
    """`prepare_device` for a while; then the rules of before, which may be somebody else's, hold again."""
    tf32_before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    deterministic = torch.are_deterministic_algorithms_enabled()
    before = *tf32_before, deterministic, torch.utils.deterministic.fill_uninitialized_memory
    try:
        prepare_device(device, tf32)
        yield
    finally:
        _set_rules(*before)


def _set_rules(products_tf32: bool, cudnn_tf32: bool, is_deterministic: bool, fills_memory: bool) -> None:
    """Whether matrix products and cuDNN may round to TF32, kernels give the same each time, new memory is filled."""
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products_tf32, cudnn_tf32
    torch.use_deterministic_algorithms(is_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fills_memory


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, with those that PyTorch keeps for tensors to come."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def describe_device(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"GPU ({torch.cuda.get_device_name(device)})"
    return f"{device.type.upper()} ({torch.get_num_threads()} threads)"


def set_seeds(seed: int) -> None:
    """Seeds every global generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def count_workers(asked: int) -> int:
    """Loading processes to use: as many as asked for, but no more than there are cores beside two that train.

    Batches are the same for any number, so this is a matter of speed alone.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    trainings = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that torchrun started on this machine
    return max(0, min(asked, cores // trainings - 2))


def recursive_todevice(x: Any, device: torch.device) -> Any:
    """Moves a tensor, or the tensors in nested tuples and lists, to a device without waiting for the copy."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), x)


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], x: Any) -> Any:
    """A tensor, or nested tuples and lists, with every tensor changed; all else stays as it is."""
    if isinstance(x, torch.Tensor):
        return change(x)
    if isinstance(x, (tuple, list)):
        items = [map_tensors(change, item) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x


# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Makes glibc keep the memory that tensors free, for the next ones; does nothing where there is no glibc.

    By default large blocks go back to the system, which hands out zeroed pages one by one when the next step touches
    the same amount of memory again: on a CPU this can cost more than the arithmetic. The process then stays as large
    as it once was.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)  # large blocks come from the heap too
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # which never shrinks
        libc.mallopt(_M_TOP_PAD, 64 * 2**20)  # and grows by 64 MB at a time
