"""Measuring in worker processes, one per allocator setting, that take turns, so both see the same machine."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import SIDES, Sides
from common.machine import keep_freed_memory

Cell = tuple[bool, str]  # whether freed memory is kept, and the side
CELLS: tuple[Cell, ...] = tuple((keep, side) for keep in (True, False) for side in SIDES)


class Worker:
    """A process that prepares cases and runs their sides on demand.

    Args:
        keep: whether it keeps freed memory, see `keep_freed_memory`.
        threads: threads of PyTorch in it.
    """

    def __init__(self, keep: bool, threads: int) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, keep, threads), daemon=True)
        self._process.start()
        theirs.close()

    def prepare(self, case: Callable[..., Sides], **arguments: Any) -> None:
        """Makes a case the one that `ask` is about."""
        self.ask(_prepare, case, arguments)

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of function(sides of the case, *arguments), computed in the process."""
        self._connection.send((function, arguments))
        return self._connection.recv()

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, keep: bool, threads: int) -> None:
    """What a worker does."""
    if keep:
        keep_freed_memory()
    torch.set_num_threads(threads)
    sides: Sides = {}
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        connection.send(function(sides, *arguments))


def _prepare(sides: Sides, case: Callable[..., Sides], arguments: dict[str, Any]) -> None:
    sides.clear()  # the memory of the case before
    sides.update(case(**arguments))


def measure(
    workers: dict[bool, Worker],
    case: Callable[..., Sides],
    rounds: int,
    cells: Sequence[Cell],
    **arguments: Any,
) -> dict[Cell, float]:
    """Median seconds of every cell over interleaved rounds, after one that does not count."""
    for keep in {keep for keep, _ in cells}:
        workers[keep].prepare(case, **arguments)
    seconds: dict[Cell, list[float]] = {cell: [] for cell in cells}
    for _ in range(rounds + 1):
        for keep, side in cells:
            seconds[keep, side].append(workers[keep].ask(run_time, side))
    return {cell: statistics.median(values[1:]) for cell, values in seconds.items()}


def run_time(sides: Sides, side: str) -> float:
    """Median seconds of as many runs of a side as begin within a quarter of a second; one at least.

    What is short is thus timed with warm caches and threads, as where batch follows batch.
    """
    seconds: list[float] = []
    while sum(seconds) < 0.25:
        start = time.perf_counter()
        sides[side]()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def count_flops(sides: Sides) -> int:
    """Floating-point operations of the textbook side's matrix products; to be asked of a worker."""
    with FlopCounterMode(display=False) as counter:
        sides["textbook"]()
    return counter.get_total_flops()


def peak_memory(sides: Sides, side: str) -> float:
    """Bytes that two runs of a side need at most beyond what the process held before; NaN outside Linux.

    To be asked of a worker that has done nothing else, since freed memory may still be held.
    """
    before = _memory_status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory use so far is forgotten
    except OSError:
        return math.nan
    for _ in range(2):
        sides[side]()
    return _memory_status("VmHWM") - before


def _memory_status(name: str) -> float:
    """A line of /proc/self/status in bytes."""
    if not Path("/proc/self/status").exists():
        return math.nan
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def gemm_rate(sides: Sides, size: int = 1024, rounds: int = 5) -> float:
    """Operations per second of a float32 matrix product at its best; to be asked of a worker."""
    a, b = torch.randn(2, size, size)
    product = {"mm": lambda: torch.mm(a, b)}
    return 2 * size**3 / min(run_time(product, "mm") for _ in range(rounds))


def copy_rate(sides: Sides, size: int = 2**26, rounds: int = 5) -> float:
    """Bytes per second at which memory is copied at best; to be asked of a worker."""
    a, b = torch.zeros(2, size // 4)
    copy = {"copy": lambda: b.copy_(a)}
    return size / min(run_time(copy, "copy") for _ in range(rounds))
