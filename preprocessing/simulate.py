"""Simulated Sentinel-Agri: a dataset folder in the published format that contains no measurement.

    python -m preprocessing.simulate OUT --parcels 2000 --seed 1

Every parcel grows one of twenty crops. Growth curves say how much of the ground is covered by leaves, straw,
flowers and soil at each date, and mix their four spectra accordingly. A parcel has its own timing, vigour,
weeds and soil; a pixel its own density and noise; border pixels see part of a neighbour; some dates lie under
clouds or shadows. Dates, parcel sizes and mean reflectances are like those of Sentinel-Agri; the names of the
crops are invented and stand for no real nomenclature.
"""

import argparse
import json
import pickle
import tempfile
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy.special import expit

from learning.errors import UserError, as_user_error, run_cli
from learning.progress import progress_bar

VERSION = 1  # raise it whenever other bytes are written, so that no stale embedded dataset is used
EMBEDDED_PARCELS = 2000
EMBEDDED_SEED = 1
EMBEDDED_MAX_PIXELS = 75  # real parcels are larger; this keeps the embedded dataset at 60 MB

DATES = [
    int(day)
    for day in (
        "20170103 20170113 20170212 20170314 20170403 20170423 20170513 20170602 "
        "20170612 20170622 20170702 20170707 20170712 20170717 20170722 20170806 "
        "20170821 20170826 20170905 20170910 20170920 20171005 20171010 20171015"
    ).split()
]
DAYS = np.array([datetime.strptime(str(day), "%Y%m%d").timetuple().tm_yday for day in DATES], np.float64)
T, C = len(DATES), 10

# Reflectances x 10000 in B2 B3 B4 B5 B6 B7 B8 B8A B11 B12.
LEAVES = np.array([180, 550, 260, 990, 3300, 4200, 4350, 4600, 1850, 760], np.float64)
STRAW = np.array([540, 900, 1180, 1600, 2200, 2500, 2680, 2950, 3050, 1800], np.float64)
FLOWERS = np.array([420, 1500, 1250, 2050, 3400, 4000, 4300, 4550, 2100, 1000], np.float64)
SOIL = np.array([600, 850, 1070, 1330, 1600, 1770, 1920, 2120, 2750, 2000], np.float64)
CLOUD = np.array([3700, 3500, 3400, 3400, 3500, 3600, 3600, 3700, 2800, 2200], np.float64)

# Soils are moist and dark in winter, dry and bright in summer.
DRYNESS = 1 - 0.25 * np.cos(2 * np.pi * DAYS / 365)
# Haze over all parcels, and how often a parcel has a cloud or its shadow, by date.
HAZE = np.array([0.14, 0.14, 0.14, 0.05] + [0] * 20)
CLOUDINESS = np.full(T, 0.05)
CLOUDINESS[[0, 1, 2, 3, 5, 12, 17, 19, 21]] = 0.15

# Pixels per parcel: quantiles, and the sizes there.
QUANTILES = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1)
SIZES = (1, 2, 4, 9, 19, 43, 75, 113, 162, 225, 313, 449, 716, 1036, 2002, 3940, 14879)


class Crop(NamedTuple):
    """How one class grows. Days are days of the year, covers are fractions of the ground."""

    code: int  # a label of the published nomenclature; all else, the name too, is invented
    name: str
    share: float  # of the parcels
    seasons: tuple[tuple[float, float, float], ...]  # days of half growth and half decline, leaf cover
    evergreen: float = 0.06  # leaf cover all year round
    straw: float = 0  # cover left by the first season
    flowering: float | None = None  # day of full flower
    cuts: tuple[float, ...] = ()  # days of mowing
    tone: float = 1  # near-infrared reflectance relative to LEAVES


CROPS = (
    Crop(1, "permanent meadow", 0.29, ((75, 190, 0.38), (245, 330, 0.34)), 0.50),
    Crop(3, "winter wheat", 0.16, ((68, 166, 0.86), (245, 400, 0.20)), straw=0.75),
    Crop(4, "maize", 0.11, ((166, 256, 0.86),), straw=0.4, tone=0.95),
    Crop(5, "vineyard", 0.087, ((128, 290, 0.38),), 0.20, tone=0.85),
    Crop(6, "sunflower", 0.08, ((158, 224, 0.80), (255, 400, 0.18)), straw=0.3, flowering=196),
    Crop(8, "temporary meadow", 0.07, ((70, 210, 0.46), (240, 330, 0.38)), 0.44, cuts=(146,)),
    Crop(9, "winter barley", 0.05, ((62, 150, 0.86), (240, 400, 0.25)), straw=0.75),
    Crop(12, "durum wheat", 0.04, ((74, 161, 0.76), (245, 400, 0.20)), straw=0.70, tone=0.95),
    Crop(13, "alfalfa", 0.025, ((72, 310, 0.55),), 0.36, cuts=(130, 172, 214, 258), tone=1.08),
    Crop(14, "rapeseed", 0.02, ((48, 158, 0.82), (240, 400, 0.3)), 0.12, straw=0.6, flowering=106, tone=1.08),
    Crop(16, "soybean", 0.015, ((172, 262, 0.90),), straw=0.2, tone=1.12),
    Crop(18, "orchard", 0.012, ((105, 298, 0.38),), 0.32, tone=0.95),
    Crop(19, "fallow", 0.010, ((82, 185, 0.32), (250, 400, 0.20)), 0.28, straw=0.35),
    Crop(23, "silage maize", 0.008, ((160, 236, 0.88), (265, 400, 0.30)), straw=0.15, tone=0.95),
    Crop(28, "spring barley", 0.007, ((96, 170, 0.82), (250, 400, 0.20)), straw=0.7),
    Crop(31, "sorghum", 0.005, ((178, 262, 0.74),), straw=0.4, tone=0.92),
    Crop(33, "triticale", 0.004, ((66, 172, 0.90), (245, 400, 0.20)), straw=0.8),
    Crop(34, "peas", 0.003, ((92, 158, 0.84), (245, 400, 0.25)), straw=0.4, tone=1.12),
    Crop(36, "olive grove", 0.002, ((100, 300, 0.04),), 0.42, tone=0.82),
    Crop(39, "market garden", 0.002, ((105, 160, 0.65), (205, 262, 0.65))),
)
# The first parcels take the classes in turn, so that each has at least five; all others draw their class.
FIRST_PARCELS = 5 * len(CROPS)
CUMULATED_SHARES = np.cumsum([crop.share for crop in CROPS])


class Parcel(NamedTuple):
    """One simulated parcel."""

    label: int
    pixels: np.ndarray  # reflectances x 10000, (T, C, S) uint16
    geometry: list[float]  # see draw_geometry


def ground_cover(
    crop: Crop, shift: float = 0, longer: float = 0, vigour: float = 1, weeds: float = 0, weeds_day: float = 0
) -> np.ndarray:
    """What covers the ground of one parcel.

    Args:
        crop: its growth curves.
        shift: days by which all happens later.
        longer: days by which each season lasts longer.
        vigour: factor of the leaf cover.
        weeds: leaf cover of weeds at their best.
        weeds_day: day of the year on which they are at their best.

    Returns:
        Fractions covered by leaves, straw, flowers and bare soil at each date, (T, 4); they sum to 1.
    """
    days = DAYS - shift
    up, down, cover = np.array(crop.seasons).T[:, :, None]
    # A double logistic curve per season.
    leaves = (cover * expit((days - up) / 9) * expit((down + longer - days) / 7)).sum(0)
    for cut in crop.cuts:
        leaves *= np.where(days < cut, 1, 1 - 0.7 * np.exp((cut - days) / 18))
    leaves += crop.evergreen + weeds * np.exp(-(((DAYS - weeds_day) / 35) ** 2))
    leaves = np.minimum(leaves * vigour, 0.97)

    after = days - down[0] - longer
    straw = (1 - leaves) * crop.straw * expit(after / 5) * np.exp(-np.maximum(after, 0) / 60)
    flowers = np.zeros(T)
    if crop.flowering is not None:
        flowers = 0.6 * leaves * np.exp(-(((days - crop.flowering) / 14) ** 2))
    return np.stack((leaves - flowers, straw, flowers, 1 - leaves - straw), axis=1)


def mix_spectra(crop: Crop, cover: np.ndarray, soil: float = 1) -> np.ndarray:
    """Reflectances (T, C) of ground covered as in `ground_cover`; `soil` is the parcel's soil brightness."""
    tone = np.where((np.arange(C) >= 4) & (np.arange(C) <= 7), crop.tone, 1)
    plants = cover[:, :3] @ np.stack((LEAVES * tone, STRAW, FLOWERS))
    return plants + (cover[:, 3] * DRYNESS * soil)[:, None] * SOIL


TYPICAL = np.stack([mix_spectra(crop, ground_cover(crop)) for crop in CROPS])  # what a neighbour looks like


def draw_geometry(size: int, rng: Generator) -> list[float]:
    """Draws the outline of a parcel of `size` pixels of 10 m, a turned rectangle.

    Returns:
        Perimeter (m), area (m2), pixels over those of the bounding box, perimeter / area (1/m).
    """
    area = 100 * size * np.exp(rng.normal(0, 0.03))
    aspect = np.exp(abs(rng.normal(0, 0.6)))
    length, width = np.sqrt(area * aspect), np.sqrt(area / aspect)
    perimeter = 2 * (length + width) * np.exp(abs(rng.normal(0, 0.1)))  # no outline is quite straight
    angle = rng.uniform(0, np.pi / 2)
    cosine, sine = np.cos(angle), np.sin(angle)
    box = round((length * cosine + width * sine) * (length * sine + width * cosine) / 100)
    return [float(value) for value in (perimeter, area, size / max(box, size), perimeter / area)]


def cast_clouds(x: np.ndarray, rng: Generator) -> None:
    """Puts clouds or shadows over some pixels of some dates of x, (T, C, S), in place."""
    for date in np.flatnonzero(rng.random(T) < CLOUDINESS):
        hidden = rng.random(x.shape[-1]) < rng.uniform(0.2, 1.2)
        behind = CLOUD[:, None] if rng.random() < 0.5 else 0.3 * x[date]
        x[date] += rng.beta(1, 3) * hidden * (behind - x[date])


def simulate_parcel(seed: int, index: int, max_pixels: int | None = None) -> Parcel:
    """Draws parcel number `index`, counted from 0; a function of its arguments alone.

    Args:
        seed: of the dataset.
        index: place of the parcel in the dataset.
        max_pixels: larger parcels are cut to this size; None leaves the sizes of Sentinel-Agri.
    """
    rng = np.random.default_rng((seed, index))
    drawn = np.searchsorted(CUMULATED_SHARES, rng.random() * CUMULATED_SHARES[-1], side="right")
    crop = CROPS[index % len(CROPS) if index < FIRST_PARCELS else drawn]
    size = round(np.exp(np.interp(rng.random(), QUANTILES, np.log(SIZES))))
    size = size if max_pixels is None else min(size, max_pixels)
    geometry = draw_geometry(size, rng)

    shift, longer = rng.normal(0, 8, 2)
    vigour, soil = np.exp(rng.normal(0, (0.12, 0.15)))
    cover = ground_cover(crop, shift, longer, vigour, abs(rng.normal(0, 0.15)), rng.uniform(0, 365))
    light = np.exp(rng.normal(0, 0.03, (T, 1)) + rng.normal(0, 0.015, (T, C)))
    spectra = mix_spectra(crop, cover, soil) * light

    # A pixel has the parcel's spectrum with more or less leaves, and at the border part of a neighbour's.
    neighbour = TYPICAL[rng.integers(len(CROPS))]
    parts = np.stack((spectra, cover[:, :1] * (LEAVES - SOIL), neighbour - spectra), axis=-1)
    parts *= 1 - HAZE[:, None, None]
    parts[:, :, 0] += HAZE[:, None] * CLOUD
    border = rng.random(size) < geometry[0] / 20 / size  # half of the pixels that the outline crosses
    weights = np.stack((np.ones(size), rng.normal(0, 0.1, size), border * rng.random(size)))
    # Not `parts @ weights`: on matrices as small as these, BLAS would keep all cores busy for nothing.
    x = np.einsum("tcp,ps->tcs", parts.astype(np.float32), weights.astype(np.float32))

    # Flat noise: it is drawn three times as fast as normal noise.
    noise = rng.random(x.shape, np.float32)
    noise -= 0.5
    noise *= (50 + 0.1 * spectra[..., None]).astype(np.float32)
    x += noise
    cast_clouds(x, rng)
    np.clip(np.rint(x, out=x), 1, 65535, out=x)
    return Parcel(crop.code, x.astype(np.uint16), geometry)


def write_dataset(folder: Path, parcels: int, seed: int, max_pixels: int | None, progress: bool) -> None:
    """Writes DATA, META and the statistics into an existing folder; arguments as in `simulate`."""
    (folder / "DATA").mkdir()
    (folder / "META").mkdir()
    labels, sizes, geometries = {}, {}, {}
    # Sums of integers are exact, so mean and standard deviation need no second pass.
    total, squares = np.zeros((2, T, C), np.int64)
    for index in progress_bar(range(parcels), "simulating", "parcels", shown=progress):
        parcel = simulate_parcel(seed, index, max_pixels)
        name = str(index + 1)
        np.save(folder / "DATA" / f"{name}.npy", parcel.pixels)
        labels[name], sizes[name], geometries[name] = parcel.label, parcel.pixels.shape[-1], parcel.geometry
        total += parcel.pixels.sum(-1, dtype=np.int64)
        squares += np.einsum("tcs,tcs->tc", parcel.pixels, parcel.pixels, dtype=np.int64)

    count = sum(sizes.values())
    mean = total / count
    deviation = np.sqrt(squares / count - mean**2)
    # Protocol 4 writes arrays in the form that older numpy and Python releases wrote too.
    statistics = pickle.dumps((mean.astype(np.float32), deviation.astype(np.float32)), protocol=4)
    (folder / "S2-2017-T31TFM-meanstd.pkl").write_bytes(statistics)
    meta = {
        "labels": {"label_44class": labels},
        "dates": {str(t): day for t, day in enumerate(DATES)},
        "sizes": sizes,
        "geomfeat": geometries,
    }
    for name, content in meta.items():
        (folder / "META" / f"{name}.json").write_text(json.dumps(content))


def simulate(
    folder: str | Path, parcels: int, seed: int, progress: bool = True, max_pixels: int | None = None
) -> None:
    """Writes a simulated dataset in the published format; under its final name only once it is complete.

    Parcel number i, counted from 1, depends on seed, i and max_pixels alone, not on the number of parcels.

    Args:
        folder: must not exist, or be empty.
        parcels: at least 100, so that each of the 20 classes has at least five.
        seed: at least 0.
        progress: show a progress bar.
        max_pixels: larger parcels are cut to this size; None leaves the sizes of Sentinel-Agri.

    Raises:
        UserError: if an argument is out of its range, or the folder is in use or cannot be written.
    """
    if parcels < FIRST_PARCELS:
        raise UserError(f"parcels is {parcels}; give at least {FIRST_PARCELS}, five for each of the classes.")
    if seed < 0:
        raise UserError(f"seed is {seed}; give 0 or more.")
    if max_pixels is not None and max_pixels < 1:
        raise UserError(f"max_pixels is {max_pixels}; give at least 1.")
    folder = Path(folder).resolve()
    with as_user_error(OSError, prefix=f"The simulated dataset cannot be written to {folder}: "):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder; name a new one or remove it.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            complete = Path(temporary) / folder.name
            complete.mkdir()
            write_dataset(complete, parcels, seed, max_pixels, progress)
            complete.rename(folder)


def embedded_dataset() -> Path:
    """Folder of the embedded simulated dataset: made on first use and kept in .cache of the repository.

    Two processes may ask at once: the first to finish provides it, the other's copy is discarded.

    Raises:
        UserError: if it cannot be written.
    """
    name = f"simulated-{VERSION}-{EMBEDDED_PARCELS}-{EMBEDDED_SEED}"
    folder = Path(__file__).resolve().parent.parent / ".cache" / name
    complete = (folder / "META").is_dir
    if not complete():
        try:
            simulate(folder, EMBEDDED_PARCELS, EMBEDDED_SEED, max_pixels=EMBEDDED_MAX_PIXELS)
        except UserError:
            if not complete():  # otherwise another process was faster
                raise
    return folder


def main() -> None:
    """Command line: python -m preprocessing.simulate OUT."""
    parser = argparse.ArgumentParser(description="Writes a simulated Sentinel-Agri dataset.")
    parser.add_argument("out", metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--parcels", type=int, default=EMBEDDED_PARCELS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=EMBEDDED_SEED, help="default: %(default)s")
    parser.add_argument("--max_pixels", type=int, help="cut larger parcels to this size; default: real sizes")
    args = parser.parse_args()
    simulate(args.out, args.parcels, args.seed, max_pixels=args.max_pixels)
    print(
        f"{args.out}: {args.parcels} simulated parcels, {T} dates, {C} bands, "
        f"{len(CROPS)} classes; no real data"
    )


if __name__ == "__main__":
    run_cli(main)
