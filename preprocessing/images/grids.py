"""Pixel grids: images of one coordinate system placed on one mosaic, and the blocks they are read by."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.windows import Window

from common.errors import UserError
from preprocessing.images.outlines import name_crs
from preprocessing.images.scenes import Image, When

_SIDE = 1024  # pixels of a block's side, unless memory asks for less


class Footprint(NamedTuple):
    """Where an image lies on its grid, in pixels."""

    row: int
    column: int
    height: int
    width: int

    def contains(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Whether pixels of the grid lie inside."""
        rows, columns = rows - self.row, columns - self.column
        return (rows >= 0) & (rows < self.height) & (columns >= 0) & (columns < self.width)

    def hides(self, other: "Footprint") -> bool:
        """Whether one covers more than half of the other; tiles of one orbit that adjoin overlap by a tenth."""
        height = min(self.row + self.height, other.row + other.height) - max(self.row, other.row)
        width = min(self.column + self.width, other.column + other.width) - max(self.column, other.column)
        smaller = min(self.height * self.width, other.height * other.width)
        return 2 * max(height, 0) * max(width, 0) > smaller


@dataclass
class Grid:
    """All images of one coordinate system; tiles of it are one mosaic.

    Attributes:
        crs, transform: of the mosaic, whose first pixel is its upper left one.
        height, width: in pixels.
        images: on this grid, ordered by date and name.
        footprints: of the images, one each.
    """

    crs: CRS
    transform: Affine
    height: int
    width: int
    images: list[Image] = field(default_factory=list)
    footprints: list[Footprint] = field(default_factory=list)

    @cached_property
    def dates(self) -> list[When]:
        """Dates of the images, increasing; several images of one date count once, unless they are kept apart."""
        return sorted({image.when for image in self.images})

    @cached_property
    def places(self) -> list[Footprint]:
        """The different footprints."""
        return sorted(set(self.footprints))


def place_images(images: Sequence[Image], same_date: str | None = None) -> list[Grid]:
    """Places images on one grid per coordinate system.

    Args:
        images: ordered by date and name.
        same_date: what becomes of images of one date and one place, see `--same_date` of preprocessing.prepare.

    Raises:
        UserError: if resolutions differ, images of one system are shifted by part of a pixel, or images of one date show
            one place and nothing was chosen.
    """
    first = images[0]
    by_crs: dict[str, list[Image]] = {}
    for image in images:
        transforms = image.header.transform, first.header.transform
        size, expected = ((transform.a, -transform.e) for transform in transforms)
        if not np.allclose(size, expected, rtol=1e-6):
            raise UserError(
                f"{image.bands[0].path} has pixels of {size[0]:g} x {size[1]:g}, {first.bands[0].path} of "
                f"{expected[0]:g} x {expected[1]:g}; choose one with --resolution."
            )
        by_crs.setdefault(name_crs(image.header.crs), []).append(image)
    grids = [_mosaic(members) for members in by_crs.values()]
    for grid in grids:
        _keep_apart(grid, same_date)
    return grids


def _mosaic(images: list[Image]) -> Grid:
    """The smallest grid that holds all images of one coordinate system."""
    origin = images[0].header.transform
    corners = []
    for image in images:
        column, row = ~origin @ (image.header.transform.c, image.header.transform.f)
        if max(abs(row - round(row)), abs(column - round(column))) > 0.01:
            raise UserError(
                f"{image.bands[0].path} is shifted by part of a pixel against {images[0].bands[0].path}; "
                "align them with gdalwarp -tap."
            )
        corners.append((round(row), round(column), image.header.height, image.header.width))
    row, column = (min(corner[axis] for corner in corners) for axis in (0, 1))
    footprints = [Footprint(r - row, c - column, height, width) for r, c, height, width in corners]
    height = max(place.row + place.height for place in footprints)
    width = max(place.column + place.width for place in footprints)
    transform = origin @ Affine.translation(column, row)
    return Grid(images[0].header.crs, transform, height, width, images, footprints)


def _keep_apart(grid: Grid, same_date: str | None) -> None:
    """Gives images that show one place on one date places of their own, if wanted; adjoining tiles stay one mosaic."""
    taken: dict[tuple[int, int], list[tuple[Image, Footprint]]] = {}
    double = []
    for i, (image, place) in enumerate(zip(grid.images, grid.footprints)):
        k = 0
        while rivals := [each for each, other in taken.get((image.date, k), ()) if place.hides(other)]:
            double.append((rivals[0], image))
            k += 1
        taken.setdefault((image.date, k), []).append((image, place))
        if same_date == "separate":
            grid.images[i] = image._replace(place=k)
    if double and same_date is None:
        first, second = double[0]
        dates = len({image.date for _, image in double})
        raise UserError(
            f"{first.name} and {second.name} show one place on one date ({dates} such date(s) in all); choose with "
            "--same_date: mosaic (a pixel comes from the first, by name, that sees it), mean, or separate (each counts as "
            "a date)."
        )


def block_shape(image: Image, most_pixels: int) -> tuple[int, int]:
    """Rows and columns that an image is read by: whole tiles or strips of its file, of at most `most_pixels`."""
    header = image.header
    height, width = (min(size, whole) for size, whole in zip(header.block, (header.height, header.width)))
    columns = width * max(1, min(_SIDE, most_pixels // height) // width)
    rows = height * max(1, min(_SIDE, most_pixels // columns) // height)
    return rows, columns


def windows(place: Footprint, shape: tuple[int, int]) -> Iterator[Window]:
    """Blocks of an image, row by row."""
    for row in range(0, place.height, shape[0]):
        for column in range(0, place.width, shape[1]):
            size = min(shape[1], place.width - column), min(shape[0], place.height - row)
            yield Window(column, row, *size)
