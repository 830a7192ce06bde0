"""One pass over a part of the data: training and evaluation. Both return figures; printing is the caller's."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchnet.meter import AverageValueMeter

from learning.errors import UserError
from learning.metrics import accuracy, mean_iou
from learning.progress import progress_bar
from learning.runtime import recursive_todevice


class Scores:
    """Mean loss and confusion matrix of a pass, summed up on the device and fetched only when asked for.

    Fetching makes the host wait for the device, so it is done once per display interval, not once per step.
    """

    def __init__(self, n_classes: int, device: torch.device) -> None:
        self.n_classes = n_classes
        self._loss = AverageValueMeter()
        self._new_loss = torch.zeros((), dtype=torch.float64, device=device)
        self._new_parcels = 0
        self._counts = torch.zeros(n_classes * n_classes, dtype=torch.int64, device=device)

    def add(self, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        """Takes a batch: its mean loss, logits (B, K) and true classes (B,)."""
        self._new_loss += loss.detach() * len(target)
        self._new_parcels += len(target)
        pairs = target * self.n_classes + logits.detach().argmax(1)
        self._counts.scatter_add_(0, pairs, torch.ones_like(pairs))

    def fetch_loss(self) -> float:
        """Mean loss over the parcels so far."""
        if self._new_parcels:
            self._loss.add(self._new_loss.item(), self._new_parcels)
            self._new_loss.zero_()
            self._new_parcels = 0
        return self._loss.value()[0]

    def confusion_matrix(self) -> np.ndarray:
        """Counts (K, K) so far, rows true classes."""
        return self._counts.view(self.n_classes, self.n_classes).cpu().numpy()

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
    progress = progress_bar(loader, name, "batches")
    for step, (x, y) in enumerate(progress, start=1):
        x, y = recursive_todevice(x, device), y.to(device, non_blocking=True)
        optimizer.zero_grad()
        logits = _logits(model(x))
        loss = criterion(logits, y)
        loss.backward()
        optimizer.step()
        scores.add(loss, logits, y)
        if step % display_step == 0 or step == len(loader):
            mean = scores.fetch_loss()
            if not np.isfinite(mean):
                raise UserError(
                    f"{name}, step {step}: the loss is {mean}; lower --lr or check the mean and deviation."
                )
            progress.set_postfix_str(f"loss {mean:.4f}", refresh=False)
    return scores.summary("train")


@torch.no_grad()
def evaluation(
    model: nn.Module,
    criterion: nn.Module,
    loader: DataLoader,
    device: torch.device,
    n_classes: int,
    mode: str = "val",
    name: str = "validation",
) -> tuple[dict[str, float], np.ndarray]:
    """Evaluates a model.

    Returns:
        <mode>_loss, <mode>_accuracy in percent and <mode>_IoU in 0..1; and the confusion matrix (K, K).
    """
    model.eval()
    scores = Scores(n_classes, device)
    for x, y in progress_bar(loader, name, "batches"):
        x, y = recursive_todevice(x, device), y.to(device, non_blocking=True)
        logits = _logits(model(x))
        scores.add(criterion(logits, y), logits, y)
    return scores.summary(mode), scores.confusion_matrix()


def _logits(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
