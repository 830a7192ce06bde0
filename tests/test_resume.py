"""A training that is killed, stopped or goes on with other settings."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import train
from common.files import write_bytes
from common.progress import tqdm
from learning.checkpoints import STATE, FoldProgress
from learning.results import CONFIG
from models.weights import CHECKPOINT, read_checkpoint
from tests.commands import run_train
from tests.folders import write_folder, write_meta
from tests.processes import (
    PATIENCE,
    contents,
    kill_at_every_stage,
    start,
    stop_when,
    wait,
    wait_until_stopped,
)

LONG = bool(os.environ.get("SOAK"))
EPOCHS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "set", n_parcels=18)


def command(folder: Path, res_dir: Path, *more: str) -> list[str]:
    line = (
        f"--dataset_folder {folder} --res_dir {res_dir} --kfold 3 --npixel 6 --batch_size 4 --epochs {EPOCHS}"
    )
    return [*line.split(), *more]


@pytest.fixture(scope="module")
def reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A results folder's path, and what it holds after an uninterrupted run."""
    path = tmp_path_factory.mktemp("run")
    pid = start(train.main, command(folder, path / "res", "--resume"), path / "log")
    assert wait(pid) == 0, (path / "log").read_text()
    files = contents(path / "res")
    shutil.rmtree(path / "res")
    return path / "res", files


def has_epoch(res_dir: Path, fold: int, epoch: int) -> bool:
    """Whether a fold has finished an epoch and written all files."""
    log = res_dir / f"Fold_{fold}" / "trainlog.json"
    return log.exists() and f'"{epoch}"' in log.read_text()


def begin_run(folder: Path, res_dir: Path, epoch: int, *more: str) -> None:
    """Trains until fold 2 has finished an epoch, then kills the process."""

    def main() -> None:
        stop_when(res_dir, lambda: has_epoch(res_dir, 2, epoch))
        train.main()

    pid = start(main, command(folder, res_dir, "--resume", *more), res_dir.with_name("log"))
    wait_until_stopped(pid)
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL


def without_pictures() -> None:
    """Trains; pictures, which take most of the time, are what they would be drawn from, except with SOAK=1."""
    if not LONG:
        train.plot_training = lambda logs: json.dumps(logs).encode()
        train.plot_confusion = lambda *values: repr(values).encode()
        train.save_figure = write_bytes
    train.main()


def test_killed_at_every_stage_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    res_dir = tmp_path / "res"
    line, log = command(folder, res_dir, "--resume"), tmp_path / "log"
    assert wait(start(without_pictures, line, log)) == 0, log.read_text()
    files = contents(res_dir)
    shutil.rmtree(res_dir)

    def same(stage: str) -> str:
        """The second and third fold are one: what is finished before them is on the disk."""
        return stage if LONG else stage.replace("Fold_3", "Fold_2")

    killed = kill_at_every_stage(without_pictures, line, res_dir, log, every_time=LONG, same=same)
    again = contents(res_dir)
    assert set(again) == set(files)
    assert [name for name in files if again[name] != files[name]] == []
    assert not any(STATE in name for name in again)
    # Of all files, half written and put in their place; of those that every epoch replaces, also the second time.
    for path in {Path(same(name)) for name in files if name != ".lock"}:
        assert any(
            stage.startswith(f"within {path.with_name(f'.{path.name}.*.unfinished')}") for stage in killed
        ), path
        assert any(stage.startswith(f"rename {path}") for stage in killed), path
    for fold in (1, 2):
        for name in (STATE, "trainlog.json", CHECKPOINT):
            assert any(stage.startswith(f"rename Fold_{fold}/{name} anew") for stage in killed), (fold, name)


def test_the_mean_of_weights_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What is kept and tested is the plain mean over the last epochs, in one go or killed among them."""
    weights, finish_epoch = [], FoldProgress.finish_epoch

    def watch(progress: FoldProgress, scores: dict[str, float]) -> bool:
        weights.append({name: x.clone() for name, x in progress.model.state_dict().items()})
        return finish_epoch(progress, scores)

    monkeypatch.setattr(FoldProgress, "finish_epoch", watch)
    flags = "--average_weights", "0.5"
    monkeypatch.setattr("sys.argv", ["train.py", *command(folder, tmp_path / "res", *flags)])
    train.main()
    assert "Fold 1/3  test of the mean of epochs 4 to 6: " in capsys.readouterr().out
    whole = contents(tmp_path / "res")
    for fold in (1, 2, 3):
        kept = read_checkpoint(tmp_path / "res" / f"Fold_{fold}" / CHECKPOINT)
        assert kept["epoch"] == EPOCHS
        last = weights[EPOCHS * fold - 3 : EPOCHS * fold]
        for name, values in kept["state_dict"].items():
            mean = torch.stack([each[name].double() for each in last]).mean(0)
            assert torch.allclose(values.double(), mean, rtol=1e-5, atol=1e-7), name

    shutil.rmtree(tmp_path / "res")
    begin_run(folder, tmp_path / "res", 5, *flags)
    log = tmp_path / "log"
    assert wait(start(train.main, command(folder, tmp_path / "res", "--resume", *flags), log)) == 0
    found = contents(tmp_path / "res")
    assert [
        name for name in whole if found[name] != whole[name] and name not in (CONFIG, "report.html")
    ] == []


def test_a_process_killed_while_it_draws_a_bar_stops_no_other(tmp_path: Path) -> None:
    shared = tqdm.get_lock()

    def die() -> None:
        with shared:
            os.kill(os.getpid(), signal.SIGKILL)

    assert wait(start(die, [], tmp_path / "log")) == -signal.SIGKILL
    for lock in getattr(
        shared, "locks", [shared]
    ):  # those of tqdm's default, one for processes and one for threads
        assert lock.acquire(timeout=PATIENCE)
        lock.release()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_says_how_to_go_on(folder: Path, tmp_path: Path, number: int, status: int) -> None:
    res_dir, log = tmp_path / "res", tmp_path / "log"

    def main() -> None:
        stop_when(res_dir, (res_dir / "Fold_1" / STATE).exists)
        train.main()

    pid = start(main, command(folder, res_dir), log)
    wait_until_stopped(pid)
    os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)
    assert wait(pid) == status
    last = log.read_text().splitlines()[-1]
    assert last.startswith("stopped; ") and "--resume" in last and str(res_dir) in last


@pytest.fixture(scope="module")
def unfinished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    res_dir = tmp_path_factory.mktemp("begun") / "res"
    begin_run(folder, res_dir, epoch=3)
    return res_dir


@pytest.fixture
def begun(unfinished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unfinished, tmp_path / "begun"))


@pytest.mark.parametrize(
    "option, name",
    [
        ("--epochs 7", "epochs"),
        ("--lr 0.01", "lr"),
        ("--rdm_seed 2", "rdm_seed"),
        ("--gru", "gru"),
        ("--geomfeat 0", "geomfeat"),
        ("--kfold 4", "kfold"),
    ],
)
def test_other_settings_are_refused(
    begun: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    option: str,
    name: str,
) -> None:
    before = contents(begun)
    with pytest.raises(SystemExit) as end:
        run_train(folder, begun, f"--epochs {EPOCHS} {option} --resume", monkeypatch)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and "Traceback" not in error
    assert f" {name} is " in error and "--res_dir" in error
    assert contents(begun) == before | {".lock": b""}


def test_changed_labels_are_refused(
    begun: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    labels = json.loads((other / "META" / "labels.json").read_text())
    labels["label_44class"]["5"] = 9
    write_meta(other, "labels", labels)
    with pytest.raises(SystemExit):
        run_train(other, begun, f"--epochs {EPOCHS} --resume", monkeypatch)
    assert "data_key" in capsys.readouterr().err


def test_changed_pixels_are_refused(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    other = write_folder(tmp_path / "other", n_parcels=18, seed=3)
    with pytest.raises(SystemExit):
        run_train(other, begun, f"--epochs {EPOCHS} --resume", monkeypatch)
    assert "normalisation.npz does not fit the data" in capsys.readouterr().err


def test_what_has_no_influence_may_differ(
    begun: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    elsewhere = Path(shutil.copytree(folder, tmp_path / "moved"))
    options = f"--epochs {EPOCHS} --resume --preload --num_workers 0 --display_step 1 --device cpu"
    run_train(elsewhere, begun, options, monkeypatch)
    out = capsys.readouterr().out
    assert "1 of 3 folds are finished" in out and "fold 2 after epoch 3" in out
    assert (begun / "overall.json").exists()


def test_a_finished_run_stays_as_it_is(
    reference: tuple[Path, dict[str, bytes]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    res_dir, files = reference
    for name, data in files.items():
        (res_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (res_dir / name).write_bytes(data)
    run_train(folder, res_dir, f"--epochs {EPOCHS} --resume", monkeypatch)
    assert contents(res_dir) == files


def damage_cut(state: Path) -> None:
    state.write_bytes(state.read_bytes()[:-1000])


def damage_log(state: Path) -> None:
    value = torch.load(state, weights_only=True)
    del value["log"][2]
    torch.save(value, state)


def damage_moments(state: Path) -> None:
    value = torch.load(state, weights_only=True)
    value["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(value, state)


def damage_best(state: Path) -> None:
    value = torch.load(state, weights_only=True)
    value["best"] = value["best"][:100].clone()
    torch.save(value, state)


@pytest.mark.parametrize("damage", [damage_cut, damage_log, damage_moments, damage_best])
def test_a_damaged_state_is_named(
    begun: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, damage
) -> None:
    damage(begun / "Fold_2" / STATE)
    with pytest.raises(SystemExit) as end:
        run_train(folder, begun, f"--epochs {EPOCHS} --resume", monkeypatch)
    error = capsys.readouterr().err
    assert end.value.code == 2 and "Fold_2" in error and "Traceback" not in error
    (begun / "Fold_2" / STATE).unlink()  # as the message says
    run_train(folder, begun, f"--epochs {EPOCHS} --resume", monkeypatch)


def test_folds_without_a_configuration_are_not_resumed(
    begun: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (begun / CONFIG).unlink()
    with pytest.raises(SystemExit):
        run_train(folder, begun, f"--epochs {EPOCHS} --resume", monkeypatch)
    assert "no conf.json" in capsys.readouterr().err


def test_two_trainings_do_not_share_a_folder(
    begun: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def main() -> None:
        stop_when(begun, lambda: has_epoch(begun, 2, 4))
        train.main()

    pid = start(main, command(folder, begun, "--resume"), tmp_path / "log")
    try:
        wait_until_stopped(pid)
        with pytest.raises(SystemExit):
            run_train(folder, begun, f"--epochs {EPOCHS} --resume", monkeypatch)
        assert "another training" in capsys.readouterr().err
    finally:
        os.kill(pid, signal.SIGKILL)
        wait(pid)
