"""Outlines of the parcels of a dataset, by the dataset's ids. Geographic libraries are imported when needed only."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import UserError

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

OUTLINES = "parcels.gpkg"  # in META


def require_geo() -> None:
    """Raises a UserError unless the geographic libraries are installed."""
    for name in ("geopandas", "pyogrio", "pyarrow"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"outlines of parcels need {name}, which is not installed; run pip install -r requirements-geo.txt."
            ) from error


def read_outlines(path: str | Path, id_column: str = "id") -> GeoDataFrame:
    """Reads the outlines of parcels from any vector format, or GeoParquet.

    Args:
        path: a file of polygons with a coordinate reference system; parcels without an area are left out.
        id_column: column with the dataset's ids, whole numbers.

    Returns:
        One row per parcel, columns `id` (int64, unique) and `geometry`, in the file's coordinate reference system.

    Raises:
        UserError: saying what of this the file lacks.
    """
    require_geo()
    from preprocessing.images.outlines import read_parcels

    table = read_parcels(path, id_column=id_column, skip_invalid=True).table
    if "parcel" in table:
        raise UserError(
            f"{path}: column {id_column!r} holds ids such as {table['parcel'].iloc[0]!r}; expected the dataset's, whole "
            f"numbers, as in META/{OUTLINES} of the dataset."
        )
    return table[["id", "geometry"]]


def to_ground(outlines: GeoDataFrame) -> GeoDataFrame:
    """The same outlines in metres, north up: in the equal-area azimuthal projection about the middle of them all.

    Unlike the metres of, say, Web Mercator, these are metres on the ground, wherever the parcels are.

    Raises:
        UserError: if the coordinates are outside their reference system.
    """
    west, south, east, north = outlines.geometry.to_crs(4326).total_bounds
    if not np.isfinite([west, south, east, north]).all():
        raise UserError(
            f"the outlines do not lie where their coordinate reference system, {outlines.crs.name}, applies; correct it."
        )
    return outlines.to_crs(f"+proj=laea +lat_0={(south + north) / 2} +lon_0={(west + east) / 2} +units=m")
