"""Calibration: how often predictions made with a given confidence are right (Guo et al., ICML 2017)."""

import torch
from torch import Tensor

CALIBRATION = "calibration.json"  # in Fold_k of a results folder
N_BINS = 15


class Calibration:
    """Counts of predictions by confidence, in bins of equal width over 0..1, summed up on the device.

    Attributes:
        sums: per bin the number of predictions, the sum of their confidences and the number right, (3, N_BINS) float64.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(3, N_BINS, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Takes a batch: logits (B, K) and true classes (B,)."""
        confidence, predicted = logits.detach().double().softmax(1).max(1)
        confidence = confidence.nan_to_num(0)
        bins = (confidence * N_BINS).long().clamp(max=N_BINS - 1)  # a confidence of 1 belongs to the last bin
        values = torch.stack([torch.ones_like(confidence), confidence, (predicted == target).double()])
        self.sums.index_add_(1, bins, values)

    def summary(self) -> dict[str, list[float]]:
        """What calibration.json holds: bin edges (N_BINS + 1), count, sum of confidence and number right per bin."""
        count, confidence, right = self.sums.tolist()
        edges = [i / N_BINS for i in range(N_BINS + 1)]
        return {"edges": edges, "count": count, "confidence": confidence, "right": right}
