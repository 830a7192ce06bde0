"""Who runs tasks: threads of this machine, or the workers of a Dask cluster."""

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from common.errors import UserError, as_user_error

THREADS = 4  # that read and decompress blocks on this machine
PATIENCE = "10s"  # with a scheduler that does not answer
Workers = tuple[Callable[..., Any], int]


@contextmanager
def open_workers(scheduler: str | None, function: Callable[..., Any], path: str) -> Iterator[Workers]:
    """What starts a task, `submit(function, *arguments)`, and how many tasks run at once.

    Args:
        scheduler: address of a Dask scheduler, whose workers see the images under the same paths and have this
            repository on their path; None for threads of this machine.
        function, path: what they are to run, and a file that they are to read.

    Raises:
        UserError: if Dask is not installed, or no scheduler answers has workers, or those cannot do it.
    """
    if scheduler is None:
        with ThreadPoolExecutor(THREADS) as executor:
            yield executor.submit, THREADS
        return
    with as_user_error(ImportError, prefix="--scheduler needs the packages of requirements-geo.txt: "):
        from dask.distributed import Client
    unreachable = f"no Dask scheduler answers at {scheduler}; start one or leave --scheduler out: "
    with as_user_error(OSError, ValueError, TypeError, prefix=unreachable):
        client = Client(scheduler, timeout=PATIENCE)
    with client:
        workers = sum(client.nthreads().values())
        if not workers:
            raise UserError(f"the Dask scheduler at {scheduler} has no workers; start some.")
        advice = "start workers with the repository's folder in PYTHONPATH and the packages of requirements-geo.txt"
        with as_user_error(Exception, prefix=f"a Dask worker cannot run this code; {advice}: "):
            client.run(callable, function)  # whatever its import raises there
        for worker, sees in client.run(os.path.exists, path).items():
            if not sees:
                raise UserError(
                    f"the Dask worker {worker} does not see {path}; mount the images there under the same path."
                )
        yield partial(_submit, client), workers


def _submit(client: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Starts a task in sealed form, since a scheduler unpacks what it passes on and need not know this code."""

    def run(task: bytes) -> Any:  # not known by name anywhere, and so sent whole
        import pickle

        function, arguments = pickle.loads(task)
        return function(*arguments)

    return client.submit(run, pickle.dumps((function, arguments)), pure=False)


def run_ahead(
    submit: Callable[..., Any], function: Callable, tasks: Iterable[tuple], ahead: int
) -> Iterator[Any]:
    """Results of function(*task) in the order of the tasks, of which at most `ahead` are under way."""
    running: deque = deque()
    for task in tasks:
        running.append(submit(function, *task))
        if len(running) >= ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
