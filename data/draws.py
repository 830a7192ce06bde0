"""Random draws that are pure functions of what they are for: (seed, fold, epoch, parcel).

A generator's state depends on every draw before it, hence on workers, batches and restarts. Here a 64-bit hash takes
its place: every draw is computed from its own key, for a whole batch at once, on any device, with the same result.
"""

import hashlib

import torch
from torch import Tensor

_MULTIPLIERS = (
    -4658895280553007687,
    -7723592293110705685,
)  # of the 64-bit finaliser splitmix64, as signed numbers
_ROUNDS = 3
_NOISE_VALUES = 2**20


def stream_key(*words: int | str) -> int:
    """A 64-bit key for a purpose, from any words that name it."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def parcel_keys(stream: int, parcels: Tensor) -> Tensor:
    """One key per parcel id, (B,) int64, independent between streams and parcels."""
    return _mix(_mix(parcels) ^ stream)


def choose_pixels(keys: Tensor, sizes: Tensor, npixel: int) -> Tensor:
    """Chooses npixel pixels of every parcel without replacement.

    A keyed permutation of 0..n-1 is evaluated at 0..npixel-1, which touches npixel numbers, not n: a Feistel network
    on pairs (left, right) with a * b >= n, and cycle walking, that is, what falls outside 0..n-1 is permuted again.

    Args:
        keys: one per parcel, (B,).
        sizes: number of pixels n of each parcel, (B,).
        npixel: how many to choose.

    Returns:
        Pixel indices, (B, npixel) int64. A parcel of at most npixel pixels gives all of them in order, then its
        first one repeatedly.
    """
    slots = torch.arange(npixel, device=sizes.device)
    pixels = torch.where(slots < sizes.unsqueeze(1), slots, 0)
    large = (sizes > npixel).nonzero().squeeze(1)
    n = sizes[large]
    a = n.double().sqrt().ceil().long()
    b = (n + a - 1) // a
    rounds = torch.arange(2 * _ROUNDS, device=sizes.device).unsqueeze(1)
    numbers = torch.cat(
        [a.unsqueeze(0), b.unsqueeze(0), _mix(keys[large] + rounds)]
    )  # a, b and the round keys
    chosen = _permute(slots, *numbers.unsqueeze(2))
    row, slot = (chosen >= n.unsqueeze(1)).nonzero(as_tuple=True)
    while len(row):  # less than one in sqrt(n)
        walked = _permute(chosen[row, slot], *numbers[:, row])
        chosen[row, slot] = walked
        outside = walked >= n[row]
        row, slot = row[outside], slot[outside]
    pixels[large] = chosen
    return pixels


def noise_values(stream: int, sigma: float, clip: float) -> Tensor:
    """A store of clipped normal noise, clip(sigma N(0, 1), -clip, clip), that `add_noise` reads from."""
    generator = torch.Generator().manual_seed(stream)
    return torch.randn(_NOISE_VALUES, generator=generator).mul_(sigma).clamp_(-clip, clip)


def noise_places(keys: Tensor, n_rows: int, n_places: int) -> Tensor:
    """Where in the store of noise each row reads: (B * n_rows,), from 0 to n_places - 1, for n_rows rows per key."""
    rows = torch.arange(n_rows, device=keys.device)
    return _below(_mix(keys.unsqueeze(1) ^ _mix(rows)), n_places).view(-1)


def add_noise(rows: Tensor, places: Tensor, noise: Tensor) -> None:
    """Adds to rows (R, width), in place, the windows of the store of noise that begin at `places`, (R,).

    Drawing two million normal numbers for every batch would cost more than everything else in loading it.
    """
    rows += noise.unfold(0, rows.shape[1], 1).index_select(0, places)


def uniform_values(keys: Tensor, n: int) -> Tensor:
    """n numbers from 0 to 1, 1 excluded, for every key: (B, n) float64."""
    return _shift(_mix(keys.unsqueeze(1) ^ _mix(torch.arange(n, device=keys.device))), 11).double() / 2**53


def _permute(x: Tensor, a: Tensor, b: Tensor, *round_keys: Tensor) -> Tensor:
    """A bijection of 0..a*b-1, its own for every round key."""
    left = x // b
    right = x - left * b
    for key_left, key_right in zip(round_keys[::2], round_keys[1::2]):
        left = _add_modulo(left, _below(_mix_once(right + key_left), a), a)
        right = _add_modulo(right, _below(_mix_once(left + key_right), b), b)
    return left * b + right


def _add_modulo(x: Tensor, y: Tensor, n: Tensor) -> Tensor:
    """(x + y) % n for x and y from 0 to n - 1: n is taken off, and added again where that gives less than 0."""
    x = y.add_(x).sub_(n)
    return x.add_((x >> 63) & n)


def _below(hashed: Tensor, n: Tensor | int) -> Tensor:
    """Maps hashes evenly to 0..n-1, for n < 2^31."""
    return _shift(hashed, 33).mul_(n).bitwise_right_shift_(31)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: every bit of x changes about half of the result's."""
    x = _shift(x, 30).bitwise_xor_(x).mul_(_MULTIPLIERS[0])
    x = _shift(x, 27).bitwise_xor_(x).mul_(_MULTIPLIERS[1])
    return _shift(x, 31).bitwise_xor_(x)


def _mix_once(x: Tensor) -> Tensor:
    """A cheaper hash, whose high bits are good, for the rounds of the permutation."""
    x = x * _MULTIPLIERS[0]
    return _shift(x, 32).bitwise_xor_(x).mul_(_MULTIPLIERS[1])


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
