"""Settings of the whole suite: no display, one thread, and GPU tests that say when they are skipped."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Before anything imports matplotlib; commands under test inherit it.
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

from tests.processes import end_children

# The tensors are tiny: on busy cores, threads that wait for each other take five times as long as one alone.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped, with a note, where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # not by keywords, among which folders are too
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def predict(
    folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Predicts a module's `folder` by its `weights`, or others, with options; gives the output folder."""
    from tests.commands import run_inference

    def run(options: str = "", data: Path = folder, run: Path = weights, name: str = "out") -> Path:
        return run_inference(data, run, tmp_path / name, options, monkeypatch)

    return run


@pytest.fixture(autouse=True)
def _no_child_stays() -> Iterator[None]:
    yield
    end_children()
