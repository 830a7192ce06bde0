"""From raw numbers to what a model takes: steps (batch, keys) -> batch, for shared dates and for dates that vary.

Steps that decide which dates there are, `fill_missing` to `first_dates`, work on raw numbers in the host's memory,
since it must know how many there are. Those from `normalise` on work on floats in the memory of any device, and none
makes the host wait for it: raw numbers, in the type of the store, can be sent to a GPU before, see `Raw`.

Pixels are pixel-major, (B, S, L, C) in memory, and a step may write to them. A step is called as (batch, draws) -> batch,
with what it draws for each parcel, (B, ...), or None: draws are made for a whole batch at once, see `data.draws`, and do
not depend on the company that a parcel is in. On a CPU a batch passes in parts of a few parcels, which stay in the cache.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.threads import share
from data.batch import Batch, memory, present_first, send
from data.draws import add_noise
from data.missing import find_missing

Step = Callable[[Batch, Tensor | None], Batch]
Steps = Sequence[tuple[Step, Tensor | None]]  # with what they draw
Part = slice | np.ndarray  # of the parcels of a batch
AUGMENTATIONS: list[Step] = []  # what a script adds here changes what train.py trains on
NUMBERS_PER_PART = 2**20  # at most, to stay in the cache
PARCELS_PER_PART = 16  # at least, if these are not too many numbers: every part has its costs


class Raw(NamedTuple):
    """A batch on its way to a GPU, for `finish`: raw numbers, and rows that are repeated but once.

    Attributes:
        batch: in the host's memory; rows that all dates or parcels share stand in it once.
        noise, moved: what is drawn for jitter, and to move calendars; None if nothing is.
    """

    batch: Batch
    noise: Tensor | None
    moved: Tensor | None

    @property
    def drawn(self) -> dict[str, Tensor]:
        """By name, what is drawn for the steps that are left."""
        return {name: x for name, x in self._asdict().items() if name != "batch" and x is not None}


def prepare(
    frame: Batch,
    read: Callable[[Part, int], Tensor],
    raw_steps: Steps,
    steps: Steps,
    n_dates: np.ndarray,
    n_channels: int,
    changed: Sequence[str],
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Reads the pixels of a batch and takes them through steps, part by part.

    Args:
        frame: all but the pixels, as the first step is to get it.
        read: gives the raw pixels (P, L, C, S) of a part on so many dates L.
        raw_steps, steps: what is done before and after raw numbers become floats.
        n_dates: of each parcel's file, (B,).
        n_channels: C.
        changed: names of what the steps change beside the pixels.
        dtype: of the pixels between raw steps and others; the mask is of floats where the pixels are.
    """
    B, L, S = frame.mask.shape

    def load(part: Part, most: int, target: Tensor | None = None) -> Batch:
        """A part, its pixels in memory of its own, or in `target` if they fit."""
        others = frame[1:]  # of all parcels, where steps neither change nor read them
        if changed:
            others = [None if x is None else x[part][:, :most] for x in frame[1:]]
        batch = _take(Batch(read(part, most), *others), raw_steps, part)
        fits = target is not None and batch.pixels.shape[1] == L
        pixels = convert(batch.pixels, dtype, target if fits else None)
        batch = batch._replace(pixels=pixels)  # the raw ones are freed, and their memory is used again
        return _take(batch, steps, part)

    if frame.mask.device.type != "cpu":
        return load(slice(0, B), L)
    target = torch.empty(B, S, L, n_channels, dtype=dtype)
    zeros = {name: _zeros_like(getattr(frame, name), dtype.is_floating_point) for name in changed}
    whole = frame._replace(pixels=target.permute(0, 2, 3, 1), **zeros)
    size = max(PARCELS_PER_PART, -(-B // torch.get_num_threads()))
    size = max(1, min(size, NUMBERS_PER_PART // (S * L * n_channels)))
    in_place = bool((n_dates == L).all())
    order = None if in_place else n_dates.argsort(kind="stable")  # about as many dates go together

    def fill(i: int) -> None:
        part: Part = slice(i * size, (i + 1) * size)
        if in_place:
            batch = load(part, L, target[part])
        else:
            part = order[part]
            batch = load(part, max(1, int(n_dates[part[-1]])))
        pixels = memory(batch.pixels)
        if changed:  # pixels and days of a date that is absent become 0, as its mask is
            parcel, date = np.nonzero(~batch.present)
            pixels.numpy()[parcel, :, date] = 0
            batch = batch._replace(days=batch.days.where(torch.from_numpy(batch.present), 0))
            for name in changed:
                values = np.asarray(getattr(batch, name))
                np.asarray(getattr(whole, name))[part, : values.shape[1]] = values
        _put_pixels(pixels, target, part)

    share(-(-B // size), fill)
    return whole


def _take(batch: Batch, steps: Steps, part: Part) -> Batch:
    """Takes a part of a batch through steps."""
    for step, draws in steps:
        batch = step(batch, None if draws is None else draws[part])
    return batch


def _put_pixels(pixels: Tensor, target: Tensor, part: Part) -> None:
    """Writes the pixels of a part, (P, S, L, C), to their place unless they are there; 0 beyond their dates."""
    if isinstance(part, slice) and pixels.data_ptr() == target[part].data_ptr():
        return
    values, everything = pixels.flatten(2).numpy(), target.flatten(2).numpy()
    everything[part, :, : values.shape[2]] = values
    everything[part, :, values.shape[2] :] = 0


def list_steps(
    drawn: Mapping[str, Tensor],
    nodata: Sequence[float | None],
    norm: tuple[Tensor, Tensor] | None,
    by_date: bool,
    noise: Tensor | None,
    own: Sequence[Step],
    varying: bool,
) -> tuple[Steps, Steps]:
    """What is done with raw numbers, and then with floats.

    Args:
        drawn: by name, of what is done only if it is drawn.
        nodata: the value that means missing, besides NaN; none where no pixel is missing.
        norm: scale and shift, (L, C) each; None to leave numbers as they are.
        by_date: whether their rows differ.
        noise: that jitter reads from.
        own: functions of the user.
        varying: whether they may leave out dates.
    """
    decide: list[tuple[Step, Tensor | None]] = [(fill_missing(value), None) for value in nodata]
    if "end" in drawn:
        decide.append((end_early, drawn["end"]))
    if "left out" in drawn:
        decide.append((drop_dates, drawn["left out"]))
    move = [(first_dates, None)] if decide else []
    steps = [] if norm is None else [(normalise(*norm), None)]
    if by_date:
        steps += move  # dates stay where their mean and deviation are until these are applied
    else:
        decide += move
    if "noise" in drawn:
        steps.append((add_jitter(noise), drawn["noise"]))
    if "moved" in drawn:
        steps.append((move_calendar, drawn["moved"]))
    steps += [(augment(function, varying), drawn[f"augment {i}"]) for i, function in enumerate(own)]
    return decide, steps


def _zeros_like(x: Tensor | np.ndarray, floats: bool) -> Tensor | np.ndarray:
    """As many numbers 0, of float32 if so asked of a tensor, each in memory of its own."""
    if isinstance(x, Tensor):
        return torch.zeros(x.shape, dtype=torch.float32 if floats else x.dtype)
    return np.zeros_like(x)


def fill_missing(nodata: float | None) -> Step:
    """Masks the pixels that are missing on a date, and puts a copy of one that is present in the place of each."""

    def step(batch: Batch, draws: Tensor | None) -> Batch:
        pixels = memory(batch.pixels).numpy()
        missing = find_missing(pixels, nodata)  # (B, S, L)
        if missing is None:
            return batch
        B, S, L, C = pixels.shape
        first = missing.argmin(1) * L + np.arange(L)  # that is present on a date, as a row of the parcel
        places = np.flatnonzero(missing)
        parcel = places // (S * L)
        rows = pixels.reshape(-1, C)
        rows[places] = rows.take(parcel * (S * L) + first[parcel, places % L], axis=0)
        mask = batch.mask.numpy() & ~missing.transpose(0, 2, 1)
        pixels = torch.from_numpy(pixels).permute(0, 2, 3, 1)
        return batch._replace(pixels=pixels, mask=torch.from_numpy(mask), present=mask.any(2))

    return step


def end_early(batch: Batch, end: Tensor) -> Batch:
    """Leaves out what comes after a share of the dates that a parcel has, (B, 1) above 0 to 1, but never the first."""
    number, n = batch.present.cumsum(1), batch.present.sum(1, keepdims=True)
    kept = batch.present & (number <= np.maximum(1, np.ceil(end.numpy() * n)))
    return batch._replace(mask=batch.mask & torch.from_numpy(kept).unsqueeze(2), present=kept)


def drop_dates(batch: Batch, left_out: Tensor) -> Batch:
    """Leaves out dates, where (B, L or more) says so, but never all that a parcel has."""
    there = batch.present
    kept = there & ~left_out[:, : there.shape[1]].numpy()
    lost = np.flatnonzero(there.any(1) & ~kept.any(1))
    kept[lost, there[lost].argmax(1)] = True
    return batch._replace(mask=batch.mask & torch.from_numpy(kept).unsqueeze(2), present=kept)


def first_dates(batch: Batch, draws: Tensor | None = None) -> Batch:
    """Moves the dates that are present before the absent ones."""
    return present_first(batch)[0]


def convert(pixels: Tensor, dtype: torch.dtype, target: Tensor | None = None) -> Tensor:
    """Raw pixels (B, L, C, S) as another type, in `target`, (B, S, L, C), if given, else in new memory."""
    x = memory(pixels)
    if x.dtype == torch.uint16 and x.device.type != "cpu":  # GPUs compute with signed types only
        x = x.view(torch.int16).int().bitwise_and_(0xFFFF)
    x = x.to(dtype, copy=True) if target is None else target.copy_(x)
    return x.permute(0, 2, 3, 1)


def finish(raw: Raw, steps: Steps) -> Batch:
    """What `prepare` would have given, of a batch whose raw numbers came to the memory of a device.

    Args:
        raw: with all but `present` there.
        steps: that are left, all they need there too.
    """
    batch = raw.batch
    B, L = batch.present.shape
    batch = batch._replace(
        pixels=convert(batch.pixels, torch.float32),
        mask=batch.mask.float().expand(-1, L, -1),
        extra=None if batch.extra is None else batch.extra.expand(-1, L, -1),
        days=batch.days.expand(B, -1),
    )
    batch = _take(batch, steps, slice(None))
    if batch.present.all():
        return batch
    present, x = send(batch.present, batch.pixels.device), memory(batch.pixels)
    x.masked_fill_(~present[:, None, :, None], 0)
    return batch._replace(pixels=x.permute(0, 2, 3, 1), days=batch.days.where(present, 0))


def once(batch: Batch) -> Batch:
    """The batch without the repetitions of rows that share memory."""

    def rows(x: Tensor) -> Tensor:
        return x[tuple(slice(1) if n == 0 else slice(None) for n in x.stride())]

    return Batch(*(None if x is None else rows(x) for x in batch[:4]), batch.present)


def normalise(scale: Tensor, shift: Tensor) -> Step:
    """Makes x * scale + shift of pixels; both (L or more, C)."""

    def step(batch: Batch, draws: Tensor | None) -> Batch:
        x = memory(batch.pixels)
        torch.addcmul(shift[: x.shape[2]], x, scale[: x.shape[2]], out=x)
        return batch._replace(pixels=x.permute(0, 2, 3, 1))

    return step


def add_jitter(noise: Tensor) -> Step:
    """Adds noise to all values, read from a store of it at places (B, S)."""

    def step(batch: Batch, places: Tensor) -> Batch:
        x = memory(batch.pixels)
        add_noise(x.view(places.numel(), -1), places.flatten(), noise)
        return batch._replace(pixels=x.permute(0, 2, 3, 1))

    return step


def move_calendar(batch: Batch, moved: Tensor) -> Batch:
    """Moves all days of a parcel by as many, (B, 1)."""
    return batch._replace(days=batch.days + moved)


def augment(function: Step, varying: bool) -> Step:
    """A user's function, whose result is looked at; where dates may vary, its mask says which are left.

    Raises:
        UserError: if it returns something else than a batch of the same parcels, dates, channels and pixels, or leaves out
            a date that all parcels share.
    """

    def step(batch: Batch, draws: Tensor | None) -> Batch:
        given, mask = [None if x is None else tuple(x.shape) for x in batch[:4]], batch.mask.float()
        batch = batch._replace(mask=mask)
        found = function(batch, draws)
        if (
            not isinstance(found, Batch)
            or [None if x is None else tuple(x.shape) for x in found[:4]] != given
        ):
            shapes = ", ".join(f"{name} {shape}" for name, shape in zip(Batch._fields, given) if shape)
            raise UserError(
                f"augment returned something else than a Batch of the shapes it was given: {shapes}."
            )
        if varying:
            return present_first(found._replace(present=None))[0]
        if found.mask is not mask and not (found.mask != 0).any(2).all():
            raise UserError(
                "augment left no pixel on a date that all parcels share; leave one, or open the dataset with varying=True."
            )
        return found._replace(present=batch.present)

    return step
