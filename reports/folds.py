"""A picture of folds: which parcels, of which blocks or groups, are in which part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from reports.cartography import PALETTE, add_scale, fill_outlines, legend_patch, map_figure, points_per_metre
from reports.plots import shorten

if TYPE_CHECKING:
    from geopandas import GeoSeries


def plot_parts(
    outlines: GeoSeries,
    part: np.ndarray,
    title: str,
    groups: np.ndarray | None = None,
    grid: tuple[np.ndarray, float] | None = None,
) -> Figure:
    """Outlines coloured by part, and lines round the groups or the grid of the blocks.

    Args:
        outlines: in metres, (N,).
        part: of each parcel, (N,), from 0.
        title: heading.
        groups: names of the groups, (N,): a line goes round each, and the legend names them where they are few.
        grid: south-west corner of the blocks and their side.
    """
    bounds = outlines.total_bounds
    colours = [PALETTE[k % len(PALETTE)] for k in range(part.max() + 1)]
    handles = []
    for k, colour in enumerate(colours):
        label = f"part {k + 1} ({(part == k).sum():,} parcels)"
        if groups is not None:
            own = [str(name) for name in np.unique(groups[part == k])]
            few = ", ".join(shorten(own, 25)) if len(own) <= 3 else f"{len(own):,} groups"
            label = f"{label}: {few}"
        handles.append(legend_patch(colour, label))
    figure, (panel,) = map_figure(bounds, [title], handles)
    fill_outlines(panel, outlines, np.array(colours)[part])
    add_scale(panel, bounds)
    if groups is not None:
        rings = LineCollection(_rings(outlines, groups), colors="black", linewidths=0.8, zorder=3)
        panel.add_collection(rings)
    if grid is not None:
        corner, side = grid
        width = 0.1 * side * points_per_metre(panel)
        lines = {"colors": "black", "linewidths": min(1.2, width), "zorder": 3}
        panel.vlines(np.arange(corner[0], bounds[2], side), bounds[1], bounds[3], **lines)
        panel.hlines(np.arange(corner[1], bounds[3], side), bounds[0], bounds[2], **lines)
    return figure


def _rings(outlines: GeoSeries, groups: np.ndarray) -> list[np.ndarray]:
    """The convex line round each group, (points, 2) each."""
    import shapely

    points, parcel = shapely.get_coordinates(outlines.to_numpy(), return_index=True)
    group = np.unique(groups, return_inverse=True)[1][parcel]
    order = np.argsort(group, kind="stable")
    hulls = shapely.convex_hull(shapely.multipoints(shapely.points(points[order]), indices=group[order]))
    return [np.array(hull.exterior.coords) for hull in hulls]
