"""suspects.csv: parcels whose label looks wrong, the least probable label first."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from learning.predictions import read_rows
from preprocessing.simulate import simulate
from reports.suspects import find_suspects, plot_suspects
from tests.commands import run_inference, run_train
from tests.folders import write_folder

SWAPPED = 0.05


def write_table(path: Path, true: list[str], probabilities: np.ndarray, by: list[str] | None = None) -> Path:
    """predictions.csv of parcels 1, 2, ... with classes a, b, c, ..."""
    classes = [chr(ord("a") + k) for k in range(probabilities.shape[1])]
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        header = ["id", "true_label", "predicted_label", "confidence", "agreement", "predicted_by"]
        table.writerow([*header, *(f"probability_{name}" for name in classes)])
        for i, (label, row) in enumerate(zip(true, probabilities)):
            predicted = classes[row.argmax()]
            table.writerow([i + 1, label, predicted, row.max(), 1, by[i] if by else "1", *row])
    return path


def swap(labels: np.ndarray, n_classes: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which 5 % at random became another class, and which ones."""
    which = random.choice(len(labels), round(SWAPPED * len(labels)), replace=False)
    labels = labels.copy()
    labels[which] = (labels[which] + random.integers(1, n_classes, len(which))) % n_classes
    return labels, which


def test_swapped_labels_come_first(tmp_path: Path) -> None:
    """Of calibrated predictions that are right for about 85 % of the parcels."""
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.full(6, 0.1), 2000)
    true = (probabilities.cumsum(1) > random.random((2000, 1))).argmax(1)
    assert 0.75 < (probabilities.argmax(1) == true).mean() < 0.9
    declared, which = swap(true, 6, random)
    table = write_table(tmp_path / "t.csv", [chr(ord("a") + k) for k in declared], probabilities)
    suspects, n = find_suspects(read_rows(table))
    assert n == 2000 and len(suspects) == (declared != probabilities.argmax(1)).sum()
    first = {int(row["id"]) - 1 for row in suspects[:100]}
    assert len(first & set(which)) >= 70  # by the confidence in the predicted class 41
    # As a plain sort does.
    wrong = [i for i in range(2000) if declared[i] != probabilities[i].argmax()]
    wrong.sort(key=lambda i: (probabilities[i, declared[i]], -probabilities[i].max()))
    assert [int(row["id"]) - 1 for row in suspects] == wrong
    for row in suspects[::50]:
        i = int(row["id"]) - 1
        assert float(row["true_probability"]) == probabilities[i, declared[i]]


def test_parcels_that_cannot_be_judged_are_passed_over(tmp_path: Path) -> None:
    probabilities = np.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]])
    table = write_table(tmp_path / "t.csv", ["a", "", "a", "a"], probabilities, ["seen", "1", "all", "2"])
    suspects, n = find_suspects(read_rows(table))
    assert [row["id"] for row in suspects] == ["3"] and n == 2
    assert suspects[0] == {
        "id": "3",
        "true_label": "a",
        "predicted_label": "b",
        "confidence": "0.7",
        "true_probability": "0.3",
        "predicted_by": "all",
    }


def test_the_picture_counts_pairs_by_confidence(tmp_path: Path) -> None:
    rows = [
        {
            "true_label": true,
            "predicted_label": "b",
            "true_name": name,
            "predicted_name": "$5",
            "true_probability": p,
        }
        for true, name, p in [
            ("a", "wheat", "1e-5"),
            ("a", "wheat", "0.009"),
            ("a", "wheat", "0.01"),
            ("c", "oats", "0.4"),
        ]
    ]
    figure = plot_suspects(rows, 10)
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["wheat \u2192 $5", "oats \u2192 $5"]
    widths = [[bar.get_width() for bar in bars] for bars in axis.containers]
    assert widths == [[2, 0], [1, 0], [0, 1]]
    figure.savefig(tmp_path / "p.png")
    plot_suspects([], 10).savefig(tmp_path / "none.png")


def test_inference_lists_them_if_the_folds_have_not_learned_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = write_folder(tmp_path / "set", n_parcels=21)
    weights = run_train(folder, tmp_path / "res", "--epochs 1", monkeypatch)
    output = run_inference(folder, weights, tmp_path / "out", "", monkeypatch)
    rows = list(read_rows(output / "predictions.csv"))
    suspects = list(read_rows(output / "suspects.csv"))
    wrong = {row["id"] for row in rows if row["true_label"] != row["predicted_label"]}
    assert wrong and {row["id"] for row in suspects} == wrong
    probability = [float(row["true_probability"]) for row in suspects]
    assert probability == sorted(probability)
    by_id = {row["id"]: row for row in rows}
    for row in suspects:
        assert row["true_probability"] == by_id[row["id"]][f"probability_{row['true_label']}"]
    assert (output / "suspects.png").read_bytes().startswith(b"\x89PNG")
    assert f"Suspects: {len(wrong)} of 21" in capsys.readouterr().out
    output = run_inference(folder, weights, tmp_path / "published", "--fold all", monkeypatch)
    assert not (output / "suspects.csv").exists() and "Suspects: none listed" in capsys.readouterr().out


@pytest.mark.skipif(not os.environ.get("SOAK"), reason="trains; set SOAK=1")
def test_swapped_labels_of_simulated_data_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, random = tmp_path / "set", np.random.default_rng(1)
    simulate(folder, 600, 1, progress=False, max_pixels=30)
    path = folder / "META" / "labels.json"
    labels = json.loads(path.read_text())["label_44class"]
    known = sorted(set(labels.values()))
    numbers, which = swap(np.array([known.index(label) for label in labels.values()]), len(known), random)
    declared = {parcel: known[k] for parcel, k in zip(labels, numbers)}
    path.write_text(json.dumps({"label_44class": declared}))
    options = "--kfold 5 --epochs 30 --batch_size 32 --npixel 16"
    weights = run_train(folder, tmp_path / "res", options, monkeypatch)
    output = run_inference(folder, weights, tmp_path / "out", "", monkeypatch)
    first = [row["id"] for row in read_rows(output / "suspects.csv")][: len(which)]
    swapped = {list(labels)[i] for i in which}
    assert len(swapped & set(first)) >= len(which) / 2
