"""learning/predictions.py and data/parts.py: each parcel predicted by classifiers that did not learn from it."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

import inference
from common.arrays import load_arrays
from data.folds import fold_splits
from data.packing import open_store
from data.parts import PARTS, Parts, fingerprints
from learning import predictions
from learning.calibration import Calibration, Logits, fit_temperature
from learning.predictions import OUTPUTS, Predictions
from learning.run import open_run
from models.ensemble import Jury
from reports import season
from tests.commands import Predict, read_table, read_temperatures, run_command, run_train
from tests.folders import write_folder, write_meta

CLASSES = [1, 3, 9]
SPLITS = fold_splits(21, 3, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "set", n_parcels=21)


@pytest.fixture(scope="module")
def weights(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_train(folder, tmp_path_factory.mktemp("run") / "res", "--epochs 3", monkeypatch)


def confusion(output: Path) -> np.ndarray:
    rows = np.load(output / "Predictions_id_ytrue_y_pred.npy")
    mat = np.zeros((3, 3), np.int64)
    np.add.at(mat, (rows[:, 1], rows[:, 2]), rows[:, 1] >= 0)
    return mat


def held_out_by() -> list[str]:
    """The fold, as text, that each parcel was a test parcel of."""
    return [str(next(k for k, (_, _, test) in enumerate(SPLITS, start=1) if i in test)) for i in range(21)]


def test_the_score_of_the_training_dataset_is_that_of_the_training(
    weights: Path, predict: Predict, capsys: pytest.CaptureFixture
) -> None:
    output = predict()
    total = sum(load_arrays(weights / f"Fold_{k}" / "conf_mat.pkl") for k in (1, 2, 3))
    np.testing.assert_array_equal(confusion(output), total)
    overall = json.loads((weights / "overall.json").read_text())
    assert (
        f"All: accuracy {100 * overall['Accuracy']:.1f}%, mIoU {overall['MACRO_IoU']:.3f}"
        in capsys.readouterr().out
    )
    table = read_table(output)
    assert [row["predicted_by"] for row in table] == held_out_by()
    assert {row["agreement"] for row in table} == {"1"}


def test_probabilities_are_those_of_the_fold_at_its_temperature(folder: Path, weights: Path) -> None:
    run = open_run(weights)
    found, dataset, ensemble = (
        run.predict(folder, device="cpu"),
        run.open_dataset(folder),
        run.load(device="cpu"),
    )
    members = ensemble.member_log_probabilities(dataset.batch(range(21))[0])
    temperatures = read_temperatures(weights)
    assert len(set(temperatures)) == 3
    for i, fold in enumerate(map(int, held_out_by())):
        expected = (members[fold - 1, i] / temperatures[fold - 1]).softmax(0)
        np.testing.assert_allclose(found.probabilities[i], expected, rtol=1e-4)
        assert found.predicted[i] == members[fold - 1, i].argmax()
    together = run.predict(folder, fold="all", device="cpu")
    expected = (members.mean(0) / np.mean(temperatures)).softmax(1)
    np.testing.assert_allclose(together.probabilities, expected, rtol=1e-4)
    assert together.predicted.tolist() == members.mean(0).argmax(1).tolist()


def test_a_parcel_is_known_wherever_its_folder_lies(folder: Path, predict: Predict, tmp_path: Path) -> None:
    """Only if id, dates, number of pixels and first pixel are the same: next year's parcels are new."""
    other = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    expected = held_out_by()
    values = np.load(other / "DATA" / "4.npy")
    values[:, :, 0] += 1
    np.save(other / "DATA" / "4.npy", values)
    np.save(other / "DATA" / "7.npy", np.repeat(np.load(other / "DATA" / "7.npy"), 2, axis=2))
    (other / "DATA" / "9.npy").rename(other / "DATA" / "99.npy")
    for name in ("labels", "geomfeat"):
        content = json.loads((other / "META" / f"{name}.json").read_text())
        table = content["label_44class"] if name == "labels" else content
        table["99"] = table.pop("9")
        write_meta(other, name, content)
    rows = read_table(predict(data=other))
    by = {row["id"]: row["predicted_by"] for row in rows}
    assert {parcel for parcel, who in by.items() if who == "all"} == {"4", "7", "99"}
    assert all(by[str(i + 1)] == expected[i] for i in range(21) if i + 1 not in (4, 7, 9))
    dates = json.loads((other / "META" / "dates.json").read_text())
    write_meta(other, "dates", {key: int(value) + 10_000 for key, value in dates.items()})  # a year later
    rows = read_table(predict(data=other, name="later"))
    assert {row["predicted_by"] for row in rows} == {"all"}


def test_parcels_that_no_fold_held_out_are_marked_and_left_out_of_scores(
    weights: Path, predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    part = Path(shutil.copytree(weights, tmp_path / "part"))
    shutil.rmtree(part / "Fold_2")  # as after an interruption
    output = predict(run=part)
    expected = ["seen" if by == "2" else by for by in held_out_by()]
    assert [row["predicted_by"] for row in read_table(output)] == expected
    printed = capsys.readouterr().out
    assert "7 parcels that folds learned from and none held out" in printed
    assert "on 14 parcels with a known class" in printed


def test_folds_of_older_runs_are_rebuilt_and_checked(
    weights: Path, predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    old = Path(shutil.copytree(weights, tmp_path / "old"))
    (old / PARTS).unlink()
    for k in (1, 2, 3):
        (old / f"Fold_{k}" / "calibration.json").unlink()
    output = predict(run=old)
    assert [row["predicted_by"] for row in read_table(output)] == held_out_by()
    config = json.loads((old / "conf.json").read_text())
    (old / "conf.json").write_text(json.dumps(config | {"data_key": "0123456789abcdef"}))
    output = predict(run=old, name="other")
    assert {row["predicted_by"] for row in read_table(output)} == {"all"}
    assert "nothing tells what they learned from" in capsys.readouterr().out


def test_parts_are_looked_up_as_a_plain_loop_does() -> None:
    random = np.random.default_rng(0)
    marks = random.integers(-(2**62), 2**62, 30)
    splits = [(list(range(10)), [10, 11], [12, 13, 14]), ([12, 13, 20], [21], [0, 1, 22])]
    parts = Parts.of(marks, splits)
    asked = np.concatenate([marks[::-1], random.integers(0, 2**62, 5)])
    for folds in ([1, 2], [1], [2]):
        held_out, seen = parts.look_up(asked, folds)
        for mark, fold, was_seen in zip(asked, held_out, seen):
            where = np.flatnonzero(marks == mark)
            i = int(where[0]) if len(where) else -1
            tests = [k for k in folds if i in splits[k - 1][2]]
            learned = any(i in train + val for train, val, _ in splits) and i >= 0
            assert fold == (tests[0] if tests else 0)
            assert was_seen == (not tests and learned)


def test_fingerprints_differ_and_survive_copying(folder: Path, tmp_path: Path) -> None:
    ids = [str(i) for i in range(1, 22)]
    first = fingerprints(folder, ids, open_store(folder))
    assert len(set(first.tolist())) == 21
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    np.testing.assert_array_equal(fingerprints(copied, ids, open_store(copied, tmp_path / "cache")), first)


def test_damaged_parts_are_reported(
    weights: Path, predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bad = Path(shutil.copytree(weights, tmp_path / "bad"))
    (bad / PARTS).write_bytes((bad / PARTS).read_bytes()[:50])
    with pytest.raises(SystemExit) as end:
        predict(run=bad)
    error = capsys.readouterr().err
    assert end.value.code == 2 and PARTS in error and "--fold all" in error


def test_a_model_for_fixed_dates_needs_them_all(
    weights: Path, predict: Predict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for command in (
        lambda: predict("--until 03-01"),
        lambda: run_command(season.main, f"{weights}", monkeypatch),
    ):
        with pytest.raises(SystemExit) as end:
            command()
        error = capsys.readouterr().err
        assert (
            end.value.code == 2 and "all 5" in error and "--varying_dates" in error and error.count("\n") == 1
        )


# -------------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_temperature_undoes_what_logits_were_multiplied_by(factor: float) -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 5, generator=random) * 2
    target = torch.multinomial(logits.softmax(1), 1, generator=random).squeeze(1)
    part = Logits()
    for here in (slice(0, 1000), slice(1000, 4000)):
        part.add(logits[here] * factor, target[here])
    found = fit_temperature(part)
    assert found == pytest.approx(factor, rel=0.1)

    def loss(temperature: float) -> float:  # the plain twin
        p = (logits.double() * factor / temperature).log_softmax(1)
        return float(-p[torch.arange(4000), target].mean())

    best = minimize_scalar(loss, bounds=(0.2, 5), method="bounded").x
    assert found == pytest.approx(best, rel=1e-3)
    calibration = Calibration(found)
    calibration.add(logits * factor, target)
    summary = calibration.summary()
    gap = abs(sum(summary["calibrated"]["confidence"]) - sum(summary["calibrated"]["right"])) / 4000
    assert gap < 0.01 and summary["calibrated"]["right"] != summary["right"] or factor == 1


def test_a_part_that_is_all_right_or_empty_gives_a_temperature_too() -> None:
    assert fit_temperature(Logits()) == 1
    part = Logits()
    part.add(torch.eye(3) * 9, torch.arange(3))
    assert 0.2 <= fit_temperature(part) < 0.3


# ------------------------------------------------------------------------------------------------------ outputs


def test_an_output_file_of_ones_own(predict: Predict, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lines:
        def __init__(self, file: io.BufferedWriter, classes: list[int]) -> None:
            self.file = file

        def add(self, batch: Predictions) -> None:
            for parcel, label in zip(batch.ids, batch.labels):
                self.file.write(f"{parcel} {label}\n".encode())

        def close(self) -> None:
            self.file.write(b"end\n")

    monkeypatch.setitem(OUTPUTS, "labels.txt", Lines)
    output = predict("--batch_size 4")
    expected = [f"{row['id']} {row['predicted_label']}" for row in read_table(output)]
    assert (output / "labels.txt").read_text().splitlines() == [*expected, "end"]


def test_a_jury_votes_as_a_plain_loop_does() -> None:
    torch.manual_seed(0)
    members, held_out = torch.randn(3, 6, 4).log_softmax(2), torch.tensor([0, 2, 5, 0, 7, 2])
    jury = Jury(None, [2, 5, 7], [0.5, 1.0, 2.0], held_out.numpy(), np.zeros(6, bool))
    probabilities, votes = jury.probabilities(members, held_out)
    for i, fold in enumerate(held_out.tolist()):
        if fold:
            k = [2, 5, 7].index(fold)
            expected, vote = (
                (members[k, i] / [0.5, 1.0, 2.0][k]).softmax(0),
                [int(members[k, i].argmax())] * 3,
            )
        else:
            expected, vote = (members[:, i].mean(0) / (3.5 / 3)).softmax(0), members[:, i].argmax(1).tolist()
        torch.testing.assert_close(probabilities[i], expected)
        assert votes[:, i].tolist() == vote


def test_batches_are_joined(folder: Path, weights: Path) -> None:
    run = open_run(weights)
    one = run.predict(folder, device="cpu")
    many = run.predict(folder, device="cpu", batch_size=4)
    assert one.ids == many.ids and predictions.join([one]).ids == one.ids
    np.testing.assert_allclose(one.probabilities, many.probabilities, rtol=1e-4)


@pytest.fixture(scope="module")
def others(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two more trainings: other folds, and another encoder for varying dates."""
    root, flags = tmp_path_factory.mktemp("others"), ("--rdm_seed 2", "--gru --varying_dates --rdm_seed 3")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return [
            run_train(folder, root / str(i), f"--epochs 2 {each}", monkeypatch)
            for i, each in enumerate(flags)
        ]


def test_runs_predict_together(
    folder: Path, weights: Path, others: list[Path], predict: Predict, capsys: pytest.CaptureFixture
) -> None:
    each = [open_run(run).predict(folder, device="cpu") for run in (weights, *others)]
    rows = read_table(predict(f"--with_runs {others[0]} {others[1]}"))
    found = np.array([[float(row[f"probability_{label}"]) for label in CLASSES] for row in rows])
    expected = np.prod([run.probabilities for run in each], axis=0) ** (1 / 3)
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert [row["predicted_label"] for row in rows] == [str(CLASSES[k]) for k in expected.argmax(1)]
    votes = np.mean([run.predicted == expected.argmax(1) for run in each], axis=0)
    np.testing.assert_allclose([float(row["agreement"]) for row in rows], votes, atol=1e-5)
    assert [row["predicted_by"] for row in rows] == held_out_by()
    out = capsys.readouterr().out
    assert all(f"Together with: {run}" in out for run in others)
    right = np.mean([row["predicted_label"] == row["true_label"] for row in rows])
    assert f"All: accuracy {100 * right:.1f}%" in out


def test_what_one_of_the_runs_has_seen_is_seen() -> None:
    def one(**changes: list) -> Predictions:
        values = {"targets": [0, 1, 2], "predicted": [0, 1, 2], "confidence": [1.0] * 3, "agreement": [1.0] * 3,
                  "probabilities": np.full((3, 3), 1 / 3), "held_out": [1, 2, 0], "seen": [False] * 3}  # fmt: skip
        arrays = {name: np.array(value) for name, value in (values | changes).items()}
        return Predictions(["1", "2", "3"], **arrays, classes=CLASSES)

    gone = np.array([[np.nan] * 3, [0.2, 0.5, 0.3], [1.0, 0.0, 0.0]])
    runs = one(), one(held_out=[3, 0, 0], seen=[False, True, False], probabilities=gone, predicted=[-1, 1, 0])
    (both,) = predictions.mean_of_runs([iter([run]) for run in runs])
    assert both.predicted_by == ["1", "seen", "all"] and both.labels == [None, 3, 1]
    np.testing.assert_allclose(
        both.probabilities[1], np.sqrt([0.2, 0.5, 0.3]) / np.sqrt([0.2, 0.5, 0.3]).sum()
    )
    np.testing.assert_allclose(both.probabilities[2], [1, 0, 0], atol=1e-12)
    assert both.agreement.tolist() == [0.5, 1, 0.5]
    sure = [one(probabilities=np.roll(np.eye(3), k, axis=1)) for k in (0, 1)]  # each of another class
    (both,) = predictions.mean_of_runs([iter([run]) for run in sure])
    np.testing.assert_allclose(np.sort(both.probabilities, axis=1), [[0, 0.5, 0.5]] * 3, atol=1e-12)


def test_runs_that_cannot_predict_together(
    folder: Path, weights: Path, others: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    few = run_train(folder, tmp_path / "few", "--epochs 1 --sub_classes [1,3]", monkeypatch)
    bare = Path(shutil.copytree(weights, tmp_path / "bare"))
    (bare / "conf.json").unlink()
    for options, words in (
        (f"--with_runs {few}", "other classes"),
        (f"--with_runs {bare}", "conf.json"),
        (f"--with_runs {tmp_path / 'nowhere'}", "nowhere is not a folder"),
        (f"--with_runs {others[0]} --sets 0.9", "--sets needs one run"),
    ):
        with pytest.raises(SystemExit, match="2"):
            command = f"--weight_dir {weights} --dataset_folder {folder} --output_dir {tmp_path / 'out'}"
            run_command(inference.main, f"{command} {options}", monkeypatch)
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
