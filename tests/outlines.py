"""Outlines of tiny parcels, for tests."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import geopandas
import shapely

UTM = 32631


def write_outlines(
    path: Path,
    ids: Sequence[int | str],
    corners: Sequence[tuple[float, float]] | None = None,
    crs: int | None = UTM,
) -> Path:
    """Writes square outlines of 100 m, with a hole in the first one.

    Args:
        path: a GeoPackage.
        ids: of the parcels, column `id`.
        corners: lower left corners in metres of UTM zone 31; in a row of 10 per line if not given.
        crs: coordinate reference system of the file; None leaves it out.
    """
    corners = corners or [(500_000 + 120 * (i % 10), 4_800_000 + 120 * (i // 10)) for i in range(len(ids))]
    squares = [shapely.box(x, y, x + 100, y + 100) for x, y in corners]
    squares[0] = squares[0].difference(squares[0].centroid.buffer(30))
    table = geopandas.GeoDataFrame({"id": list(ids)}, geometry=squares, crs=UTM)
    table = table.to_crs(crs) if crs else table.set_crs(None, allow_override=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a file has no reference system
        table.to_file(path)
    return path
