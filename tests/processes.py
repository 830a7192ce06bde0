"""Runs commands in processes of their own that can be killed, forked so that torch need not be imported again."""

import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from learning.errors import run_cli


def start(
    main: Callable[[], None], command: list[str], log: Path, environment: dict[str, str] | None = None
) -> int:
    """Runs a script's main function in a child process, its output in `log`; returns the process's id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        os.environ.update(environment or {})
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        sys.argv = ["script.py", *command]
        run_cli(main)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start_ranks(main: Callable[[], None], command: list[str], log: Path, n: int) -> list[int]:
    """Runs n processes that join each other, as torchrun would start them; returns their ids."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    return [
        start(main, command, log, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(n)
    ]


def wait(pid: int) -> int:
    """A child's exit status; minus the signal's number if one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(condition: Callable[[], bool], pid: int, seconds: float = 60) -> None:
    """Waits until something holds that a child has to bring about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the process ended first"
        time.sleep(0.005)


def kill_and_repeat(run: Callable[[], int], n_kills: int, seconds: float, seed: int) -> int:
    """Starts a process again and again, killing it with SIGKILL at random moments of `seconds`, then lets it finish.

    Returns:
        How many times it was killed before it had finished by itself.
    """
    moments, killed = random.Random(seed), 0
    for _ in range(n_kills):
        pid = run()
        time.sleep(moments.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        status = wait(pid)
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
    assert wait(run()) == 0
    return killed


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
