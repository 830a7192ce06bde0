"""What was made of images and outlines: the table that is printed, META/prepared.json and META/prepared.png."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
from geopandas import GeoDataFrame, GeoSeries
from matplotlib.figure import Figure
from shapely.geometry import box

from data.outlines import to_ground
from preprocessing.images.grids import Grid
from preprocessing.images.outlines import name_crs
from reports.cartography import PALETTE, add_scale, fill_outlines, frame_panel, legend_patch
from reports.plots import show_dates

_BLANK = 0.01  # share of zeros that is worth a word


def summarise(
    grids: Sequence[Grid],
    dates: dict[tuple[int, int], np.ndarray],
    n_kept: int,
    n_unlabelled: int,
    left_out: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """The content of META/prepared.json.

    Args:
        grids: with the images.
        dates: of every date, pixels of parcels, how many are missing, and how many are 0 in all bands.
        n_kept: number of parcels.
        n_unlabelled: how many of them have no label, though there is a column of labels.
        left_out: the other parcels and why.
    """
    images = Counter(image.when for grid in grids for image in grid.images)
    rows = []
    for when, n in sorted(images.items()):
        pixels, missing, _ = dates.get(when, np.zeros(3)).tolist()
        share = missing / pixels if pixels else None  # no parcel is there
        rows.append({"date": when[0], "images": n, "pixels": int(pixels), "missing": share})
    total = sum(dates.values())
    return {
        "images": sum(images.values()),
        "tiles": sum(len(grid.places) for grid in grids),
        "crs": [name_crs(grid.crs) for grid in grids],
        "parcels": n_kept,
        "unlabelled": n_unlabelled,
        "left_out": dict(Counter(reason for _, reason in left_out)),
        "missing": float(total[1] / total[0]),
        "zeros": float(total[2] / total[0]),
        "dates": rows,
    }


def describe(prepared: dict[str, Any]) -> list[str]:
    """The table, line by line; `prepared` is META/prepared.json."""
    first, last = prepared["dates"][0]["date"], prepared["dates"][-1]["date"]
    lines = [
        f"images: {prepared['images']} on {len(prepared['dates'])} dates, {first} to {last}",
        f"tiles: {prepared['tiles']} in {', '.join(prepared['crs'])}",
        f"bands: {' '.join(prepared['bands'])}"
        + (f"; reflectance = {prepared['units']:g} x number" if prepared["units"] else ""),
    ]
    lines += [
        "offset {offset:g} of {images} image(s), {first} to {last}: {why}".format_map(group)
        for group in prepared["offsets"]
    ]
    lines.append(f"parcels: {prepared['parcels']:,} kept, {sum(prepared['left_out'].values()):,} left out")
    if prepared.get("unlabelled"):
        lines.append(
            f"without a label {prepared['unlabelled']:,}: inference predicts them, training leaves them out"
        )
    lines += [f"left out {n}: {reason}" for reason, n in prepared["left_out"].items()]
    lines.append(f"missing: {100 * prepared['missing']:.1f}% of the observations of pixels")
    lines += [
        f"  {row['date']} {row['images']:4} image(s) "
        + ("no parcel" if row["missing"] is None else f"{100 * row['missing']:5.1f}% missing")
        for row in prepared["dates"]
    ]
    if prepared["zeros"] > _BLANK:
        lines.append(
            f"{100 * prepared['zeros']:.1f}% of the observations are 0 in all bands, which their files do not declare "
            "missing; if they are, prepare again with --nodata 0"
        )
    return lines


def plot_prepared(
    prepared: dict[str, Any], grids: Sequence[Grid], table: GeoDataFrame, kept: np.ndarray
) -> Figure:
    """Coverage by date, and where parcels and images lie.

    Args:
        prepared: from `summarise`.
        grids: with the images.
        table: outlines of the parcels.
        kept: whether each is in the dataset.
    """
    figure = Figure(figsize=(8, 10.5), layout="constrained")
    coverage, panel = figure.subplots(2, height_ratios=(1, 3))
    rows = [row for row in prepared["dates"] if row["missing"] is not None]
    days = [datetime.strptime(str(row["date"]), "%Y%m%d") for row in rows]
    coverage.vlines(days, 0, [100 * (1 - row["missing"]) for row in rows], color=PALETTE[0], linewidth=3)
    coverage.set(ylim=(0, 100), ylabel="pixels seen (%)", title=f"{len(rows)} dates")
    show_dates(coverage)
    outlines = to_ground(table)
    frame_panel(panel, outlines.total_bounds)
    add_scale(panel, outlines.total_bounds)
    for grid in grids:
        for place in grid.places:
            left, top = grid.transform @ (place.column, place.row)
            right, bottom = grid.transform @ (place.column + place.width, place.row + place.height)
            edges = GeoSeries([box(left, bottom, right, top)], crs=grid.crs).to_crs(outlines.crs)
            panel.plot(*edges.iloc[0].exterior.xy, color="grey", linewidth=0.8)
    colours = np.where(kept, PALETTE[2], PALETTE[1])
    fill_outlines(panel, outlines.geometry, colours)
    panel.set_title("parcels, and edges of the images (grey)")
    sides = (PALETTE[2], "kept", kept.sum()), (PALETTE[1], "left out", (~kept).sum())
    handles = [legend_patch(colour, f"{name} ({n:,})") for colour, name, n in sides]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure
