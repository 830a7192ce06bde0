"""Draws of pixels and noise: exact against a slow plain form, and distributed as sampling without replacement."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from data import draws
from data.draws import add_noise, choose_pixels, noise_places, noise_values, parcel_keys, stream_key

BITS = 2**64 - 1
IMPROBABLE = 1e-6  # the draws are fixed, so a test that passes once always does

# ------------------------------------------------------------------------------- plain form, one number at a time


def mix(x: int) -> int:
    """The finaliser of splitmix64, with its published constants."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
    return x ^ (x >> 31)


def mix_once(x: int) -> int:
    x = (x * 0xBF58476D1CE4E5B9) & BITS
    return ((x ^ (x >> 32)) * 0x94D049BB133111EB) & BITS


def below(hashed: int, n: int) -> int:
    return ((hashed >> 33) * n) >> 31


def permute(x: int, key: int, a: int, b: int) -> int:
    """Three rounds on x = left * b + right, each adding a keyed function of one half to the other."""
    left, right = divmod(x, b)
    for i in range(3):
        left = (left + below(mix_once((right + mix((key + 2 * i) & BITS)) & BITS), a)) % a
        right = (right + below(mix_once((left + mix((key + 2 * i + 1) & BITS)) & BITS), b)) % b
    return left * b + right


def choose_plainly(key: int, n: int, npixel: int) -> list[int]:
    if n <= npixel:
        return list(range(n)) + [0] * (npixel - n)
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    chosen = []
    for slot in range(npixel):
        x = permute(slot, key, a, b)
        while x >= n:
            x = permute(x, key, a, b)
        chosen.append(x)
    return chosen


def test_keys_as_in_the_plain_form():
    parcels = [0, 1, 17, 191702, 2**40, 2**63 - 1]
    stream = stream_key("pixels", 1, 2, 3)
    expected = [mix(mix(parcel) ^ (stream & BITS)) for parcel in parcels]
    assert [int(key) & BITS for key in parcel_keys(stream, torch.tensor(parcels))] == expected


@pytest.mark.parametrize("npixel", [1, 2, 7, 64])
def test_pixels_as_in_the_plain_form(npixel):
    sizes = [*range(12), 15, 16, 17, 63, 64, 65, 99, 100, 101, 162, 1000, 4095, 4096, 4097, 10**6 + 3, 2**31]
    keys = parcel_keys(stream_key("plain"), torch.arange(len(sizes)))
    chosen = choose_pixels(keys, torch.tensor(sizes), npixel)
    assert chosen.dtype == torch.int64
    for key, n, row in zip(keys.tolist(), sizes, chosen.tolist()):
        assert row == choose_plainly(key & BITS, n, npixel), f"{n} pixels"


@pytest.mark.gpu
def test_pixels_are_the_same_on_a_gpu():
    keys, sizes = parcel_keys(3, torch.arange(2000)), torch.arange(2000)
    found = choose_pixels(keys.cuda(), sizes.cuda(), 64).cpu()
    assert torch.equal(found, choose_pixels(keys, sizes, 64))


def test_words_name_different_streams():
    words = [(1, 2, 3), (1, 23), (12, 3), ("1", 2, 3), (1, 2), ("pixels", 1), ("jitter", 1), ()]
    assert len({stream_key(*each) for each in words}) == len(words)
    assert all(-(2**63) <= stream_key(*each) < 2**63 for each in words)
    assert stream_key("pixels", 1, 1, 1) == stream_key("pixels", 1, 1, 1)


# ------------------------------------------------------------------------------------------------- distribution


def draw(n: int, npixel: int, times: int) -> Tensor:
    """Pixels that many parcels of n pixels choose, (times, npixel)."""
    keys = parcel_keys(stream_key("distribution", n, npixel), torch.arange(times))
    return choose_pixels(keys, torch.full((times,), n), npixel)


def p_value(counts: np.ndarray) -> float:
    """Of the hypothesis that all cells are equally likely."""
    return stats.chisquare(counts.reshape(-1)).pvalue


@pytest.mark.parametrize("n, npixel", [(2, 1), (3, 2), (9, 8), (65, 64), (81, 64), (300, 64), (5000, 64)])
def test_chosen_pixels_are_valid_and_distinct(n, npixel):
    chosen = draw(n, npixel, 2000)
    assert chosen.shape == (2000, npixel)
    assert chosen.min() >= 0 and chosen.max() < n
    assert (chosen.sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("n, npixel", [(65, 64), (100, 64), (101, 2), (298, 64), (1000, 8)])
def test_every_pixel_is_as_likely_in_every_slot(n, npixel):
    chosen = draw(n, npixel, 50_000)
    for slot in {0, 1, npixel // 2, npixel - 1}:
        assert p_value(np.bincount(chosen[:, slot], minlength=n)) > IMPROBABLE, f"slot {slot}"


@pytest.mark.parametrize("n, npixel", [(81, 64), (100, 64), (101, 2)])
def test_every_pair_of_pixels_is_as_likely(n, npixel):
    chosen = draw(n, npixel, 60_000).numpy()
    off_diagonal = ~np.eye(n, dtype=bool)
    for first, second in {(0, 1), (0, npixel - 1), (npixel // 2, npixel - 1)} & {
        (i, j) for i in range(npixel) for j in range(i + 1, npixel)
    }:
        counts = np.bincount(chosen[:, first] * n + chosen[:, second], minlength=n * n).reshape(n, n)
        assert p_value(counts[off_diagonal]) > IMPROBABLE, f"slots {first} and {second}"


@pytest.mark.parametrize("n, npixel", [(2, 1), (3, 2), (5, 3), (6, 5), (9, 4), (16, 4)])
def test_no_pixel_of_a_tiny_parcel_is_preferred(n, npixel):
    """Three rounds do not make all orders of a handful of pixels equally likely, but which are chosen nearly so."""
    counts = np.bincount(draw(n, npixel, 100_000).reshape(-1), minlength=n) / (100_000 * npixel / n)
    assert 0.97 < counts.min() and counts.max() < 1.03


@pytest.mark.parametrize("n, npixel", [(16, 8), (65, 64), (100, 64), (1000, 64)])
@pytest.mark.parametrize("pattern", ["ramp", "stripes", "halves"])
def test_mean_of_the_chosen_scatters_as_without_replacement(n, npixel, pattern):
    """Neighbours resemble each other in a field, so pixels that are chosen together too often would show here."""
    index = torch.arange(n)
    values = {"ramp": index, "stripes": index % 2, "halves": 2 * index // n}[pattern].double()
    means = values[draw(n, npixel, 20_000)].mean(1)
    expected = values.var().item() / npixel * (1 - npixel / n)
    assert means.var().item() == pytest.approx(expected, rel=0.06)
    assert abs(means.mean() - values.mean()) < 5 * math.sqrt(expected / 20_000)


def test_parcels_and_streams_are_independent():
    """One pixel each of 100: those of neighbouring ids, and of successive epochs, make every pair equally often."""
    sizes = torch.full((100_000,), 100)
    first, second = (
        choose_pixels(parcel_keys(stream_key("pixels", 1, 1, epoch), torch.arange(100_000)), sizes, 1)[:, 0]
        for epoch in (1, 2)
    )
    for one, other in ((first[:-1], first[1:]), (first, second)):
        assert p_value(np.bincount(one * 100 + other, minlength=10_000)) > IMPROBABLE


def test_ids_alike_in_their_low_or_high_bits_have_unlike_draws():
    ids = torch.cat([torch.arange(1000) << shift for shift in range(0, 50, 5)]).unique()
    keys = parcel_keys(stream_key("pixels", 1), ids)
    assert len(keys.unique()) == len(ids)
    bits = (keys.unsqueeze(1) >> torch.arange(64)) & 1
    np.testing.assert_allclose(bits.double().mean(0), 0.5, atol=0.03)


# -------------------------------------------------------------------------------------------------------- noise


def test_noise_is_a_clipped_normal():
    noise = noise_values(stream_key("noise", 1), 0.01, 0.05)
    assert noise.abs().max() <= 0.05
    assert float(noise.std()) == pytest.approx(0.01, rel=0.01)
    assert stats.kstest(noise[:100_000].numpy(), stats.norm(0, 0.01).cdf).pvalue > IMPROBABLE
    clipped = noise_values(stream_key("noise", 1), 1, 0.5)
    assert float((clipped.abs() == 0.5).double().mean()) == pytest.approx(2 * stats.norm.sf(0.5), abs=0.005)


def test_rows_read_windows_at_places_of_the_plain_form(monkeypatch):
    monkeypatch.setattr(draws, "_NOISE_VALUES", 1000)
    noise = noise_values(5, 1, 3)
    keys = parcel_keys(stream_key("jitter", 1), torch.arange(7))
    rows = torch.full((7 * 3, 20), 100.0)
    add_noise(rows, noise_places(keys, 3, 1000 - 20 + 1), noise)
    for i, row in enumerate(rows):
        parcel, slot = divmod(i, 3)
        place = below(mix((int(keys[parcel]) & BITS) ^ mix(slot)), 1000 - 20 + 1)
        torch.testing.assert_close(row, 100 + noise[place : place + 20])


def test_windows_reach_all_of_the_noise():
    rows = torch.zeros(64 * 500, 10)
    add_noise(rows, noise_places(parcel_keys(1, torch.arange(500)), 64, 41), torch.arange(50.0))
    assert p_value(np.bincount(rows[:, 0].long(), minlength=41)) > IMPROBABLE
    assert rows.max() == 49
