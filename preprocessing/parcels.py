"""Outlines of the parcels of a dataset, by the dataset's ids. Geographic libraries are imported when needed only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from data.outlines import OUTLINES, require_geo

if TYPE_CHECKING:
    from geopandas import GeoDataFrame


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
