"""inference.py from end to end, on tiny random folders."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import PixelSetData
from learning.results import load_normalisation
from learning.run import open_run
from models.weights import read_checkpoint
from tests.commands import run_inference, run_train
from tests.folders import write_folder

CLASSES = [1, 3, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set"
    write_folder(path, n_parcels=15)
    return path


@pytest.fixture(scope="module")
def weights(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_train(
            folder,
            tmp_path_factory.mktemp("run") / "res",
            "--epochs 2 --n_head 4 --mlp3 [64,32]",
            monkeypatch,
        )


def read_table(output: Path) -> list[dict[str, str]]:
    with open(output / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def log_probabilities(folder: Path, weights: Path) -> torch.Tensor:
    """Every fold's log-softmax, (folds, N, K), computed by hand from the files of the run."""
    config = json.loads((weights / "conf.json").read_text())
    norm, extra = load_normalisation(weights)
    data = PixelSetData(
        folder, None, config["npixel"], norm=norm, extra_feature="geomfeat", extra_stats=extra
    )
    x, _ = data.evaluation(config["rdm_seed"]).batch(range(len(data)))
    result = []
    for k in (1, 2, 3):
        model = open_run(weights).architecture.build()
        model.load_state_dict(read_checkpoint(weights / f"Fold_{k}" / "model.pth.tar")["state_dict"])
        result.append(model.eval()(x).log_softmax(1).detach())
    return torch.stack(result)


def test_needs_only_weights_and_data(
    folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = run_inference(folder, weights, tmp_path / "out", "--batch_size 4 --fold all", monkeypatch)
    table, array = read_table(output), np.load(output / "Predictions_id_ytrue_y_pred.npy")
    labels = json.loads((folder / "META" / "labels.json").read_text())["label_44class"]
    members = log_probabilities(folder, weights)
    best = members.mean(0).argmax(1)
    temperatures = [
        json.loads((weights / f"Fold_{k}" / "calibration.json").read_text())["temperature"] for k in (1, 2, 3)
    ]
    assert [row["id"] for row in table] == sorted(labels, key=int)
    assert array.shape == (15, 3) and array[:, 0].tolist() == sorted(map(int, labels))
    for i, row in enumerate(table):
        assert int(row["true_label"]) == labels[row["id"]] == CLASSES[array[i, 1]]
        assert int(row["predicted_label"]) == CLASSES[best[i]] == CLASSES[array[i, 2]]
        probabilities = [float(row[f"probability_{code}"]) for code in CLASSES]
        calibrated = (members.mean(0)[i] / np.mean(temperatures)).softmax(0)
        assert probabilities == pytest.approx(calibrated.tolist(), abs=1e-4)
        assert float(row["confidence"]) == max(probabilities)
        assert float(row["agreement"]) == pytest.approx(
            (members[:, i].argmax(1) == best[i]).float().mean().item(), abs=1e-5
        )


def test_two_runs_are_identical(
    folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_inference(folder, weights, tmp_path / "a", "", monkeypatch)
    second = run_inference(folder, weights, tmp_path / "b", "--preload", monkeypatch)
    for name in ("predictions.csv", "Predictions_id_ytrue_y_pred.npy"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_one_fold(folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = run_inference(folder, weights, tmp_path / "out", "--fold 2", monkeypatch)
    array = np.load(output / "Predictions_id_ytrue_y_pred.npy")
    assert array[:, 2].tolist() == log_probabilities(folder, weights)[1].argmax(1).tolist()
    assert {row["agreement"] for row in read_table(output)} == {"1"}


def test_labels_are_optional(
    folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = run_inference(folder, weights, tmp_path / "known", "", monkeypatch)
    unlabelled = shutil.copytree(folder, tmp_path / "unlabelled")
    (unlabelled / "META" / "labels.json").unlink()
    output = run_inference(unlabelled, weights, tmp_path / "out", "", monkeypatch)
    assert {row["true_label"] for row in read_table(output)} == {""}
    array = np.load(output / "Predictions_id_ytrue_y_pred.npy")
    assert set(array[:, 1]) == {-1}
    assert array[:, 2].tolist() == np.load(known / "Predictions_id_ytrue_y_pred.npy")[:, 2].tolist()


def test_parcels_of_unknown_classes_are_predicted_too(
    folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    labels = json.loads((other / "META" / "labels.json").read_text())
    first, second = sorted(labels["label_44class"], key=int)[:2]
    labels["label_44class"][first] = 77
    del labels["label_44class"][second]
    (other / "META" / "labels.json").write_text(json.dumps(labels))
    rows = read_table(run_inference(other, weights, tmp_path / "out", "", monkeypatch))
    assert [row["true_label"] for row in rows[:2]] == ["", ""] and rows[2]["true_label"] != ""


def test_normalises_as_in_training(
    folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = run_inference(folder, weights, tmp_path / "known", "", monkeypatch)
    part = shutil.copytree(folder, tmp_path / "part")  # other statistics, of pixels and of extra features
    keep = sorted(int(path.stem) for path in (part / "DATA").glob("*.npy"))[:4]
    for path in (part / "DATA").glob("*.npy"):
        if int(path.stem) not in keep:
            path.unlink()
    features = json.loads((part / "META" / "geomfeat.json").read_text())
    (part / "META" / "geomfeat.json").write_text(json.dumps({str(k): features[str(k)] for k in keep}))
    rows = read_table(run_inference(part, weights, tmp_path / "out", "", monkeypatch))
    assert [row["confidence"] for row in rows] == [row["confidence"] for row in read_table(known)[:4]]


def test_bare_weights_take_the_architecture_from_flags(
    folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare"
    for k in (1, 2, 3):
        shutil.copytree(weights / f"Fold_{k}", bare / f"Fold_{k}")
    options = "--n_head 4 --mlp3 [64,32] --sub_classes [1,3,9] --npixel 6"
    output = run_inference(folder, bare, tmp_path / "out", options, monkeypatch)
    known = run_inference(folder, weights, tmp_path / "known", "--fold all", monkeypatch)
    assert (output / "predictions.csv").read_bytes() == (known / "predictions.csv").read_bytes()


def test_flags_override_the_run(
    folder: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_inference(folder, weights, tmp_path / "out", "--n_head 8", monkeypatch)
    assert ended.value.code == 2
    assert "another architecture" in capsys.readouterr().err
