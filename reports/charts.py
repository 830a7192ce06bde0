"""Geometry of the report's charts: numbers to places on the page; its template draws them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from scipy.stats import binomtest

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 42  # margins


class Axes:
    """A plane with ticks.

    Args:
        x, y: least and greatest value on each axis.
        x_name, y_name: what the axes show.
        whole: whether the x axis counts.
    """

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], x_name: str, y_name: str, whole: bool = False
    ) -> None:
        ticks = [MaxNLocator(5, integer=whole).tick_values(*x), MaxNLocator(5).tick_values(*y)]
        self._x, self._y = x, (min(y[0], ticks[1][0]), max(y[1], ticks[1][-1]))
        self.x_name, self.y_name = x_name, y_name
        self.x_ticks = [(self.x(tick), f"{tick:g}") for tick in ticks[0] if x[0] <= tick <= x[1]]
        self.y_ticks = [(self.y(tick), f"{tick:g}") for tick in ticks[1]]
        self.shapes: list[dict[str, Any]] = []

    def x(self, value: float) -> float:
        """Place of a value on the x axis, in pixels from the left."""
        low, high = self._x
        return round(LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Place of a value on the y axis, in pixels from the top."""
        low, high = self._y
        return round(HEIGHT - BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM), 1)

    def add_line(self, x: Sequence[float], y: Sequence[float], style: str) -> None:
        """Draws a line through the points that are finite."""
        points = " ".join(f"{self.x(a)},{self.y(b)}" for a, b in zip(x, y) if np.isfinite(b))
        self.shapes.append({"kind": "line", "points": points, "style": style})

    def add_bar(self, x: tuple[float, float], y: float) -> None:
        """Draws a bar from 0 to y."""
        left, right, top = self.x(x[0]), self.x(x[1]), self.y(y)
        self.shapes.append(
            {"kind": "bar", "x": left, "y": top, "width": right - left - 1, "height": self.y(0) - top}
        )

    def add_point(self, x: float, y: float, note: str) -> None:
        """Draws a point that says `note` where it is pointed at."""
        self.shapes.append({"kind": "point", "x": self.x(x), "y": self.y(y), "note": note})


def plot_curves(logs: Sequence[dict[str, dict[str, float | None]]], key: str, name: str) -> Axes:
    """Training and validation of every fold (thin) and their mean (thick) by epoch.

    Args:
        logs: of each fold, {epoch: {train_loss, val_loss, ...}}.
        key: loss, accuracy or IoU.
        name: what to write at the axis.
    """
    curves = {}
    for part in ("train", "val"):
        lengths = [len(log) for log in logs]
        values = np.full((len(logs), max(lengths)), np.nan)
        for row, log in zip(values, logs):
            row[: len(log)] = [epoch[f"{part}_{key}"] for epoch in log.values()]  # None becomes nan
        curves[part] = values
    present = np.concatenate([values[np.isfinite(values)] for values in curves.values()])
    low, high = (present.min(), present.max()) if len(present) else (0.0, 1.0)
    epochs = np.arange(1, values.shape[1] + 1)
    axes = Axes((1, max(2, len(epochs))), (float(low), float(high)), "epoch", name, whole=True)
    for part, values in curves.items():
        for row in values:
            axes.add_line(epochs, row, f"thin {part}")
        known = np.isfinite(values).any(0)
        axes.add_line(epochs[known], np.nanmean(values[:, known], axis=0), part)
    return axes


def plot_calibration(edges: np.ndarray, count: np.ndarray, confidence: np.ndarray, right: np.ndarray) -> Axes:
    """Share of right predictions by confidence with 95 % intervals, the diagonal, and the parcels' distribution as bars.

    Args:
        edges: of the bins of confidence, (bins + 1,).
        count, confidence, right: per bin the number of parcels, the sum of confidences and the number right, (bins,).
    """
    axes = Axes((0, 1), (0, 1), "confidence", "share right")
    for i in range(len(count)):
        axes.add_bar((edges[i], edges[i + 1]), count[i] / count.sum())
    axes.add_line((0, 1), (0, 1), "diagonal")
    filled = count > 0
    x, y = confidence[filled] / count[filled], right[filled] / count[filled]
    axes.add_line(x, y, "val")
    for sure, share, n, k in zip(x, y, count[filled], right[filled]):
        low, high = binomtest(int(k), int(n)).proportion_ci(method="wilson")
        axes.add_line((sure, sure), (low, high), "interval")
        axes.add_point(
            sure, share, f"{int(n):,} parcels: mean confidence {sure:.3f}, {100 * share:.1f}% right"
        )
    return axes


def calibration_error(count: np.ndarray, confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: mean over parcels of the gap between confidence and share right, 0 to 1."""
    return float(np.abs(confidence - right).sum() / count.sum())
