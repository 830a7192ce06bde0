"""Runs the two scripts inside the test process, as their command lines would."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import inference
import train
from common.errors import run_cli
from learning.predictions import read_rows

Predict = Callable[..., Path]  # see the fixture `predict`


def run_command(main: Callable[[], None], command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a script's main function with a command line; ends as the script would, by SystemExit, if it is wrong."""
    monkeypatch.setattr(sys, "argv", ["script.py", *shlex.split(command)])
    run_cli(main)


def run_train(
    folder: Path, res_dir: Path, options: str, monkeypatch: pytest.MonkeyPatch, pictures: bool = False
) -> Path:
    """Trains on a folder with 3 folds and small sets of pixels, and returns the results folder.

    Without pictures and the report, which would take longer than the training, unless they are asked for.
    """
    command = f"--dataset_folder {folder} --res_dir {res_dir} --kfold 3 --npixel 6 --batch_size 4 {options}"
    with pytest.MonkeyPatch.context() as plain:
        for name in () if pictures else ("plot_training", "plot_confusion", "save_figure", "write_report"):
            plain.setattr(train, name, lambda *values: None)
        run_command(train.main, command, monkeypatch)
    return res_dir


def run_inference(
    folder: Path, weight_dir: Path, output: Path, options: str, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Predicts a folder and returns the output folder."""
    command = f"--dataset_folder {folder} --weight_dir {weight_dir} --output_dir {output} {options}"
    run_command(inference.main, command, monkeypatch)
    return output


def read_table(output: Path) -> list[dict[str, str]]:
    """The lines of predictions.csv in an output folder."""
    return list(read_rows(output / "predictions.csv"))


def read_temperatures(res_dir: Path) -> list[float]:
    """The temperatures of the three folds of a results folder."""
    paths = [res_dir / f"Fold_{k}" / "calibration.json" for k in (1, 2, 3)]
    return [json.loads(path.read_text())["temperature"] for path in paths]
