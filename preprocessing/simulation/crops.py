"""Twenty invented crops: how they cover the ground in the course of a season, and what that looks like from above."""

from typing import NamedTuple

import numpy as np
from scipy.special import expit

from preprocessing.simulation.seasons import PUBLISHED, Season

C = 10
BANDS = ["B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12"]
# Reflectances x 10000 in these.
LEAVES = np.array([180, 550, 260, 990, 3300, 4200, 4350, 4600, 1850, 760], np.float64)
STRAW = np.array([540, 900, 1180, 1600, 2200, 2500, 2680, 2950, 3050, 1800], np.float64)
FLOWERS = np.array([420, 1500, 1250, 2050, 3400, 4000, 4300, 4550, 2100, 1000], np.float64)
SOIL = np.array([600, 850, 1070, 1330, 1600, 1770, 1920, 2120, 2750, 2000], np.float64)
CLOUD = np.array([3700, 3500, 3400, 3400, 3500, 3600, 3600, 3700, 2800, 2200], np.float64)


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


def ground_cover(
    crop: Crop,
    shift: float = 0,
    longer: float = 0,
    vigour: float = 1,
    weeds: float = 0,
    weeds_day: float = 0,
    season: Season = PUBLISHED,
) -> np.ndarray:
    """What covers the ground of one parcel.

    Args:
        crop: its growth curves.
        shift: days by which all happens later.
        longer: days by which each season lasts longer.
        vigour: factor of the leaf cover.
        weeds: leaf cover of weeds at their best.
        weeds_day: day of the year on which they are at their best.
        season: dates and weather.

    Returns:
        Fractions covered by leaves, straw, flowers and bare soil at each date, (T, 4); they sum to 1.
    """
    days = season.days - season.later - shift
    up, down, cover = np.array(crop.seasons).T[:, :, None]
    # A double logistic curve per season.
    leaves = (cover * expit((days - up) / 9) * expit((down + longer - days) / 7)).sum(0)
    for cut in crop.cuts:
        leaves *= np.where(days < cut, 1, 1 - 0.7 * np.exp((cut - days) / 18))
    leaves += crop.evergreen + weeds * np.exp(-(((season.days - weeds_day) / 35) ** 2))
    leaves = np.minimum(leaves * vigour * season.vigour, 0.97)

    after = days - down[0] - longer
    straw = (1 - leaves) * crop.straw * expit(after / 5) * np.exp(-np.maximum(after, 0) / 60)
    flowers = np.zeros(len(days))
    if crop.flowering is not None:
        flowers = 0.6 * leaves * np.exp(-(((days - crop.flowering) / 14) ** 2))
    return np.stack((leaves - flowers, straw, flowers, 1 - leaves - straw), axis=1)


def mix_spectra(crop: Crop, cover: np.ndarray, soil: float = 1, season: Season = PUBLISHED) -> np.ndarray:
    """Reflectances (T, C) of ground covered as in `ground_cover`; `soil` is the parcel's soil brightness."""
    dryness = 1 - 0.25 * np.cos(2 * np.pi * season.days / 365)  # soils are dark in winter, bright in summer
    tone = np.where((np.arange(C) >= 4) & (np.arange(C) <= 7), crop.tone, 1)
    plants = cover[:, :3] @ np.stack((LEAVES * tone, STRAW, FLOWERS))
    return plants + (cover[:, 3] * dryness * soil)[:, None] * SOIL


# In the published season, (20, T, C).
TYPICAL = np.stack([mix_spectra(crop, ground_cover(crop)) for crop in CROPS])
