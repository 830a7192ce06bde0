"""Outlines of the parcels of a dataset. Geographic libraries are imported when needed only."""

from __future__ import annotations

import importlib
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import UserError
from common.files import read_json

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

OUTLINES = "parcels.gpkg"  # in META
OWN_IDS = "own_ids.json"  # in META, of parcels without outlines
_CHUNK = 2**14  # outlines looked at at a time
JOINT = " / "  # between the parts of a group's name


def require_geo() -> None:
    """Raises a UserError unless the geographic libraries are installed."""
    for name in ("geopandas", "pyogrio", "pyarrow"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"outlines of parcels need {name}, which is not installed; run pip install -r requirements-geo.txt."
            ) from error


def read_own_ids(folder: Path) -> dict[str, str]:
    """Ids of the parcels in the files that a dataset was made from, by id; none where those are its ids.

    A GeoPackage is a database, which is read here without geographic libraries.

    Args:
        folder: dataset folder.

    Raises:
        UserError: if META/parcels.gpkg, or META/own_ids.json of a dataset without it, is damaged.
    """
    path = folder / "META" / OUTLINES
    if not path.exists():
        table = folder / "META" / OWN_IDS
        own = read_json(table, "{parcel id: own id}") if table.exists() else {}
        if not isinstance(own, dict):
            raise UserError(f"{table} is something else; expected {{parcel id: own id}}.")
        return {parcel: str(name) for parcel, name in own.items()}
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as file:
            if "parcel" not in {name for _, name, *_ in file.execute("PRAGMA table_info(parcels)")}:
                return {}
            return {str(number): str(own) for number, own in file.execute("SELECT id, parcel FROM parcels")}
    except sqlite3.Error as error:
        raise UserError(f"{path} is damaged ({error}); copy it again, or remove it.") from error


def to_dataset_ids(names: Sequence[str], own_ids: Mapping[str, str]) -> list[str | None]:
    """Ids of the dataset for the ids of a file: these are either the dataset's or the parcels' own, whichever more are.

    Args:
        names: ids in the file.
        own_ids: of the dataset, see `read_own_ids`.

    Returns:
        An id for each; None for an own one that the dataset does not have.
    """
    by_own = {own: parcel for parcel, own in own_ids.items()}
    if sum(name in by_own for name in names) > sum(name in own_ids for name in names):
        return [by_own.get(name) for name in names]
    return list(names)


def to_ground(outlines: GeoDataFrame) -> GeoDataFrame:
    """The same outlines in metres on the ground, see `ground_crs`."""
    return outlines.to_crs(ground_crs(outlines))


def ground_crs(outlines: GeoDataFrame) -> str:
    """Coordinates in metres, north up: the equal-area azimuthal projection about the middle of all outlines.

    Unlike the metres of, say, Web Mercator, these are metres on the ground, wherever the parcels are.

    Raises:
        UserError: if the coordinates are outside their reference system.
    """
    import shapely
    from pyproj import Transformer

    to_degrees = Transformer.from_crs(outlines.crs, 4326, always_xy=True)
    (west, south), (east, north) = np.full(2, np.inf), np.full(2, -np.inf)
    for start in range(0, len(outlines), _CHUNK):
        points = shapely.get_coordinates(outlines.geometry.iloc[start : start + _CHUNK]).T.copy()
        to_degrees.transform(*points, inplace=True)
        west, south = np.minimum((west, south), points.min(1, initial=np.inf))
        east, north = np.maximum((east, north), points.max(1, initial=-np.inf))
    if not np.isfinite([west, south, east, north]).all():
        raise UserError(
            f"the outlines do not lie where their coordinate reference system, {outlines.crs.name}, applies; correct it."
        )
    return f"+proj=laea +lat_0={(south + north) / 2} +lon_0={(west + east) / 2} +units=m"
