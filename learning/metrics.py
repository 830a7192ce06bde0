"""Scores of a classification, all from its confusion matrix (rows are true classes)."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import confusion_matrix


def mIou(y_true: ArrayLike, y_pred: ArrayLike, n_classes: int) -> float:
    """Mean IoU over the classes below n_classes that are present in either vector, in 0..1; nan without any."""
    if not np.size(y_true):
        return float("nan")
    size = 1 + int(max(n_classes - 1, np.max(y_true), np.max(y_pred)))
    return mean_iou(confusion_matrix(y_true, y_pred, labels=range(size)), n_classes)


def mean_iou(mat: NDArray, n_classes: int | None = None) -> float:
    """Mean IoU, in 0..1, over the classes (below n_classes) that have a sample or a prediction; nan if none has."""
    mat = np.asarray(mat)
    iou = _ratio(np.diag(mat), mat.sum(0) + mat.sum(1) - np.diag(mat))[:n_classes]
    return float(np.nanmean(iou)) if np.isfinite(iou).any() else float("nan")


def accuracy(mat: NDArray) -> float:
    """Share of samples classified right, in 0..1; nan without samples."""
    return float(_ratio(np.trace(mat), mat.sum()))


def confusion_matrix_analysis(mat: NDArray) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Scores per class and overall, in 0..1; nan where undefined (a class without sample or without prediction).

    Args:
        mat: confusion matrix (K, K).

    Returns:
        per_class: {class index: {"IoU", "Precision", "Recall", "F1-score"}}.
        overall: "micro_" scores from counts summed over classes, "MACRO_" means over the classes where a score is
            defined, and "Accuracy".
    """
    mat = np.asarray(mat)
    tp = np.diag(mat)
    fp, fn = mat.sum(0) - tp, mat.sum(1) - tp
    scores = _scores(tp, fp, fn)
    per_class = {str(k): {name: float(values[k]) for name, values in scores.items()} for k in range(len(mat))}
    micro = _scores(tp.sum(), fp.sum(), fn.sum())
    overall = {f"micro_{name}": float(value) for name, value in micro.items()}
    for name, values in scores.items():
        overall[f"MACRO_{name}"] = float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
    overall["Accuracy"] = accuracy(mat)
    return per_class, overall


def _scores(tp: NDArray, fp: NDArray, fn: NDArray) -> dict[str, NDArray]:
    """The four scores from true positives, false positives and false negatives (arrays or numbers)."""
    return {
        "IoU": _ratio(tp, tp + fp + fn),
        "Precision": _ratio(tp, tp + fp),
        "Recall": _ratio(tp, tp + fn),
        "F1-score": _ratio(2 * tp, 2 * tp + fp + fn),
    }


def _ratio(a: NDArray, b: NDArray) -> NDArray:
    """a / b, nan where b is 0."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return np.divide(a, b, out=np.full_like(b, np.nan), where=b > 0)


# By name, scores of a confusion matrix that the logs of a training hold, as train_NAME, val_NAME, test_NAME.
METRICS: dict[str, Callable[[NDArray], float]] = {
    "accuracy": lambda mat: 100 * accuracy(mat),
    "IoU": mean_iou,
}
