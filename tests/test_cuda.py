"""Training, resuming, predicting and attention on a GPU, imitated by `pretend_cuda.py`: numbers are those of a CPU."""

import csv
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import date, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader

import figure2
import inference
import reports.figure2
import train
from benchmarks import cuda
from common.errors import run_cli
from common.machine import map_tensors, prepared_device
from common.processes import join_ranks
from data.batch import Batch
from data.device import DeviceLoader
from data.folds import choose_splits
from data.samplers import BatchSampler
from dataset import PixelSetData, batch_loader
from learning import crossvalidation
from learning.checkpoints import STATE
from learning.engine import OPTIMIZERS, ReplayedSteps, train_epoch
from learning.focal_loss import FocalLoss
from learning.options import resolve_architecture
from learning.run import open_run
from learning.weight_init import weight_init
from models.architecture import DataShape
from preprocessing.simulate import simulate
from reports import attention, suspects
from tests.commands import run_command, run_inference, run_train
from tests.folders import NOMENCLATURE, write_folder, write_meta
from tests.pretend_cuda import CUDA, ROOM, Log, PretendTensor, pretend_cuda

FLAGS = {"L-TAE": "", "TAE": "--tae", "GRU": "--gru --average_weights 0.9", "TempCNN": "--tcnn"}
WITH_ATTENTION = ("L-TAE", "TAE")
EPOCHS = 2
DATES = {
    "shared": (ROOM, 0),
    "varying": (ROOM,),
}  # bytes free on the device; pixels of varying dates never go there
# Waits of the host in one training step. Each costs more than many kernels: a number may only go down.
WAITS = {"shared": dict.fromkeys(FLAGS, 0), "varying": dict.fromkeys(FLAGS, 0)}
MOST_KERNELS = 190  # of a training step of L-TAE with shared dates


def write_shared(path: Path) -> Path:
    """Fifteen parcels of 1 to 9 pixels, and five dates that the files have out of order."""
    write_folder(path, 15, sizes=[1 + i % 9 for i in range(15)])
    days = json.loads((path / "META" / "dates.json").read_text())
    write_meta(path, "dates", {str(i): days[str(t)] for i, t in enumerate([3, 1, 4, 0, 2])})
    return path


def write_varying(path: Path) -> Path:
    """The same with dates of their own, and pixels, dates and one whole parcel missing."""
    write_shared(path)
    random, dates = np.random.default_rng(1), {}
    for parcel in range(1, 16):
        n_dates = 3 + parcel % 3
        pixels = np.load(path / "DATA" / f"{parcel}.npy")[:n_dates]
        gaps = random.random((n_dates, pixels.shape[2])) < 0.2
        gaps[parcel % n_dates] = parcel % 2
        np.save(path / "DATA" / f"{parcel}.npy", pixels * ~(gaps | (parcel == 7))[:, None])
        days = date(2018, 1, 1) + timedelta(parcel) + 20 * np.arange(n_dates) * timedelta(1)
        dates[str(parcel)] = [str(day) for day in days]
    write_meta(path, "dates", dates)
    write_meta(path, "info", {"nodata": 0})
    return path


ITEMS = DeviceLoader.items
PICTURES = {  # what draws
    train: ("save_figure", "plot_training", "plot_confusion", "write_report"),
    attention: ("save_figure", "plot_attention"),
    suspects: ("save_figure", "plot_suspects"),
    reports.figure2: ("save_figure", "plot_comparison"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    return {"shared": write_shared(root / "shared"), "varying": write_varying(root / "varying")}


@pytest.fixture(scope="module", autouse=True)
def without_pictures() -> Iterator[None]:
    """Nothing is drawn, which would take longer than all else and has nothing to do with the device."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module, names in PICTURES.items():
            for name in names:
                monkeypatch.setattr(module, name, lambda *args, **kwargs: None)
        yield


@pytest.fixture
def log() -> Iterator[Log]:
    with pretend_cuda() as log:
        yield log


def train_on(
    device: str, folder: Path, res_dir: Path, flags: str, monkeypatch: pytest.MonkeyPatch, free: int = ROOM
) -> Path:
    """Trains on the first fold alone, of three, with the device imitated if it is cuda; returns the results folder."""
    monkeypatch.setattr(train, "choose_splits", lambda *arguments: choose_splits(*arguments)[:1])
    # As a DataLoader draws.
    monkeypatch.setattr(
        DeviceLoader, "items", lambda self: (torch.empty((), dtype=torch.int64).random_(), ITEMS(self))[1]
    )
    options = f"--device {device} --epochs {EPOCHS} --lr 0.0001 --num_workers 0 {flags}"
    with pretend_cuda(free) if device == "cuda" else nullcontext():
        return run_train(folder, res_dir, options, monkeypatch)


class Case(NamedTuple):
    """An architecture on a dataset, trained on each device; see `train_on`."""

    name: str
    dates: str
    folder: Path
    cpu: Path
    cuda: Path


# TAE on dates that vary does little that L-TAE does not, and `count_steps` takes it too.
CASES = [(name, dates) for dates in DATES for name in FLAGS if (name, dates) != ("TAE", "varying")]
# Without dropout nothing goes wrong in resuming with shared dates that does not with others.
RESUMED = [(name, dates) for name, dates in CASES if dates == "varying" or name in WITH_ATTENTION]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Case:
    name, dates = request.param
    folder, root = folders[dates], tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        runs = [train_on(where, folder, root / where, FLAGS[name], monkeypatch) for where in ("cpu", "cuda")]
    return Case(name, dates, folder, *runs)


def losses(res_dir: Path) -> list[float]:
    """Of training and validation in every epoch, and of the test."""
    log = json.loads((res_dir / "Fold_1" / "trainlog.json").read_text())
    test = json.loads((res_dir / "Fold_1" / "test_metrics.json").read_text())
    return [
        *(scores[key] for scores in log.values() for key in ("train_loss", "val_loss")),
        test["test_loss"],
    ]


def test_training_gives_the_numbers_of_a_cpu(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [case.cuda]
    if 0 in DATES[case.dates] and case.name in ("L-TAE", "GRU"):
        flags = FLAGS[case.name]
        runs.append(train_on("cuda", case.folder, tmp_path / "res", flags, monkeypatch, free=0))
    for res_dir in runs:
        assert losses(res_dir) == pytest.approx(losses(case.cpu), rel=2e-4)


@pytest.mark.parametrize("free, size", [(ROOM, 32), (0, 4)])
def test_validation_takes_more_parcels_at_a_time_where_the_pixels_are(
    free: int, size: int, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def look(model: nn.Module, criterion: nn.Module, loader: DataLoader, *args: object) -> None:
        raise Seen(loader.sampler.batches.batch_size)

    monkeypatch.setattr(crossvalidation, "evaluation", look)
    with pytest.raises(Seen, match=f"^{size}$"):
        train_on("cuda", folders["shared"], tmp_path / "res", "--batch_size 4", monkeypatch, free)


@pytest.mark.parametrize("case", RESUMED, ids="-".join, indirect=True)
def test_a_resumed_training_is_the_uninterrupted_one(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_after_one(*args: object) -> dict[str, float]:
        if (tmp_path / "res" / "Fold_1" / STATE).exists():
            raise KeyboardInterrupt
        return train_epoch(*args)

    with monkeypatch.context() as stopping:
        stopping.setattr(crossvalidation, "train_epoch", stop_after_one)
        with pytest.raises(SystemExit):
            train_on("cuda", case.folder, tmp_path / "res", FLAGS[case.name], stopping)
    train_on("cuda", case.folder, tmp_path / "res", f"{FLAGS[case.name]} --resume", monkeypatch)
    for name in ("trainlog.json", "test_metrics.json", "model.pth.tar"):
        assert (tmp_path / "res" / "Fold_1" / name).read_bytes() == (case.cuda / "Fold_1" / name).read_bytes()


def test_figure_2_gives_the_numbers_of_a_cpu(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Counted on "meta", which is what the imitation is to C++.
    monkeypatch.setattr(reports.figure2, "measure_model", lambda run: ((1, 1), (None, None)))
    tables = []
    for device in ("cpu", "cuda"):
        command = f"--dataset_folder {folders['shared']} --res_dir {tmp_path / device} --only GRU/15k --device {device} "
        with pretend_cuda() if device == "cuda" else nullcontext() as log:
            run_command(figure2.main, command + "--epochs 1 --kfold 3 --npixel 6 --batch_size 4", monkeypatch)
        tables.append(list(csv.DictReader((tmp_path / device / "figure2.csv").read_text().splitlines())))
        tables[-1][0].pop("training_seconds")
    assert log.kernels.total() > 1000 and tables[0] == tables[1] and len(tables[0]) == 1


def read_outputs(output: Path) -> list[np.ndarray]:
    """The numbers of the table of predictions, and of the attention if there is one."""
    with open(output / "predictions.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    found = [np.array([[float(x or "nan") for x in row[:5] + row[6:]] for row in rows])]  # not predicted_by
    if (output / "attention.npz").exists():
        arrays = np.load(output / "attention.npz")
        found += [arrays[name] for name in ("weight", "ndvi", "ndvi_std", "observed", "parcels")]
    return found


def test_inference_and_attention_give_the_numbers_of_a_cpu(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_sizes: set[int] = set()
    init = BatchSampler.__init__

    def note(self: BatchSampler, indices: Sequence[int], batch_size: int, *args: object) -> None:
        batch_sizes.add(batch_size)
        init(self, indices, batch_size, *args)

    monkeypatch.setattr(BatchSampler, "__init__", note)
    options = "--num_workers 0"
    if case.name in WITH_ATTENTION:
        options += " --attention --ndvi_bands 0 1"
    outputs = []
    for device, free in [("cpu", ROOM), *(("cuda", free) for free in DATES[case.dates])]:
        output = tmp_path / f"{device}_{free}"
        with pretend_cuda(free) if device == "cuda" else nullcontext() as log:
            few = "--batch_size 4" if device == "cpu" else ""
            run_inference(case.folder, case.cpu, output, f"--device {device} {options} {few}", monkeypatch)
        if log is not None:
            has_room = case.dates == "shared" and free > 0
            assert batch_sizes == {1024 if has_room else 128}
            assert any("PixelStore.to" in place for place in log.waits) == has_room
        outputs.append(read_outputs(output))
        if case.name in WITH_ATTENTION[:1] and device == "cuda":
            with pretend_cuda(free):
                predicted = open_run(case.cpu).predict(case.folder, device="cuda")
                both = f"--device cuda --num_workers 0 --with_runs {case.cpu}"  # the mean of a run and itself
                run_inference(case.folder, case.cpu, tmp_path / "both", both, monkeypatch)
            np.testing.assert_allclose(predicted.confidence, outputs[-1][0][:, 3], rtol=1e-5)
            np.testing.assert_allclose(read_outputs(tmp_path / "both")[0], outputs[-1][0], rtol=1e-4)
        batch_sizes.clear()
    expected, *others = outputs
    assert len(expected) == (6 if case.name in WITH_ATTENTION else 1)
    assert np.isnan(expected[0][6]).any() == (case.dates == "varying")  # a parcel without observations
    for found in others:
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------ batches and steps


def open_folder(folder: Path) -> PixelSetData:
    return PixelSetData(folder, NOMENCLATURE, 6, [1, 3, 9], (90.0, 60.0), "geomfeat")


def flatten(batch: object) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda x: found.append(x) or x, batch)
    return found


def test_without_room_the_pixels_stay_where_they_are(folders: dict[str, Path]) -> None:
    dataset = open_folder(folders["shared"])
    n = 2 * dataset.store.n_bytes
    for free, kept, fits in [(n, 0, False), (n + 1, 0, True), (1, n - 1, False), (1, n, True)]:
        with pretend_cuda(free, kept):
            assert dataset.fits_on(CUDA) == fits


@pytest.mark.parametrize("command", ["train", "inference"])
@pytest.mark.parametrize("tf32", [False, True])
def test_a_command_chooses_its_gpu_and_one_precision(
    command: str, tf32: bool, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is left once it has joined."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as PyTorch begins

    class Joined(Exception):
        pass

    def join(*arguments: object) -> None:
        assert join_ranks(*arguments) == torch.device("cuda:1")
        raise Joined

    module, folder = {"train": (train, "--res_dir"), "inference": (inference, "--weight_dir")}[command]
    monkeypatch.setattr(module, "join_ranks", join)
    monkeypatch.setattr("sys.argv", [command, folder, "x", "--device", "cuda:1", *["--tf32"] * tf32])
    with pytest.raises(Joined):
        module.main()
    assert chosen == [torch.device("cuda:1")]
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")


def test_a_device_is_prepared_for_a_while(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as PyTorch begins

    def rules() -> tuple[bool, ...]:
        tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        return *tf32, torch.are_deterministic_algorithms_enabled()

    before = rules()
    for tf32 in (False, True):
        with pytest.raises(KeyError), prepared_device(CUDA, tf32):
            assert rules() == (tf32, tf32, True)
            raise KeyError
        assert rules() == before == (True, False, False)
    with prepared_device(torch.device("cpu")):
        assert rules() == before


def keep(batch: Batch, keys: Tensor) -> Batch:
    """An augmentation of one's own, for which batches are prepared in the host's memory."""
    return batch


@pytest.mark.parametrize("dates", DATES)
def test_batches_can_be_pinned_and_hold_the_same(dates: str, folders: dict[str, Path]) -> None:
    dataset, sampler = open_folder(folders[dates]), BatchSampler(range(8), 4)
    dataset.augment = (keep,)
    with pretend_cuda():
        pinned = flatten(list(batch_loader(dataset.epoch_draws(1), sampler, 0, CUDA)))
    plain = flatten(list(batch_loader(dataset.epoch_draws(1), sampler, 0)))
    assert len(pinned) == len(plain) == 2 * (4 if dates == "shared" else 5)
    for a, b in zip(pinned, plain):
        assert a.pretends_pinned and torch.equal(a, b)
    pixels = pinned[0]
    assert pixels.permute(0, 3, 1, 2).is_contiguous()  # as they lie in memory without pinning


PER_DATE = np.arange(1.0, 21).reshape(5, 4)  # dates, channels


@pytest.mark.parametrize("dates", ["shared", "shared, some missing", "varying"])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_integers_cross_to_the_device_and_become_the_floats_of_a_cpu(
    dates: str, dtype: type, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(folders["varying" if dates == "varying" else "shared"], folder)
    for path in (folder / "DATA").iterdir():
        pixels = np.load(path).astype(dtype) * dtype(257)  # up to 65,535
        if "missing" in dates:
            pixels[int(path.stem) % 5] = 0
        np.save(path, pixels)
    write_meta(folder, "info", {"nodata": 0})
    norm = (90.0, 60.0) if dates == "varying" else (200 * PER_DATE, PER_DATE + 9)
    sent, n = {}, 0
    for jitter in (None, (0.01, 0.05)):
        dataset = PixelSetData(folder, NOMENCLATURE, 6, [1, 3, 9], norm, "geomfeat", jitter)
        assert dataset.varying == (dates != "shared")
        if dataset.varying:
            dataset.temporal_dropout, dataset.temporal_truncation, dataset.temporal_shift = 0.3, 0.5, 5
        drawn, sampler = dataset.epoch_draws(1), BatchSampler(range(len(dataset)), 4, 3)
        expected = flatten(list(batch_loader(drawn, sampler, 0)))
        with pretend_cuda() as log:
            found = flatten(list(batch_loader(drawn, sampler, 0, CUDA)))
        assert not log.waits and all(isinstance(x, PretendTensor) for x in found)
        for a, b in zip(found, expected, strict=True):
            if a.dim() > 1:  # dates that no parcel of the batch has may be cut off
                assert b.shape[-1] != 6 or not b[:, a.shape[1] :].any()  # pixels and mask
                b = b[:, : a.shape[1]]
            torch.testing.assert_close(a.values, b, rtol=1e-6, atol=1e-6)
        sent[jitter], n = log.sent, sum(x.numel() for x in expected if x.dim() == 4)
    raw = sent[None]
    assert raw[torch.uint16] == (2 * n if dtype == np.uint16 else 0)
    floats = sum(
        x.numel() * x.element_size() for x in expected
    )  # what is sent where batches are prepared before
    if dtype == np.uint16:
        assert (
            raw.total() - raw[torch.int64] < floats / 2
        )  # but for labels and the order of dates, which are few
    assert set(sent[0.01, 0.05] - raw) == {torch.int64, torch.float32}  # where noise is read, and the noise


def test_a_dataset_with_draws_takes_them_to_the_device(folders: dict[str, Path]) -> None:
    for view in (lambda dataset: dataset.epoch_draws(1, 2), lambda dataset: dataset.evaluation(1)):
        dataset = open_folder(folders["shared"])
        expected = flatten(view(dataset).batch([3, 9, 0, 5]))
        with pretend_cuda() as log:
            before, after = view(dataset).to(CUDA), view(dataset.to(CUDA))
            log.clear()
            for found in (before, after):
                for a, b in zip(flatten(found.batch([3, 9, 0, 5])), expected, strict=True):
                    torch.testing.assert_close(a.values, b, rtol=1e-6, atol=1e-6)
            assert not log.waits


def test_a_dataset_on_the_device_can_be_normalised_otherwise(folders: dict[str, Path]) -> None:
    dataset = open_folder(folders["shared"]).evaluation(1)
    with pretend_cuda():
        moved = dataset.to(CUDA)
        moved.set_norm((5.0, 3.0))
        found = flatten(moved.batch([3, 9]))
    dataset.set_norm((5.0, 3.0))
    torch.testing.assert_close(found[0].values, flatten(dataset.batch([3, 9]))[0])


def count_steps(name: str, folder: Path, numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Waits and kernels of epochs of so many training steps on 2 parcels each, once the epoch's draws are made."""
    with pretend_cuda() as log:
        dataset = open_folder(folder)
        typed = {FLAGS[name][2:]: True} if FLAGS[name] else {}
        architecture = resolve_architecture(typed, {}, DataShape.of(dataset, 3))
        model = architecture.build().apply(weight_init).to(CUDA)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        assert dataset.fits_on(CUDA) != dataset.varying
        if dataset.fits_on(CUDA):
            dataset = dataset.to(CUDA)
        drawn, counts = dataset.epoch_draws(1), []
        for n in numbers:
            loader = batch_loader(drawn, BatchSampler(range(2 * n), 2), 0, CUDA)
            log.clear()
            train_epoch(model, optimizer, FocalLoss(1), loader, CUDA, 3)
            counts.append((log.waits.total(), log.kernels.total()))
        return counts


@pytest.mark.parametrize("dates", DATES)
@pytest.mark.parametrize("name", FLAGS)
def test_the_host_seldom_waits_for_a_training_step(name: str, dates: str, folders: dict[str, Path]) -> None:
    _, few, many = count_steps(name, folders[dates], (1, 2, 5))  # the first step also begins Adam's moments
    waits, kernels = ((b - a) / 3 for a, b in zip(few, many))
    assert 0 <= waits <= WAITS[dates][name]
    assert kernels > 50
    if (name, dates) == ("L-TAE", "shared"):
        assert kernels <= MOST_KERNELS


class Training:
    """Epochs of 15 parcels in batches of 4, the last one of 3, with dropout, on the device; also for `test_gpu.py`."""

    def __init__(
        self, folder: Path, replay: bool, criterion: nn.Module | None = None, name: str = "L-TAE"
    ) -> None:
        dataset, typed = open_folder(folder).to(CUDA), {FLAGS[name][2:]: True} if FLAGS[name] else {}
        torch.manual_seed(1)
        architecture = resolve_architecture(typed, {}, DataShape.of(dataset, 3))
        self.model = architecture.build().apply(weight_init).to(CUDA)
        self.optimizer = OPTIMIZERS["adam"](self.model.parameters(), 0.001)
        self.drawn, self.criterion = dataset.epoch_draws(0), criterion or FocalLoss(1)
        self.replayed = ReplayedSteps(self.optimizer, 4, 3, CUDA) if replay else None

    def train(self, epoch: int, lr: float = 0.001, display_step: int = 2) -> dict[str, float]:
        self.drawn.redraw(epoch)
        torch.manual_seed(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loader = batch_loader(self.drawn, BatchSampler(range(15), 4, epoch), 0)
        what = self.model, self.optimizer, self.criterion, loader, CUDA, 3
        return train_epoch(*what, display_step, replayed=self.replayed)

    def state(self) -> list[Tensor]:
        states = self.optimizer.state_dict()["state"]
        moments = [states[i][name] for i in states for name in ("step", "exp_avg", "exp_avg_sq")]
        return [x.cpu() for x in (*self.model.state_dict().values(), *moments)]


def test_replayed_steps_are_those_taken_one_by_one(folders: dict[str, Path], log: Log) -> None:
    """Pixels, jitter, order and dropout differ from epoch to epoch, at last the learning rate too."""
    eager, replayed = (Training(folders["shared"], replay) for replay in (False, True))
    for epoch, lr, replays in [(1, 0.001, 0), (2, 0.001, 3), (3, 0.001, 3), (4, 0.01, 3)]:
        expected = eager.train(epoch, lr)
        log.clear()
        assert replayed.train(epoch, lr) == expected
        assert log.replays == replays
        for a, b in zip(replayed.state(), eager.state(), strict=True):
            assert torch.equal(a, b)


class Asking(nn.Module):
    """A loss that makes the host wait."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        assert logits.sum().item() != 0.5
        return FocalLoss(1)(logits, target)


def test_what_cannot_be_captured_is_said_once_and_done_without(
    folders: dict[str, Path], log: Log, capsys: pytest.CaptureFixture
) -> None:
    eager, other = Training(folders["shared"], False), Training(folders["shared"], True, Asking())
    for epoch in (1, 2):
        assert other.train(epoch) == eager.train(epoch)
    assert log.replays == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "CUDA graph" in line and "capturing" in line
    for a, b in zip(other.state(), eager.state(), strict=True):
        assert torch.equal(a, b)


def test_another_epoch_is_drawn_in_the_memory_of_the_first(folders: dict[str, Path], log: Log) -> None:
    dataset = open_folder(folders["shared"]).to(CUDA)
    drawn, other = dataset.epoch_draws(1), dataset.epoch_draws(2)
    before = flatten(drawn.batch([3, 9, 0]))

    def addresses() -> list[int]:
        tensors = [*vars(drawn).values(), *drawn._drawn.values()]
        return [x.values.data_ptr() for x in tensors if isinstance(x, PretendTensor)]

    memory = addresses()
    drawn.redraw(2)
    assert memory == addresses()
    after, expected = flatten(drawn.batch([3, 9, 0])), flatten(other.batch([3, 9, 0]))
    assert all(torch.equal(a.values, b.values) for a, b in zip(after, expected, strict=True))
    assert not torch.equal(before[0].values, after[0].values)


@pytest.mark.parametrize("dates, free, reason", [("shared", 0, "room"), ("varying", ROOM, "vary")])
def test_why_steps_are_not_captured_is_said(
    dates: str,
    free: int,
    reason: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(crossvalidation, "train_fold", lambda *args: ({}, {}))
    monkeypatch.setattr(train, "summarise", lambda *args: None)
    monkeypatch.setattr(train, "draw_curves", lambda *args: lambda logs: None)
    train_on("cuda", folders[dates], tmp_path / "res", "--cuda_graph", monkeypatch, free)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "--cuda_graph" in line]
    assert reason in line


def test_an_augmentation_of_ones_own_is_not_captured(folders: dict[str, Path], log: Log) -> None:
    machine, dataset = crossvalidation.Machine(CUDA, cuda_graph=True), open_folder(folders["shared"])
    dataset = dataset.to(CUDA)
    assert machine.graph_obstacle(dataset) is None
    dataset.augment = (lambda batch, keys: batch,)
    assert "augmentation" in machine.graph_obstacle(dataset)


def test_the_benchmark_of_a_gpu_runs(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the imitation, which has neither a profiler nor a memory of its own."""

    def simulate_little(folder: Path, parcels: int, seed: int, progress: bool) -> None:
        simulate(folder, parcels, seed, progress, max_pixels=4)

    monkeypatch.setattr(cuda, "simulate", simulate_little)
    monkeypatch.setattr(cuda, "BATCH_SIZE", 4)
    monkeypatch.setattr(cuda, "all_configurations", lambda: ["TempCNN/14k"])
    monkeypatch.setattr(cuda.Training, "count_kernels", lambda self: 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    rows = dict(cuda.measure(CUDA, parcels=10, steps=2))
    assert any("10" in name and "graph" in name for name in rows) and any(
        "TempCNN/14k" in name for name in rows
    )
    assert log.replays == (3 * 2 - 3) + (2 + 2 - 3)  # all whole batches but the first three
    assert cuda.IMITATED_KERNELS == MOST_KERNELS
    assert "7" in rows.values()


def test_without_a_gpu_the_benchmark_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["cuda.py"])
    with pytest.raises(SystemExit) as end:
        run_cli(cuda.main)
    assert end.value.code == 2 and "PYTHON=" in capsys.readouterr().err


def test_more_parcels_repeat_those_of_a_few(folders: dict[str, Path], log: Log) -> None:
    small = open_folder(folders["shared"]).to(CUDA)
    large = cuda.enlarge(open_folder(folders["shared"]), 40, CUDA)
    assert len(large) == 40
    small, large = (dataset.evaluation(1) for dataset in (small, large))
    for item in (0, 4):  # of 1 and 5 pixels, all of which are drawn
        for a, b in zip(flatten(large.batch([item + 30])), flatten(small.batch([item])), strict=True):
            assert torch.equal(a.cpu(), b.cpu())


# ------------------------------------------------------------------------------------- the imitation does not pass all


MIXED = {
    "add": lambda here, there: here + there,
    "reversed": lambda here, there: there + here,
    "product": lambda here, there: there @ here,
    "concatenation": lambda here, there: torch.cat([here, there]),
    "index of the host's": lambda here, there: here[there.long()],
    "index_select": lambda here, there: there.index_select(0, torch.zeros(1, dtype=torch.int64)),
    "written to": lambda here, there: here.add_(there),
    "out=": lambda here, there: torch.add(there, 1, out=here),
    "layer": lambda here, there: nn.Linear(3, 2)(there),
    "lengths on the device": lambda here, there: pack_padded_sequence(there, there[0].long(), True),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_devices_are_refused(name: str, log: Log) -> None:
    with pytest.raises(RuntimeError):
        MIXED[name](torch.ones(3, 3), torch.ones(3, 3, device="cuda"))


def test_numbers_of_the_host_may_be_mixed_in(log: Log) -> None:
    x = torch.ones(3, device="cuda") * torch.tensor(2.0)
    assert x.device.type == "cuda" and (x.cpu() == 2).all()


CONVERTED = {"numpy": lambda x: x.numpy(), "asarray": np.asarray, "stack": lambda x: np.stack([x])[0]}


VARYING = {
    "cumsum": lambda x: x.cumsum(0),
    "put": lambda x: x.put_(torch.arange(3, device="cuda"), x.clone()),
    "loss of pictures": lambda x: nn.functional.nll_loss(x.view(1, 3, 1, 1), x.long().view(3, 1, 1)[:1] * 0),
}


@pytest.mark.parametrize("name", VARYING)
def test_kernels_that_give_other_results_every_time_are_refused(name: str, log: Log) -> None:
    x = torch.ones(3, device="cuda")
    VARYING[name](x)
    x.long().cumsum(0)
    torch.use_deterministic_algorithms(True)
    with pytest.raises(RuntimeError, match="deterministic"):
        VARYING[name](x)
    x.long().cumsum(0)


def test_products_need_a_setting_to_be_deterministic(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3, 3, device="cuda")
    torch.use_deterministic_algorithms(True)
    x @ x
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with pytest.raises(RuntimeError, match="CuBLAS"):
        x @ x


@pytest.mark.parametrize("name", CONVERTED)
def test_numpy_is_refused(name: str, log: Log) -> None:
    x = torch.ones(3, device="cuda")
    assert CONVERTED[name](x.cpu()).shape == (3,)
    with pytest.raises(TypeError, match="cuda"):
        CONVERTED[name](x)


def test_memory_that_is_shared_cannot_be_pinned(log: Log) -> None:
    x = torch.arange(12.0).view(3, 4)
    assert torch.equal(x.t().pin_memory(), x.t()) and x.t().pin_memory().stride() == (1, 4)
    with pytest.raises(RuntimeError, match="single memory location"):
        x.unsqueeze(1).expand(-1, 5, -1).pin_memory()
    with pytest.raises(RuntimeError, match="dense CPU"):
        x.to("cuda").pin_memory()


WAITING = {
    "item": lambda x: x.sum().item(),
    "truth": lambda x: bool((x > 0).all()),
    "copy to the host": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "from a list": lambda x: torch.as_tensor([1, 2], device="cuda"),
    "blocking": lambda x: torch.ones(3).pin_memory().to("cuda"),
    "pageable": lambda x: torch.ones(3).to("cuda", non_blocking=True),
}
NOT_WAITING = {
    "arithmetic": lambda x: (x * 2 + x).sum(),
    "made there": lambda x: torch.arange(4, device="cuda"),
    "index": lambda x: x[torch.arange(2, device="cuda")],
    "filling": lambda x: x.clone().masked_fill_(x > 0, 3),
    "pinned": lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
}


@pytest.mark.parametrize("name", [*WAITING, *NOT_WAITING])
def test_waits_are_noted(name: str, log: Log) -> None:
    x = torch.ones(3, device="cuda")
    log.clear()
    (WAITING | NOT_WAITING)[name](x)
    assert log.waits.total() == (name in WAITING)
    assert all("tests/test_cuda.py" in place for place in log.waits)


def test_kernels_are_counted(log: Log) -> None:
    x = torch.ones(3, 4, device="cuda")
    log.clear()
    x.t()[1:].add_(1).exp()
    assert log.kernels["add_"] == log.kernels["exp"] == 1 and log.kernels.total() == 2  # none for the views


@pytest.mark.parametrize("name", WAITING)
def test_nothing_that_waits_can_be_captured(name: str, log: Log) -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        WAITING[name](x)


def test_a_graph_repeats_what_was_captured(log: Log) -> None:
    x, total, factor = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda"), 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x * factor).clone()
        total += y
    assert total.tolist() == [0, 0, 0]  # captured, not carried out
    factor = 5  # too late
    for value in (1, 10):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == 3 * [2 * value]
    assert total.tolist() == 3 * [22] and log.replays == 2


def test_training_steps_replayed_are_those_carried_out(log: Log) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).to(CUDA)
        return model, torch.optim.Adam(model.parameters(), fused=True, capturable=True)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        FocalLoss(1)(model(x), y).backward()
        optimizer.step()

    batches = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(5)]
    eager, replayed = make(), make()
    x, y = (values.to(CUDA) for values in batches[0])
    graph = torch.cuda.CUDAGraph()
    for i, batch in enumerate(batches):
        step(*eager, *(values.to(CUDA) for values in batch))
        x.copy_(batch[0]), y.copy_(batch[1])
        if i == 0:
            step(*replayed, x, y)
            with torch.cuda.graph(graph):
                step(*replayed, x, y)
        else:
            graph.replay()
    for a, b in zip(eager[0].state_dict().values(), replayed[0].state_dict().values(), strict=True):
        assert torch.equal(a.values, b.values)


def test_an_optimizer_has_to_be_capturable(log: Log) -> None:
    weight = nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = torch.optim.Adam([weight], fused=True)
    weight.square().sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_all_is_as_before_afterwards() -> None:
    available, pin = torch.cuda.is_available, Tensor.pin_memory
    with pretend_cuda():
        assert torch.cuda.is_available() and isinstance(torch.ones(2, device="cuda"), PretendTensor)
    assert torch.cuda.is_available is available and Tensor.pin_memory is pin
    assert not isinstance(torch.ones(2, device="meta"), PretendTensor)
