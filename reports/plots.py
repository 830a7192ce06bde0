"""Figures; each function returns one, which the caller saves, shows, or puts into a page."""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.dates as mdates
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binomtest

from common.files import write_bytes

# Seen well on white and on a dark page, and told apart by colour-blind readers.
TRAIN_COLOUR, VAL_COLOUR, NDVI_COLOUR = "#0072b2", "#d55e00", "#009e73"
SCORES = {"loss": "loss", "accuracy": "accuracy (%)", "IoU": "mIoU"}
_HEAT = (0.0, 0.4, 0.68)


def plot_training(
    logs: Mapping[int, Mapping[str, Mapping[str, float | None]]], scores: Sequence[str] = tuple(SCORES)
) -> Figure:
    """Scores of training and validation against the epoch, one thin line per fold and their mean.

    Args:
        logs: each fold's {epoch: {train_loss, train_accuracy, train_IoU, val_loss, val_accuracy, val_IoU}}.
        scores: which of loss, accuracy and IoU to draw, a panel each.
    """
    figure = Figure(figsize=(4 * len(scores), 3.2), layout="constrained")
    for axis, key in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores):
        for part, label, colour in (("train", "training", TRAIN_COLOUR), ("val", "validation", VAL_COLOUR)):
            curves = [[epoch[f"{part}_{key}"] for epoch in log.values()] for log in logs.values()]
            curves = [np.array(curve, dtype=float) for curve in curves]
            for curve in curves:
                axis.plot(np.arange(1, len(curve) + 1), curve, color=colour, linewidth=0.7, alpha=0.5)
            mean = np.mean([curve for curve in curves if len(curve) == max(map(len, curves))], axis=0)
            marker = "o" if len(mean) == 1 else ""
            axis.plot(np.arange(1, len(mean) + 1), mean, marker=marker, color=colour, lw=2, label=label)
        axis.set(title=SCORES[key], xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.axes[0].legend(frameon=False)
    if len(scores) > 1:
        figure.suptitle(f"{len(logs)} folds (thin) and their mean (thick)" if len(logs) > 1 else "1 fold")
    return figure


def shorten(names: Sequence[str], most: int) -> list[str]:
    """The names in at most so many letters; of names that begin alike, the beginning and the end."""
    cut = [name if len(name) <= most else f"{name[: most - 1].rstrip()}\u2026" for name in names]
    half = most // 2
    return [
        f"{name[:half]}\u2026{name[half + 1 - most :]}"
        if len(name) > most and cut.count(short) > 1
        else short
        for name, short in zip(names, cut)
    ]


def plot_confusion(
    mat: np.ndarray, classes: Sequence[int | str], title: str, names: Mapping[str, str] | None = None
) -> Figure:
    """Confusion matrix as row percentages, rows true classes; the most frequent class first.

    Args:
        mat: counts (K, K).
        classes: labels of the classes, in the order of the counts.
        title: heading; empty for none.
        names: names by label as text; labels stand for those without.
    """
    order = np.argsort(-mat.sum(1), kind="stable")
    texts = [(names or {}).get(str(classes[k]), str(classes[k])) for k in order]
    mat, total = mat[np.ix_(order, order)], mat.sum(1)[order]
    share = np.divide(mat, total[:, None], out=np.zeros(mat.shape), where=total[:, None] > 0)
    figure = Figure(layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # squares are laid out less exactly
    axis = figure.subplots()
    colours = np.empty((*mat.shape, 4))
    colours[..., :3], colours[..., 3] = _HEAT, 0.9 * share  # on what is behind, be it light or dark
    axis.imshow(colours, interpolation="none")
    for row, column in np.argwhere(share >= 0.005):
        colour = "white" if share[row, column] > 0.55 else "black"
        text = f"{100 * share[row, column]:.0f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    places, style = np.arange(len(mat)), {"fontsize": 8, "parse_math": False}
    columns, rows = shorten(texts, 26), [f"{text} ({n:,})" for text, n in zip(shorten(texts, 40), total)]
    axis.set_xticks(places, columns, rotation=90 if max(map(len, columns)) > 3 else 0, **style)
    axis.set_yticks(places, rows, **style)
    axis.set_xticks(places[1:] - 0.5, minor=True)
    axis.set_yticks(places[1:] - 0.5, minor=True)
    axis.grid(which="minor", color="0.5", alpha=0.25, linewidth=0.5)
    axis.tick_params(which="both", length=0)
    axis.set(xlabel="predicted class, in % of the true class", ylabel="true class (number of parcels)")
    # Room for the cells, in inches, and beside them for the longest of the names.
    side = max(2.8, len(mat) * float(np.clip(5 / len(mat), 0.27, 0.7)))
    below = max(label.get_window_extent().height for label in axis.get_xticklabels()) / figure.dpi
    beside = max(label.get_window_extent().width for label in axis.get_yticklabels()) / figure.dpi
    width = side + 0.75 + beside
    heading = textwrap.wrap(title, int(width / 0.1))
    figure.set_size_inches(width, side + 0.75 + below + 0.22 * len(heading))
    if heading:
        figure.suptitle("\n".join(heading), fontsize="medium", parse_math=False)
    return figure


def plot_calibration(edges: np.ndarray, curves: Mapping[str, np.ndarray]) -> Figure:
    """Share of right predictions by confidence with 95 % intervals, and the diagonal; the last one's parcels as bars.

    Args:
        edges: of the bins of confidence, (bins + 1,).
        curves: by name: number of parcels, sum of their confidences and number right of each bin, (3, bins).
    """
    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], "--", color="black", alpha=0.6, linewidth=1)
    for (name, (count, confidence, right)), colour in zip(curves.items(), (VAL_COLOUR, TRAIN_COLOUR)):
        filled = count > 0
        x, y = confidence[filled] / count[filled], right[filled] / count[filled]
        tests = [binomtest(int(k), int(n)) for k, n in zip(right[filled], count[filled])]
        low, high = np.transpose([test.proportion_ci(method="wilson") for test in tests])
        interval = np.maximum([y - low, high - y], 0)
        axis.errorbar(x, y, interval, fmt="o-", color=colour, markersize=4, elinewidth=1, label=name)
    axis.bar(edges[:-1], count / count.sum(), 0.96 * np.diff(edges), align="edge", color="0.5", alpha=0.4)
    axis.set(xlabel="confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def plot_attention(
    weight: np.ndarray,
    ndvi: np.ndarray,
    ndvi_std: np.ndarray,
    k: int,
    dates: np.ndarray,
    title: str,
    width: int | None,
    folds: Sequence[int],
) -> Figure:
    """Attention to dates, for one class: mean over all heads of all folds with its spread, and every head.

    Above it the NDVI of this class and of the others, if that of this class is known.

    Args:
        weight: share of each head's attention by fold, class and date or period, (M, K, H, T); NaN where there is no date.
        ndvi, ndvi_std: mean NDVI and its deviation over parcels, (K, T); NaN where unknown.
        k: the class to draw.
        dates: first day of each period, (T,) datetime64.
        title: heading.
        width: days of a period; None for single dates, whose cells reach half-way to the next ones.
        folds: their numbers, (M,).
    """
    M, _, H, _ = weight.shape
    seen = np.isfinite(ndvi[k])
    heights = [1.3] * bool(seen.any()) + [1.3, float(np.clip(0.09 * M * H, 1.2, 4.5))]
    heading = textwrap.fill(title, 78)
    figure = Figure(figsize=(8, sum(heights) + 1 + 0.2 * heading.count("\n")), layout="constrained")
    *upper, middle, lower = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    edges = cell_edges(mdates.date2num(dates), width)
    centres = (edges[:-1] + edges[1:]) / 2 if width else mdates.date2num(dates)
    for axis in upper:
        for other in np.delete(ndvi, k, axis=0):
            known = np.isfinite(other)
            axis.plot(centres[known], other[known], color="0.8", linewidth=0.7)
        _plot_spread(axis, centres[seen], ndvi[k][seen], ndvi_std[k][seen], NDVI_COLOUR)
        axis.set_ylabel("mean NDVI\n(grey: others)")
    heads = weight[:, k].reshape(M * H, -1)
    there = np.isfinite(heads).all(0)
    _plot_spread(middle, centres[there], heads[:, there].mean(0), heads[:, there].std(0), TRAIN_COLOUR)
    middle.set_ylim(bottom=0)
    middle.set_ylabel("attention: mean\nand deviation\nover heads")
    highest = np.nanmax(weight)  # the same scale for all classes
    image = lower.pcolormesh(edges, np.arange(M * H + 1), heads, cmap="magma_r", vmin=0, vmax=highest)
    lower.plot(centres, np.zeros(len(centres)), "|", color="black", clip_on=False, markersize=7)
    for end in range(H, M * H, H):
        lower.axhline(end, color="black", linewidth=0.8)
    lower.set_facecolor("0.88")
    lower.set_yticks((np.arange(M) + 0.5) * H, [f"fold {fold}" for fold in folds], fontsize="small")
    lower.tick_params(axis="y", length=0)
    lower.set_ylabel(f"{H} heads each" if M > 1 else f"{H} heads")
    lower.invert_yaxis()
    lower.xaxis_date()
    show_dates(lower)
    figure.colorbar(image, ax=lower, label=f"share per {f'{width} days' if width else 'date'}", aspect=12)
    figure.suptitle(heading, fontsize="medium", parse_math=False)
    figure.align_ylabels()
    return figure


def _plot_spread(
    axis: matplotlib.axes.Axes, x: np.ndarray, mean: np.ndarray, std: np.ndarray, colour: str
) -> None:
    """A line in a band of a deviation to both sides, on a grid."""
    axis.plot(x, mean, ".-", color=colour)
    axis.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
    axis.grid(alpha=0.3)


def show_dates(axis: matplotlib.axes.Axes) -> None:
    """Marks an axis of days at months or the like, in few letters."""
    locator = mdates.AutoDateLocator()
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(mdates.ConciseDateFormatter(locator))


def cell_edges(days: np.ndarray, width: int | None) -> np.ndarray:
    """Where the cells of the periods that begin at `days`, (T,), begin and end, (T + 1,)."""
    if width:
        return np.append(days, days[-1] + width)
    if len(days) == 1:
        return days[0] + np.array([-0.5, 0.5])
    middle = (days[:-1] + days[1:]) / 2
    return np.concatenate([[2 * days[0] - middle[0]], middle, [2 * days[-1] - middle[-1]]])


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write_bytes(path, buffer.getvalue())


def to_svg(figure: Figure) -> str:
    """A figure as an SVG element of a page: without background, and with what is black in the page's colour of text."""
    buffer = io.StringIO()
    # Text stays text; equal figures have equal ids, so that a page is the same whenever it is made.
    style = {"svg.fonttype": "none", "svg.hashsalt": "figure", "font.sans-serif": "DejaVu Sans"}
    with matplotlib.rc_context(style):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.S)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])  # which HTML knows
    return svg.replace("#000000", "currentColor")
