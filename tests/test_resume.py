"""A training that is killed, stopped or goes on with other settings."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import train
from learning.progress import tqdm
from learning.results import CONFIG
from learning.resume import STATE
from preprocessing.store import open_store
from tests.commands import run_train
from tests.folders import write_folder, write_meta
from tests.processes import contents, kill_and_repeat, start, wait, wait_for

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
def reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], float]:
    """A results folder's path, what it holds after an uninterrupted run, and the seconds of that run."""
    path = tmp_path_factory.mktemp("run")
    begin = time.monotonic()
    pid = start(train.main, command(folder, path / "res", "--resume"), path / "log")
    assert wait(pid) == 0, (path / "log").read_text()
    seconds = time.monotonic() - begin
    files = contents(path / "res")
    shutil.rmtree(path / "res")
    return path / "res", files, seconds


def begin_run(folder: Path, res_dir: Path, epoch: int) -> None:
    """Trains until fold 2 has finished an epoch, then kills the process."""
    pid = start(train.main, command(folder, res_dir, "--resume"), res_dir.with_name("log"))
    log = res_dir / "Fold_2" / "trainlog.json"
    wait_for(lambda: log.exists() and f'"{epoch}"' in log.read_text(), pid)
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL


def test_killed_at_random_moments_gives_the_same_files(
    reference: tuple[Path, dict[str, bytes], float], folder: Path
) -> None:
    res_dir, files, seconds = reference
    n_kills = 60 if LONG else 20

    def run() -> int:
        return start(train.main, command(folder, res_dir, "--resume"), res_dir.with_name("log"))

    killed = kill_and_repeat(run, n_kills, seconds / 4, seed=1)
    assert killed >= 3  # before it had come to its end
    again = contents(res_dir)
    shutil.rmtree(res_dir)
    assert set(again) == set(files)
    assert [name for name in files if again[name] != files[name]] == []
    assert not any(STATE in name for name in again)


def test_a_process_killed_while_it_draws_a_bar_stops_no_other(tmp_path: Path) -> None:
    shared = tqdm.get_lock()

    def die() -> None:
        with shared:
            os.kill(os.getpid(), signal.SIGKILL)

    assert wait(start(die, [], tmp_path / "log")) == -signal.SIGKILL
    for lock in getattr(
        shared, "locks", [shared]
    ):  # those of tqdm's default, one for processes and one for threads
        assert lock.acquire(timeout=10)
        lock.release()


def test_packing_that_is_killed_is_made_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", n_parcels=600, sizes=[400] * 600)
    begin = time.monotonic()
    open_store(folder)
    seconds = time.monotonic() - begin
    packed = {name: data for name, data in contents(folder).items() if name.startswith("PACKED")}

    def run() -> int:
        for path in folder.glob("PACKED-*"):  # finished before it was killed
            shutil.rmtree(path)
        return start(lambda: open_store(folder), [], tmp_path / "log")

    assert kill_and_repeat(run, 40 if LONG else 8, seconds, seed=2)
    again = {name: data for name, data in contents(folder).items() if "PACKED-" in name}
    assert again == packed  # and nothing beside it


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_says_how_to_go_on(folder: Path, tmp_path: Path, number: int, status: int) -> None:
    res_dir, log = tmp_path / "res", tmp_path / "log"
    pid = start(train.main, command(folder, res_dir), log)
    wait_for((res_dir / "Fold_1" / STATE).exists, pid)
    os.kill(pid, number)
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
    assert end.value.code == 2 and error.startswith("error: --resume: ") and "Traceback" not in error
    assert f" {name} is " in error
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
    reference: tuple[Path, dict[str, bytes], float], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    res_dir, files, _ = reference
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
    pid = start(train.main, command(folder, begun, "--resume"), tmp_path / "log")
    try:
        log = tmp_path / "log"
        wait_for(lambda: log.exists() and "after epoch" in log.read_text(), pid)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(SystemExit):
            run_train(folder, begun, f"--epochs {EPOCHS} --resume", monkeypatch)
        assert "another training" in capsys.readouterr().err
    finally:
        os.kill(pid, signal.SIGKILL)
        wait(pid)
