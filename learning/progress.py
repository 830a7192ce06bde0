"""Progress of whatever takes more than two seconds."""

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress_bar(steps: Iterable, name: str, unit: str, shown: bool = True) -> tqdm:
    """Shows progress, rate and time left while `steps` are taken: a bar that goes when done.

    In a log file, where bars would pile up, it is a line a minute for what takes longer than that.
    """
    seconds = (2, 0.2) if sys.stderr.isatty() else (60, 60)
    return tqdm(
        steps, name, unit=f" {unit}", leave=False, delay=seconds[0], mininterval=seconds[1], disable=not shown
    )
