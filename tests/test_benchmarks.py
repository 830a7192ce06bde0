"""The two sides of the benchmark compute the same. That it runs is tested with the commands of README.md."""

import copy
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.cases import DEFAULT, LARGEST, SIDES, Folder, build_models, draw_batch, step
from benchmarks.measure import peak_memory, run_time
from preprocessing.simulate import simulate


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    return model


@pytest.mark.parametrize("preset", ["LTAE/9k", DEFAULT, LARGEST])
def test_models_agree(preset: str):
    models, (inputs, target) = build_models(preset, n_dates=5), draw_batch(6, n_dates=5, npixel=7)
    results = {}
    for side in SIDES:
        model = without_dropout(models[side]).double()
        (pixels, mask), extra = inputs[side]
        data = (pixels.double(), mask.double()), extra.double()
        trained = model.train()(data)
        nn.functional.cross_entropy(trained, target).backward()
        gradients = [
            p.grad.abs().sum() for p in model.parameters() if p.grad is not None and p.grad.abs().max() > 1e-9
        ]
        with torch.no_grad():
            results[side] = trained, model.eval()(data), torch.stack(gradients).sum()
    for fast, textbook in zip(*(results[side] for side in SIDES), strict=True):
        assert torch.allclose(fast, textbook, rtol=1e-9, atol=1e-11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "simulated"
    simulate(path, 100, seed=1, progress=False, max_pixels=64)  # no parcel is sampled, so no draw is involved
    return str(path)


def test_loaders_agree(folder: str):
    data = Folder(folder, batch_size=16, jitter=False)
    fast = data.fast.batch(list(range(100)))
    items = [data.textbook[i] for i in range(100)]
    textbook = torch.utils.data.default_collate(items)
    for ours, theirs in zip(flatten(fast), flatten(textbook), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_both_loaders_add_the_same_amount_of_noise(folder: str):
    clean, noisy = (Folder(folder, 100, jitter) for jitter in (False, True))
    for side in SIDES:
        drawn = next(iter(noisy.batches(side)))[0][0][0]
        assert drawn.shape == (100, 24, 10, 64)
    difference = noisy.fast.batch([3])[0][0][0] - clean.fast.batch([3])[0][0][0]
    theirs = noisy.textbook[3][0][0][0] - clean.textbook[3][0][0][0]
    for noise in (difference, theirs):
        assert np.isclose(float(noise.std()), 0.01, rtol=0.05)
        assert float(noise.abs().max()) <= 0.05 + 1e-5


def flatten(batch) -> list[torch.Tensor]:
    if isinstance(batch, (tuple, list)):
        return [tensor for part in batch for tensor in flatten(part)]
    return [batch]


def test_a_case_can_be_timed_and_weighed():
    sides = step(DEFAULT, batch_size=2, n_dates=3, npixel=4)
    for side in SIDES:
        assert run_time(sides, side) > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is counted by /proc")
def test_peak_memory_is_what_a_case_needs_for_a_moment():
    size = 2**27

    def use() -> None:
        with mmap.mmap(-1, size) as room:  # no tensor, which could get memory that was freed before
            for page in range(0, size, mmap.PAGESIZE):
                room[page] = 1

    needed = peak_memory({"fast": use, "textbook": lambda: None}, "fast")
    assert 0.9 * size < needed < 1.5 * size  # the kernel counts pages in batches
    assert peak_memory({"textbook": lambda: None}, "textbook") < size / 4


def test_training_one_side_leaves_the_other_alone():
    models = build_models(DEFAULT, n_dates=3)
    before = copy.deepcopy(models["textbook"].state_dict())
    with torch.no_grad():
        for p in models["fast"].parameters():
            p.zero_()
    assert all(torch.equal(value, before[key]) for key, value in models["textbook"].state_dict().items())
