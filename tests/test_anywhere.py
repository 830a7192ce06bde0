"""With PYTHONPATH set to the repository, every command runs from any folder, on relative paths."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("preprocessing.download", "reports.report")  # for scripts see test_ways.py


def run_elsewhere(folder: Path, module: str, arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, ""), module


@pytest.mark.parametrize("module", COMMANDS)
def test_commands(tmp_path, module):
    run_elsewhere(tmp_path, module, "--help")
