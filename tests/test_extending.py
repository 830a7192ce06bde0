"""The code of docs/extending.md runs as it stands there, and does what the page says."""

import csv
import importlib
import json
import os
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import inference
import models
import train
from data.batch import Batch
from learning.run import open_run
from models.architecture import Architecture
from models.layers import DAYS
from preprocessing.simulate import simulate
from tests.processes import start, wait

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))
ENCODER, TABLES = "A temporal encoder", "Losses, optimisers, schedules, metrics"
SHORT = "--kfold 3 --epochs 2 --npixel 6"
SCRIPTS = {"train.py": train.main, "inference.py": inference.main}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with datasets in it and the new files, where commands run."""
    folder = tmp_path_factory.mktemp("clone")
    simulate(folder / "path" / "to" / "dataset", 120, seed=3, progress=False, max_pixels=6)
    simulate(folder / "irregular", 120, 3, False, 6, irregular=(3, 6), gaps=True)
    for text in SECTIONS.values():
        for path, code in re.findall(r"^`([\w/]+\.py)`:\n\n```python\n(.*?)```", text, flags=re.M | re.S):
            assert not (ROOT / path).exists()
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(code)
    return folder


def run(act: Callable[[], None], command: list[str], clone: Path) -> str:
    """What a child prints that knows the new files; they do not reach other tests."""

    def main() -> None:
        os.chdir(clone)
        models.__path__.append(str(clone / "models"))
        act()

    log = clone / "log"
    log.unlink(missing_ok=True)
    assert wait(start(main, command, log)) == 0, log.read_text()
    return log.read_text()


def commands(section: str) -> list[list[str]]:
    """Words of a section's commands, after `python`."""
    blocks = re.findall(r"```bash\n(.*?)```", SECTIONS[section], flags=re.S)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


def run_commands(section: str, clone: Path, options: str = SHORT) -> str:
    output = ""
    for script, *words in commands(section):
        words += shlex.split(options) if "--res_dir" in words else []
        output += run(SCRIPTS.get(script, lambda: runpy.run_path(script, run_name="__main__")), words, clone)
    return output


def test_an_encoder_trains_resumes_and_predicts(clone: Path) -> None:
    assert "accuracy" in run_commands(ENCODER, clone)
    config = json.loads((clone / "results" / "transformer" / "conf.json").read_text())
    assert config["transformer"] is True and config["n_layers"] == 1 and config["n_head"] == 4
    assert config["mlp4"][0] == config["mlp2"][-1] == 128
    assert "PSE + Transformer" in (clone / "results" / "transformer" / "report.html").read_text()
    with open(clone / "output" / "transformer" / "predictions.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 120
    words = (
        "--dataset_folder path/to/dataset --res_dir results/transformer --transformer --n_layers 1 --resume"
    )
    assert "3 of 3 folds are finished" in run(train.main, shlex.split(f"{words} {SHORT}"), clone)


def test_an_encoder_is_known_by_its_flags(clone: Path) -> None:
    def read_help() -> None:
        with pytest.raises(SystemExit):
            train.parse_args()

    text = run(read_help, ["--help"], clone)
    assert "--transformer" in text and "layers of the Transformer (default: 2)" in " ".join(text.split())
    assert "--tcnn or --transformer" in " ".join(text.split())
    options = (
        "--dataset_folder path/to/dataset --res_dir results/narrow --transformer --mlp4 [32,20] --kfold 3"
    )
    run(train.main, shlex.split(f"{options} --epochs 1 --npixel 6"), clone)
    config = json.loads((clone / "results" / "narrow" / "conf.json").read_text())
    assert config["mlp2"] == [132, 32] and config["mlp4"] == [32, 20]


def test_an_encoder_takes_dates_that_vary(clone: Path) -> None:
    options = "--dataset_folder irregular --res_dir results/irregular --transformer --temporal_dropout 0.3"
    run(train.main, shlex.split(f"{options} --kfold 3 --epochs 1 --npixel 6"), clone)

    def predict() -> None:
        predicted = open_run("results/irregular").predict(device="cpu")
        known = np.array([label is not None for label in predicted.labels])
        assert np.isfinite(predicted.probabilities[known]).all() and known.sum() > 100
        print("predicted", np.isnan(predicted.probabilities[~known]).all())

    assert "predicted True" in run(predict, [], clone)


def test_absent_dates_do_not_change_the_vector_of_an_encoder(clone: Path) -> None:
    def compare() -> None:
        importlib.import_module("models.transformer")
        torch.manual_seed(1)
        architecture = Architecture(
            "transformer", n_dates=None, sizes={"n_head": 4, "n_layers": 2, "dropout": 0.1}
        )
        assert architecture.hyperparameters()["positions"] == DAYS
        model = architecture.build()
        x, mask = torch.randn(3, 5, 10, 4), torch.ones(3, 5, 4)
        extra, days = (
            torch.randn(3, 1, 4).expand(-1, 5, -1),
            torch.tensor([[0.0, 9, 20, 31, 60]]).expand(3, -1),
        )
        mask[0, 2:], mask[1, 1], mask[2] = 0, 0, 0
        vectors = model.eval().embed(Batch(x, mask, extra, days))
        alone = model.embed(Batch(x[:1, :2], mask[:1, :2], extra[:1, :2], days[:1, :2]))
        torch.testing.assert_close(vectors[:1], alone)
        rest = [0, 2, 3, 4]
        alone = model.embed(Batch(x[1:2, rest], mask[1:2, rest], extra[1:2, rest], days[1:2, rest]))
        torch.testing.assert_close(vectors[1:2], alone)
        assert vectors[2].isnan().all()
        model.train()(Batch(x, mask, extra, days)).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        print("compared")

    assert "compared" in run(compare, [], clone)


@pytest.fixture(scope="module")
def mine(clone: Path) -> Path:
    """The results folder of the page's own script."""
    run_commands(TABLES, clone)
    return clone / "results" / "mine"


def test_an_augmentation_changes_training_alone(clone: Path) -> None:
    command = "--dataset_folder path/to/dataset --epochs 1 --kfold 3 --npixel 6 --res_dir"
    run(train.main, shlex.split(f"{command} plain"), clone)

    def main() -> None:
        runpy.run_path("my_augmentation.py", run_name="__main__")

    run(main, shlex.split(f"{command} bright"), clone)
    logs = [
        json.loads((clone / name / "Fold_1" / "trainlog.json").read_text())["1"]
        for name in ("plain", "bright")
    ]
    assert logs[0]["train_loss"] != logs[1]["train_loss"]
    assert logs[0]["train_loss"] == pytest.approx(logs[1]["train_loss"], rel=0.2)
    config = json.loads((clone / "bright" / "conf.json").read_text())
    assert config["augmentations"] == ["vary_brightness"]
    run(main, shlex.split(f"{command} bright --resume"), clone)
    with pytest.raises(AssertionError, match="augmentations"):
        run(train.main, shlex.split(f"{command} bright --resume"), clone)


def test_names_in_tables_train_resume_and_show_in_the_results(clone: Path, mine: Path) -> None:
    config = json.loads((mine / "conf.json").read_text())
    assert [config[name] for name in ("loss", "optimizer", "schedule")] == ["smoothed", "adamw", "cosine"]
    log = json.loads((mine / "Fold_1" / "trainlog.json").read_text())
    assert log["2"].keys() >= {"train_F1", "val_F1"} and 0 <= log["2"]["val_F1"] <= 1
    assert "test_F1" in json.loads((mine / "Fold_1" / "test_metrics.json").read_text())
    optimizer = torch.load(mine / "Fold_1" / "model.pth.tar", weights_only=True)["optimizer"]
    epoch = torch.load(mine / "Fold_1" / "model.pth.tar", weights_only=True)["epoch"]
    assert optimizer["param_groups"][0]["weight_decay"] == 0.01
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(0.001 * (1, 0.5)[epoch - 1])
    assert "3 of 3 folds are finished" in run_commands(TABLES, clone, f"{SHORT} --resume")


def test_the_loss_of_the_page_is_the_mean_over_a_batch(clone: Path) -> None:
    def compare() -> None:
        loss = runpy.run_path("my_train.py")["LOSSES"]["smoothed"](1.0)
        logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
        log_p = logits.log_softmax(1)
        expected = -(0.9 * log_p[torch.arange(6), target] + 0.1 * log_p.mean(1)).mean()
        torch.testing.assert_close(loss(logits, target), expected)
        print("compared")

    assert "compared" in run(compare, [], clone)


def test_an_output_file_is_written_beside_the_others(clone: Path, mine: Path) -> None:
    assert "doubtful.csv" in run_commands("An output file", clone)
    folder = clone / "output" / "mine"
    with open(folder / "predictions.csv", newline="") as file:
        table = list(csv.DictReader(file))
    expected = [row for row in table if float(row["confidence"]) < 0.5]
    lines = (folder / "doubtful.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines] == [
        [row["id"], row["predicted_label"]] for row in expected
    ]
    assert lines and all(float(line.split(",")[2]) <= 0.5 for line in lines)
