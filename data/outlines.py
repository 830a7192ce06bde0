"""Outlines of the parcels of a dataset. Geographic libraries are imported when needed only."""

from __future__ import annotations

import importlib
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
