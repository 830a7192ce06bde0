"""What happens to real runs: a full disk, files that change, processes that die, a loss that is not finite."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch.utils.data import get_worker_info

import inference
import train
from common.errors import UserError
from common.files import write_bytes
from common.processes import together
from data.packing import open_store
from dataset import PixelSetData
from learning import crossvalidation, predictions
from learning.checkpoints import STATE
from learning.results import TRAINLOG
from models.weights import CHECKPOINT, read_checkpoint
from tests.commands import run_train
from tests.folders import write_folder
from tests.processes import start, stop_when, wait, wait_until_stopped

EPOCHS = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "set", n_parcels=18)


def start_training(folder: Path, res_dir: Path, main: Callable[[], None]) -> int:
    line = f"--dataset_folder {folder} --res_dir {res_dir} --kfold 3 --npixel 6 --batch_size 4 --epochs 8"
    return start(together(main), line.split(), res_dir.with_name("log"))


def begin(folder: Path, res_dir: Path, epochs: Sequence[int] = (1,)) -> int:
    """Starts a training that stops itself whenever one of these epochs is finished; waits for the first time."""

    def finished(epoch: int) -> bool:
        log = res_dir / "Fold_1" / TRAINLOG
        return log.exists() and f'"{epoch}"' in log.read_text()

    def main() -> None:
        stop_when(res_dir, *(lambda epoch=epoch: finished(epoch) for epoch in epochs))
        train.main()

    pid = start_training(folder, res_dir, main)
    wait_until_stopped(pid)
    return pid


def check_end(pid: int, res_dir: Path, *words: str) -> None:
    """A training that ended with one sentence, and left its last finished epoch."""
    assert wait(pid) == 2
    log = res_dir.with_name("log").read_text()
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in log, log
    assert all(word in errors[0] for word in words), errors[0]
    state = read_checkpoint(res_dir / "Fold_1" / STATE)
    assert list(json.loads((res_dir / "Fold_1" / "trainlog.json").read_text())) == [
        str(i) for i in state["log"]
    ]
    read_checkpoint(res_dir / "Fold_1" / CHECKPOINT)


def test_full_disk(folder: Path, tmp_path: Path) -> None:
    pid = begin(folder, tmp_path / "res")
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (200_000, limits[1]))
    os.kill(pid, signal.SIGCONT)
    check_end(pid, tmp_path / "res", "last.pth.tar cannot be written", "make room")
    assert not list((tmp_path / "res" / "Fold_1").glob(".*"))  # nothing half written stays


def test_full_disk_while_predicting(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    res_dir = run_train(folder, tmp_path / "res", "--epochs 1", monkeypatch)

    def predict() -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        inference.main()

    line = f"--dataset_folder {folder} --weight_dir {res_dir} --output_dir {tmp_path / 'out'}"
    assert wait(start(predict, line.split(), tmp_path / "predict.log")) == 2
    assert "out cannot be written" in (tmp_path / "predict.log").read_bytes().decode()
    assert not (tmp_path / "out" / predictions.TABLE).exists()


def test_packing_on_a_full_disk(folder: Path, tmp_path: Path) -> None:
    def pack() -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        open_store(folder)

    assert wait(start(pack, [], tmp_path / "log")) == 2
    assert "cannot be written" in (tmp_path / "log").read_text()
    assert not list(folder.glob("*PACKED-*"))


def test_room_is_taken_before_pixels_are_written(folder: Path) -> None:
    """A file with holes, written through a memory map, would end the process where the disk is full."""
    store = open_store(folder, cache_dir=folder)
    stat = (store.path / "pixels.npy").stat()
    assert stat.st_blocks * 512 >= stat.st_size


def test_an_unwritable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere/x cannot be written .No such file or directory.; make room"):
        write_bytes(tmp_path / "nowhere" / "x", b"")


@pytest.mark.parametrize("removed", [True, False])
def test_pixels_that_change_during_training(folder: Path, tmp_path: Path, removed: bool) -> None:
    pid = begin(folder, tmp_path / "res")
    pixels = next(folder.glob("PACKED-*")) / "pixels.npy"
    if removed:
        shutil.rmtree(pixels.parent)
    else:
        os.utime(pixels)
    os.kill(pid, signal.SIGCONT)
    check_end(pid, tmp_path / "res", str(pixels), "was changed or removed", "--resume")


def test_files_of_parcels_may_go_once_they_are_packed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pid = begin(folder, tmp_path / "res", epochs=(1, 4))
    (folder / "DATA" / "3.npy").unlink()
    os.kill(pid, signal.SIGCONT)
    wait_until_stopped(pid)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    with pytest.raises(SystemExit):
        run_train(folder, tmp_path / "res", "--epochs 8 --resume", monkeypatch)
    assert "was begun; give the same settings and data" in capsys.readouterr().err


def test_a_loading_process_that_dies(folder: Path, tmp_path: Path) -> None:
    load, state = PixelSetData.batch, tmp_path / "res" / "Fold_1" / STATE

    def batch(self, items):
        if get_worker_info() and state.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, items)

    def main() -> None:
        PixelSetData.batch = batch
        crossvalidation.count_workers = lambda asked: 1
        train.main()

    check_end(
        start_training(folder, tmp_path / "res", main),
        tmp_path / "res",
        "a loading process ended",
        "--resume",
    )


def test_a_loss_that_is_not_finite(folder: Path, tmp_path: Path) -> None:
    def main() -> None:
        step, state = torch.optim.Adam.step, tmp_path / "res" / "Fold_1" / STATE

        def diverge(self) -> None:
            step(self)
            if state.exists():
                with torch.no_grad():
                    self.param_groups[0]["params"][-1].fill_(float("inf"))

        torch.optim.Adam.step = diverge
        train.main()

    pid = start_training(folder, tmp_path / "res", main)
    check_end(pid, tmp_path / "res", "Fold 1/3  epoch", "step", "the loss is nan", "--lr")
