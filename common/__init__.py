"""Ground floor: mistakes of the user, files, progress, flags, threads and processes."""

import os
import sys
from pathlib import Path
from types import TracebackType

# A folder of the user's own that is called models, beside which a command was started, must not be taken for ours.
_root = str(Path(__file__).resolve().parent.parent)
if sys.path[0] != _root:
    sys.path.insert(0, _root)


def _say_stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while libraries are still imported is no fault of the program."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _say_stopped

# With it, products on a GPU are the same every time. cuBLAS reads this when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# OpenMP's threads that spin while they wait slow a step down several times when another process uses a core, and keep
# those of common/threads.py from theirs. Some 20 microseconds of it, until the next operation, do little harm and save
# waking up: of GNU's OpenMP, which PyTorch has on Linux, a count of rounds. OpenMP reads this when torch is imported,
# so a script imports this package first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
