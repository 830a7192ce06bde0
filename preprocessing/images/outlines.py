"""Outlines of parcels: read and checked, their coordinate system, their geometrical features."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import geopandas
import numpy as np
import pandas
import pyogrio
import shapely
from geopandas import GeoDataFrame, GeoSeries
from pyproj import CRS

from common.errors import UserError, as_user_error
from data.outlines import JOINT

GEOMFEAT = ["perimeter (m)", "area (m2)", "pixels / pixels of the bounding box", "perimeter / area (1/m)"]
_POLYGONS = (3, 6)  # and multi-polygons, in shapely's numbers


class Parcels(NamedTuple):
    """Parcels as read.

    Attributes:
        table: columns id (whole numbers), label (None without one), geometry; and parcel, the ids of the file, where
            those are not whole numbers; and group, see `group_columns`.
        left_out: id and reason of those left out already.
        classes: names of the labels, by label as text.
    """

    table: GeoDataFrame
    left_out: list[tuple[str, str]]
    classes: dict[str, str]


def read_parcels(
    path: str | Path,
    label_column: str | None = None,
    id_column: str | None = None,
    layer: str | None = None,
    skip_invalid: bool = False,
    class_column: str | None = None,
    group_columns: Sequence[str] = (),
) -> Parcels:
    """Reads parcel outlines in any vector format, or GeoParquet.

    Args:
        path: the file.
        label_column: column of the labels, whole numbers or text; None for parcels without labels.
        id_column: column of the ids; None numbers the parcels from 1 in the order of the file.
        layer: of a file with several.
        skip_invalid: leave out parcels whose outline is empty or no area, instead of stopping.
        class_column: column of the labels' names; None where labels are names themselves, or have none.
        group_columns: columns whose values, joined as text, become the column group; None where one has none.

    Raises:
        UserError: if the file, a column or its coordinate system is missing, ids repeat, or an outline is empty.
    """
    columns = [name for name in (id_column, label_column, class_column, *group_columns) if name]
    with warnings.catch_warnings():  # about the form of columns that nobody asked for
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="pyogrio")
        table = _read_table(Path(path), list(dict.fromkeys(columns)), layer)
    if not len(table):
        raise UserError(f"{path} contains no parcel; expected one outline per parcel.")
    if table.crs is None:
        raise UserError(
            f"{path} has no coordinate system; assign the one it was drawn in, such as by ogr2ogr -a_srs EPSG:4326."
        )
    names, ids = _ids(table, id_column, path)
    outlines = table.geometry.to_numpy().copy()
    plain = np.isin(shapely.get_type_id(outlines), _POLYGONS) & ~shapely.has_z(outlines)
    for i in np.flatnonzero(~(plain & shapely.is_valid(outlines) & ~shapely.is_empty(outlines))):
        outlines[i] = _areas(outlines[i])
    outlines = GeoSeries(outlines, crs=table.crs)
    parcels = GeoDataFrame({"id": ids, "label": None, "geometry": outlines}, crs=table.crs)
    if label_column:
        parcels["label"] = pandas.Series(_labels(table[label_column]), dtype=object)
    if names is not None:
        parcels["parcel"] = names
    if group_columns:
        groups = zip(*([_plain(value) for value in table[name]] for name in group_columns))
        joined = [None if None in group else JOINT.join(map(str, group)) for group in groups]
        parcels["group"] = pandas.Series(joined, dtype=object)
    classes = _class_names(parcels["label"], table[class_column] if class_column else None, path)
    own_ids, empty = ids_in_file(parcels), outlines.isna() | outlines.is_empty
    if empty.any() and (not skip_invalid or empty.all()):
        raise UserError(
            f"{path}: the outline of parcel {own_ids[empty].iloc[0]} is empty or not an area ({empty.sum()} such in "
            "all); expected polygons. Correct the file, or leave such parcels out with --skip_invalid."
        )
    if label_column and (parcels.label.isna() | empty).all():
        raise UserError(f"{path}: column {label_column!r} is empty; choose another --label_column.")
    left_out = [(name, "its outline is empty or not an area") for name in own_ids[empty]]
    return Parcels(parcels[~empty].reset_index(drop=True), left_out, classes)


def ids_in_file(parcels: GeoDataFrame) -> pandas.Series:
    """Ids as text, as the file has them that the parcels were read from."""
    return parcels["parcel" if "parcel" in parcels else "id"].astype(str)


def _read_table(path: Path, columns: list[str], layer: str | None) -> GeoDataFrame:
    """The wanted columns and the geometry."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a file with parcel outlines in --parcels.")
    try:
        if path.suffix.lower() == ".parquet":
            table = geopandas.read_parquet(path)
            present = list(table.columns)
        else:
            layers = [name for name, kind in pyogrio.list_layers(path) if kind is not None]
            if layer is None and len(layers) > 1:
                raise UserError(f"{path} has the layers {', '.join(layers)}; choose one with --layer.")
            if layer is not None and layer not in layers:
                raise UserError(f"{path} has no layer {layer!r}; it has {', '.join(layers)}.")
            present = list(pyogrio.read_info(path, layer=layer)["fields"])
            table = None
    except UserError:
        raise
    except Exception as error:  # damaged bytes can fail in any way
        raise UserError(
            f"{path} cannot be read as parcel outlines ({error}); expected a vector file."
        ) from error
    for column in columns:
        if column not in present:
            raise UserError(f"{path} has no column {column!r}; it has {', '.join(present)}.")
    if table is None:
        with as_user_error(Exception, prefix=f"{path} is damaged: "):
            table = geopandas.read_file(path, layer=layer, columns=columns)
    if not isinstance(table, GeoDataFrame):
        raise UserError(f"{path} contains no outlines; expected a polygon for every parcel.")
    return table


def _ids(table: GeoDataFrame, column: str | None, path: str | Path) -> tuple[list[str] | None, np.ndarray]:
    """The ids of the file as text, None where they are whole numbers or absent, and whole numbers for all parcels."""
    numbered = np.arange(1, len(table) + 1)
    if column is None:
        return None, numbered
    values = table[column]
    if values.isna().any():
        raise UserError(
            f"{path}: parcel {int(np.argmax(values.isna())) + 1} of the file has no id in column {column!r}; every "
            "parcel needs one. Without --id_column they are numbered."
        )
    plain = values.tolist() if values.dtype.kind in "iu" else [_plain(value) for value in values]
    whole = all(isinstance(value, int) and 0 <= value < 2**63 for value in plain)
    if not whole:
        plain = [str(value) for value in plain]
    repeated = pandas.Series(plain, dtype=object).duplicated()
    if repeated.any():
        raise UserError(
            f"{path}: the id {plain[int(np.argmax(repeated))]!r} in column {column!r} stands more than once "
            f"({int(repeated.sum())} repeated in all); ids must differ."
        )
    return (None, np.array(plain, np.int64)) if whole else (plain, numbered)


def _plain(value: Any) -> Any:
    """A whole number, also one written as text or with a point, as int; no value as None; anything else as text."""
    if pandas.isna(value) or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, int | np.integer | float | np.floating) and not isinstance(value, bool):
        return int(value) if float(value).is_integer() else str(value)
    text = str(value)
    return int(text) if text.isascii() and text.isdigit() and str(int(text)) == text else text


def _labels(values: pandas.Series) -> list[Any]:
    """Labels, all whole numbers or all text; None where there is none."""
    plain = [_plain(value) for value in values]
    if all(value is None or isinstance(value, int) for value in plain):
        return plain
    return [None if value is None else str(value) for value in plain]


def _class_names(labels: pandas.Series, names: pandas.Series | None, path: str | Path) -> dict[str, str]:
    """Names by label as text: from a column, else the labels themselves where they are text."""
    classes: dict[str, str] = {}
    for label, name in zip(labels, labels if names is None else names):
        if label is None or not isinstance(name, str):
            continue
        if classes.setdefault(str(label), name) != name:
            raise UserError(
                f"{path}: label {label} is named {classes[str(label)]!r} and {name!r}; give every label "
                "one name, or leave --class_column out."
            )
    return classes


def _areas(outline: shapely.Geometry | None) -> shapely.Geometry | None:
    """The outline's areas alone, made valid; an outline without any becomes an empty one."""
    if outline is None or outline.is_empty:
        return None
    if outline.geom_type in ("Polygon", "MultiPolygon") and outline.is_valid:
        return shapely.force_2d(outline)
    parts = shapely.get_parts(shapely.make_valid(shapely.force_2d(outline)))
    parts = [area for part in parts for area in shapely.get_parts(part) if area.geom_type == "Polygon"]
    return shapely.union_all(parts) if parts else None


def name_crs(crs: Any) -> str:
    """EPSG:... of a coordinate system that has such a number, else its description."""
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else crs.to_wkt()


def is_metric(crs: Any) -> bool:
    """Whether coordinates are metres on the ground; those of the web's Mercator maps are not."""
    crs = CRS.from_user_input(crs)
    if not crs.is_projected or crs.axis_info[0].unit_name not in ("metre", "meter"):
        return False
    return "Mercator" not in crs.coordinate_operation.method_name.replace("Transverse Mercator", "")


def to_metres(outlines: GeoSeries, crs: Any = None) -> GeoSeries:
    """Outlines in a plane of metres: `crs` where it is one, else the UTM zone they lie in."""
    if crs is not None and is_metric(crs):
        return outlines.to_crs(crs)
    return outlines if is_metric(outlines.crs) else outlines.to_crs(outlines.estimate_utm_crs())


def features(outlines: GeoSeries, filled: np.ndarray) -> np.ndarray:
    """Geometrical features of parcels, see GEOMFEAT.

    Args:
        outlines: in metres, (N,).
        filled: pixels over pixels of the bounding box, (N,).

    Returns:
        (N, 4).
    """
    perimeter, area = outlines.length.to_numpy(), outlines.area.to_numpy()
    return np.stack((perimeter, area, filled, perimeter / area), axis=1)
