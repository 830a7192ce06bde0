"""The ways users go, with the flags they type and no other: train, stop, go on, predict, from results to predictions."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import figure2
import inference
import train
from common.processes import together
from dataset import PixelSetData
from learning.checkpoints import FoldProgress
from learning.run import open_run
from models.stclassifier import PseLTae_pretrained
from models.weights import read_checkpoint
from preprocessing.simulate import simulate
from tests.commands import run_command
from tests.folders import write_folder
from tests.processes import contents, start, wait

ROOT = Path(__file__).resolve().parent.parent
TIMES = {"training_time.json", "figure2.csv", "figure2.png"}  # which tell how long it took


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "simulated"
    simulate(path, 150, seed=5, progress=False, max_pixels=6)
    return path


def run_child(main: Callable[[], None], command: str, log: Path, kill_at: int | None = None) -> int:
    """Runs a script in a child, which dies by SIGKILL at the end of its kill_at-th epoch; returns how it ended."""

    def run() -> None:
        finish, done = FoldProgress.finish_epoch, 0

        def finish_or_die(self: FoldProgress, scores: dict[str, float]) -> bool:
            nonlocal done
            done += 1
            is_best = finish(self, scores)
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return is_best

        FoldProgress.finish_epoch = finish_or_die
        main()

    return wait(start(run, shlex.split(command), log))


def results(folder: Path) -> dict[str, bytes]:
    """Every file of a results folder but those that hold times."""
    return {name: data for name, data in contents(folder).items() if Path(name).name not in TIMES}


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, bytes]]:
    """An uninterrupted training: its results folder, its command and its files."""
    path = tmp_path_factory.mktemp("run")
    command = f"--dataset_folder {dataset} --res_dir {path / 'res'} --epochs 2"
    assert run_child(train.main, command, path / "log") == 0, (path / "log").read_text()
    return path / "res", command, results(path / "res")


def test_a_training_goes_on_with_resume_and_no_other_flag(
    trained: tuple[Path, str, dict[str, bytes]], tmp_path: Path
) -> None:
    res_dir, command, files = trained
    complete = tmp_path / "complete"
    shutil.move(res_dir, complete)
    try:
        assert run_child(train.main, command, tmp_path / "log", kill_at=5) == -signal.SIGKILL
        assert (res_dir / "Fold_3" / "last.pth.tar").exists() and not (res_dir / "Fold_4").exists()
        assert run_child(train.main, f"{command} --resume", tmp_path / "log") == 0, (
            tmp_path / "log"
        ).read_text()
        assert results(res_dir) == files
        assert run_child(train.main, f"{command} --resume", tmp_path / "log") == 0, (
            tmp_path / "log"
        ).read_text()
        assert results(res_dir) == files
    finally:
        shutil.rmtree(res_dir, ignore_errors=True)
        shutil.move(complete, res_dir)


def test_figure2_goes_on_with_the_same_line(dataset: Path, tmp_path: Path) -> None:
    res_dir, log = tmp_path / "figure2", tmp_path / "log"
    command = f"--dataset_folder {dataset} --res_dir {res_dir} --only LTAE/9k TAE/19k --epochs 1"
    assert run_child(figure2.main, command, log) == 0, log.read_text()
    files = results(res_dir)
    shutil.rmtree(res_dir)
    for kill_at in (3, 4):  # in the third fold of the first configuration, and in the second of the other one
        assert run_child(figure2.main, command, log, kill_at) == -signal.SIGKILL
    assert (res_dir / "TAE" / "19k" / "Fold_2").exists()
    assert run_child(figure2.main, command, log) == 0, log.read_text()
    assert results(res_dir) == files
    assert run_child(figure2.main, command, log) == 0, log.read_text()
    assert log.read_text().count(": finished") == 2 + 1  # the first one was, when the second was begun again
    assert results(res_dir) == files


def documented_trainings() -> list[str]:
    """Every training command of the documentation, but those of figure2.py."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
        lines = (line.split("#")[0].strip() for block in blocks for line in block.splitlines())
        found += [line for line in lines if line.startswith("python train.py")]
    return sorted(set(found))


@pytest.mark.parametrize("line", documented_trainings())
def test_settings_that_are_resolved_twice_are_equal(
    line: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What --resume compares is what was resolved, whatever is typed."""
    words = shlex.split(line)[2:]
    for flag, value in (("--dataset_folder", dataset), ("--res_dir", tmp_path / "res")):
        words[words.index(flag) + 1] = str(value)
    if "--folds" in words:
        parts = {"folds": [list(range(1 + k, 151, 5)) for k in range(5)]}
        (tmp_path / "folds.json").write_text(json.dumps(parts))
        words[words.index("--folds") + 1] = str(tmp_path / "folds.json")
    monkeypatch.setattr(train, "train_folds", lambda *args: ([], None))
    monkeypatch.setattr(train, "summarise", lambda *args: None)
    run_command(train.main, shlex.join(words), monkeypatch)
    run_command(train.main, shlex.join([*words, "--resume"]), monkeypatch)


# ------------------------------------------------------------------------------------ from results to predictions


def test_one_line_from_results_and_dataset_to_predictions(
    trained: tuple[Path, str, dict[str, bytes]],
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predicted = open_run(trained[0]).predict(dataset, device="cpu")
    run_command(
        inference.main, f"--weight_dir {trained[0]} --output_dir {tmp_path}", monkeypatch
    )  # the run's dataset
    with open(tmp_path / "predictions.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert predicted.ids == [row["id"] for row in table] and len(table) == 150
    assert [str(label) for label in predicted.labels] == [row["predicted_label"] for row in table]
    assert [str(label) for label in predicted.true_labels] == [row["true_label"] for row in table]
    columns = [[float(row[f"probability_{label}"]) for row in table] for label in predicted.classes]
    np.testing.assert_allclose(predicted.probabilities, np.array(columns).T, rtol=1e-5)
    own = open_run(trained[0]).predict(fold=2, device="cpu")
    assert own.ids == predicted.ids and not np.allclose(own.probabilities, predicted.probabilities)


def test_published_weights_are_scored_on_the_parcels_that_each_fold_did_not_see(
    trained: tuple[Path, str, dict[str, bytes]],
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """They come without conf.json; the folds are restored, and the score is then that of the training."""
    for fold in range(1, 6):
        shutil.copytree(trained[0] / f"Fold_{fold}", tmp_path / "weights" / f"Fold_{fold}")
    command = (
        f"--weight_dir {tmp_path / 'weights'} --dataset_folder {dataset} --output_dir {tmp_path / 'out'} "
        "--kfold 5 --rdm_seed 1"
    )
    run_command(inference.main, command, monkeypatch)
    printed = capsys.readouterr().out
    for fold in range(1, 6):
        metrics = json.loads((trained[0] / f"Fold_{fold}" / "test_metrics.json").read_text())
        expected = f"accuracy {metrics['test_accuracy']:.1f}%, mIoU {metrics['test_IoU']:.3f}"
        assert f"Fold {fold}: {expected} on 30 parcels" in printed
    overall = json.loads((trained[0] / "overall.json").read_text())
    assert f"All: accuracy {100 * overall['Accuracy']:.1f}%, mIoU {overall['MACRO_IoU']:.3f}" in printed
    predicted = np.load(tmp_path / "out" / "Predictions_id_ytrue_y_pred.npy")
    assert (predicted[:, 1] == predicted[:, 2]).mean() == pytest.approx(overall["Accuracy"])


def test_pixels_that_are_not_normalised_are_warned_of_once(
    trained: tuple[Path, str, dict[str, bytes]], dataset: Path
) -> None:
    run = open_run(trained[0])
    kwargs = run.architecture.hyperparameters()
    raw = PixelSetData(dataset, None, 6, extra_feature="geomfeat").evaluation(1).batch(range(20))[0]
    normalised = run.open_dataset(dataset).batch(range(20))[0]
    (pixels, mask), extra = raw
    reflectance = (pixels / 10_000, mask), extra
    for batch in (raw, reflectance):
        model = PseLTae_pretrained(trained[0], kwargs, "cpu")
        with pytest.warns(UserWarning, match="not normalised") as caught:
            model(batch)
            model.predict_class(batch)
        assert len(caught) == 1
    model = PseLTae_pretrained(trained[0], kwargs, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(normalised)
        model(raw)  # the first batch has told


# ------------------------------------------------------------------------------------------ settings are the run's


@pytest.fixture
def with_gaps(tmp_path: Path) -> Path:
    """A dataset in which 200 means missing, which nothing in it says."""
    folder = write_folder(tmp_path / "gaps", n_parcels=18, extra_size=0)
    for path in (folder / "DATA").glob("*.npy"):
        values = np.load(path)
        values[1:3] = 200
        np.save(path, values)
    return folder


def predictions(output: Path) -> bytes:
    return (output / "predictions.csv").read_bytes()


def test_what_means_missing_is_remembered(
    with_gaps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    res_dir = tmp_path / "res"
    command = (
        f"--dataset_folder {with_gaps} --res_dir {res_dir} --nodata 200 --kfold 3 --epochs 1 --batch_size 4"
    )
    run_command(train.main, command, monkeypatch)
    packed = [path.name for path in with_gaps.glob("PACKED-*")]
    infer = f"--weight_dir {res_dir} --dataset_folder {with_gaps}"
    run_command(inference.main, f"{infer} --output_dir {tmp_path / 'plain'}", monkeypatch)
    run_command(inference.main, f"{infer} --output_dir {tmp_path / 'typed'} --nodata 200", monkeypatch)
    assert predictions(tmp_path / "plain") == predictions(tmp_path / "typed")
    assert [path.name for path in with_gaps.glob("PACKED-*")] == packed
    meta = with_gaps / "META" / "info.json"
    meta.write_text(json.dumps({"nodata": 7}))  # what was typed stays
    run_command(inference.main, f"{infer} --output_dir {tmp_path / 'declared'}", monkeypatch)
    assert predictions(tmp_path / "declared") == predictions(tmp_path / "typed")
    run_command(inference.main, f"{infer} --output_dir {tmp_path / 'other'} --nodata 7", monkeypatch)
    assert predictions(tmp_path / "other") != predictions(tmp_path / "typed")
    run_command(train.main, f"{command} --resume", monkeypatch)


def test_another_dataset_may_declare_another_value_that_means_missing(with_gaps: Path) -> None:
    (with_gaps / "META" / "info.json").write_text(json.dumps({"nodata": 200}))
    declared, typed = (
        open_run_with(with_gaps, nodata=200.0, nodata_declared=declared) for declared in (True, False)
    )
    (with_gaps / "META" / "info.json").write_text(json.dumps({"nodata": -1}))
    assert declared.nodata_in(with_gaps) == -1 and typed.nodata_in(with_gaps) == 200
    (with_gaps / "META" / "info.json").unlink()
    assert declared.nodata_in(with_gaps) == typed.nodata_in(with_gaps) == 200


def open_run_with(folder: Path, **settings: object):
    """Data settings as conf.json keeps and gives them back."""
    from data.settings import DataSettings

    settings = DataSettings(**settings)
    config = json.loads(json.dumps(settings.to_config())) | {"lms": 5, "input_dim": 4}
    again = DataSettings.from_config(config)
    assert (again.nodata, again.nodata_declared) == (settings.nodata, settings.nodata_declared)
    return again


@pytest.mark.parametrize("value", [None, 0.0, -9999.0, np.inf, -np.inf])
def test_every_value_that_means_missing_survives_json(value: float | None, tmp_path: Path) -> None:
    assert open_run_with(tmp_path, nodata=value).nodata == value


def test_a_packing_under_a_training_is_left_alone(
    with_gaps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain inference used to remove the packed pixels that a training with --nodata was reading."""
    res_dir, looked = tmp_path / "res", []
    finish = FoldProgress.finish_epoch

    def finish_and_look(self: FoldProgress, scores: dict[str, float]) -> bool:
        looked.append(len(PixelSetData(with_gaps, None, 6, nodata=7)))
        return finish(self, scores)

    monkeypatch.setattr(FoldProgress, "finish_epoch", finish_and_look)
    command = (
        f"--dataset_folder {with_gaps} --res_dir {res_dir} --nodata 200 --kfold 3 --epochs 1 --batch_size 4"
    )
    run_command(train.main, command, monkeypatch)
    assert looked == [18] * 3


def test_a_numpy_number_in_the_optimiser_can_be_read_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a schedule written with NumPy leaves behind."""
    adam = torch.optim.Adam

    def adam_with_numpy(parameters, lr: float, **kwargs: object) -> torch.optim.Adam:
        return adam(parameters, lr=np.float64(lr), **kwargs)

    monkeypatch.setattr(torch.optim, "Adam", adam_with_numpy)
    command = f"--dataset_folder {dataset} --res_dir {tmp_path / 'res'} --kfold 3 --epochs 1"
    run_command(train.main, command, monkeypatch)
    state = read_checkpoint(tmp_path / "res" / "Fold_1" / "model.pth.tar")["optimizer"]
    assert state["param_groups"][0]["lr"] == 0.001 and type(state["param_groups"][0]["lr"]) is float


def test_without_a_dataset_that_is_still_there_inference_asks_for_one(
    trained: tuple[Path, str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    results_dir = Path(shutil.copytree(trained[0], tmp_path / "res"))
    config = json.loads((results_dir / "conf.json").read_text())
    (results_dir / "conf.json").write_text(json.dumps(config | {"dataset_folder": str(tmp_path / "gone")}))
    with pytest.raises(SystemExit) as end:
        run_command(inference.main, f"--weight_dir {results_dir} --output_dir {tmp_path}", monkeypatch)
    error = capsys.readouterr().err
    assert end.value.code == 2 and str(tmp_path / "gone") in error and "--dataset_folder" in error


# ------------------------------------------------------------------------------------------- partly labelled data


def test_parcels_without_a_label_are_left_out_of_training_and_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = write_folder(tmp_path / "set", n_parcels=24, extra_size=0)
    path = folder / "META" / "labels.json"
    labels = json.loads(path.read_text())["label_44class"]
    del labels["5"], labels["6"]
    labels["7"], labels["8"] = None, 77
    path.write_text(json.dumps({"label_44class": labels}))
    command = (
        f"--dataset_folder {folder} --res_dir {tmp_path / 'res'} --kfold 3 --epochs 1 --sub_classes [1,3,9]"
    )
    run_command(train.main, command, monkeypatch)
    printed = capsys.readouterr().out
    assert "Data: 20 parcels" in printed
    assert "3 parcels without a label" in printed and "1 parcels of other classes" in printed
    run_command(train.main, f"{command} --resume", monkeypatch)
    run_command(
        inference.main, f"--weight_dir {tmp_path / 'res'} --output_dir {tmp_path / 'out'}", monkeypatch
    )
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert len(rows) == 24
    for parcel in ("5", "6", "7", "8"):
        assert rows[parcel]["true_label"] == "" and rows[parcel]["predicted_by"] == "all"
    assert {rows[parcel]["predicted_by"] for parcel in rows if parcel not in ("5", "6", "7", "8")} == {
        "1",
        "2",
        "3",
    }


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_labels_from_a_table(separator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "set", n_parcels=20, extra_size=0)
    crops = {i: ("wheat", "maize")[i % 2] for i in range(1, 20)}
    lines = [
        separator.join(("parcel", "area", "crop")),
        *(separator.join((str(i), "1", c)) for i, c in crops.items()),
    ]
    lines.append(separator.join(("20", "1", "")))
    (tmp_path / "crops.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    (folder / "META" / "labels.json").unlink()
    table = f"--labels_table {tmp_path / 'crops.csv'} --id_column parcel --label_column crop"
    command = f"--dataset_folder {folder} --res_dir {tmp_path / 'res'} --kfold 3 --epochs 1 {table}"
    run_command(train.main, command, monkeypatch)
    run_command(train.main, f"{command} --resume", monkeypatch)
    assert open_run(tmp_path / "res").data.classes == ("maize", "wheat")
    found = open_run(tmp_path / "res").predict(device="cpu")
    assert found.true_labels == [crops.get(int(parcel)) for parcel in found.ids]
    (tmp_path / "crops.csv").unlink()
    assert set(open_run(tmp_path / "res").predict(device="cpu").true_labels) == {None}


@pytest.mark.parametrize(
    "content, words",
    [
        ("id,crop\n1,a\n", ["'label'", "id, crop", "--label_column"]),
        ("id,label\n1,a\n1,b\n", ["parcel 1", "'a'", "'b'"]),
        ("id,label\n1,\n", ["nothing", "--label_column"]),
        ("", ["'id'", "--id_column"]),
        (None, ["cannot be read"]),
    ],
)
def test_wrong_tables_in_one_sentence(
    content: str | None,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    folder = write_folder(tmp_path / "set")
    if content is not None:
        (tmp_path / "t.csv").write_text(content)
    command = f"--dataset_folder {folder} --res_dir {tmp_path / 'res'} --labels_table {tmp_path / 't.csv'}"
    with pytest.raises(SystemExit) as end:
        run_command(train.main, command, monkeypatch)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and all(word in error for word in words)


# -------------------------------------------------------------------------------------- mistakes, before data are read


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--tae --gru", ["--tae", "--gru"]),
        ("--kfold 2", ["--kfold is 2", "3"]),
        ("--mlp3 [100,128] --d_model 256", ["100", "256"]),
        ("--gru --n_head 3", ["--n_head", "GRU"]),
        ("--tcnn --mlp3 [64] --mlp4 [32,3]", ["32", "64"]),
        ("--epoch 3", ["--epoch", "--epochs?"]),
        ("--nodata none", ["'none'", "NaN"]),
        ("--pooling mean_middle", ["'middle'"]),
    ],
)
def test_mistakes_are_found_before_data_are_read(
    flags: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    command = f"--dataset_folder {tmp_path / 'nowhere'} --res_dir {tmp_path / 'res'} {flags}"
    with pytest.raises(SystemExit) as end:
        run_command(train.main, command, monkeypatch)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and all(word in error for word in words)
    assert "nowhere" not in error and not (tmp_path / "res").exists()


@pytest.mark.parametrize("flags", ["--mlp3 128", "--mlp3 [128]", "--mlp3 128,128"])
def test_lists_may_be_typed_without_brackets(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", *flags.split()])
    assert train.parse_args().mlp3 == [int(word) for word in re.findall(r"\d+", flags.split()[1])]


def run_script(words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command = f"{shlex.quote(sys.executable)} {words}"
    return subprocess.run(
        command,
        shell=True,
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=600,
    )


def test_scripts_run_from_anywhere_beside_folders_of_the_same_names(dataset: Path, tmp_path: Path) -> None:
    for name in ("models", "data", "common", "learning"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('somebody else’s')\n")
    script, locale = ROOT / "train.py", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    place = tmp_path / "Flächen"
    shutil.copytree(dataset, place)
    done = run_script(
        f"{script} --dataset_folder {place} --res_dir {tmp_path / 'rés'} --kfold 3 --epochs 1 --device cpu",
        tmp_path,
        **locale,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rés" / "overall.json").exists() and "Traceback" not in done.stderr
    done = run_script(f"{script} --help | head -1", tmp_path)
    assert done.stdout.startswith("usage:") and done.stderr == ""


def test_a_batch_that_does_not_fit_is_one_sentence(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command = f"--dataset_folder {dataset} --res_dir {tmp_path} --kfold 3 --epochs 1 --npixel 1000000000000"
    with pytest.raises(SystemExit) as end:
        run_command(together(train.main), command, monkeypatch)
    error = capsys.readouterr().err
    assert end.value.code == 2 and "--npixel" in error and error.count("\n") == 1
