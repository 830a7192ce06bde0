"""Runs commands in processes of their own that can be killed, forked so that torch need not be imported again."""

import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch._dynamo  # noqa: F401  # the first step of an optimiser imports it: once here, not once per child

from common.errors import run_cli

PATIENCE = 600  # seconds; no test needs as many, a process that hangs is ended then
_children: set[int] = set()


def start(
    main: Callable[[], None], command: list[str], log: Path, environment: dict[str, str] | None = None
) -> int:
    """Runs a script's main function in a child process, its output in `log`; returns the process's id."""
    pid = os.fork()
    if pid:
        _children.add(pid)
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
    port = _free_port()
    shared = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    return [
        start(main, command, log, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(n)
    ]


def _free_port() -> int:
    """A port beside the range that systems choose from for others, so that none takes it in the meantime."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as attempt, suppress(OSError):
            attempt.bind(("localhost", port))
            return port
    raise AssertionError("no port is free")


def wait(pid: int) -> int:
    """A child's exit status; minus the signal's number if one killed it."""
    status = _wait(pid)
    assert not os.WIFSTOPPED(status), "the process has stopped itself, and waits to be continued"
    return os.waitstatus_to_exitcode(status)


def wait_until_stopped(pid: int) -> None:
    """Waits until a child has stopped itself, see `stop_when`."""
    status = _wait(pid)
    assert os.WIFSTOPPED(status), f"the process ended first, with {os.waitstatus_to_exitcode(status)}"


def _wait(pid: int) -> int:
    """A child's status once it has ended or stopped itself."""
    end = time.monotonic() + PATIENCE
    while True:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if found:
            if not os.WIFSTOPPED(status):
                _children.discard(pid)
            return status
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"process {pid} hung")
        time.sleep(0.002)


def end_children() -> None:
    """Kills what a test that failed has left."""
    for pid in list(_children):
        os.kill(pid, signal.SIGKILL)
        _wait(pid)


def watch(folder: Path, act: Callable[[str, str], None]) -> None:
    """Calls `act` before each step of this process in a folder: every file or folder opened, made, renamed or removed.

    For children alone, since it cannot be undone: the steps are audit events of Python. Packages that write files by
    themselves raise none.

    Args:
        folder: the folder.
        act: gets the step's name, and the path in the folder; of a renaming, the new one.
    """
    root, me = os.path.abspath(folder) + os.sep, os.getpid()
    one_thread, inside = threading.Lock(), threading.local()

    def hook(event: str, args: tuple) -> None:
        # Steps of `act` itself do not count, nor do those of loading processes, which inherit this.
        if event not in _STEPS or os.getpid() != me or getattr(inside, "act", False):
            return
        place, directory = _STEPS[event]
        path = args[place]
        if isinstance(path, int) or path is None:
            return
        path = os.fsdecode(path)
        if (
            directory is not None and args[directory] >= 0
        ):  # relative to an open folder, as shutil.rmtree does it
            path = os.path.join(os.readlink(f"/proc/self/fd/{args[directory]}"), path)
        path = os.path.abspath(path)
        if path.startswith(root):
            inside.act = True
            try:
                with one_thread:
                    act(_name_step(event, args), path.removeprefix(root))
            finally:
                inside.act = False

    sys.addaudithook(hook)


# Events of Python by the places of a path, and of the folder that it is relative to, among their arguments.
_STEPS = {
    "open": (0, None),
    "os.mkdir": (0, 2),
    "os.rename": (1, 3),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.chmod": (0, 2),
    "os.truncate": (0, None),
}


def _name_step(event: str, args: tuple) -> str:
    if event != "open":
        return event.removeprefix("os.")
    writes = any(c in args[1] for c in "wax+") if args[1] else bool(args[2] & (os.O_WRONLY | os.O_RDWR))
    return "write" if writes else "read"


def stop_when(folder: Path, *conditions: Callable[[], bool]) -> None:
    """Stops this process, a child, at its first step in a folder at which a condition holds; then for the next one."""
    left = list(conditions)

    def act(step: str, path: str) -> None:
        if left and left[0]():
            left.pop(0)
            os.kill(os.getpid(), signal.SIGSTOP)

    watch(folder, act)


def kill_at_every_stage(
    main: Callable[[], None],
    command: list[str],
    folder: Path,
    log: Path,
    before: Callable[[], None] = lambda: None,
    every_time: bool = False,
    same: Callable[[str], str] = str,
) -> list[str]:
    """Starts a script until it ends by itself; each process is killed at the first stage at which none was before.

    A stage is a step in a folder, see `watch`, together with the path and with whether there is something at that path;
    or it is the writing of a file, which is cut in half then. Nothing depends on how long anything takes.

    Args:
        main, command, log: as for `start`; the log lies elsewhere.
        folder: where the stages are.
        before: called before each start.
        every_time: whether a step that one process takes several times is a stage each time.
        same: makes one stage of several, where it gives their names one name.

    Returns:
        The stages, in the order of the kills.
    """
    killed: list[str] = []
    note = log.with_suffix(".stage")

    def run() -> None:
        seen, known, written = Counter(), set(killed), None

        def reach(stage: str, cut: Path | None = None) -> None:
            stage = same(_RANDOM.sub("*", stage))
            seen[stage] += 1
            if every_time:
                stage += f" {seen[stage]}"
            if stage not in known:
                if cut:
                    os.truncate(cut, cut.stat().st_size // 2)
                note.write_text(stage)
                os.kill(os.getpid(), signal.SIGKILL)

        def act(step: str, path: str) -> None:
            nonlocal written
            if written and written.is_file() and written.stat().st_size:
                reach(f"within {written.relative_to(folder)}", written)
            written = folder / path if step == "write" else None
            there = (folder / path).exists()
            if there or step != "remove":  # what is not there can be removed without any change
                reach(f"{step} {path}{' anew' if there else ''}")

        watch(folder, act)
        main()

    while True:
        before()
        pid = start(run, command, log)
        status = wait(pid)
        if status == 0:
            return killed
        assert status == -signal.SIGKILL, log.read_text()
        killed.append(note.read_text())
        note.unlink()
        assert (
            len(set(killed)) == len(killed) < 2000
        )  # names that differ from run to run would give ever more


# What differs from process to process in names of temporary files and folders: a number, or eight letters.
_RANDOM = re.compile(r"(?<=\.)\d+(?=\.unfinished)|(?<=-)[a-z0-9_]{8}(?=/| |$)")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
