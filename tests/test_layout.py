"""Which pixels belong to which parcel, against loops over pixel centres."""

from pathlib import Path

import numpy as np
import pytest

from tests.rasters import (
    CRS,
    LEFT,
    SIDE,
    TOP,
    difficult_outlines,
    geopandas,
    random_values,
    square,
    write_image,
)

# isort: split
# After the packages are known to be there.
from shapely import Point, affinity

from preprocessing.images import layout
from preprocessing.images.grids import Grid, place_images, windows
from preprocessing.images.scenes import find_images

# No pixel's centre lies on an edge, where it could belong to either side.
OUTLINES = [affinity.translate(outline, 0.3, 0.4) for outline in difficult_outlines()]


def make_grid(folder: Path, *corners: tuple[float, float]) -> Grid:
    """A grid of square images whose upper left corners lie so many metres right of and below the first's usual one."""
    for i, (x, y) in enumerate(corners or [(0, 0)]):
        write_image(folder / f"{'abc'[i]}_20170103.tif", random_values(i), LEFT + x, TOP - y)
    return place_images(find_images(str(folder))[0])[0]


def plain_inside(outline: object, grid: Grid) -> list[int]:
    """The same by asking of every pixel's centre."""
    found = []
    for row in range(grid.height):
        for column in range(grid.width):
            held = any(
                place.row <= row < place.row + place.height
                and place.column <= column < place.column + place.width
                for place in grid.places
            )
            x, y = grid.transform @ (column + 0.5, row + 0.5)
            if held and outline.contains(Point(x, y)):
                found.append(row * grid.width + column)
    return found


@pytest.mark.parametrize("corners", [[(0, 0)], [(0, 0), (500, 700)]])
def test_a_pixel_belongs_to_the_outline_that_holds_its_centre(tmp_path, corners):
    grid = make_grid(tmp_path, *corners)
    for outline in OUTLINES:
        found = layout.inside(outline, outline.bounds, grid)
        assert found.dtype == np.int64 and found.tolist() == plain_inside(outline, grid)
    far = square(90_000, 0, 50)
    assert not len(layout.inside(far, far.bounds, grid))
    assert not len(layout.inside(far.buffer(-100), 4 * [np.nan], grid))


def test_every_parcel_has_its_own_pixels_and_those_without_are_left_out(tmp_path):
    grid = make_grid(tmp_path / "images")
    outlines = geopandas.GeoSeries([*OUTLINES, square(5000, 0, 99)], crs=CRS)
    (found,) = layout.lay_out(outlines, [grid], 0, tmp_path)
    assert sorted(found.parcels.tolist()) == list(range(8)) and found.covered.all() and found.kept.all()
    for i, parcel in enumerate(found.parcels):
        pixels = found.pixels[found.offsets[i] : found.offsets[i + 1]].tolist()
        assert pixels == plain_inside(outlines[parcel], grid)
        rows, columns = np.divmod(pixels, grid.width)
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert found.filled[i] == pytest.approx(len(pixels) / box)


def test_dates_are_those_of_the_images_that_hold_a_pixel(tmp_path):
    for name, day, x in (("a", 20170103, 0), ("b", 20170214, 800), ("b", 20170301, 800)):
        write_image(tmp_path / "images" / f"{name}_{day}.tif", random_values(0), LEFT + x)
    grid = place_images(find_images(str(tmp_path / "images"))[0])[0]
    outlines = geopandas.GeoSeries([square(0, 0, 50), square(1000, 0, 50), square(780, 0, 100)], crs=CRS)
    (found,) = layout.lay_out(outlines, [grid], 0, tmp_path)
    dates = dict(zip(found.parcels.tolist(), found.dates()))
    a, b, c = ((day, 0) for day in (20170103, 20170214, 20170301))
    assert dates == {0: (a,), 1: (b, c), 2: (a, b, c)}


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (32, 64), (7, 13)])
@pytest.mark.parametrize("piece", [50, 2**20])
def test_pixels_are_sorted_by_blocks(tmp_path, monkeypatch, shape, piece):
    monkeypatch.setattr(layout, "_CHUNK", piece)
    grid = make_grid(tmp_path / "images", (0, 0), (400, 300))
    outlines = geopandas.GeoSeries(OUTLINES, crs=CRS)
    (found,) = layout.lay_out(outlines, [grid], 0, tmp_path)
    for place in grid.places:
        blocks = layout.sort_by_blocks(found, place, shape, tmp_path / "order")
        expected = []
        for window in windows(place, shape):
            members = []
            for where, pixel in enumerate(found.pixels.tolist()):
                row = pixel // grid.width - place.row - window.row_off
                column = pixel % grid.width - place.column - window.col_off
                if 0 <= row < window.height and 0 <= column < window.width:
                    members.append((where, row, column))
            if members:
                expected.append((window, members))
        assert blocks.windows == [window for window, _ in expected]
        for i, (_, members) in enumerate(expected):
            assert list(zip(*(values.tolist() for values in blocks.pixels(i)))) == members
