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
from preprocessing.images.scenes import Image

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
    def dates(self) -> list[int]:
        """Dates of the images, YYYYMMDD, increasing; several images of one date count once."""
        return sorted({image.date for image in self.images})

    @cached_property
    def places(self) -> list[Footprint]:
        """The different footprints."""
        return sorted(set(self.footprints))


def place_images(images: Sequence[Image]) -> list[Grid]:
    """Places images on one grid per coordinate system.

    Raises:
        UserError: if resolutions differ, or images of one system are shifted by part of a pixel.
    """
    first = images[0]
    by_crs: dict[str, list[Image]] = {}
    for image in images:
        size, expected = (_pixel_size(each.header.transform) for each in (image, first))
        if not np.allclose(size, expected, rtol=1e-6):
            raise UserError(
                f"{image.bands[0].path} has pixels of {size[0]:g} x {size[1]:g}, {first.bands[0].path} of "
                f"{expected[0]:g} x {expected[1]:g}; resample them to one resolution with gdalwarp -tr."
            )
        by_crs.setdefault(_name(image.header.crs), []).append(image)
    return [_mosaic(members) for members in by_crs.values()]


def _name(crs: CRS) -> str:
    """The same for all files of one coordinate system, however they write it."""
    return str(crs.to_epsg() or crs.to_wkt())


def _pixel_size(transform: Affine) -> tuple[float, float]:
    return transform.a, -transform.e


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
    return Grid(
        images[0].header.crs, origin @ Affine.translation(column, row), height, width, images, footprints
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
