"""Values of single pixels, and whole dates, against loops over pixels."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.rasters import CRS, LEFT, SIDE, difficult_outlines, geopandas, random_values, write_image

# isort: split
# After the packages are known to be there.
from rasterio.windows import Window

from preprocessing.images.extract import (
    Reading,
    choose_reading,
    extract,
    fits,
    is_missing,
    plane_path,
    read_pixels,
)
from preprocessing.images.grids import place_images
from preprocessing.images.layout import lay_out
from preprocessing.images.scenes import Image, find_images
from preprocessing.images.units import choose_units

UINT16 = np.dtype(np.uint16)


def one_image(path: Path, values: np.ndarray, bands: list[str] | None = None, **options: object) -> Image:
    write_image(path, values, **options)
    return choose_units(find_images(str(path.parent), bands)[0])[0][0]


def some_pixels(seed: int, window: Window, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, window.height, n), rng.integers(0, window.width, n)


@pytest.mark.parametrize("window", [Window(0, 0, SIDE, SIDE), Window(32, 64, 50, 20)])
@pytest.mark.parametrize("nodata", [None, 7])
def test_values_and_what_is_missing(tmp_path, window, nodata):
    values = random_values(1, 2) % 10
    image = one_image(tmp_path / "20170103.tif", values, ["2", "1"], nodata=3)
    rows, columns = some_pixels(2, window)
    found, seen = read_pixels(image, window, rows, columns, Reading(UINT16, 3, nodata))
    for i, (row, column) in enumerate(zip(rows, columns)):
        pixel = values[:, window.row_off + row, window.col_off + column].tolist()
        assert found[:, i].tolist() == pixel[::-1]
        assert seen[i] == (3 not in pixel and nodata not in pixel)
    assert 0 < seen.sum() < len(seen)


def test_scaled_values(tmp_path):
    values = random_values(1, 2)
    image = one_image(tmp_path / "20170103.tif", values)
    window = Window(0, 0, SIDE, SIDE)
    rows, columns = some_pixels(3, window)
    found, _ = read_pixels(image, window, rows, columns, Reading(np.dtype(np.float32), np.nan, scale=0.5))
    np.testing.assert_array_equal(found, values[:, rows, columns] * np.float32(0.5))


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [(None, "u2", False), (np.nan, "f4", False), (-1, "u2", False), (0.5, "u2", False), (65535, "u2", True)]
    + [(0.5, "f4", True), (-9999, "i2", True), (65536, "u2", False)],
)
def test_what_a_type_can_hold(value, dtype, expected):
    assert fits(value, np.dtype(dtype)) == expected


@pytest.mark.parametrize(
    ("dtype", "tag", "nodata", "scale", "expected"),
    [
        ("uint16", None, None, None, ("uint16", 65535)),
        ("int16", None, None, None, ("int16", -32768)),
        ("uint16", 0, None, None, ("uint16", 0)),
        ("uint16", 0, 9, None, ("uint16", 9)),
        ("uint16", 0, -5, None, ("uint16", 65535)),
        ("float32", -9999, None, None, ("float32", np.nan)),
        ("uint16", 0, None, 0.1, ("float32", np.nan)),
    ],
)
def test_type_and_missing_value_of_the_output(tmp_path, dtype, tag, nodata, scale, expected):
    image = one_image(tmp_path / "20170103.tif", random_values(0).astype(dtype), nodata=tag)
    reading = choose_reading([image], nodata, scale=scale)
    np.testing.assert_equal((reading.dtype.name, reading.fill), expected)


def test_a_pixel_is_missing_where_all_channels_are():
    values = np.array([[1, 0, 0], [2, 0, 5]])
    assert is_missing(values, 0).tolist() == [False, True, False]
    assert is_missing(np.where(values, values, np.nan), np.nan).tolist() == [False, True, False]


def test_the_planes_of_dates(tmp_path):
    """Two tiles of one date that overlap: of every pixel, the first value that is there."""
    days, offset = ("20170103", "20170214"), 60
    images = {}
    for i, day in enumerate(days):
        for j, name in enumerate("ab"):
            values = random_values(2 * i + j) % 50
            images[day, name] = values
            write_image(tmp_path / "images" / f"{name}_{day}.tif", values, LEFT + 10 * offset * j, nodata=0)
    (grid,) = place_images(choose_units(find_images(str(tmp_path / "images"))[0])[0])
    (layout,) = lay_out(geopandas.GeoSeries(difficult_outlines(), crs=CRS), [grid], 0, tmp_path)
    with ThreadPoolExecutor(2) as executor:
        extract([layout], Reading(UINT16, 0), tmp_path, 10**8, (executor.submit, 2))
    for day in days:
        found = np.load(plane_path(tmp_path, 0, (int(day), 0)))
        for place, pixel in enumerate(layout.pixels.tolist()):
            row, column = divmod(pixel, grid.width)
            expected = np.zeros(3)
            for name, left in (("b", offset), ("a", 0)):
                inside = 0 <= column - left < SIDE
                if inside and images[day, name][:, row, column - left].all():
                    expected = images[day, name][:, row, column - left]
            assert found[:, place].tolist() == expected.tolist()


def test_a_damaged_image_is_named(tmp_path):
    image = one_image(tmp_path / "20170103.tif", random_values(1))
    path = tmp_path / "20170103.tif"
    path.write_bytes(path.read_bytes()[:-20_000])
    window = Window(0, 0, SIDE, SIDE)
    with pytest.raises(ValueError, match="20170103 cannot be read"):
        read_pixels(image, window, *some_pixels(0, window), Reading(UINT16, 0))
