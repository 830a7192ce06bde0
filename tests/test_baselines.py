"""The scores that benchmarks compare with are those of scikit-learn called plainly, and those of train.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.metrics import accuracy_score, f1_score, jaccard_score
from torch import nn

from benchmarks import baselines, what_helps
from tests.commands import run_command, run_train
from tests.folders import NOMENCLATURE, write_folder, write_meta

CLASSES = (1, 3, 9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """18 parcels whose first channel tells the class, more or less; some dates are missing."""
    path = write_folder(tmp_path / "data", 18, classes=CLASSES, dtype=np.float32, extra_size=0)
    for parcel in range(1, 19):
        file = path / "DATA" / f"{parcel}.npy"
        pixels = np.load(file)
        pixels[:, 0] += 150 * (parcel % 3)
        if parcel % 4 == 0:
            pixels[parcel % 5] = np.nan
        np.save(file, pixels)
    return path


def read_plainly(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Per-date means (N, L C) and labels (N,) of parcels 1 to N."""
    labels = json.loads((folder / "META" / "labels.json").read_text())[NOMENCLATURE]
    series = [np.load(folder / "DATA" / f"{parcel}.npy").mean(2, np.float64).ravel() for parcel in labels]
    return np.stack(series), np.array(list(labels.values()))


@pytest.mark.parametrize("name, alone", [("forest", False), ("boosting", False), ("forest", True)])
def test_baselines_score_as_scikit_learn_called_plainly(
    name: str, alone: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    parts = [[*range(first, first + 6)] for first in (1, 7, 13)]
    write_meta(folder, "folds", {"folds": parts})
    command = f"--dataset_folder {folder} --folds {folder}/META/folds.json --rdm_seed 4 --seeds 2 --trees 5"
    run_command(baselines.main, f"{command} --only {name}{' --training_only' * alone}", monkeypatch)

    x, y = read_plainly(folder)
    assert np.isnan(x).any()
    expected = []
    for seed in (4, 5):
        found = np.zeros_like(y)
        for k, part in enumerate(parts):
            test = np.isin(np.arange(1, 19), part)
            known = ~test & ~(alone & np.isin(np.arange(1, 19), parts[(k + 1) % 3]))  # next part: validation
            model = (
                RandomForestClassifier(5, random_state=seed)
                if name == "forest"
                else HistGradientBoostingClassifier(random_state=seed)
            )
            found[test] = model.fit(x[known], y[known]).predict(x[test])
        macro = [score(y, found, average="macro") for score in (jaccard_score, f1_score)]
        expected.append([accuracy_score(y, found), *macro])
    mean, error = np.mean(expected, 0), np.ptp(expected, 0) / 2  # that is the standard error of two
    words = "accuracy {:.1f} +- {:.1f} %, mIoU {:.3f} +- {:.3f}, macro F1 {:.3f} +- {:.3f}"
    printed = words.format(*np.stack([mean, error], 1).ravel() * ([100] * 2 + [1] * 4))
    assert printed in capsys.readouterr().out
    assert name == "boosting" or 0.4 < mean[0] < 1 and error[0] > 0


def test_trees_need_dates_that_parcels_share(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    days = {str(parcel): [20170103 + parcel + date for date in range(5)] for parcel in range(1, 19)}
    write_meta(folder, "dates", days)
    with pytest.raises(SystemExit) as stop:
        run_command(baselines.main, f"--dataset_folder {folder}", monkeypatch)
    assert stop.value.code == 2 and str(folder) in capsys.readouterr().err


def test_the_papers_recipe_is_that_of_train(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    options = f"--dataset_folder {folder} --kfold 3 --npixel 6 --batch_size 4 --epochs 2 --num_workers 0"
    run_train(folder, tmp_path / "run", "--epochs 2 --num_workers 0", monkeypatch)
    metrics = json.loads((tmp_path / "run" / "Fold_1" / "test_metrics.json").read_text())
    file = tmp_path / "gains.json"
    command = f"{options} --res_file {file} --seeds 1"
    run_command(what_helps.main, f"{command} --only paper", monkeypatch)
    results = json.loads(file.read_text())
    found = results["scores"]["1"]["paper"]
    assert found["best"] == [metrics["test_accuracy"], metrics["test_IoU"]]

    results["scores"]["1"]["paper"] = {"best": [50, 0.5], "last": [51, 0.51], "averaged": [0, 0]}
    file.write_text(json.dumps(results))
    capsys.readouterr()
    run_command(what_helps.main, command, monkeypatch)  # the others alone
    assert json.loads(file.read_text())["scores"]["1"].keys() == what_helps.TRAININGS.keys()
    printed = capsys.readouterr().out
    assert "| last instead of best epoch | 1 | +1.00" in printed and len(printed.splitlines()) == 2 + len(
        what_helps.ROWS
    )


def test_scores_of_another_task_are_not_taken_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "gains.json"
    command = f"--kfold 3 --npixel 6 --batch_size 4 --epochs 1 --num_workers 0 --seeds 1 --res_file {file} --only mean"
    run_command(what_helps.main, f"{command} --dataset_folder {folder}", monkeypatch)
    before = file.read_bytes()
    assert json.loads(before)["scores"]["1"].keys() == {"paper", "mean"}  # no gain without the paper's
    other = write_folder(tmp_path / "other", 18, classes=(1, 9, 3), dtype=np.float32, extra_size=0)
    for options, name in (
        (f"--dataset_folder {other}", "parcels and folds"),
        (f"--dataset_folder {folder} --kfold 4", "parcels and folds"),
        (f"--dataset_folder {folder} --epochs 2", "epochs"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run_command(what_helps.main, f"{command} {options}", monkeypatch)
        message = capsys.readouterr().err
        assert f"{name} was" in message and "--res_file" in message
    file.write_text('{"1": {}}')
    with pytest.raises(SystemExit, match="2"):
        run_command(what_helps.main, f"{command} --dataset_folder {folder}", monkeypatch)


def test_gains_are_those_of_pairs() -> None:
    scores = {"paper": [(80.0, 0.5), (90.0, 0.7), (85.0, 0.6)], "decay": [(82.0, 0.51), (93.0, 0.71)]}
    results: dict = {str(seed): {} for seed in range(3)}
    for name, of_seeds in scores.items():
        for seed, score in enumerate(of_seeds):
            results[str(seed)][name] = dict.fromkeys(("best", "last", "averaged"), score)
    lines = what_helps.format_table(results).splitlines()
    assert lines[2] == f"| {what_helps.PAPER} | 3 | 85.00 +- 2.89 | 0.6000 +- 0.0577 |"
    (decay,) = (line for line in lines if "AdamW" in line)
    assert decay.endswith("| 2 | +2.50 +- 0.50 | +0.0100 +- 0.0000 |")


def test_what_is_tried_does_what_it_says() -> None:
    weights = what_helps.class_weights(np.repeat([0, 1], [4, 16]), 3)
    assert float(weights[0]) == pytest.approx(2 * float(weights[1]))
    assert float(4 * weights[0] + 16 * weights[1]) == pytest.approx(20)

    logits, target = torch.randn(7, 4, generator=torch.manual_seed(0)), torch.arange(7) % 4
    log_p = logits.log_softmax(1)
    smooth = torch.full((7, 4), 0.1 / 4).scatter(1, target[:, None], 0.9 + 0.1 / 4)
    p = log_p.exp()[torch.arange(7), target]
    expected = ((1 - p) ** 2 * -(smooth * log_p).sum(1)).mean()
    assert torch.allclose(what_helps.SmoothedFocalLoss(2)(logits, target), expected)

    model = nn.Sequential()
    model.spatial_encoder = nn.Identity()
    what_helps.drop_in_pse(model, 0.25)
    dropped = model.train().spatial_encoder(torch.ones(10000))
    assert abs(float((dropped == 0).float().mean()) - 0.25) < 0.03
    assert torch.equal(model.eval().spatial_encoder(torch.ones(9)), torch.ones(9))
