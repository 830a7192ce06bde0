"""Maps of parcels: pictures with legend and scale bar, and predictions as vector files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from common.errors import UserError
from common.progress import progress_bar
from data.outlines import to_ground
from reports.cartography import PALETTE, fill, frame_panel, outline_paths

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from pandas import DataFrame

GREY, DARK = "#b8b8b8", "#333333"  # parcels without a prediction; classes that are pooled
UNDEFINED, OTHER = "no observation", "other classes"
_DPI, _WIDTH = 200, 11  # of the picture, in inches


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
    names: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes predictions.gpkg and predictions.parquet, and a picture of them.

    Args:
        outlines: of the predicted parcels, as `match_outlines` gives them.
        table: predictions.csv of inference.py; a parcel without a predicted label is one that was never observed.
        output: folder for the vector files.
        picture: the map, in any format of matplotlib, by its suffix; None for no map.
        names: names of classes by label as text; labels stand for those without.

    Returns:
        The files written.
    """
    predictions = read_predictions(table)
    classes = [column.removeprefix("probability_") for column in predictions if "probability_" in column]
    name = predictions["predicted_label"].map(lambda label: (names or {}).get(label, label))
    predictions.insert(list(predictions).index("predicted_label") + 1, "predicted_name", name)
    frame = outlines.merge(predictions, on="id", validate="one_to_one")
    writers: dict[Path, Callable[[Path], None]] = {
        output / "predictions.gpkg": lambda path: frame.set_axis(_distinct(frame.columns), axis=1).to_file(
            path, layer="predictions"
        ),
        output / "predictions.parquet": frame.to_parquet,
    }
    if picture is not None:
        writers[picture] = lambda path: plot_map(to_ground(frame), classes).savefig(path, dpi=_DPI)
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
    """The table of predictions: labels are text, empty where unknown; probabilities are numbers, 0 to 1, or nan."""
    import pandas

    text = dict.fromkeys(("true_label", "predicted_label"), str)
    labels = pandas.read_csv(table, usecols=["id", *text], dtype=text, keep_default_na=False)
    return labels.merge(pandas.read_csv(table).drop(columns=[*text]), on="id")


def class_colours(labels: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """Colours of the classes that occur, the most frequent first.

    A class has the colour of its place among all `classes`, whatever else occurs, so that maps can be compared. Only
    where there are more classes than colours, the rarest are pooled and some have to move.

    Args:
        labels: label of every parcel.
        classes: all labels that the model tells apart.
    """
    found, counts = np.unique(np.asarray(labels, dtype=str), return_counts=True)
    ranked = [str(label) for label in found[np.argsort(-counts, kind="stable")] if label]
    kept = ranked if len(ranked) <= len(PALETTE) else ranked[: len(PALETTE) - 1]
    free = dict(enumerate(PALETTE))
    colours = {}
    for label in kept:
        place = list(classes).index(label) % len(PALETTE)
        colours[label] = free.pop(place if place in free else min(free))
    return colours | dict.fromkeys(ranked[len(kept) :], DARK)


def plot_map(frame: GeoDataFrame, classes: Sequence[str]) -> Figure:
    """Two panels: parcels by predicted class, and by confidence.

    Args:
        frame: in metres, with the columns predicted_label, predicted_name and confidence (0 to 1).
        classes: all labels that the model tells apart, in their order.
    """
    labels = frame["predicted_label"].to_numpy(dtype=str)
    colours = class_colours(labels, classes)
    known = labels != ""
    west, south, east, north = bounds = frame.total_bounds
    paths = outline_paths(frame.geometry)
    height = (north - south) / max(east - west, 1.0)  # as a share of the width
    rows, columns = (2, 1) if height < 0.6 else (1, 2)
    figure = Figure(layout="constrained")
    axes = figure.subplots(rows, columns)
    fill(axes[0], paths, [colours.get(label, GREY) for label in labels])
    axes[0].set_title("Predicted class")
    fill(axes[1], [paths[i] for i in np.flatnonzero(~known)], GREY)
    sure = fill(axes[1], [paths[i] for i in np.flatnonzero(known)], None)
    sure.set(array=frame["confidence"].to_numpy(float)[known], cmap="viridis", clim=(0, 1))
    axes[1].set_title("Confidence (probability of the predicted class)")
    figure.colorbar(sure, ax=axes[1], shrink=0.8, aspect=30, pad=0.02)
    for panel in axes:
        frame_panel(panel, bounds)
    legend_rows = _add_legend(figure, labels, colours, dict(zip(labels, frame["predicted_name"])))
    panel_height = min((height + 0.2) * (_WIDTH / columns - 0.3), 10)
    figure.set_size_inches(_WIDTH, rows * (panel_height + 0.4) + 0.5 + 0.2 * legend_rows)
    return figure


def _add_legend(
    figure: Figure, labels: np.ndarray, colours: Mapping[str, str], names: Mapping[str, str]
) -> int:
    """Lists the classes that occur, with their numbers of parcels, below the panels; returns the number of rows."""
    pooled = np.isin(labels, [label for label, colour in colours.items() if colour == DARK])
    entries = [
        (colour, names[label], (labels == label).sum()) for label, colour in colours.items() if colour != DARK
    ]
    entries += [(DARK, OTHER, pooled.sum()), (GREY, UNDEFINED, (labels == "").sum())]
    words = [f"{name[:29] + '...' if len(name) > 32 else name} ({n:,})" for _, name, n in entries]
    handles = [
        Patch(facecolor=colour, label=label.replace("$", r"\$"))  # which would begin a formula
        for (colour, _, n), label in zip(entries, words)
        if n
    ]
    columns = 5 if max(map(len, words)) < 26 else 3
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize="small",
        title="Class (number of parcels)",
    )
    return -(-len(handles) // columns)
