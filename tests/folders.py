"""Tiny random datasets in the true folder format, for tests."""

import json
import pickle
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

NOMENCLATURE = "label_44class"


def write_folder(
    path: str | Path,
    n_parcels: int = 12,
    n_dates: int = 5,
    n_channels: int = 4,
    classes: Sequence[int] = (1, 3, 9),
    seed: int = 0,
    *,
    sizes: Sequence[int] | None = None,
    ids: Sequence[int] | None = None,
    dtype: DTypeLike = np.uint16,
    extra_size: int = 4,
    statistics: bool = False,
) -> Path:
    """Writes a dataset folder with random pixels.

    Args:
        path: folder to write; made if it is not there.
        n_parcels, n_dates, n_channels: N, T and C.
        classes: labels, given to the parcels in turn, so that a few parcels have them all.
        seed: of pixels, sizes and extra features.
        sizes: number of pixels of each parcel, (N,); random from 1 to 20 if not given.
        ids: ids of the parcels, (N,); 1 to N if not given.
        dtype: type of the pixels, which are whole numbers from 1 to 255 in any type.
        extra_size: numbers per parcel in META/geomfeat.json; 0 leaves the file out.
        statistics: whether to write the mean and standard deviation per date and channel under the published name.

    Returns:
        The folder.
    """
    path, random = Path(path), np.random.default_rng(seed)
    ids = range(1, n_parcels + 1) if ids is None else ids
    sizes = random.integers(1, 21, n_parcels) if sizes is None else sizes
    for name in ("DATA", "META"):
        (path / name).mkdir(parents=True, exist_ok=True)
    parcels = [random.integers(1, 256, (n_dates, n_channels, int(size))).astype(dtype) for size in sizes]
    for parcel, pixels in zip(ids, parcels):
        np.save(path / "DATA" / f"{parcel}.npy", pixels)
    write_meta(path, "labels", {NOMENCLATURE: {str(p): classes[i % len(classes)] for i, p in enumerate(ids)}})
    days = (date(2017, 1, 3) + timedelta(days=11 * t) for t in range(n_dates))
    write_meta(path, "dates", {str(t): int(day.strftime("%Y%m%d")) for t, day in enumerate(days)})
    write_meta(path, "sizes", {str(p): int(size) for p, size in zip(ids, sizes)})
    if extra_size:
        features = random.uniform(1, 10, (n_parcels, extra_size))
        write_meta(path, "geomfeat", {str(p): values.tolist() for p, values in zip(ids, features)})
    if statistics:
        pixels = np.concatenate(parcels, axis=2).astype(np.float64)
        mean_std = pixels.mean(2).astype(np.float32), pixels.std(2).astype(np.float32)
        (path / "S2-2017-T31TFM-meanstd.pkl").write_bytes(pickle.dumps(mean_std))
    return path


def write_meta(path: Path, name: str, value: object) -> None:
    """Writes META/<name>.json."""
    (path / "META" / f"{name}.json").write_text(json.dumps(value))
