"""Progress of whatever takes more than two seconds, and of a training in words."""

import sys
import threading
import time
from collections.abc import Iterable

from tqdm import tqdm

# tqdm's own lock is shared by processes that are forked: one that is killed while it holds it would stop all others.
tqdm.set_lock(threading.RLock())


def progress_bar(steps: Iterable, name: str, unit: str, shown: bool = True, total: int | None = None) -> tqdm:
    """Shows progress, rate and time left while `steps`, of which `total` tells the number, are taken: a bar that goes when done.

    In a log file, where bars would pile up, it is a line a minute for what takes longer than that.
    """
    seconds = (2, 0.2) if sys.stderr.isatty() else (60, 60)
    timing = {"delay": seconds[0], "mininterval": seconds[1]}
    return tqdm(steps, name, total, leave=False, unit=f" {unit}", disable=not shown, **timing)


class Clock:
    """Tells rate and time left of n_epochs, over all folds that are not finished."""

    def __init__(self, n_epochs: int) -> None:
        self.n_epochs, self.done = n_epochs, 0
        self.start = self.last = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def skip(self, n_epochs: int) -> None:
        """Leaves out epochs that an earlier process finished."""
        self.n_epochs -= n_epochs
        self.last = time.monotonic()

    def lap(self, n_parcels: int) -> str:
        """Counts an epoch over n_parcels and puts its duration, its rate and the time left into words."""
        now = time.monotonic()
        seconds, self.last, self.done = now - self.last, now, self.done + 1
        left = (now - self.start) / self.done * (self.n_epochs - self.done)
        return f"{format_time(seconds)}, {n_parcels / seconds:,.0f} parcels/s, {format_time(left)} left"


def format_time(seconds: float) -> str:
    """A duration in the unit that suits it."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_scores(scores: dict[str, float]) -> str:
    """Training and validation scores of an epoch in one line."""
    return " | ".join(
        f"{part} loss {scores[f'{part}_loss']:.3f} acc {scores[f'{part}_accuracy']:.1f}% "
        f"mIoU {scores[f'{part}_IoU']:.3f}"
        for part in ("train", "val")
    )
