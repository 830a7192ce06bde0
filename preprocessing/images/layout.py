"""Which pixels belong to which parcel: every parcel is rasterised once, on the grid that covers most of it."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
from geopandas import GeoSeries
from rasterio import Env
from rasterio.features import rasterize
from rasterio.transform import Affine
from rasterio.windows import Window

from common.progress import progress_bar
from preprocessing.images.grids import Footprint, Grid, windows
from preprocessing.images.outlines import to_metres
from preprocessing.images.scenes import When

_CHUNK = 2**20  # pixels that are sorted at a time
_CELL = 1024  # pixels of a cell; parcels are ordered by cells, so that neighbours in space are so on disk


@dataclass
class Layout:
    """The parcels of one grid and their pixels; overlapping parcels each have their own.

    Attributes:
        grid: the grid.
        parcels: places of the parcels in the table of outlines, (N,).
        offsets: the pixels of parcel i are offsets[i]:offsets[i + 1], (N + 1,).
        pixels: row * width + column on the grid of every pixel, (P,) int64, memory-mapped.
        covered: whether an image at each of the grid's places has pixels of each parcel, (N, places).
        filled: pixels over pixels of the bounding box of each parcel, (N,).
        kept: whether the dataset is to contain each parcel, (N,).
    """

    grid: Grid
    parcels: np.ndarray
    offsets: np.ndarray
    pixels: np.ndarray
    covered: np.ndarray
    filled: np.ndarray
    kept: np.ndarray

    def dates(self) -> list[tuple[When, ...]]:
        """Dates of all images whose extent holds pixels of a parcel, for every parcel."""
        patterns, which = np.unique(self.covered, axis=0, return_inverse=True)
        images = list(zip(self.grid.images, self.grid.footprints))
        dates = []
        for covered in patterns:
            places = set(compress(self.grid.places, covered))
            dates.append(tuple(sorted({image.when for image, place in images if place in places})))
        return [dates[pattern] for pattern in which.ravel()]


def inside(outline: object, bounds: Sequence[float], grid: Grid) -> np.ndarray:
    """Pixels of the grid whose centre is in an outline and that some image covers.

    Args:
        outline: a polygon or several, in the grid's coordinates.
        bounds: of the outline: left, bottom, right, top.
        grid: the grid.

    Returns:
        row * width + column, increasing, int64.
    """
    if not np.isfinite(bounds).all():
        return np.empty(0, np.int64)
    left, top = ~grid.transform @ (bounds[0], bounds[3])
    right, bottom = ~grid.transform @ (bounds[2], bounds[1])
    row, column = max(0, int(np.floor(top))), max(0, int(np.floor(left)))
    height = min(grid.height, int(np.ceil(bottom))) - row
    width = min(grid.width, int(np.ceil(right))) - column
    if height <= 0 or width <= 0:
        return np.empty(0, np.int64)
    transform = grid.transform @ Affine.translation(column, row)
    mask = rasterize([outline], (height, width), transform=transform, dtype="uint8")
    rows, columns = np.nonzero(mask)
    rows, columns = rows + row, columns + column
    places = grid.places
    if len(places) > 1:
        held = np.any([place.contains(rows, columns) for place in places], axis=0)
        rows, columns = rows[held], columns[held]
    return rows * grid.width + columns


def lay_out(outlines: GeoSeries, grids: Sequence[Grid], buffer: float, folder: Path) -> list[Layout]:
    """Rasterises all parcels; of several grids, a parcel belongs to the one with most of its pixels (then the first).

    Args:
        outlines: of the parcels.
        grids: the grids.
        buffer: metres by which outlines grow; negative: shrink.
        folder: where the pixels' places are kept, so that they need not fit into memory.

    Returns:
        One layout per grid; parcels without a pixel are in none.
    """
    grown = (to_metres(outlines, grid.crs).buffer(buffer) if buffer else outlines for grid in grids)
    on_grid = [series.to_crs(grid.crs) for series, grid in zip(grown, grids)]
    bounds = [series.bounds.to_numpy() for series in on_grid]
    geometries = [series.to_numpy() for series in on_grid]
    # Parcel, number of pixels, places that cover it, how filled.
    kept: list[list[tuple]] = [[] for _ in grids]
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"pixels-{g}", "wb")) for g in range(len(grids))]
        stack.enter_context(Env())  # one for all: rasterio would make one per parcel
        for parcel in progress_bar(_order(bounds[0], grids[0]), "rasterising", "parcels"):
            found = [inside(geometries[g][parcel], bounds[g][parcel], grid) for g, grid in enumerate(grids)]
            g = int(np.argmax([len(pixels) for pixels in found]))
            if pixels := found[g].tobytes():
                files[g].write(pixels)
                kept[g].append((parcel, len(found[g]), *_describe(found[g], grids[g])))
    return [_layout(grid, kept[g], folder / f"pixels-{g}") for g, grid in enumerate(grids) if kept[g]]


def _order(bounds: np.ndarray, grid: Grid) -> list[int]:
    """Parcels cell by cell of the grid."""
    corners = np.nan_to_num(bounds[:, [0, 3]], posinf=0)
    columns, rows = ~grid.transform @ (corners[:, 0], corners[:, 1])
    return np.lexsort((columns // _CELL, rows // _CELL)).tolist()


def _describe(pixels: np.ndarray, grid: Grid) -> tuple[list[bool], float]:
    """Which places cover a parcel's pixels, and its pixels over those of their bounding box."""
    rows, columns = np.divmod(pixels, grid.width)
    covered = [bool(place.contains(rows, columns).any()) for place in grid.places]
    return covered, len(pixels) / (int(np.ptp(rows)) + 1) / (int(np.ptp(columns)) + 1)


def _layout(grid: Grid, kept: list[tuple], path: Path) -> Layout:
    parcels, counts, covered, filled = (np.array(values) for values in zip(*kept))
    offsets = np.concatenate(([0], np.cumsum(counts)))
    return Layout(
        grid, parcels, offsets, np.memmap(path, np.int64, "r"), covered, filled, np.ones(len(counts), bool)
    )


@dataclass
class Blocks:
    """The pixels of a layout at one place of its grid, sorted by the blocks that an image there is read by.

    Attributes:
        windows: blocks with at least one pixel, in the image's own rows and columns.
        starts: pixels of block i are starts[i]:starts[i + 1] of `order`.
        order: places in the layout's pixels, (P,) int64, memory-mapped.
    """

    layout: Layout
    place: Footprint
    windows: list[Window]
    starts: np.ndarray
    order: np.ndarray

    def pixels(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A block's pixels: their places in the layout, and rows and columns in the block."""
        where = np.array(self.order[self.starts[block] : self.starts[block + 1]])
        rows, columns = np.divmod(self.layout.pixels[where], self.layout.grid.width)
        window = self.windows[block]
        rows -= self.place.row + window.row_off
        columns -= self.place.column + window.col_off
        return where, rows.astype(np.int32), columns.astype(np.int32)


def sort_by_blocks(layout: Layout, place: Footprint, shape: tuple[int, int], path: Path) -> Blocks:
    """Sorts a layout's pixels by blocks of the given shape, by counting, piece by piece, so that memory is bounded."""
    per_row = -(-place.width // shape[1])
    every = list(windows(place, shape))

    def pieces():
        for start in range(0, len(layout.pixels), _CHUNK):
            rows, columns = np.divmod(layout.pixels[start : start + _CHUNK], layout.grid.width)
            held = np.flatnonzero(place.contains(rows, columns))
            rows, columns = rows[held] - place.row, columns[held] - place.column
            yield start + held, rows // shape[0] * per_row + columns // shape[1]

    counts = np.zeros(len(every), np.int64)
    for _, blocks in pieces():
        counts += np.bincount(blocks, minlength=len(every))
    starts = np.concatenate(([0], np.cumsum(counts)))
    order = np.memmap(path, np.int64, "w+", shape=(max(1, int(starts[-1])),))
    free = starts[:-1].copy()  # where each block goes on
    for places, blocks in pieces():
        by_block = np.argsort(blocks, kind="stable")
        blocks, here = blocks[by_block], np.bincount(blocks, minlength=len(every))
        rank = np.arange(len(blocks)) - (np.cumsum(here) - here)[blocks]
        order[free[blocks] + rank] = places[by_block]
        free += here
    used = np.flatnonzero(counts)
    return Blocks(layout, place, [every[i] for i in used], np.append(starts[used], starts[-1]), order)
