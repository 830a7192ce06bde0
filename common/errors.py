"""Mistakes of the user, as opposed to faults of the program: one sentence, exit code 2."""

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
    try:
        main()
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
