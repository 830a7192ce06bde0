"""Training and prediction by several processes: the same results as with one."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from torch import nn

import inference
import train
from common import processes
from common.arrays import load_arrays
from common.errors import UserError
from common.processes import rank, together
from data import packing
from data.folds import choose_splits
from data.store import PixelStore
from learning import crossvalidation, predictions
from learning.calibration import SCORES
from learning.checkpoints import FoldProgress
from learning.weight_init import freeze_idle_biases
from models.stclassifier import PseTae
from tests.folders import write_folder
from tests.processes import PATIENCE, start_ranks, wait

ROOT = Path(__file__).parent.parent
# 12 to 14 parcels are trained on, in batches of 5: the last one can have fewer parcels than there are processes.
OPTIONS = "--kfold 3 --npixel 6 --batch_size 5 --epochs 2 --num_workers 2 --device cpu".split()

SLOW = [
    (3, "fixed", "--tae"),
    (2, "fixed", "--gru"),
    (3, "fixed", "--tcnn"),
    (3, "fixed", "--pooling max_min --lr 0.0001"),
    (2, "varying", "--gru --lr 0.0001"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dataset with shared dates, and one in which observations are missing."""
    path = tmp_path_factory.mktemp("data")
    fixed, varying = (
        write_folder(path / name, n_parcels=41, dtype=np.float32) for name in ("fixed", "varying")
    )
    for parcel in range(1, 40, 3):
        file = varying / "DATA" / f"{parcel}.npy"
        pixels = np.load(file)
        pixels[parcel % 5] = np.nan
        np.save(file, pixels)
    return {"fixed": fixed, "varying": varying}


def train_first_fold() -> None:
    """Trains on the first fold, without dropout."""

    def freeze(model: nn.Module) -> None:
        """Also keeps the one bias of TAE that is without influence then, and whose gradient is rounding errors."""
        freeze_idle_biases(model)
        if isinstance(model, PseTae):
            model.temporal_encoder.inlayernorm.bias.requires_grad_(False)

    train.choose_splits = lambda *args: choose_splits(*args)[:1]
    nn.Dropout.forward = lambda self, x: x  # that of the attention included, which has no flag
    crossvalidation.freeze_idle_biases = freeze
    train.main()


def run_ranks(main, command: list, log: Path, n: int) -> str:
    pids = start_ranks(together(main), [str(word) for word in command], log, n)
    statuses = [wait(pid) for pid in pids]
    text = log.read_text()
    assert statuses == [0] * n, text
    return text


def run_train(folder: Path, res_dir: Path, n: int, *options: str) -> str:
    command = ["--dataset_folder", folder, "--res_dir", res_dir, *OPTIONS, *options]
    return run_ranks(train_first_fold, command, res_dir.with_name(f"{res_dir.name}.log"), n)


def losses(res_dir: Path) -> np.ndarray:
    """Training and validation loss of the first epoch."""
    first = json.loads((res_dir / "Fold_1" / "trainlog.json").read_text())["1"]
    return np.array([first["train_loss"], first["val_loss"]])


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Results of a single process by kind of data and model, made when they are first asked for."""
    path = tmp_path_factory.mktemp("alone")

    class Runs(dict):
        def __missing__(self, key: tuple[str, str]) -> Path:
            data, model = key
            run_train(folders[data], path / f"{data}{model}", 1, *model.split())
            self[key] = path / f"{data}{model}"
            return self[key]

    return Runs()


@pytest.mark.parametrize(
    "n, data, model",
    [
        (2, "fixed", ""),
        (3, "fixed", ""),
        # With smaller steps: Adam makes the most of gradients that are little more than rounding errors.
        (3, "varying", "--lr 0.0001 --average_weights 0.5"),
        *(SLOW if os.environ.get("SOAK") else ()),
    ],
)
def test_same_losses_as_one_process(
    alone: dict, folders: dict[str, Path], tmp_path: Path, n: int, data: str, model: str
) -> None:
    out = run_train(folders[data], tmp_path / "res", n, *model.split())
    assert f"{n} processes" in out and out.count("epoch 1/2") == 1  # printed once
    assert losses(tmp_path / "res") == pytest.approx(losses(alone[data, model]), rel=1e-4)
    mat, same = (load_arrays(r / "Fold_1" / "conf_mat.pkl") for r in (tmp_path / "res", alone[data, model]))
    assert (mat.sum(1) == same.sum(1)).all()  # every parcel counted once
    calibration = json.loads((tmp_path / "res" / "Fold_1" / "calibration.json").read_text())
    assert sum(calibration["count"]) == mat.sum()
    scores, same = (np.load(r / "Fold_1" / SCORES) for r in (tmp_path / "res", alone[data, model]))
    np.testing.assert_allclose(scores, same, atol=1e-3)
    one, several = (json.loads((r / "conf.json").read_text()) for r in (alone[data, model], tmp_path / "res"))
    assert {name for name in one if one[name] != several[name]} == {"res_dir", "command"}


@pytest.mark.parametrize(
    "n, data, model, batch_size", [(2, "fixed", "", 4), (3, "varying", "--lr 0.0001", 9)]
)
def test_same_predictions_as_one_process(
    alone: dict, folders: dict[str, Path], tmp_path: Path, n: int, data: str, model: str, batch_size: int
) -> None:
    for k in (1, n):
        command = ["--dataset_folder", folders[data], "--weight_dir", alone[data, model], "--device", "cpu"]
        command += ["--output_dir", tmp_path / str(k), "--batch_size", batch_size]
        out = run_ranks(inference.main, command, tmp_path / f"{k}.log", k)
        assert out.count("Predictions:") == 1
    for name in (predictions.TABLE, predictions.PREDICTIONS):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / str(n) / name).read_bytes()


def test_a_killed_process_ends_all_and_others_go_on(folders: dict[str, Path], tmp_path: Path) -> None:
    res_dir, log = tmp_path / "res", tmp_path / "res.log"
    options = [*OPTIONS, "--epochs", "6"]

    def main() -> None:
        finish = FoldProgress.finish_epoch

        def die(self: FoldProgress, scores: dict[str, float]) -> bool:
            if rank() == 1 and self.epoch == 1:  # the first process has written what the first epoch gave
                os.kill(os.getpid(), signal.SIGKILL)
            return finish(self, scores)

        FoldProgress.finish_epoch = die
        train_first_fold()

    pids = start_ranks(
        together(main),
        ["--dataset_folder", str(folders["fixed"]), "--res_dir", str(res_dir), *options],
        log,
        3,
    )
    statuses = [wait(pid) for pid in pids]
    assert statuses[0] == 2 and statuses[1] == -signal.SIGKILL and statuses[2] != 0
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "another process" in errors[0] and "--resume" in errors[0]
    assert "Traceback" not in log.read_text()
    out = run_train(folders["fixed"], res_dir, 2, "--epochs", "6", "--resume")
    assert "Resuming: fold 1 after epoch" in out
    log = json.loads((res_dir / "Fold_1" / "trainlog.json").read_text())
    assert list(log) == [str(epoch) for epoch in range(1, 7)]


def test_more_processes_than_parcels_of_a_batch(folders: dict[str, Path], tmp_path: Path) -> None:
    command = ["--dataset_folder", str(folders["fixed"]), "--res_dir", str(tmp_path / "res"), *OPTIONS]
    pids = start_ranks(together(train.main), [*command, "--batch_size", "2"], tmp_path / "log", 3)
    assert [wait(pid) for pid in pids] == [2, 2, 2]
    assert "error: there are 3 processes for batches of 2 parcels" in (tmp_path / "log").read_text()


def test_all_wait_for_one_that_packs_at_its_lock(tmp_path: Path) -> None:
    """It packs once all have come there: did the others wait for it in a collective, it would wait for them."""
    folder = write_folder(tmp_path / "data", n_parcels=41, dtype=np.float32)

    class Lock(FileLock):
        def acquire(self, *args: object, **kwargs: object) -> object:
            if Path(self.lock_file).name == ".PACKED.lock":
                (tmp_path / f"came {rank()}").touch()
            return super().acquire(*args, **kwargs)

    def pack(*args: object) -> None:
        (tmp_path / f"packed {rank()}").touch()
        end = time.monotonic() + PATIENCE / 2
        while len(list(tmp_path.glob("came *"))) < 3:
            assert time.monotonic() < end, "the others do not come to the lock"
            time.sleep(0.01)
        pack_folder(*args)

    def compute(self: PixelStore, per: str, path: Path) -> object:
        (tmp_path / f"mean {rank()}").touch()
        return compute_statistics(self, per, path)

    def main() -> None:
        packing.FileLock, packing._pack, PixelStore._compute_statistics = Lock, pack, compute
        train_first_fold()

    pack_folder, compute_statistics = packing._pack, PixelStore._compute_statistics
    command = ["--dataset_folder", folder, "--res_dir", tmp_path / "res", *OPTIONS]
    run_ranks(main, command, tmp_path / "log", 3)
    assert processes._PATIENCE <= timedelta(minutes=10)
    for step in ("packed", "mean"):
        assert len(list(tmp_path.glob(f"{step} *"))) == 1


def torchrun(*command: object) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*launcher, *map(str, command)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE,
    )  # fmt: skip


def test_torchrun(folders: dict[str, Path], tmp_path: Path) -> None:
    common = ["train.py", "--dataset_folder", folders["fixed"], *OPTIONS]
    run = torchrun(*common, "--res_dir", tmp_path / "res", "--epochs", 1)
    assert run.returncode == 0, run.stdout
    assert "2 processes" in run.stdout and (tmp_path / "res" / "overall.json").exists()
    if not os.environ.get("SOAK"):
        return
    again = torchrun(*common, "--res_dir", tmp_path / "res", "--epochs", 1)
    errors = [line for line in again.stdout.splitlines() if line.startswith("error: ")]
    assert again.returncode == 1 and len(errors) == 1 and "--overwrite" in errors[0]


def test_processes_end_at_once_when_their_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken down as Python ends, threads of gloo among it, could abort one and with it the first."""
    done = []
    monkeypatch.setattr(processes, "n_ranks", lambda: 2)
    monkeypatch.setattr(os, "_exit", lambda status: done.append(status))
    together(lambda: done.append("work"))()
    assert done == ["work", 0]


def test_want_of_memory_is_one_sentence() -> None:
    def fail() -> None:
        raise MemoryError

    with pytest.raises(UserError, match="--batch_size or --npixel"):
        together(fail)()
