"""Single simulated parcels: crop, size, outline, and every pixel's reflectances."""

from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from preprocessing.simulation.crops import CLOUD, CROPS, LEAVES, SOIL, C, Crop, ground_cover, mix_spectra
from preprocessing.simulation.seasons import PUBLISHED, PUBLISHED_YEAR, Season

# Pixels per parcel: quantiles, and the sizes there.
QUANTILES = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1)
SIZES = (1, 2, 4, 9, 19, 43, 75, 113, 162, 225, 313, 449, 716, 1036, 2002, 3940, 14879)
# The first parcels take the classes in turn, so that each has at least five; all others draw their class.
FIRST_PARCELS = 5 * len(CROPS)
CUMULATED_SHARES = np.cumsum([crop.share for crop in CROPS])


class Parcel(NamedTuple):
    """One simulated parcel."""

    label: int
    pixels: np.ndarray  # reflectances x 10000, (T, C, S) uint16; 0 for what is missing
    geometry: list[float]  # see draw_geometry


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


def cast_clouds(x: np.ndarray, cloudiness: np.ndarray, rng: Generator) -> np.ndarray:
    """Puts clouds or shadows over some pixels of some dates of x, (T, C, S), in place; returns which, (T, S)."""
    covered = np.zeros((x.shape[0], x.shape[2]), bool)
    for date in np.flatnonzero(rng.random(len(x)) < cloudiness):
        hidden = rng.random(x.shape[-1]) < rng.uniform(0.2, 1.2)
        behind = CLOUD[:, None] if rng.random() < 0.5 else 0.3 * x[date]
        x[date] += rng.beta(1, 3) * hidden * (behind - x[date])
        covered[date] = hidden
    return covered


def draw_crop(index: int, rng: Generator) -> Crop:
    """Draws the crop of parcel number `index`, counted from 0."""
    drawn = np.searchsorted(CUMULATED_SHARES, rng.random() * CUMULATED_SHARES[-1], side="right")
    return CROPS[index % len(CROPS) if index < FIRST_PARCELS else drawn]


def simulate_parcel(
    seed: int,
    index: int,
    max_pixels: int | None = None,
    season: Season = PUBLISHED,
    gaps: bool = False,
) -> Parcel:
    """Draws parcel number `index`, counted from 0; a function of its arguments alone.

    Other years have other parcels, so that none is known from training.

    Args:
        seed: of the dataset.
        index: place of the parcel in the dataset.
        max_pixels: larger parcels are cut to this size; None leaves the sizes of Sentinel-Agri.
        season: its dates and their weather.
        gaps: whether pixels under clouds or shadows are missing.
    """
    year = () if season.year == PUBLISHED_YEAR else (season.year,)
    rng = np.random.default_rng((seed, index, *year))
    crop = draw_crop(index, rng)
    size = round(np.exp(np.interp(rng.random(), QUANTILES, np.log(SIZES))))
    size = size if max_pixels is None else min(size, max_pixels)
    geometry = draw_geometry(size, rng)
    pixels = draw_pixels(crop, size, geometry[0], rng, True, season, gaps)
    return Parcel(crop.code, pixels, geometry)


def draw_pixels(
    crop: Crop,
    size: int,
    perimeter: float,
    rng: Generator,
    clouds: bool = True,
    season: Season = PUBLISHED,
    gaps: bool = False,
) -> np.ndarray:
    """Draws the pixels of a parcel, reflectances x 10000, (T, C, S) uint16, at least 1 where not missing.

    Args:
        crop: what grows there.
        size: number of pixels of 10 m, S.
        perimeter: of the outline in metres; the longer, the more pixels see a neighbour.
        rng: source of all draws.
        clouds: whether some dates lie under clouds or shadows.
        season: dates and weather.
        gaps: whether what lies under clouds or shadows is missing, 0.
    """
    T = len(season.days)
    shift, longer = rng.normal(0, 8, 2)
    vigour, soil = np.exp(rng.normal(0, (0.12, 0.15)))
    cover = ground_cover(crop, shift, longer, vigour, abs(rng.normal(0, 0.15)), rng.uniform(0, 365), season)
    light = np.exp(rng.normal(0, 0.03, (T, 1)) + rng.normal(0, 0.015, (T, C)))
    spectra = mix_spectra(crop, cover, soil, season) * light

    # A pixel has the parcel's spectrum with more or less leaves, and at the border part of a neighbour's.
    other = CROPS[rng.integers(len(CROPS))]
    neighbour = mix_spectra(other, ground_cover(other, season=season), season=season)
    parts = np.stack((spectra, cover[:, :1] * (LEAVES - SOIL), neighbour - spectra), axis=-1)
    parts *= 1 - season.haze[:, None, None]
    parts[:, :, 0] += season.haze[:, None] * CLOUD
    border = rng.random(size) < perimeter / 20 / size  # half of the pixels that the outline crosses
    weights = np.stack((np.ones(size), rng.normal(0, 0.1, size), border * rng.random(size)))
    # Not `parts @ weights`: on matrices as small as these, BLAS would keep all cores busy for nothing.
    x = np.einsum("tcp,ps->tcs", parts.astype(np.float32), weights.astype(np.float32))

    # Flat noise: it is drawn three times as fast as normal noise.
    noise = rng.random(x.shape, np.float32)
    noise -= 0.5
    noise *= (50 + 0.1 * spectra[..., None]).astype(np.float32)
    x += noise
    covered = cast_clouds(x, season.cloudiness, rng) if clouds else None
    np.clip(np.rint(x, out=x), 1, 65535, out=x)
    pixels = x.astype(np.uint16)
    if gaps and clouds:
        pixels *= ~covered[:, None]
    return pixels
