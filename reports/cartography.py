"""What maps of parcels are drawn with: colours, filled outlines, scale bar and arrow to the north."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.path import Path

if TYPE_CHECKING:
    from geopandas import GeoSeries

# At least 17 units of CIELAB apart, and 9 as seen with protanopia or deuteranopia; the first ones furthest.
PALETTE = [
    *(
        "#0078b4",
        "#d25a00",
        "#00a578",
        "#e1a500",
        "#002db4",
        "#d2f096",
        "#b4e1ff",
        "#d2003c",
        "#5a2d69",
        "#004b00",
    ),
    *(
        "#5a78ff",
        "#007878",
        "#c3a55a",
        "#961e4b",
        "#004ba5",
        "#ffe169",
        "#87f0b4",
        "#b487b4",
        "#5aa5ff",
        "#00c3f0",
    ),
]


def outline_paths(outlines: GeoSeries) -> list[Path]:
    """One path per outline, of all its rings; holes run the other way round, so that they stay empty."""
    import shapely

    pieces, outline_of = shapely.get_parts(shapely.orient_polygons(outlines.to_numpy()), return_index=True)
    rings, piece_of = shapely.get_rings(pieces, return_index=True)
    points, point_of = shapely.get_coordinates(rings, return_index=True)
    lengths = np.bincount(point_of, minlength=len(rings))
    ends = np.cumsum(lengths)
    codes = np.full(len(points), Path.LINETO, Path.code_type)
    codes[ends - lengths], codes[ends - 1] = Path.MOVETO, Path.CLOSEPOLY
    cuts = np.cumsum(np.bincount(outline_of[piece_of], lengths, len(outlines)).astype(int))[:-1]
    return [Path(*parcel) for parcel in zip(np.split(points, cuts), np.split(codes, cuts))]


def fill(panel: Axes, paths: Sequence[Path], colours: str | Sequence[str] | None) -> PathCollection:
    """Draws filled outlines; a hairline of the same colour closes the gaps between neighbours."""
    collection = PathCollection(paths, facecolors=colours, edgecolors="face", linewidths=0.1)
    return panel.add_collection(collection, autolim=False)


def frame_panel(panel: Axes, bounds: Sequence[float]) -> None:
    """Shows the given metres (west, south, east, north), with a scale bar and an arrow to the north."""
    west, south, east, north = bounds
    size = max(east - west, north - south, 1.0)
    pad = 0.03 * size
    panel.set(
        xlim=(west - pad, east + pad),
        ylim=(south - 3.4 * pad, north + pad),
        xticks=[],
        yticks=[],
        aspect="equal",
    )
    length = scale_length(min(size / 4, (east - west) / 2.5))
    bar = south - 1.5 * pad
    panel.plot([west, west + length], [bar, bar], color="black", linewidth=3, solid_capstyle="butt")
    words = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    panel.annotate(
        words, (west + length, bar), (6, 0), textcoords="offset points", va="center", fontsize="small"
    )
    arrow = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0}
    panel.annotate(
        "N", (east, bar + pad), (east, bar - pad), ha="center", va="top", fontsize="small", arrowprops=arrow
    )


def scale_length(most: float) -> float:
    """The longest of 1, 2 and 5 times a power of ten that is at most `most` metres, at least 1 m."""
    power = 10.0 ** np.floor(np.log10(max(most, 1)))
    return float(max(step * power for step in (1, 2, 5) if step * power <= max(most, 1)))
