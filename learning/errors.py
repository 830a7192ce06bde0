"""Mistakes of the user, as opposed to faults of the program: one sentence, exit code 2."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)  # as a shell reports a command that Ctrl-C ended
