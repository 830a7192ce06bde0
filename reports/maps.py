"""Maps of parcels: pictures with legend and scale bar, and predictions as vector files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from common.errors import UserError
from common.progress import progress_bar
from data.days import read_days
from data.metadata import read_info
from data.outlines import to_ground
from reports.cartography import (
    PALETTE,
    add_colour_bar,
    add_scale,
    colour_distances,
    fill,
    legend_patch,
    map_figure,
    outline_paths,
    qgis_style,
)
from reports.plots import shorten

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from pandas import DataFrame

    from dataset import PixelSetData

GREY, DARK = "#b8b8b8", "#333333"  # parcels without a prediction; classes that are pooled
# Columns of predictions.csv that hold text.
TEXT = ("true_label", "predicted_label", "predicted_by", "parcel", "true_name", "predicted_name", "set")
UNDEFINED, OTHER = "no observation", "other classes"
_DPI = 200  # of the picture


def match_outlines(outlines: GeoDataFrame, ids: Sequence[str]) -> GeoDataFrame:
    """The outlines of a dataset's parcels; says how many parcels and outlines have no counterpart.

    Args:
        outlines: as `read_outlines` gives them.
        ids: the dataset's parcel ids.

    Raises:
        UserError: if no parcel has an outline.
    """
    matched = outlines[outlines["id"].isin(np.asarray(ids, np.int64))]
    if matched.empty:
        raise UserError(
            f"no outline is of one of the {len(ids)} parcels: its ids are such as {outlines['id'].iloc[0]}, the dataset's "
            f"such as {ids[0]}; name the column with the dataset's ids with --id_column."
        )
    if len(matched) < len(ids):
        print(f"Outlines: {len(ids) - len(matched)} of {len(ids)} parcels have none; they are not on the map")
    if len(matched) < len(outlines):
        print(f"Outlines: {len(outlines) - len(matched)} are of no parcel of the dataset; left out")
    return matched


def write_map(
    outlines: GeoDataFrame,
    table: Path,
    output: Path,
    picture: Path | None = None,
    title: str = "",
    confusion: np.ndarray | None = None,
) -> list[Path]:
    """Writes predictions.gpkg with its style for QGIS, predictions.parquet, and a picture of them.

    Args:
        outlines: of the predicted parcels, as `match_outlines` gives them.
        table: predictions.csv of inference.py; a parcel without a predicted label is one that was never observed.
        output: folder for the vector files.
        picture: the map, in any format of matplotlib, by its suffix; None for no map.
        title: heading of the picture.
        confusion: counts (K, K) of the model's tests; classes that it takes for each other get unlike colours.

    Returns:
        The files written.
    """
    predictions = read_predictions(table)
    classes = [column.removeprefix("probability_") for column in predictions if "probability_" in column]
    if "predicted_name" not in predictions:
        place = list(predictions).index("predicted_label") + 1
        predictions.insert(place, "predicted_name", predictions["predicted_label"])
    frame = outlines.merge(predictions, on="id", validate="one_to_one")
    labels = frame["predicted_label"].to_numpy(dtype=str)
    colours = class_colours(labels, classes, confusion) | ({"": GREY} if "" in labels else {})
    names = dict(zip(labels, frame["predicted_name"])) | {"": UNDEFINED}
    layer = frame.set_axis(_distinct(frame.columns), axis=1)
    style = qgis_style("predicted_label", colours, names)
    writers: dict[Path, Callable[[Path], None]] = {
        output / "predictions.gpkg": lambda path: layer.to_file(path, layer="predictions"),
        output / "predictions.parquet": frame.to_parquet,
        output / "predictions.qml": lambda path: path.write_bytes(style),
    }
    if picture is not None:
        figure = plot_map(to_ground(frame), classes, title, confusion)
        writers[picture] = lambda path: figure.savefig(path, dpi=_DPI)
    for path, write in progress_bar(writers.items(), "writing maps", "files"):
        temporary = path.with_name(f".{os.getpid()}-{path.name}")
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return list(writers)


def _distinct(columns: Iterable[str]) -> list[str]:
    """Column names that differ in more than case, as GeoPackages need: labels may be a and A."""
    names: dict[str, str] = {}
    for name in columns:
        while name.lower() in names:
            name += "_"
        names[name.lower()] = name
    return list(names.values())


def check_picture(path: str | Path) -> Path:
    """The path of a picture to write, in a folder that is there.

    Raises:
        UserError: if its suffix is no format of pictures, or its folder does not exist.
    """
    path = Path(path)
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        raise UserError(
            f"{path} does not end as a picture does; end it with .png, or one of {', '.join(formats)}."
        )
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder; make it, or write {path.name} to another one.")
    return path


def read_predictions(table: Path) -> DataFrame:
    """The table of predictions: labels and names are text, empty where unknown; numbers are nan where unknown."""
    import pandas

    columns = list(pandas.read_csv(table, nrows=0))
    text = [name for name in columns if name in TEXT]
    words = pandas.read_csv(table, usecols=text, dtype=str, keep_default_na=False)
    numbers = pandas.read_csv(table, usecols=[name for name in columns if name not in TEXT])
    return pandas.concat([words, numbers], axis=1)[columns]


def class_colours(
    labels: Sequence[str], classes: Sequence[str], confusion: np.ndarray | None = None
) -> dict[str, str]:
    """Colours of the classes that occur, the most frequent first.

    A class has the same colour on all maps of a model, whatever else occurs, so that they can be compared: that of its
    place among all `classes`, or one unlike those of the classes that it is confused with. Only where there are more
    classes than colours, the rarest of a map are pooled and some have to move.

    Args:
        labels: label of every parcel.
        classes: all labels that the model tells apart.
        confusion: counts (K, K) of the model's tests, if known.
    """
    found, counts = np.unique(np.asarray(labels, dtype=str), return_counts=True)
    ranked = [str(label) for label in found[np.argsort(-counts, kind="stable")] if label]
    kept = ranked if len(ranked) <= len(PALETTE) else ranked[: len(PALETTE) - 1]
    coloured = classes if len(classes) <= len(PALETTE) else [label for label in classes if label in kept]
    places = [list(classes).index(label) for label in coloured]
    mixed, size = np.zeros((len(classes),) * 2), np.zeros(len(classes))
    if confusion is not None:
        size = confusion.sum(1)
        shares = confusion / np.maximum(size, 1)[:, None]
        mixed = shares + shares.T
    likeness = 1 / np.maximum(colour_distances(), 1) ** 2
    few = PALETTE[: max(len(coloured), 8)]  # the first ones are the pleasanter
    chosen: dict[int, int] = {}  # colour by place
    for place in sorted(places, key=lambda place: -size[place]):
        done = list(chosen)
        clash = likeness[:, [chosen[other] for other in done]] @ mixed[place, done]
        free = [(place + step) % len(few) for step in range(len(few))]
        chosen[place] = min((c for c in free if c not in chosen.values()), key=lambda c: clash[c])
    colours = {str(classes[place]): PALETTE[colour] for place, colour in chosen.items()}
    return {label: colours[label] if label in kept else DARK for label in ranked}


def plot_map(
    frame: GeoDataFrame, classes: Sequence[str], title: str = "", confusion: np.ndarray | None = None
) -> Figure:
    """Two panels: parcels by predicted class, and by confidence.

    Args:
        frame: in metres, with the columns predicted_label, predicted_name and confidence (0 to 1).
        classes: all labels that the model tells apart, in their order.
        title: heading.
        confusion: see `class_colours`.
    """
    labels = frame["predicted_label"].to_numpy(dtype=str)
    colours = class_colours(labels, classes, confusion)
    known = labels != ""
    bounds, paths = frame.total_bounds, outline_paths(frame.geometry)
    handles = _legend_handles(labels, colours, dict(zip(labels, frame["predicted_name"])))
    headings = "Predicted class", "Confidence (probability of the predicted class)"
    figure, panels = map_figure(bounds, headings, handles, title, "Class (number of parcels)")
    fill(panels[0], paths, [colours.get(label, GREY) for label in labels])
    add_scale(panels[0], bounds)
    fill(panels[1], [paths[i] for i in np.flatnonzero(~known)], GREY)
    sure = fill(panels[1], [paths[i] for i in np.flatnonzero(known)], None)
    sure.set(array=frame["confidence"].to_numpy(float)[known], cmap="viridis", clim=(0, 1))
    add_colour_bar(panels[1], bounds, sure)
    return figure


def _legend_handles(labels: np.ndarray, colours: Mapping[str, str], names: Mapping[str, str]) -> list[Patch]:
    """The classes that occur, with their numbers of parcels."""
    shown = [label for label, colour in colours.items() if colour != DARK]
    pooled = np.isin(labels, [label for label in colours if label not in shown])
    entries = [
        (colours[label], name, (labels == label).sum())
        for label, name in zip(shown, shorten([names[label] for label in shown], 40))
    ]
    entries += [(DARK, OTHER, pooled.sum()), (GREY, UNDEFINED, (labels == "").sum())]
    return [legend_patch(colour, f"{name} ({n:,})") for colour, name, n in entries if n]


def describe_dataset(dataset: PixelSetData) -> str:
    """Name of a dataset, and first and last date of its images."""
    days = read_days(dataset.folder, [int(parcel) for parcel in dataset.pid]).values
    first, last = (date.fromordinal(int(day)) for day in (days.min(), days.max()))
    simulated = " (simulated)" if read_info(dataset.folder).get("simulated") else ""
    until = f", used until {dataset.until}" if dataset.until else ""
    return f"{dataset.folder.resolve().name}{simulated}, {first} to {last}{until}"
