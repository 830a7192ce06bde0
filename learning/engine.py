"""One pass over a part of the data: training and evaluation. Both return figures; printing is the caller's."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchnet.meter import AverageValueMeter

from common.errors import UserError
from common.machine import recursive_todevice
from common.processes import add_up, alone, is_main
from common.progress import progress_bar
from data.batch import Series
from learning.calibration import Calibration
from learning.distributed import backward, copy_from_first, leaves_to_first
from learning.metrics import accuracy, mean_iou


class Scores:
    """Mean loss and confusion matrix of a pass, summed up on the device and fetched only when asked for.

    Fetching makes the host wait for the device and for the other processes, all of which have to fetch, so it is done
    once per display interval, not once per step.
    """

    def __init__(self, n_classes: int, device: torch.device) -> None:
        self.n_classes = n_classes
        self._loss = AverageValueMeter()
        self._new = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, number of parcels
        self._counts = torch.zeros(n_classes * n_classes, dtype=torch.int64, device=device)

    def add(self, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        """Takes a batch: its mean loss, logits (B, K) and true classes (B,)."""
        self._new[0] += loss.detach() * len(target)
        self._new[1] += len(target)
        pairs = target * self.n_classes + logits.detach().argmax(1)
        self._counts.scatter_add_(0, pairs, torch.ones_like(pairs))

    def fetch_loss(self) -> float:
        """Mean loss over the parcels so far."""
        total, parcels = add_up(self._new).tolist()
        if parcels:
            self._loss.add(total, int(parcels))
            self._new.zero_()
        return self._loss.value()[0]

    def confusion_matrix(self) -> np.ndarray:
        """Counts (K, K) so far, rows true classes."""
        return add_up(self._counts.clone()).view(self.n_classes, self.n_classes).cpu().numpy()

    def summary(self, prefix: str) -> dict[str, float]:
        """Loss, accuracy in percent and mIoU in 0..1, under the published names."""
        mat = self.confusion_matrix()
        return {
            f"{prefix}_loss": self.fetch_loss(),
            f"{prefix}_accuracy": 100 * accuracy(mat),
            f"{prefix}_IoU": mean_iou(mat),
        }


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: nn.Module,
    loader: DataLoader,
    device: torch.device,
    n_classes: int,
    display_step: int = 50,
    name: str = "training",
) -> dict[str, float]:
    """Trains for one epoch.

    Returns:
        train_loss, train_accuracy in percent, train_IoU in 0..1, of the batches as they were trained on.

    Raises:
        UserError: if the loss is no longer finite.
    """
    model.train()
    scores = Scores(n_classes, device)
    progress = progress_bar(loader, name, "batches", shown=is_main())
    for step, (x, y) in enumerate(progress, start=1):
        x, y = recursive_todevice(x, device), y.to(device, non_blocking=True)
        optimizer.zero_grad()
        with alone(leaves_to_first(loader, step)):
            logits = _logits(model(x))
            loss = criterion(logits, y)
            backward(loss, model, len(y))
        optimizer.step()
        scores.add(loss, logits, y)
        if step % display_step == 0 and step < len(loader):
            progress.set_postfix_str(f"loss {_finite_loss(scores, name, step):.4f}", refresh=False)
    if leaves_to_first(loader, len(loader)):
        copy_from_first(model, optimizer)
    _finite_loss(scores, name, len(loader))
    return scores.summary("train")


def _finite_loss(scores: Scores, name: str, step: int) -> float:
    """Mean loss so far; a UserError if it is not finite."""
    mean = scores.fetch_loss()
    if not np.isfinite(mean):
        raise UserError(
            f"{name}, step {step}: the loss is {mean}; lower --lr or check the mean and deviation."
        )
    return mean


@torch.no_grad()
def evaluation(
    model: nn.Module,
    criterion: nn.Module,
    loader: DataLoader,
    device: torch.device,
    n_classes: int,
    mode: str = "val",
    name: str = "validation",
    calibration: Calibration | None = None,
) -> tuple[dict[str, float], np.ndarray]:
    """Evaluates a model; adds its predictions to `calibration`, if given.

    Returns:
        <mode>_loss, <mode>_accuracy in percent and <mode>_IoU in 0..1; and the confusion matrix (K, K).
    """
    model.eval()
    scores = Scores(n_classes, device)
    for x, y in progress_bar(loader, name, "batches", shown=is_main()):
        x, y = recursive_todevice(x, device), y.to(device, non_blocking=True)
        logits = _logits(model(x))
        if isinstance(x, Series):  # a parcel may have no pixel, among those drawn, on any date
            observed = (x.mask != 0).flatten(1).any(1)
            logits, y = logits[observed], y[observed]
        if not len(y):
            continue
        scores.add(criterion(logits, y), logits, y)
        if calibration is not None:
            calibration.add(logits, y)
    if calibration is not None:
        add_up(calibration.sums)
    return scores.summary(mode), scores.confusion_matrix()


def _logits(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
