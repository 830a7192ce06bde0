"""Figures; each function returns one, the caller saves it."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.dates as mdates
import numpy as np
from matplotlib.figure import Figure

from common.files import write_bytes

TRAIN_COLOUR, VAL_COLOUR = "tab:blue", "tab:orange"


def plot_training(logs: dict[int, dict[str, dict[str, float]]]) -> Figure:
    """Loss, accuracy and mIoU of training and validation against the epoch, one thin line per fold and their mean.

    Args:
        logs: each fold's {epoch: {train_loss, train_accuracy, train_IoU, val_loss, val_accuracy, val_IoU}}.
    """
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = (("loss", "focal loss"), ("accuracy", "accuracy (%)"), ("IoU", "mIoU"))
    for axis, (key, title) in zip(figure.subplots(1, 3), panels):
        for part, label, colour in (("train", "training", TRAIN_COLOUR), ("val", "validation", VAL_COLOUR)):
            curves = [[values[f"{part}_{key}"] for values in log.values()] for log in logs.values()]
            curves = [np.array(curve, dtype=float) for curve in curves]
            for curve in curves:
                axis.plot(np.arange(1, len(curve) + 1), curve, color=colour, linewidth=0.7, alpha=0.5)
            complete = [curve for curve in curves if len(curve) == max(map(len, curves))]
            mean = np.mean(complete, axis=0)
            axis.plot(np.arange(1, len(mean) + 1), mean, color=colour, linewidth=2, label=label)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"{len(logs)} folds (thin) and their mean (thick)" if len(logs) > 1 else "1 fold")
    return figure


def plot_confusion(mat: np.ndarray, classes: Sequence[int | str], title: str) -> Figure:
    """Confusion matrix as row percentages, rows true classes; beside it the number of parcels of each class.

    Args:
        mat: counts (K, K).
        classes: the classes' names.
        title: heading.
    """
    total = mat.sum(1, keepdims=True)
    share = np.divide(100 * mat, total, out=np.full(mat.shape, np.nan), where=total > 0)
    side = max(4.5, 0.42 * len(mat) + 2)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for row, column in np.argwhere(np.nan_to_num(share) >= 0.5):
        colour = "white" if share[row, column] > 55 else "black"
        axis.text(
            column, row, f"{share[row, column]:.0f}", ha="center", va="center", fontsize=7, color=colour
        )
    axis.set(title=title, xlabel="predicted class", ylabel="true class (number of parcels)")
    axis.set_xticks(range(len(mat)), [str(name) for name in classes], fontsize=8)
    axis.set_yticks(range(len(mat)), [f"{name} ({n})" for name, n in zip(classes, total[:, 0])], fontsize=8)
    figure.colorbar(image, ax=axis, label="% of the true class", shrink=0.8)
    return figure


def plot_attention(
    weight: np.ndarray,
    ndvi: np.ndarray,
    ndvi_std: np.ndarray,
    k: int,
    dates: np.ndarray,
    title: str,
    width: int | None,
) -> Figure:
    """Attention of heads to dates, for one class, and above it the NDVI of this class and of the others.

    Args:
        weight: share of each head's attention by class and date or period, (K, H, T); NaN where there is no date.
        ndvi, ndvi_std: mean NDVI and its deviation over parcels, (K, T); NaN where unknown.
        k: the class to draw.
        dates: first day of each period, (T,) datetime64.
        title: heading.
        width: days of a period; None for single dates, whose cells reach half-way to the next ones.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.7))
    edges = cell_edges(mdates.date2num(dates), width)
    centres = (edges[:-1] + edges[1:]) / 2 if width else mdates.date2num(dates)
    seen = np.isfinite(ndvi[k])
    if seen.any():
        for other in np.delete(ndvi, k, axis=0):
            known = np.isfinite(other)
            upper.plot(centres[known], other[known], color="0.8", linewidth=0.7)
        x, mean, deviation = centres[seen], ndvi[k][seen], ndvi_std[k][seen]
        upper.plot(x, mean, ".-", color="#009e73")
        upper.fill_between(x, mean - deviation, mean + deviation, color="#009e73", alpha=0.2, linewidth=0)
        upper.set_ylabel("mean NDVI\n(grey: other classes)")
    else:
        upper.text(0.5, 0.5, "no NDVI: bands unknown", transform=upper.transAxes, ha="center", color="0.5")
    upper.grid(alpha=0.3)
    upper.set_title(title, fontsize="medium")
    heads = np.arange(weight.shape[1] + 1) + 0.5
    highest = np.nanmax(weight)  # the same scale for all classes
    image = lower.pcolormesh(edges, heads, weight[k], cmap="magma_r", vmin=0, vmax=highest)
    lower.plot(centres, np.full(len(centres), heads[0]), "|", color="black", clip_on=False, markersize=7)
    lower.set_facecolor("0.88")
    lower.set_ylabel("head")
    lower.yaxis.get_major_locator().set_params(integer=True)
    lower.invert_yaxis()
    lower.xaxis_date()
    locator = mdates.AutoDateLocator()
    lower.xaxis.set_major_locator(locator)
    lower.xaxis.set_major_formatter(mdates.ConciseDateFormatter(locator))
    what = f"{width} days" if width else "date"
    figure.colorbar(image, ax=lower, label=f"share of attention per {what}", aspect=12)
    return figure


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
