"""What maps of parcels are drawn with: colours, filled outlines, scale bar and arrow to the north."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.path import Path

if TYPE_CHECKING:
    from geopandas import GeoSeries

# That of Okabe and Ito, and more: at least 25 units of CIELAB apart, and 13 as seen with protanopia or deuteranopia.
PALETTE = [
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#9977ff", "#66ff88", "#ff3366"),
    *("#664400", "#771177", "#00eeff", "#bbaa55", "#aaeebb", "#0044aa", "#225533", "#aa2266", "#226677", "#99dd55"),
]  # fmt: skip
_EDGE = "black"
MOST_OUTLINES = 20_000  # that are drawn as such


def colour_distances() -> np.ndarray:
    """How unlike the colours of the palette are: distances in CIELAB, (colours, colours)."""
    rgb = np.array([to_rgb(colour) for colour in PALETTE])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(linear @ np.transpose(to_xyz) / [0.9505, 1, 1.089]).T
    lab = np.stack([116 * y, 500 * (x - y), 200 * (y - z)], axis=1)
    return np.linalg.norm(lab[:, None] - lab, axis=2)


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


def map_figure(
    bounds: Sequence[float], headings: Sequence[str], handles: Sequence[Patch], title: str = "", key: str = ""
) -> tuple[Figure, list[Axes]]:
    """A figure with a framed panel for each heading, as large as what they show, so that nothing stays empty.

    Args:
        bounds: metres to show (west, south, east, north).
        headings: of the panels; what stands in brackets is left out of narrow ones.
        handles: what the legend below lists.
        title: heading of the figure.
        key: heading of the legend.
    """
    west, south, east, north = _view(bounds)
    ratio, n = (north - south) / (east - west), len(headings)
    gap, above = 0.15, 0.4 * bool(title)  # inches from here on
    columns = n if ratio > 0.6 else 1
    wide = min((7 + 4 * (n > 1) - gap) / columns - gap, 10 / ratio)
    tall, rows, width = wide * ratio + 0.35, n // columns, max(columns * (wide + gap) + gap, 7)
    per_row = max(1, int(width / (0.55 + 0.068 * max(len(handle.get_label()) for handle in handles))))
    below = 0.25 + 0.2 * bool(key) + 0.175 * -(-len(handles) // per_row)
    height = above + rows * tall + below
    figure, left, panels = Figure(figsize=(width, height)), (width - columns * (wide + gap) + gap) / 2, []
    for number, heading in enumerate(headings):
        x, y = left + number % columns * (wide + gap), height - above - (number // columns + 1) * tall
        place = x / width, (y + 0.05) / height, wide / width, wide * ratio / height
        panels.append(figure.add_axes(place))
        words = heading if wide > 0.08 * len(heading) else heading.partition(" (")[0]
        panels[-1].set_title(words, fontsize="medium")
        frame_panel(panels[-1], bounds)
    figure.suptitle(title, y=1 - 0.1 / height, va="top", parse_math=False)
    style = {"loc": "lower center", "bbox_to_anchor": (0.5, 0), "frameon": False, "fontsize": "small"}
    figure.legend(handles=handles, ncols=per_row, title=key or None, **style)
    return figure, panels


def _view(bounds: Sequence[float]) -> tuple[float, float, float, float]:
    """Metres that a panel shows (west, south, east, north): the given ones, a margin, and a strip below."""
    west, south, east, north = bounds
    pad = _margin(bounds)
    return west - pad, south - 3.4 * pad, east + pad, north + pad


def _margin(bounds: Sequence[float]) -> float:
    width, height = max(bounds[2] - bounds[0], 1.0), max(bounds[3] - bounds[1], 1.0)
    return max(0.03 * float(np.sqrt(width * height)), 0.018 * max(width, height))


def legend_patch(colour: str, label: str) -> Patch:
    """A colour for a legend; a dollar in its label begins no formula."""
    return Patch(facecolor=colour, label=label.replace("$", r"\$"))


def frame_panel(panel: Axes, bounds: Sequence[float]) -> None:
    """Makes a panel show the given metres (west, south, east, north), and a strip below them."""
    west, south, east, north = _view(bounds)
    panel.set(xlim=(west, east), ylim=(south, north), xticks=[], yticks=[], aspect="equal")


def fill(panel: Axes, paths: Sequence[Path], colours: str | Sequence[str] | None) -> PathCollection:
    """Draws filled outlines in a framed panel, with edges as thin as they are small, so that neighbours stay apart."""
    sides = [np.ptp(path.vertices, axis=0).max() for path in paths[:: max(1, len(paths) // 1000)]]
    width = min(0.05 * float(np.median(sides or [0])) * points_per_metre(panel), 0.5)
    collection = PathCollection(paths, facecolors=colours, edgecolors=_EDGE, linewidths=width)
    return panel.add_collection(collection, autolim=False)


def fill_outlines(panel: Axes, outlines: GeoSeries, colours: np.ndarray) -> None:
    """Draws outlines filled in colours, (N,), in a framed panel; of very many their centres alone."""
    if len(outlines) > MOST_OUTLINES:
        west, south, east, north = outlines.bounds.to_numpy().T
        panel.scatter((west + east) / 2, (south + north) / 2, s=0.5, c=colours, linewidths=0)
    else:
        fill(panel, outline_paths(outlines), colours.tolist())


def points_per_metre(panel: Axes) -> float:
    """How large a metre is in a framed panel, in points."""
    return float(72 * panel.bbox.width / panel.figure.dpi / np.ptp(panel.get_xlim()))


def add_scale(panel: Axes, bounds: Sequence[float]) -> None:
    """Draws a scale bar and an arrow to the north in the strip below."""
    west, south, east, north = bounds
    pad = _margin(bounds)
    length = scale_length(min(max(east - west, north - south) / 4, (east - west) / 2.5))
    bar = south - 1.7 * pad
    panel.plot([west, west + length], [bar, bar], color="black", linewidth=3, solid_capstyle="butt")
    words = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    style = {"textcoords": "offset points", "va": "center", "fontsize": "small"}
    panel.annotate(words, (west + length, bar), (6, 0), **style)
    style = {"ha": "center", "va": "top", "fontsize": "small"}
    arrow = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0}
    panel.annotate("N", (east, bar + pad), (east, bar - pad), arrowprops=arrow, **style)


def add_colour_bar(panel: Axes, bounds: Sequence[float], shown: PathCollection) -> None:
    """Draws the colours of `shown` and their numbers in the strip below."""
    west, south, east, _ = bounds
    pad = _margin(bounds)
    place = (west, south - 1.6 * pad, 0.6 * (east - west), 0.5 * pad)
    bar = panel.inset_axes(place, transform=panel.transData)
    panel.figure.colorbar(shown, cax=bar, orientation="horizontal", ticks=(0, 0.5, 1))
    bar.tick_params(labelsize="x-small", length=2, pad=1)


def scale_length(most: float) -> float:
    """The longest of 1, 2 and 5 times a power of ten that is at most `most` metres, at least 1 m."""
    power = 10.0 ** np.floor(np.log10(max(most, 1)))
    return float(max(step * power for step in (1, 2, 5) if step * power <= max(most, 1)))


def qgis_style(column: str, colours: Mapping[str, str], names: Mapping[str, str]) -> bytes:
    """A QGIS style file, which fills the parcels of a layer with one colour for each class.

    Args:
        column: of the layer, with the labels of the classes as text.
        colours: as #rrggbb, by label.
        names: what the legend calls the classes, by label.
    """
    root = ElementTree.Element("qgis", version="3.22", styleCategories="Symbology")
    renderer = ElementTree.SubElement(root, "renderer-v2", type="categorizedSymbol", attr=column)
    categories, symbols = (ElementTree.SubElement(renderer, name) for name in ("categories", "symbols"))
    for i, (label, colour) in enumerate(colours.items()):
        about = {"value": label, "type": "string", "symbol": str(i), "label": names[label], "render": "true"}
        ElementTree.SubElement(categories, "category", about)
        symbol = ElementTree.SubElement(symbols, "symbol", type="fill", name=str(i), alpha="1")
        layer = ElementTree.SubElement(symbol, "layer", {"class": "SimpleFill", "enabled": "1", "pass": "0"})
        rgba = ",".join(str(int(colour[k : k + 2], 16)) for k in (1, 3, 5)) + ",255"
        look = {"style": "solid", "color": rgba, "outline_style": "solid", "outline_color": rgba}
        for key, value in look.items():
            ElementTree.SubElement(layer, "prop", k=key, v=value)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8")
