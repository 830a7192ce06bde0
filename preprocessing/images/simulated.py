"""Simulated satellite images and parcel outlines, to try the way from one's own rasters; nothing in them was measured.

OUT/images/sim_YYYYMMDD.tif has ten bands and one named CLOUD: 0 clear, 1 cloud, 2 shadow. OUT/parcels.gpkg has the
outlines and the columns parcel (whole numbers) and crop (text); some have holes or several parts, a few overlap.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import geopandas
import numpy as np
import rasterio
from numpy.random import Generator
from rasterio.features import rasterize
from rasterio.io import DatasetWriter
from rasterio.transform import Affine, from_origin
from rasterio.windows import Window
from scipy.special import expit
from shapely import Polygon, affinity

from common.errors import UserError, as_user_error
from common.files import write_folder
from common.progress import progress_bar
from preprocessing.simulation.crops import BANDS, CLOUD, SOIL, TYPICAL, C
from preprocessing.simulation.fields import draw_crop, draw_pixels
from preprocessing.simulation.seasons import CLOUDINESS, DATES, T

CRS = "EPSG:32631"
CELL = 16  # pixels of 10 m that a parcel has for itself, on each side
STRIP = 8 * CELL  # rows of pixels that are drawn at a time: one row of the files' tiles
_ORIGIN = 300_000, 4_900_000


def simulate_rasters(folder: str | Path, parcels: int, seed: int, progress: bool = True) -> None:
    """Writes images and outlines into a new folder, under its final name only once it is complete.

    Args:
        folder: must not exist, or be empty.
        parcels: at least 1.
        seed: at least 0.
        progress: show a progress bar.

    Raises:
        UserError: if an argument is out of its range, or the folder is in use or cannot be written.
    """
    if parcels < 1 or seed < 0:
        raise UserError(f"parcels is {parcels} and seed {seed}; give at least 1 and 0.")
    folder = Path(folder).resolve()
    with (
        as_user_error(OSError, prefix=f"the simulated images cannot be written to {folder}: "),
        write_folder(folder) as work,
    ):
        (work / "images").mkdir()
        _write(work, parcels, seed, progress)


def draw_outline(row: int, column: int, rng: Generator) -> Polygon:
    """A turned, uneven quadrangle in a cell of the grid; at times with a pond, cut by a road, or over the next cell."""
    size = 10 * CELL
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * rng.uniform(0.5, 0.85, (4, 2))
    outline = affinity.rotate(Polygon(corners * size / 2), rng.uniform(-15, 15), origin=(0, 0))
    kind = rng.random()
    if kind < 0.08:
        outline = outline.difference(affinity.translate(Polygon(corners * size / 8), size / 20, 0))
    elif kind < 0.16:
        road = affinity.rotate(Polygon([(-6, -size), (6, -size), (6, size), (-6, size)]), rng.uniform(0, 180))
        outline = outline.difference(road)
    elif kind < 0.20:
        outline = affinity.scale(outline, 1.6, 1, origin=(-size / 2, 0))
    left, top = _ORIGIN
    return affinity.translate(outline, left + (column + 0.5) * size, top - (row + 0.5) * size)


def _write(folder: Path, parcels: int, seed: int, progress: bool) -> None:
    rng = np.random.default_rng((seed, 0))
    side = int(np.ceil(np.sqrt(parcels)))
    crops = [draw_crop(index, rng) for index in range(parcels)]
    outlines = [draw_outline(*divmod(index, side), rng) for index in range(parcels)]
    columns = {"parcel": range(1, parcels + 1), "crop": [crop.name for crop in crops]}
    table = geopandas.GeoDataFrame(columns, geometry=outlines, crs=CRS)
    table.to_file(folder / "parcels.gpkg", driver="GPKG")
    width, height = side * CELL, -(-parcels // side) * CELL
    clouds = [_draw_clouds(share, height, width, rng) for share in CLOUDINESS]
    with ExitStack() as stack:
        files = [stack.enter_context(_create(folder / "images", date, height, width)) for date in DATES]
        for top in progress_bar(range(0, height, STRIP), "simulating", "strips", shown=progress):
            rows = min(STRIP, height - top)
            members = range(top // CELL * side, min(parcels, (top + rows) // CELL * side))
            scene = _draw_strip(top, rows, width, [(outlines[i], crops[i]) for i in members], rng)
            for t, file in enumerate(files):
                mask = _cover(scene[t], top, clouds[t])
                window = Window(0, top, width, rows)
                file.write(scene[t].astype(np.uint16), range(1, C + 1), window=window)
                file.write(mask, C + 1, window=window)


def _create(folder: Path, date: int, height: int, width: int) -> DatasetWriter:
    """An empty image."""
    form = {"driver": "GTiff", "height": height, "width": width, "count": C + 1, "dtype": "uint16"}
    place = {"crs": CRS, "transform": from_origin(*_ORIGIN, 10, 10)}
    tiles = {"tiled": True, "blockxsize": STRIP, "blockysize": STRIP, "interleave": "band"}
    tiles |= {"compress": "deflate", "predictor": 2}
    file = rasterio.open(folder / f"sim_{date}.tif", "w", **form, **place, **tiles)
    file.descriptions = (*BANDS, "CLOUD")
    return file


def _draw_strip(top: int, rows: int, width: int, parcels: Sequence[tuple], rng: Generator) -> np.ndarray:
    """Reflectances x 10000 of some rows of the images, (T, C, rows, width), without clouds."""
    scene = np.empty((T, C, rows, width), np.float32)
    paths = 0.3 * TYPICAL[0] + 0.7 * SOIL  # grassy tracks between the parcels
    scene[:] = paths[:, :, None, None] * rng.uniform(0.9, 1.1, (rows, width))
    transform = from_origin(*_ORIGIN, 10, 10) @ Affine.translation(0, top)
    for outline, crop in parcels:
        inside = np.nonzero(rasterize([outline], (rows, width), transform=transform, dtype="uint8"))
        if len(inside[0]):
            scene[:, :, *inside] = draw_pixels(crop, len(inside[0]), outline.length, rng, clouds=False)
    return scene


def _draw_clouds(share: float, height: int, width: int, rng: Generator) -> np.ndarray:
    """Row, column and radius in pixels of round clouds that cover about `share` of an image, (clouds, 3)."""
    radius = rng.uniform(4, 24, rng.poisson(share * height * width / (np.pi * 14**2)))
    return np.stack((rng.uniform(0, height, len(radius)), rng.uniform(0, width, len(radius)), radius), axis=1)


def _cover(scene: np.ndarray, top: int, clouds: np.ndarray) -> np.ndarray:
    """Puts clouds and their shadows over some rows of one date, (C, rows, width), in place; returns the cloud mask."""
    rows, columns = np.ogrid[top : top + scene.shape[1], : scene.shape[2]]
    mask = np.zeros(scene.shape[1:], np.uint16)
    for shift, value, factor, behind in ((8, 2, 0.4, 0.0), (0, 1, 0.2, 0.8 * CLOUD)):
        for row, column, radius in clouds:
            distance = np.hypot(rows - row - shift, columns - column + shift)
            weight = expit(radius - distance)
            scene += weight * (np.reshape(behind, (-1, 1, 1)) + (factor - 1) * scene)
            mask[weight > 0.02] = value
    np.clip(np.rint(scene, out=scene), 1, 65535, out=scene)
    return mask
