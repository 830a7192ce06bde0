"""Measuring time, memory and arithmetic. Every function is meant for a process of its own, see `start_process`."""

from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import Cases, Setting
from common.machine import keep_freed_memory

START = "spawn"  # how processes start: with nothing that another has allocated


def start_process(keeps_memory: bool, threads: int) -> ProcessPoolExecutor:
    """A process to measure in, with so many threads of PyTorch, that keeps freed memory or not."""
    return ProcessPoolExecutor(1, get_context(START), _set_up, (keeps_memory, threads))


def _set_up(keeps_memory: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    if keeps_memory:
        keep_freed_memory()


@lru_cache(maxsize=3)
def prepare(setting: Setting) -> Cases:
    """The cases of a setting; all settings of a row are kept while it is measured."""
    return Cases(setting)


def run_time(setting: Setting, case: str, least: float) -> float:
    """Median seconds of as many runs as take `least` seconds, after some that do not count."""
    return _timer("run()", run=getattr(prepare(setting), case)).blocked_autorange(min_run_time=least).median


def _timer(statement: str, **names: object) -> Timer:
    return Timer(statement, globals=names, num_threads=torch.get_num_threads())


def machine_rates(least: float) -> tuple[float, float]:
    """Operations per second of a large float32 matrix product, and bytes per second of a copy, at their best."""
    a, b = torch.randn(2, 1024, 1024)
    old, new = torch.zeros(2, 2**24)
    product = min(_timer("a.mm(b)", a=a, b=b).blocked_autorange(min_run_time=4 * least).times)
    copy = min(_timer("new.copy_(old)", old=old, new=new).blocked_autorange(min_run_time=4 * least).times)
    return 2 * 1024**3 / product, old.nbytes / copy


def count_flops(setting: Setting, case: str) -> int:
    """Floating-point operations of a run's matrix products."""
    with FlopCounterMode(display=False) as counter:
        getattr(prepare(setting), case)()
    return counter.get_total_flops()


def peak_memory(setting: Setting, case: str) -> int:
    """Bytes that two runs need at most beyond what the process, which must be new, held before; 0 outside Linux."""
    run, before = getattr(prepare(setting), case), read_memory("VmRSS")
    if before:
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory use so far is forgotten
    for _ in range(2):
        run()
    return read_memory("VmHWM") - before


def read_memory(name: str, process: int | str = "self") -> int:
    """Bytes in a line of /proc/<process>/status; 0 where there is none, as once the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
