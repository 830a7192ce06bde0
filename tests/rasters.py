"""Small images and outlines for tests, and what a plain loop with rasterio.mask reads from them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

geopandas = pytest.importorskip("geopandas", reason="needs requirements-geo.txt")
rasterio = pytest.importorskip("rasterio", reason="needs requirements-geo.txt")
from rasterio.mask import raster_geometry_mask  # noqa: E402
from rasterio.transform import from_origin  # noqa: E402
from shapely.geometry import MultiPolygon, Polygon, box  # noqa: E402

CRS = "EPSG:32631"
LEFT, TOP = 500_000, 4_900_000
SIDE = 96


def write_image(
    path: Path,
    values: np.ndarray,
    left: float = LEFT,
    top: float = TOP,
    crs: str | None = CRS,
    size: float = 10,
    **options: object,
) -> Path:
    """Writes values (C, H, W) in tiles of 32 pixels.

    Among the options, `names` are the bands' descriptions, `scaled` their scale and offset.
    """
    names, scaled = options.pop("names", None), options.pop("scaled", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    C, height, width = values.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=C,
        height=height,
        width=width,
        dtype=values.dtype,
        crs=crs,
        transform=from_origin(left, top, size, size),
        tiled=True,
        blockxsize=32,
        blockysize=32,
        compress="deflate",
        **options,
    ) as file:
        file.write(values)
        if names:
            file.descriptions = names
        if scaled:
            file.scales, file.offsets = C * [scaled[0]], C * [scaled[1]]
    return path


def random_values(seed: int, C: int = 3, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Values from 1 to 999, (C, height, width) uint16."""
    return np.random.default_rng(seed).integers(1, 1000, (C, height, width)).astype(np.uint16)


def square(x: float, y: float, width: float, height: float | None = None) -> Polygon:
    """A rectangle whose upper left corner is x, y metres from the images' own, right and down."""
    height = width if height is None else height
    return box(LEFT + x, TOP - y - height, LEFT + x + width, TOP - y)


def difficult_outlines() -> list:
    """Outlines of every kind; the first and second overlap."""
    return [
        square(55, 52, 203, 170),
        square(160, 100, 180, 200),
        square(420, 60, 230).difference(square(480, 130, 77)),  # a hole
        MultiPolygon([square(100, 420, 83), square(330, 480, 121, 64)]),
        Polygon([(LEFT + 550, TOP - 400), (LEFT + 861, TOP - 487), (LEFT + 603, TOP - 713)]),
        square(-85, 700, 160),  # partly outside
        square(700, 900, 140, 200),  # partly outside, at a corner
        square(313, 333, 9),  # a single pixel
    ]


def write_parcels(path: Path, outlines: Sequence, crs: str | None = CRS, **columns: object) -> Path:
    """Writes outlines and columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    geopandas.GeoDataFrame(
        columns or {"number": range(len(outlines))}, geometry=list(outlines), crs=crs
    ).to_file(path)
    return path


def read_plainly(paths: Sequence[Path], outline: object) -> np.ndarray:
    """Values (T, C, S) of one parcel: for every image in turn, the pixels whose centre is inside."""
    dates = []
    for path in paths:
        with rasterio.open(path) as file:
            outside, _, window = raster_geometry_mask(file, [outline], crop=True)
            dates.append(file.read(window=window)[:, ~outside])
    return np.stack(dates)


def read_meta(folder: Path, name: str) -> dict:
    """META/<name>.json."""
    return json.loads((folder / "META" / f"{name}.json").read_text())


def read_data(folder: Path) -> dict[str, np.ndarray]:
    """Pixels of all parcels by id."""
    return {path.stem: np.load(path) for path in sorted((folder / "DATA").iterdir())}
