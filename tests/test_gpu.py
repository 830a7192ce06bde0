"""On a real GPU: what `test_cuda.py` tries on an imitated one, and what an imitation cannot tell.

`make gpu` runs all tests marked gpu. Without a GPU they are skipped.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import train
from common.machine import prepare_device
from data.device import DeviceLoader
from data.folds import choose_splits
from dataset import PixelSetData
from learning import crossvalidation
from learning.checkpoints import STATE
from learning.engine import train_epoch
from reports import attention
from tests.commands import run_inference, run_train
from tests.processes import PATIENCE
from tests.test_cuda import (
    CUDA,
    DATES,
    FLAGS,
    Training,
    losses,
    open_folder,
    read_outputs,
    write_shared,
    write_varying,
)

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent
FILES = ("trainlog.json", "test_metrics.json", "model.pth.tar")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    return {"shared": write_shared(root / "shared"), "varying": write_varying(root / "varying")}


@pytest.fixture(autouse=True)
def _prepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The first fold of three, no pictures, and settings of PyTorch that are put back."""
    monkeypatch.setattr(train, "choose_splits", lambda *arguments: choose_splits(*arguments)[:1])
    for module in (train, attention):
        monkeypatch.setattr(module, "save_figure", lambda path, figure: None)
    deterministic = torch.are_deterministic_algorithms_enabled()
    prepare_device(CUDA)
    yield
    torch.use_deterministic_algorithms(deterministic)


def train_on(
    device: str, folder: Path, res_dir: Path, flags: str, monkeypatch: pytest.MonkeyPatch, fits: bool = True
) -> Path:
    if not fits:
        monkeypatch.setattr(PixelSetData, "fits_on", lambda self, device: False)
    options = f"--device {device} --epochs 2 --lr 0.0001 --num_workers 0 {flags}"
    return run_train(folder, res_dir, options, monkeypatch)


def assert_same_files(one: Path, other: Path) -> None:
    for name in FILES:
        assert (one / "Fold_1" / name).read_bytes() == (other / "Fold_1" / name).read_bytes(), name


@pytest.mark.parametrize("dates", DATES)
@pytest.mark.parametrize("name", FLAGS)
def test_a_run_is_that_of_a_cpu_and_can_be_repeated_and_resumed(
    name: str, dates: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs, one of them stopped and resumed, are bit for bit the same, with dropout."""
    folder, flags = folders[dates], FLAGS[name]
    first = train_on("cuda", folder, tmp_path / "first", flags, monkeypatch)
    assert_same_files(first, train_on("cuda", folder, tmp_path / "second", flags, monkeypatch))

    def stop_after_one(*args: object) -> dict[str, float]:
        if (tmp_path / "third" / "Fold_1" / STATE).exists():
            raise KeyboardInterrupt
        return train_epoch(*args)

    with monkeypatch.context() as stopping:
        stopping.setattr(crossvalidation, "train_epoch", stop_after_one)
        with pytest.raises(SystemExit):
            train_on("cuda", folder, tmp_path / "third", flags, stopping)
    third = train_on("cuda", folder, tmp_path / "third", f"{flags} --resume", monkeypatch)
    assert_same_files(first, third)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)  # each device has random numbers of its own
    cpu, *others = (
        train_on(device, folder, tmp_path / f"{device}_{fits}", flags, monkeypatch, fits)
        for device, fits in (("cpu", True), ("cuda", True), ("cuda", False))
    )
    for other in others:
        assert losses(other) == pytest.approx(losses(cpu), rel=1e-3)


@pytest.mark.parametrize("dates", DATES)
@pytest.mark.parametrize("name", FLAGS)
def test_inference_gives_the_numbers_of_a_cpu(
    name: str, dates: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = train_on("cpu", folders[dates], tmp_path / "weights", FLAGS[name], monkeypatch)
    outputs = []
    for device, fits in (("cpu", True), ("cuda", True), ("cuda", False)):
        with monkeypatch.context() as here:
            if not fits:
                here.setattr(PixelSetData, "fits_on", lambda self, device: False)
            output = tmp_path / f"{device}_{fits}"
            run_inference(folders[dates], weights, output, f"--device {device} --num_workers 0", here)
        outputs.append(read_outputs(output)[0])
    for found in outputs[1:]:
        np.testing.assert_allclose(found, outputs[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FLAGS)
def test_replayed_steps_are_those_taken_one_by_one(
    name: str, folders: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    """Bit for bit, with dropout; the learning rate changes at last."""
    eager, replayed = (Training(folders["shared"], replay, name=name) for replay in (False, True))
    for epoch, lr in [(1, 0.001), (2, 0.001), (3, 0.001), (4, 0.01)]:
        assert replayed.train(epoch, lr) == eager.train(epoch, lr)
        for a, b in zip(replayed.state(), eager.state(), strict=True):
            assert torch.equal(a, b)
    assert capsys.readouterr().err == ""  # where it would be said that nothing was captured


@pytest.mark.parametrize("replay", [False, True])
def test_no_step_makes_the_host_wait(
    replay: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = DeviceLoader.items

    def strict(self: DeviceLoader) -> Iterator[Tensor]:
        for each in items(self):
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield each
            finally:
                torch.cuda.set_sync_debug_mode("default")

    training = Training(folders["shared"], replay)
    for epoch in (1, 2, 3):  # a graph is captured in the first and the second, which waits
        training.train(epoch)
    monkeypatch.setattr(DeviceLoader, "items", strict)
    training.train(4, display_step=100)


def test_a_store_of_more_than_2_to_the_31_numbers_is_read(folders: dict[str, Path]) -> None:
    store = open_folder(folders["shared"]).to(CUDA).store
    rows = store._on_device
    n = 2**31 // rows.shape[1] + 1000
    if torch.cuda.mem_get_info()[0] < 2 * n * rows.shape[1] * rows.element_size():
        pytest.skip("too little memory")
    large = copy.copy(store)
    large._on_device = torch.zeros(n, rows.shape[1], dtype=rows.dtype, device=CUDA)
    large._on_device[-len(rows) :] = rows
    large._dtype = store._dtype
    places = torch.arange(len(rows), device=CUDA).unsqueeze(0)
    found, expected = large.read(places + n - len(rows), store.n_dates), store.read(places, store.n_dates)
    assert torch.equal(found.int(), expected.int()) and expected.int().any()


def test_two_gpus_train_together(folders: dict[str, Path], tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["train.py", "--dataset_folder", folders["shared"], "--res_dir", tmp_path / "res"]
    options = "--kfold 3 --npixel 6 --batch_size 4 --epochs 2 --num_workers 0".split()
    run = subprocess.run(
        [*launcher, *map(str, command), *options],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE,
    )  # fmt: skip
    assert run.returncode == 0 and "2 processes" in run.stdout, run.stdout
    log = json.loads((tmp_path / "res" / "Fold_1" / "trainlog.json").read_text())
    assert all(np.isfinite(scores["train_loss"]) for scores in log.values())
