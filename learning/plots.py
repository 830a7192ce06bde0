"""Figures; each function returns one, the caller saves it."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

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
