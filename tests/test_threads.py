"""Work shared among threads."""

import copy
import multiprocessing
import os

import pytest
import torch

from common.threads import share
from models.fast.pooling import pool_mean_std
from models.pse import PixelSetEncoder


@pytest.fixture(params=[1, 2, 3])
def n_threads(request):
    """Runs a test with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def run(n_parts: int) -> list[tuple[int, int, bool]]:
    """What every part saw: its number, PyTorch's threads, and whether gradients are on."""
    seen: list[tuple[int, int, bool]] = []
    share(n_parts, lambda i: seen.append((i, torch.get_num_threads(), torch.is_grad_enabled())))
    assert sorted(i for i, *_ in seen) == list(range(n_parts))
    return seen


@pytest.mark.parametrize("n_parts", [0, 1, 2, 50])
def test_every_part_is_done_once_by_single_threads_without_gradients(n_threads, n_parts):
    seen = run(n_parts)
    assert {threads for *_, threads, _ in seen} <= {1}
    assert not any(grad for *_, grad in seen)
    assert torch.get_num_threads() == n_threads and torch.is_grad_enabled()


def test_parts_within_parts_wait_for_no_other_thread(n_threads):
    done: list[int] = []
    share(4, lambda i: share(3, lambda j: done.append(3 * i + j)))
    assert sorted(done) == list(range(12))


def test_an_error_in_a_part_reaches_the_caller(n_threads):
    def fail(i: int) -> None:
        raise ZeroDivisionError(i)

    with pytest.raises(ZeroDivisionError):
        share(4, fail)
    run(4)  # and the threads still serve


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked on this system")
def test_a_forked_process_makes_its_own_threads(n_threads):
    run(4)
    process = multiprocessing.get_context("fork").Process(target=run, args=(4,))
    process.start()
    process.join(30)
    assert process.exitcode == 0


def test_results_do_not_depend_on_the_number_of_threads():
    """Bit for bit: sums over the batch are taken in the same order."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(40, 6, 10, 64, generator=generator)
    sizes = torch.randint(1, 80, (40, 1, 1), generator=generator)
    mask = (torch.arange(64) < sizes).float().expand(-1, 6, -1)
    layers = PixelSetEncoder(10, [10, 32, 64], "mean_std", [128, 16], with_extra=False).mlp1
    before, results = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        ours = copy.deepcopy(layers)
        pooled = torch.cat(pool_mean_std(pixels, mask, ours), dim=2)
        pooled.square().sum().backward()
        gradients = [parameter.grad for parameter in ours.parameters() if parameter.grad is not None]
        results.append([pooled, *gradients])
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result))
