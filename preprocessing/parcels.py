"""Outlines of the parcels of a dataset, by the dataset's ids. Geographic libraries are imported when needed only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from data.outlines import OUTLINES, require_geo, to_dataset_ids

if TYPE_CHECKING:
    from geopandas import GeoDataFrame


def read_outlines(
    path: str | Path,
    id_column: str = "id",
    own_ids: Mapping[str, str] | None = None,
    group_columns: Sequence[str] = (),
) -> GeoDataFrame:
    """Reads the outlines of parcels from any vector format, or GeoParquet.

    Args:
        path: a file of polygons with a coordinate reference system; parcels without an area are left out.
        id_column: column with the dataset's ids, or with the parcels' own.
        own_ids: the parcels' own ids, by the dataset's.
        group_columns: columns to join into one named group.

    Returns:
        One row per parcel, columns `id` (int64, unique; negative for own ids that the dataset does not have), `geometry`
        and, if asked for, `group`, in the file's coordinate reference system.

    Raises:
        UserError: saying what of this the file lacks.
    """
    require_geo()
    from preprocessing.images.outlines import ids_in_file, read_parcels

    table = read_parcels(path, id_column=id_column, skip_invalid=True, group_columns=group_columns).table
    if own_ids or "parcel" in table:
        names = ids_in_file(table).tolist()
        ids = to_dataset_ids(names, own_ids or {})
        if ids != names:
            table["id"] = [-row if parcel is None else int(parcel) for row, parcel in enumerate(ids, start=1)]
        elif "parcel" in table:
            own = next(iter((own_ids or {}).values()), None)
            raise UserError(
                f"{path}: column {id_column!r} holds ids such as {names[0]!r}; expected the dataset's, whole numbers, as in "
                f"META/{OUTLINES} of the dataset"
                + (f", or the parcels' own, such as {own!r}." if own else ".")
            )
    return table[["id", "geometry", *(["group"] if group_columns else [])]]
