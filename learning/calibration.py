"""Calibration: how often predictions made with a given confidence are right, and a temperature that makes it as often.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. And sets of classes that hold the true one as often as is
asked for: Angelopoulos and Bates, "A Gentle Introduction to Conformal Prediction", 2021.
"""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from common.errors import UserError
from common.files import read_json
from common.processes import add_up, gather_rows

CALIBRATION, SCORES = "calibration.json", "validation_scores.npy"  # in Fold_k of a results folder
N_BINS = 15
_RANGE = 0.2, 5.0  # of a temperature: of few parcels, all of them right, the best one would be 0


def read_temperature(fold_folder: Path) -> float:
    """The temperature of a fold; 1 for one that has none, as published weights and older runs.

    Raises:
        UserError: if the file is damaged.
    """
    path = fold_folder / CALIBRATION
    content = read_json(path) if path.exists() else {}
    temperature = content.get("temperature", 1.0) if isinstance(content, dict) else None
    if not isinstance(temperature, float) or not _RANGE[0] <= temperature <= _RANGE[1]:
        raise UserError(
            f"{path} is damaged; copy it again from the training, or remove it to predict uncalibrated."
        )
    return temperature


class Logits:
    """Collects what a model gives for a part of the data.

    Attributes:
        logits: of the batches, (B, K) each.
        targets: true classes, (B,) each.
    """

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.targets: list[Tensor] = []

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Takes a batch."""
        self.logits.append(logits.detach().double())
        self.targets.append(target)


def fit_temperature(part: Logits) -> float:
    """The number that logits are divided by to make the likelihood of a part greatest; 1 without any parcel.

    Of several processes each has some of the parcels, and all find the same.
    """

    def loss(log_temperature: float) -> float:
        sums = torch.zeros(2, dtype=torch.float64)
        if part.logits:
            logits, targets = torch.cat(part.logits), torch.cat(part.targets)
            total = torch.nn.functional.cross_entropy(
                logits / math.exp(log_temperature), targets, reduction="sum"
            )
            sums = torch.stack([total.cpu(), torch.tensor(float(len(targets)), dtype=torch.float64)])
        total, count = add_up(sums).tolist()
        return total / max(count, 1)

    bounds = [math.log(limit) for limit in _RANGE]
    if loss(0.0) == 0 and loss(bounds[1]) == 0:
        return 1.0
    found = math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4}).x)
    return min(max(found, _RANGE[0]), _RANGE[1])


def validation_scores(part: Logits, temperature: float, most: int) -> np.ndarray:
    """1 less the calibrated probability of the true class, in 0..1, of every parcel of a part, in increasing order, (n,).

    Of several processes each has some of the parcels, and the first one alone gets them all.

    Args:
        part: what the model gives for the parcels.
        temperature: of the model.
        most: no process has more parcels.
    """
    scores = torch.empty(0, 1, dtype=torch.float64)
    if part.logits:
        p = (torch.cat(part.logits) / temperature).softmax(1)
        scores = 1 - p.gather(1, torch.cat(part.targets).unsqueeze(1)).cpu()
    return np.sort(np.concatenate([np.empty((0, 1)), *gather_rows(scores, most)])[:, 0])


def set_threshold(scores: np.ndarray, coverage: float) -> float:
    """The score up to which classes belong to a set, so that sets hold the true class as often as asked for.

    That holds for parcels that are as the ones scored here, on average over all draws of these.

    Args:
        scores: of the true classes of n parcels, (n,).
        coverage: share of the sets that are to hold the true class, 0 to 1.

    Returns:
        The score; 1, which lets all classes in, where n is too small for that share.
    """
    n = len(scores)
    rank = math.ceil(round((n + 1) * coverage, 6))  # n + 1 counts the parcel to predict too
    return float(np.quantile(scores, rank / n, method="higher")) if rank <= n else 1.0


def read_threshold(fold_folder: Path, coverage: float) -> float:
    """The same from the validation parcels of a fold.

    Raises:
        UserError: if their scores are missing or damaged.
    """
    path = fold_folder / SCORES
    if not path.exists():
        raise UserError(
            f"{path} is not there, which sets of classes are made from; train again, since older and published weights "
            "have none, or leave --sets out."
        )
    try:
        scores = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        if scores.ndim != 1 or scores.dtype.kind != "f" or not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError("expected numbers from 0 to 1")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} is damaged ({error}); copy it again from the training, or leave --sets out."
        ) from error
    return set_threshold(scores, coverage)


class Calibration:
    """Counts of predictions by confidence, in bins of equal width over 0..1, summed up on the device.

    Args:
        temperature: that a calibrated prediction divides logits by.
        device: where logits are.

    Attributes:
        sums: as predicted, and calibrated: per bin the number of predictions, the sum of their confidences and the number
            right, (2, 3, N_BINS) float64.
    """

    def __init__(self, temperature: float = 1.0, device: torch.device | str = "cpu") -> None:
        self.temperature = temperature
        self.sums = torch.zeros(2, 3, N_BINS, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Takes a batch: logits (B, K) and true classes (B,)."""
        for sums, temperature in zip(self.sums, (1.0, self.temperature)):
            confidence, predicted = (logits.detach().double() / temperature).softmax(1).max(1)
            confidence = confidence.nan_to_num(0)
            bins = (confidence * N_BINS).long().clamp(max=N_BINS - 1)  # 1 belongs to the last one
            values = torch.stack([torch.ones_like(confidence), confidence, (predicted == target).double()])
            sums.index_add_(1, bins, values)

    def summary(self) -> dict[str, Any]:
        """What calibration.json holds, of all processes: the temperature, bin edges (N_BINS + 1), and of each bin count,
        sum of confidence and number right, as predicted and, under "calibrated", after division by the temperature."""
        names = "count", "confidence", "right"
        before, after = (dict(zip(names, sums)) for sums in add_up(self.sums).tolist())
        edges = [i / N_BINS for i in range(N_BINS + 1)]
        return {"temperature": self.temperature, "edges": edges, **before, "calibrated": after}
