"""Work on parts of a batch, shared among threads that each compute on their own.

PyTorch shares out every single operation and waits for all threads after each. Operations on a part small enough for
the cache are over in a fraction of a millisecond, of which this waiting takes much, and far more where another
process wants a core. Here a thread takes one part after the other through all operations instead.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

_teams: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def share(n_parts: int, do: Callable[[int], None]) -> None:
    """Does parts 0..n_parts - 1 of some work, without gradients, on as many threads as PyTorch uses.

    Args:
        n_parts: number of parts. Which thread does which is left to chance, so a part must not depend on another.
        do: does one part.
    """
    parts = iter(range(n_parts))

    def work() -> None:
        for part in parts:
            do(part)

    if torch.get_num_threads() == 1:
        with torch.no_grad():
            work()
        return
    n_threads = min(torch.get_num_threads(), n_parts)
    for future in [_team().submit(work) for _ in range(n_threads)]:
        future.result()


def _team() -> ThreadPoolExecutor:
    """The threads, as many as PyTorch uses now."""
    n_threads = torch.get_num_threads()
    with _lock:
        if n_threads not in _teams:
            _teams[n_threads] = team = ThreadPoolExecutor(
                n_threads, initializer=_work_alone, initargs=(itertools.count(), n_threads)
            )
            ready = threading.Barrier(n_threads)
            for future in [team.submit(ready.wait) for _ in range(n_threads)]:
                future.result()
            torch.set_num_threads(n_threads)  # what the threads set also serves those that start later
        return _teams[n_threads]


def _work_alone(numbers: Iterator[int], n_threads: int) -> None:
    """Prepares a thread: no threads within, no gradients, and processors of its own among those of the process.

    Left to itself, the system can keep two threads that often wait for each other on one processor.
    """
    number = next(numbers)
    if hasattr(os, "sched_setaffinity"):
        processors = sorted(os.sched_getaffinity(0))
        if len(processors) >= n_threads:
            with suppress(OSError):  # a container may not allow it
                os.sched_setaffinity(0, processors[number::n_threads])
    torch.get_num_threads()  # takes over the number of the process, which would otherwise happen later
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def _forget() -> None:
    """Threads do not live on in a process made by forking."""
    global _lock
    _teams.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
