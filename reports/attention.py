"""What the heads look at: each class's mean attention by head and date, and its mean NDVI."""

import io
import re
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import write_bytes
from common.machine import recursive_todevice
from common.progress import progress_bar
from data.batch import Batch
from data.days import read_days
from dataset import PixelSetData
from models.ensemble import Ensemble
from models.pse import PixelSet, split_input
from reports.plots import plot_attention, save_figure

ARRAYS, PICTURES = "attention.npz", "attention"
_RED, _NIR = ("B4", "RED"), ("B8", "NIR", "B8A", "NIR08")  # as Sentinel-2 and catalogues name them
RED_NIR, N_CHANNELS = (2, 6), 10  # of the published datasets' bands B2 B3 B4 B5 B6 B7 B8 B8A B11 B12
WEEK = 7


class Attention(NamedTuple):
    """Means over the parcels of each class (K classes, M folds, H heads, T dates or weeks); NaN where there are none.

    Attributes:
        weight: share of a head's attention that goes to each date or week, (M, K, H, T); sums to 1 over T.
        ndvi: (K, T), and its standard deviation over parcels.
        ndvi_std: (K, T).
        observed: how many parcels' dates there are, (K, T).
        parcels: how many, (K,).
    """

    weight: np.ndarray
    ndvi: np.ndarray
    ndvi_std: np.ndarray
    observed: np.ndarray
    parcels: np.ndarray


def mean_attention(
    ensemble: Ensemble,
    dataset: PixelSetData,
    batches: Iterable[tuple[PixelSet | Batch, Tensor]],
    groups: np.ndarray,
    n_classes: int,
    bands: tuple[int, int] | None,
    device: torch.device,
) -> Attention:
    """Averages over the parcels of each class.

    Args:
        ensemble: classifiers with attention.
        dataset: the parcels.
        batches: of the dataset, in order.
        groups: class of each parcel, (N,); a negative one leaves the parcel out.
        n_classes: K.
        bands: channels of red and near infrared; None for no NDVI.
        device: where the ensemble is.
    """
    M, H = len(ensemble.members), ensemble.members[0].temporal_encoder.attention_heads.n_head
    edges, classes = (torch.as_tensor(values, device=device) for values in (bin_starts(dataset), groups))
    K, T = n_classes, len(edges)
    weight = torch.zeros(M, H, K * T, dtype=torch.float64, device=device)
    sums = torch.zeros(4, K * T, dtype=torch.float64, device=device)  # dates; NDVI: number, sum, squares
    parcels = torch.zeros(K, dtype=torch.float64, device=device)
    start = 0
    for x, target in progress_bar(batches, "attention", "batches"):
        x = recursive_todevice(x, device)
        pixels, mask, days = unpack(x, dataset)
        group = classes[start : start + len(target)]
        start += len(target)
        present = (mask != 0).any(2) & (group >= 0).unsqueeze(1)  # (B, L)
        group = group.clamp(min=0)
        place = group.unsqueeze(1) * T + torch.bucketize(days.to(edges).contiguous(), edges, right=True) - 1
        place = place.clamp(min=0).flatten()  # below 0 where there is no date
        weight.index_add_(2, place, (ensemble.attention(x) * present).flatten(2).double())
        parcels.index_add_(0, group, present.any(1).double())
        ndvi = mean_ndvi(pixels, mask, dataset, bands) if bands else torch.full_like(mask[..., 0], torch.nan)
        defined = present & ndvi.isfinite()
        ndvi = ndvi.where(defined, 0).double()
        sums.index_add_(1, place, torch.stack([present, defined, ndvi, ndvi.square()]).flatten(1).double())
    observed, n, total, squares = sums.view(4, K, T).cpu().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):  # nothing is known of a class without parcels
        mean = total / n
        deviation = np.sqrt(np.maximum(squares / n - mean**2, 0))
        share = weight.view(M, H, K, T).transpose(1, 2).cpu().numpy() / parcels.cpu().numpy()[:, None, None]
    return Attention(share, mean, deviation, observed, parcels.cpu().numpy())


def unpack(x: PixelSet | Batch, dataset: PixelSetData) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (B, L, C, S), mask (B, L, S) and days (B, L) of a batch."""
    if isinstance(x, Batch):
        return x.pixels, x.mask, x.days
    (pixels, mask), _ = split_input(x)
    days = torch.as_tensor(dataset.date_positions, device=mask.device)
    return pixels, mask, days.expand(len(mask), -1)


def mean_ndvi(pixels: Tensor, mask: Tensor, dataset: PixelSetData, bands: tuple[int, int]) -> Tensor:
    """NDVI of each parcel's mean reflectances by date, (B, L); not finite where it is not defined."""
    mean, std = dataset.norm if dataset.norm is not None else (0.0, 1.0)
    channels, rounding = [], 0.0
    for band in bands:
        sets = (pixels[:, :, band] * mask).sum(2) / mask.sum(2)
        offset, scale = (_of_band(values, band, dataset).to(sets) for values in (mean, std))
        channels.append(sets * scale + offset)
        rounding = rounding + 1e-5 * (offset.abs() + scale)  # of what is 0, as in a parcel without pixels
    red, near_infrared = channels
    total = red + near_infrared
    return torch.where(total > rounding, (near_infrared - red) / total, torch.nan)


def _of_band(values: np.ndarray | float, band: int, dataset: PixelSetData) -> Tensor:
    """What one channel was normalised with: a number, or one for each date in order."""
    values = np.broadcast_to(values, np.broadcast_shapes(np.shape(values), (dataset.n_channels,)))
    return torch.as_tensor(values[..., band].copy())


def bin_starts(dataset: PixelSetData) -> np.ndarray:
    """First day of every bin of time: each date where all parcels share them, else each week from the first on."""
    if dataset.date_positions is not None:
        return np.unique(dataset.date_positions)
    days = [dataset.calendar(i)[0] for i in range(len(dataset)) if len(dataset.calendar(i)[0])]
    return np.arange(min(own.min() for own in days), max(own.max() for own in days) + 1, WEEK)


def first_day(dataset: PixelSetData) -> np.datetime64:
    """The date that days are counted from; that of the first parcel's season where seasons are laid on each other."""
    days = read_days(dataset.folder, [int(dataset.pid[0])]).values
    origin = int(days.min()) - int(dataset.calendar(0)[0].min())
    return np.datetime64(date.fromordinal(origin))


def choose_bands(
    asked: Sequence[str] | None, names: Sequence[str], n_channels: int
) -> tuple[int, int] | None:
    """Channels of red and near infrared: those asked for, else by their usual names, else the published datasets'.

    Args:
        asked: two channels, each a number, counted from 0, or a name; None for no wish.
        names: of the channels, as META/info.json has them, or none.
        n_channels: C.

    Returns:
        None if nothing tells which they are.

    Raises:
        UserError: if there are no such channels.
    """
    known = {_spell(name): channel for channel, name in enumerate(names)} if len(names) == n_channels else {}
    if asked is None:
        found = [next((known[name] for name in usual if name in known), None) for usual in (_RED, _NIR)]
        if None not in found:
            return found[0], found[1]
        return RED_NIR if n_channels == N_CHANNELS and not names else None
    channels = [int(band) if band.isdecimal() else known.get(_spell(band), n_channels) for band in asked]
    if max(channels) >= n_channels:
        named = f", or {', '.join(map(str, names))}" if known else "; they have no names in META/info.json"
        raise UserError(
            f"--ndvi_bands is {' '.join(asked)} but the dataset has channels 0 to {n_channels - 1}, counted from 0{named}."
        )
    return channels[0], channels[1]


def _spell(name: str) -> str:
    """A band's name in one spelling: B04, b4 and B4 are the same."""
    return re.sub(r"^B0*(?=\d)", "B", str(name).strip().upper())


def write_attention(
    output: Path,
    attention: Attention,
    dataset: PixelSetData,
    classes: Sequence[int | str],
    names: dict[str, str],
    folds: Sequence[int],
) -> list[Path]:
    """Writes attention.npz, and attention/LABEL.png for every class that has parcels; returns their paths."""
    dates = first_day(dataset) + bin_starts(dataset).astype("timedelta64[D]")
    labels = np.array([str(label) for label in classes])
    buffer = io.BytesIO()
    np.savez(buffer, dates=dates, labels=labels, folds=np.array(folds), **attention._asdict())
    write_bytes(output / ARRAYS, buffer.getvalue())
    (output / PICTURES).mkdir(exist_ok=True)
    weight = np.where(attention.observed[:, None] > 0, attention.weight, np.nan)
    width = WEEK if dataset.date_positions is None else None
    written = [output / ARRAYS]
    for k, label in enumerate(labels):
        if attention.parcels[k]:
            safe = re.sub(r"[^\w-]+", "_", label)[:60]
            written.append(output / PICTURES / f"{safe if safe == label else f'{safe}_{k}'}.png")
            title = f"{names.get(label, f'class {label}')}: {attention.parcels[k]:,.0f} parcels"
            figure = plot_attention(weight, attention.ndvi, attention.ndvi_std, k, dates, title, width, folds)
            save_figure(written[-1], figure)
    return written
