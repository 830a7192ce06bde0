"""--sets: sets of classes that hold the true one as often as asked for."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import betabinom

import inference
import train
from learning.calibration import SCORES, Logits, read_temperature, set_threshold, validation_scores
from learning.predictions import Predictions, Telling, read_rows
from learning.run import open_run
from reports.report import calibration_error
from tests.commands import run_command, run_inference, run_train
from tests.folders import write_folder

K = 6


def predictions(p: np.ndarray, held_out: np.ndarray, thresholds: dict[int, float]) -> Predictions:
    n = len(p)
    return Predictions(
        [str(i) for i in range(n)],
        np.zeros(n, int),
        p.argmax(1),
        p.max(1),
        np.ones(n),
        p,
        held_out,
        np.zeros(n, bool),
        list(range(K)),
        Telling(thresholds=thresholds),
    )


def draw(n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated probabilities, and true classes drawn from them."""
    p = random.dirichlet(np.full(K, 0.3), n)
    return p, (p.cumsum(1) > random.random((n, 1))).argmax(1).clip(max=K - 1)


@pytest.mark.parametrize("n, coverage", [(99, 0.9), (300, 0.8), (40, 0.95)])
def test_sets_hold_the_true_class_as_often_as_asked_for(n: int, coverage: float) -> None:
    random, n_test, found, sizes = np.random.default_rng(0), 1000, [], []
    rank = math.ceil((n + 1) * coverage)
    deviation = betabinom(n_test, rank, n + 1 - rank).std() / n_test
    for _ in range(40):
        p, true = draw(n, random)
        threshold = set_threshold(1 - p[np.arange(n), true], coverage)
        p, true = draw(n_test, random)
        sets = predictions(p, np.ones(n_test, int), {1: threshold}).sets
        found.append(np.mean([k in own for k, own in zip(true.tolist(), sets)]))
        sizes.append(np.mean([len(own) for own in sets]))
    assert found[0] >= coverage - 2 * deviation
    mean = np.mean(found)  # of the formula: one rank above the least, as NumPy's "higher" has it
    assert coverage - 2 * deviation / 40**0.5 <= mean <= (rank + 1) / (n + 1) + 2 * deviation / 40**0.5
    assert np.mean(sizes) < K - 1


def test_threshold_is_an_order_statistic() -> None:
    scores = np.random.default_rng(0).random(50)
    for coverage in (0.5, 0.7, 0.9, 0.97):
        rank = math.ceil(round(51 * coverage, 6))
        assert set_threshold(scores, coverage) == sorted(scores)[min(rank, 49)]
    assert (
        set_threshold(scores, 0.99) == set_threshold(scores[:5], 0.9) == set_threshold(scores[:0], 0.5) == 1
    )


def test_the_threshold_is_that_of_the_fold_or_the_largest() -> None:
    p = np.array([[0.5, 0.3, 0.1, 0.06, 0.04, 0.0]] * 4)
    found = predictions(p, np.array([1, 2, 0, 3]), {1: 0.1, 2: 0.75, 3: 0.92})
    assert found.sets == [[0], [0, 1], [0, 1, 2], [0, 1, 2]]
    assert found.told["set"] == ["0", "0|1", "0|1|2", "0|1|2"]


def test_scores_are_as_a_plain_loop_computes_them() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(20, 4), torch.randint(4, (20,))
    part = Logits()
    for here in (slice(0, 13), slice(13, 20)):
        part.add(logits[here], target[here])
    expected = sorted(1 - float((row.double() / 1.7).softmax(0)[k]) for row, k in zip(logits, target))
    np.testing.assert_allclose(validation_scores(part, 1.7, 20), expected, rtol=1e-12)
    assert validation_scores(Logits(), 1.0, 5).shape == (0,)


def test_a_run_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = write_folder(tmp_path / "set", n_parcels=30)
    weights = run_train(folder, tmp_path / "res", "--epochs 1", monkeypatch)
    run = open_run(weights)
    dataset, ensemble = run.open_dataset(), run.load(device="cpu")
    members = ensemble.member_log_probabilities(dataset.batch(range(30))[0]).double()
    thresholds = {}
    for k, member in enumerate(members, start=1):
        held_out_next = 3 if k < 3 else 2  # the part that the fold validates on
        validation = np.flatnonzero(run.jury(dataset, ensemble).held_out == held_out_next)
        p = (member / read_temperature(weights / f"Fold_{k}")).softmax(1).numpy()
        scores = np.sort(1 - p[validation, dataset.target[validation]])
        np.testing.assert_allclose(np.load(weights / f"Fold_{k}" / SCORES), scores, rtol=1e-4)
        thresholds[k] = scores[7]  # the rank of 0.6 of 10 is 7, and one more
    output = run_inference(folder, weights, tmp_path / "out", "--sets 0.6", monkeypatch)
    rows = list(read_rows(output / "predictions.csv"))
    assert list(rows[0])[5:8] == ["predicted_by", "doubt", "set"]
    sizes = set()
    for row in rows:
        p = {label: float(row[f"probability_{label}"]) for label in "139"}
        limit = thresholds[int(row["predicted_by"])]
        ranked = sorted(p, key=lambda label: -p[label])
        inside = [label for label in ranked if 1 - p[label] < limit + 1e-5]
        assert row["set"] == "|".join(inside or ranked[:1]) and ranked[0] == row["predicted_label"]
        sizes.add(row["set"].count("|"))
    assert "set" in next(read_rows(output / "suspects.csv"))
    old = Path(shutil.copytree(weights, tmp_path / "old"))
    for content, message in ((b"junk", "is damaged"), (None, "train again")):
        path = old / "Fold_2" / SCORES
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(SystemExit) as end:
            run_inference(folder, old, tmp_path / "other", "--sets 0.9", monkeypatch)
        error = capsys.readouterr().err
        assert end.value.code == 2 and f"Fold_2/{SCORES}" in error and message in error and "--sets" in error


@pytest.mark.skipif(not os.environ.get("SOAK"), reason="a training with the published settings")
def test_confidence_and_sets_at_the_published_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the embedded simulated dataset; the parcels counted are test parcels, which took no part in any fit."""
    run_command(train.main, f"--res_dir {tmp_path / 'res'}", monkeypatch)
    parts = [
        json.loads(path.read_text())["calibrated"]
        for path in (tmp_path / "res").glob("Fold_*/calibration.json")
    ]
    curve = np.sum([[part[name] for name in ("count", "confidence", "right")] for part in parts], axis=0)
    assert curve[0].sum() == 2000 and calibration_error(*curve) <= 0.03
    run_command(
        inference.main,
        f"--weight_dir {tmp_path / 'res'} --output_dir {tmp_path / 'out'} --sets 0.9",
        monkeypatch,
    )
    rows = list(read_rows(tmp_path / "out" / "predictions.csv"))
    covered = np.mean([row["true_label"] in row["set"].split("|") for row in rows])
    # 400 test parcels a fold, of which as many are covered as 400 validation parcels tell; see the tests above.
    assert covered >= 0.9 - 2 * betabinom(400, 361, 40).std() / 400 / math.sqrt(5)
