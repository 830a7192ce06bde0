"""Raster files: what they say about themselves, and the date in their name."""

import re
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.transform import Affine

from common.errors import UserError

SUFFIXES = (".tif", ".tiff", ".jp2", ".vrt")
DATE = re.compile(r"((?:19|20)\d\d)(-?)(\d\d)\2(\d\d)")


class Header(NamedTuple):
    """What a raster file says about itself."""

    crs: CRS
    transform: Affine
    height: int
    width: int
    block: tuple[int, int]  # rows and columns of what is compressed together
    names: tuple[str, ...]  # of the bands: their descriptions, or 1, 2, ...
    dtypes: tuple[str, ...]
    nodata: tuple[float | None, ...]
    scaled: tuple[tuple[float, float], ...]  # scale and offset of the bands; 1 and 0 where none are named

    @property
    def size(self) -> float:
        """Width of a pixel, in the coordinate system's units."""
        return self.transform.a

    @property
    def bounds(self) -> np.ndarray:
        """Left, top, right, bottom."""
        return np.array([*(self.transform @ (0, 0)), *(self.transform @ (self.width, self.height))])

    def is_same_grid(self, other: "Header") -> bool:
        """Whether pixels coincide."""
        return self[:4] == other[:4]

    def resampled(self, size: float) -> "Header":
        """The same ground in pixels of another size, read in blocks that suit any file."""
        left, top, right, bottom = self.bounds
        height, width = (max(1, round(length / size)) for length in (top - bottom, right - left))
        return self._replace(
            transform=Affine(size, 0, left, 0, -size, top), height=height, width=width, block=(512, 512)
        )


class Source(NamedTuple):
    """One band of one file; bands count from 1."""

    path: str
    band: int
    said: tuple[float, float] | None = None  # scale and offset by what stands beside the file

    @property
    def dtype(self) -> str:
        """Type of the band's values."""
        return read_header(self.path).dtypes[self.band - 1]

    @property
    def nodata(self) -> float | None:
        """The value that stands for missing ones, None if the file names none."""
        return read_header(self.path).nodata[self.band - 1]

    @property
    def declared(self) -> tuple[float, float] | None:
        """Scale and offset that are named for the band, beside its file or in it."""
        found = self.said or read_header(self.path).scaled[self.band - 1]
        return None if found[0] == 0 or found == (1, 0) else found


class Scene(NamedTuple):
    """Everything that belongs to one acquisition of one place."""

    name: str
    date: int  # YYYYMMDD
    bands: dict[str, list[Source]]  # in one or several resolutions
    baseline: str | None = None  # Sentinel-2's processing baseline, such as "04.00", by a STAC item
    is_applied: bool | None = None  # whether the numbers have the baseline's offset applied, by a STAC item


@lru_cache(maxsize=None)
def read_header(path: str) -> Header:
    """Reads a raster file's header.

    Raises:
        UserError: if it is no raster, has no coordinate system, or is not north up.
    """
    try:
        with rasterio.open(path) as file:
            crs, transform, names = file.crs, file.transform, file.descriptions
            shapes, dtypes, nodata = file.block_shapes, file.dtypes, file.nodatavals
            height, width = file.shape
            scaled = tuple(zip(file.scales, file.offsets))
    except RasterioError as error:
        raise UserError(
            f"{path} cannot be read as an image ({error}); copy it again or remove it."
        ) from error
    if not crs:
        raise UserError(
            f"{path} has no coordinate system; assign one, such as by gdal_edit.py -a_srs EPSG:32631 {path}."
        )
    if transform.b or transform.d or transform.a <= 0 or transform.e >= 0:
        raise UserError(f"{path} is not north up; resample it with gdalwarp.")
    if not all(names) or len(set(names)) < len(names):
        names = tuple(str(i + 1) for i in range(len(names)))
    return Header(crs, transform, height, width, shapes[0], names, dtypes, nodata, scaled)


def find_date(name: str, source: str) -> int:
    """First date, YYYYMMDD or YYYY-MM-DD, in a name; `source` is what has this name, for the message."""
    for match in DATE.finditer(name):
        digits = "".join(match.group(1, 3, 4))
        try:
            datetime.strptime(digits, "%Y%m%d")
        except ValueError:
            continue
        return int(digits)
    raise UserError(
        f"{source} has no date in {name!r}; expected YYYYMMDD or YYYY-MM-DD, such as 20170131, in it."
    )
