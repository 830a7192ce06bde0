"""inference.py from end to end, on tiny random folders."""

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
from tests.commands import Predict, read_table, read_temperatures, run_train
from tests.folders import write_folder

CLASSES = [1, 3, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "set", n_parcels=15)


@pytest.fixture(scope="module")
def weights(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        options = "--epochs 2 --n_head 4 --mlp3 [64,32]"
        return run_train(folder, tmp_path_factory.mktemp("run") / "res", options, monkeypatch)


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


def test_needs_only_weights_and_data(folder: Path, weights: Path, predict: Predict) -> None:
    output = predict("--batch_size 4 --fold all")
    table, array = read_table(output), np.load(output / "Predictions_id_ytrue_y_pred.npy")
    labels = json.loads((folder / "META" / "labels.json").read_text())["label_44class"]
    members = log_probabilities(folder, weights)
    best = members.mean(0).argmax(1)
    temperatures = read_temperatures(weights)
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


def test_two_runs_are_identical(predict: Predict) -> None:
    first = predict(name="a")
    second = predict("--preload", name="b")
    for name in ("predictions.csv", "Predictions_id_ytrue_y_pred.npy"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_one_fold(folder: Path, weights: Path, predict: Predict) -> None:
    output = predict("--fold 2")
    array = np.load(output / "Predictions_id_ytrue_y_pred.npy")
    assert array[:, 2].tolist() == log_probabilities(folder, weights)[1].argmax(1).tolist()
    assert {row["agreement"] for row in read_table(output)} == {"1"}


def test_labels_are_optional(folder: Path, predict: Predict, tmp_path: Path) -> None:
    known = predict(name="known")
    unlabelled = shutil.copytree(folder, tmp_path / "unlabelled")
    (unlabelled / "META" / "labels.json").unlink()
    output = predict(data=unlabelled)
    assert {row["true_label"] for row in read_table(output)} == {""}
    array = np.load(output / "Predictions_id_ytrue_y_pred.npy")
    assert set(array[:, 1]) == {-1}
    assert array[:, 2].tolist() == np.load(known / "Predictions_id_ytrue_y_pred.npy")[:, 2].tolist()


def test_parcels_of_unknown_classes_are_predicted_too(folder: Path, predict: Predict, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    labels = json.loads((other / "META" / "labels.json").read_text())
    first, second = sorted(labels["label_44class"], key=int)[:2]
    labels["label_44class"][first] = 77
    del labels["label_44class"][second]
    (other / "META" / "labels.json").write_text(json.dumps(labels))
    rows = read_table(predict(data=other))
    assert [row["true_label"] for row in rows[:2]] == ["", ""] and rows[2]["true_label"] != ""


def test_normalises_as_in_training(folder: Path, predict: Predict, tmp_path: Path) -> None:
    known = predict(name="known")
    part = shutil.copytree(folder, tmp_path / "part")  # other statistics, of pixels and of extra features
    keep = sorted(int(path.stem) for path in (part / "DATA").glob("*.npy"))[:4]
    for path in (part / "DATA").glob("*.npy"):
        if int(path.stem) not in keep:
            path.unlink()
    features = json.loads((part / "META" / "geomfeat.json").read_text())
    (part / "META" / "geomfeat.json").write_text(json.dumps({str(k): features[str(k)] for k in keep}))
    rows = read_table(predict(data=part))
    assert [row["confidence"] for row in rows] == [row["confidence"] for row in read_table(known)[:4]]


def test_bare_weights_take_the_architecture_from_flags(
    weights: Path, predict: Predict, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    for k in (1, 2, 3):
        shutil.copytree(weights / f"Fold_{k}", bare / f"Fold_{k}")
    options = "--n_head 4 --mlp3 [64,32] --sub_classes [1,3,9] --npixel 6"
    output = predict(options, run=bare)
    known = predict("--fold all", name="known")
    assert (output / "predictions.csv").read_bytes() == (known / "predictions.csv").read_bytes()


def test_flags_override_the_run(predict: Predict, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        predict("--n_head 8")
    assert ended.value.code == 2
    assert "another architecture" in capsys.readouterr().err
