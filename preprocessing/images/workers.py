"""Who runs tasks: threads of this machine, or the workers of a Dask cluster."""

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from common.errors import UserError

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
    try:
        from dask.distributed import Client
    except ImportError as error:
        raise UserError("--scheduler needs Dask; install requirements-geo.txt.") from error
    try:
        client = Client(scheduler, timeout=PATIENCE)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"no Dask scheduler answers at {scheduler} ({error}); start one or leave --scheduler out."
        ) from error
    with client:
        workers = sum(client.nthreads().values())
        if not workers:
            raise UserError(f"the Dask scheduler at {scheduler} has no workers; start some.")
        _check_workers(client, function, path)
        yield partial(_submit, client), workers


def _submit(client: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Starts a task in sealed form, since a scheduler unpacks what it passes on and need not know this code."""

    def run(task: bytes) -> Any:  # not known by name anywhere, and so sent whole
        import pickle

        function, arguments = pickle.loads(task)
        return function(*arguments)

    return client.submit(run, pickle.dumps((function, arguments)), pure=False)


def _check_workers(client: Any, function: Callable[..., Any], path: str) -> None:
    """Raises a UserError unless every worker can import a function and sees a file."""
    try:
        client.run(callable, function)
    except Exception as error:  # whatever its import raises there
        raise UserError(
            f"a Dask worker cannot run this code ({error}); start workers with the repository's folder in PYTHONPATH, "
            "in an environment with requirements.txt and requirements-geo.txt."
        ) from error
    for worker, sees in client.run(os.path.exists, path).items():
        if not sees:
            raise UserError(
                f"the Dask worker {worker} does not see {path}; mount the images there under the same path."
            )


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
