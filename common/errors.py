"""Mistakes of the user, as opposed to faults of the program: one sentence, exit code 2."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a cluster's scheduler sends it; ends a script just as Ctrl-C does."""


class UserError(ValueError):
    """Something the user can put right; its text says what was expected, what was found and what to do."""


@contextmanager
def as_user_error(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Turns the given kinds of exception into a UserError with the same text after `prefix`."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{prefix}{error}") from error


def run_cli(main: Callable[[], None]) -> None:
    """Runs a script's main function; a UserError is printed as one sentence and ends it with exit code 2."""
    earlier = signal.signal(signal.SIGTERM, _raise_terminated)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A path may have letters that the terminal does not.
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell reports this
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("; ".join(["stopped", *getattr(stop, "__notes__", [])]), file=sys.stderr)
        sys.exit(143 if isinstance(stop, Terminated) else 130)  # as a shell reports these signals
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    raise Terminated
