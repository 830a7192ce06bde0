"""Both sides of the benchmark compute the same, and what is measured is what the table says. README's tests run it."""

import json
import mmap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import measure
from benchmarks.__main__ import DATASETS, print_row
from benchmarks.cases import DEFAULT, LARGEST, Cases, Setting, write_folder
from common.machine import map_tensors
from data.settings import DataSettings

NPIXEL = 8  # parcels have up to twice as many
WHOLE = DataSettings(npixel=2 * NPIXEL)  # no parcel is sampled


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("data")
    return [write_folder(root / str(i), 100, NPIXEL, *kind) for i, kind in enumerate(DATASETS)]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], Setting]:
    """A setting whose case `run` is a function of the test."""

    def set_up(run: Callable[[], object]) -> Setting:
        monkeypatch.setattr(measure, "prepare", lambda setting: SimpleNamespace(run=run))
        return Setting("nowhere")

    return set_up


def both(setting: Setting) -> list[Cases]:
    return [Cases(setting._replace(textbook=textbook)) for textbook in (False, True)]


def flatten(batch: object) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    map_tensors(tensors.append, batch)
    return tensors


@pytest.mark.parametrize("preset", ["LTAE/9k", DEFAULT, LARGEST])
def test_models_agree(folders: list[str], preset: str) -> None:
    results = []
    sides = both(Setting(folders[0], DataSettings(npixel=NPIXEL), batch_size=6, preset=preset))
    batch = map_tensors(torch.Tensor.double, sides[1].batch)  # the drawn pixels of one of them
    for cases in sides:
        model = cases.model.double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0
        trained = model.train()(batch)
        nn.functional.cross_entropy(trained, sides[1].target).backward()
        # None for biases that batch statistics take out again, where the other form finds rounding errors.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        assert sum(float(gradient.abs().max()) > 1e-6 for gradient in gradients) > 15
        with torch.no_grad():
            results.append([trained, model.eval()(batch), *gradients])
    for fast, textbook in zip(*results, strict=True):
        assert torch.allclose(fast, textbook, rtol=1e-9, atol=1e-10)


def test_training_one_side_leaves_the_other_alone(folders: list[str]) -> None:
    sides = both(Setting(folders[0], WHOLE, batch_size=4))
    before = [[p.clone() for p in cases.model.parameters()] for cases in sides]
    for ours, theirs in zip(*before, strict=True):
        assert torch.equal(ours, theirs)
    sides[0].step()
    assert any(not torch.equal(p, old) for p, old in zip(sides[0].model.parameters(), before[0]))
    assert all(torch.equal(p, old) for p, old in zip(sides[1].model.parameters(), before[1]))


@pytest.mark.parametrize("dataset", [0, 1])
def test_loaders_agree(folders: list[str], dataset: int) -> None:
    setting = Setting(folders[dataset], WHOLE, batch_size=100, jitter=False)
    fast, textbook = ([*flatten(cases.batch), cases.target] for cases in both(setting))
    for ours, theirs in zip(fast, textbook, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_both_loaders_go_through_every_parcel_in_another_order_each_epoch(folders: list[str]) -> None:
    for cases in both(Setting(folders[0], WHOLE, batch_size=16)):
        epochs = [[target for _, target in cases.epoch()] for _ in range(2)]
        assert [len(target) for target in epochs[0]] == 6 * [16] + [4]
        first, second = map(torch.cat, epochs)
        assert not torch.equal(first, second)
        in_order = torch.cat([target for _, target in cases.in_order(cases.dataset)])
        assert first.sort()[0].tolist() == second.sort()[0].tolist() == in_order.sort()[0].tolist()


def test_both_loaders_add_the_same_amount_of_noise(folders: list[str]) -> None:
    clean, noisy = (
        both(Setting(folders[0], WHOLE, batch_size=100, jitter=jitter)) for jitter in (False, True)
    )
    noise = [
        noisy[0].dataset.batch([3])[0][0][0] - clean[0].dataset.batch([3])[0][0][0],
        noisy[1].plain[3][0][0][0] - clean[1].plain[3][0][0][0],
    ]
    for values in noise:
        assert np.isclose(float(values.std()), 0.01, rtol=0.05)
        assert float(values.abs().max()) <= 0.05 + 1e-5


def test_datasets_are_what_the_table_says(folders: list[str]) -> None:
    for folder, (dates, gaps) in zip(folders, DATASETS, strict=True):
        fewest, most = dates or (24, 24)
        cases = Cases(Setting(folder, WHOLE, batch_size=100))
        assert cases.dataset.varying == (fewest < most)
        # A date is there if one of the pixels is; all are loaded.
        ((data, _),) = cases.in_order(cases.dataset)
        mask = data.mask if hasattr(data, "mask") else data[0][1]
        loaded = (mask != 0).any(2).sum(1)
        assert loaded.max() <= most and (gaps or loaded.min() >= fewest)
        setting = cases.setting
        assert setting.count_pairs("load") == setting.count_pairs("train") == int(loaded.sum())
        assert setting._replace(batch_size=7).count_pairs("step") == int(loaded[:7].sum())
        sizes = json.loads(Path(folder, "META", "sizes.json").read_text())
        of_parcels = torch.tensor([sizes[pid] for pid in cases.dataset.pid])
        present = (mask != 0).sum() / (loaded * of_parcels).sum()
        assert gaps == bool(present < 0.99)


@pytest.mark.parametrize("dataset", range(len(DATASETS)))
def test_cases_train_and_evaluate(folders: list[str], dataset: int) -> None:
    cases = Cases(Setting(folders[dataset], WHOLE, batch_size=32, preset="LTAE/9k"))
    before = cases.infer()
    assert before.shape == (32, 20) and torch.isfinite(before).all()
    assert torch.equal(before, cases.infer())  # the same each time
    first = cases.evaluate()
    for _ in range(3):
        cases.train()
    assert not torch.allclose(before, cases.infer(), atol=0.01)
    assert cases.evaluate()["val_loss"] < first["val_loss"]


def test_time_is_that_of_one_run(measured) -> None:
    runs = []

    def run() -> None:
        runs.append(time.sleep(0.01))

    assert 0.01 <= measure.run_time(measured(run), "run", 0.05)
    assert len(runs) >= 2  # one does not count


def test_arithmetic_is_counted(measured) -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert measure.count_flops(measured(lambda: a @ b), "run") == 2 * 3 * 5 * 7
    assert all(rate > 0 for rate in measure.machine_rates(0))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is counted by /proc")
def test_peak_memory_is_what_a_case_needs_for_a_moment(measured) -> None:
    size = 2**27

    def use() -> None:
        with mmap.mmap(-1, size) as room:  # no tensor, which could get memory that was freed before
            for page in range(0, size, mmap.PAGESIZE):
                room[page] = 1

    needed = measure.peak_memory(measured(use), "run")
    assert 0.9 * size < needed < 1.5 * size  # the kernel counts pages in batches
    assert measure.peak_memory(measured(lambda: None), "run") < size / 4
    assert measure.read_memory("VmRSS", 2**30) == 0  # no such process


def test_ratios_are_how_many_times_as_long_the_others_take(capsys: pytest.CaptureFixture) -> None:
    print_row("step", [2, 5, 1], "0.1")
    assert capsys.readouterr().out == "| step | 2.00 | 5.00 / 1.00 | 2.50 / 0.50 | 0.1 |\n"
