"""One pass over a part of the data: training and evaluation. Both return figures; printing is the caller's."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchnet.meter import AverageValueMeter

from common.errors import UserError
from common.graph import Replayed
from common.machine import recursive_todevice
from common.processes import add_up, alone, is_main, n_ranks
from common.progress import progress_bar
from data.batch import Batch
from data.device import DeviceLoader
from data.loader import Loader
from learning.metrics import METRICS

# By name, what makes an optimiser of parameters and a learning rate, and the factor of the learning rate in an epoch,
# from 1, of so many epochs. What a script adds here, --optimizer and --schedule can choose.
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]] = {
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, fused=True)
}
SCHEDULES: dict[str, Callable[[int, int], float]] = {"constant": lambda epoch, epochs: 1.0}


class Scores:
    """Mean loss and confusion matrix of a pass, summed up on the device and fetched only when asked for.

    Fetching makes the host wait for the device and for the other processes, all of which have to fetch, so it is done
    once per display interval, not once per step.
    """

    def __init__(self, n_classes: int, device: torch.device) -> None:
        self._loss = AverageValueMeter()  # over the parcels so far
        self._new = torch.zeros((), dtype=torch.float64, device=device)  # sum of losses that the meter lacks
        self._counts = torch.zeros(n_classes, n_classes, dtype=torch.float64, device=device)
        self._classes = torch.arange(n_classes, device=device)

    def reset(self) -> None:
        """Begins a new pass, in the same memory."""
        self._loss.reset()
        self._new.zero_()
        self._counts.zero_()

    def add(self, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        """Takes a batch: its mean loss, logits (B, K) and true classes (B,)."""
        self._new.add_(loss.detach(), alpha=len(target))
        true, found = (
            (classes.unsqueeze(1) == self._classes).double()
            for classes in (target, logits.detach().argmax(1))
        )
        self._counts.addmm_(true.t(), found)  # a GPU would sort what it counts one by one

    def fetch_loss(self) -> float:
        """Mean loss over the parcels so far."""
        total, parcels = add_up(torch.stack([self._new, self._counts.sum()])).tolist()
        if parcels > self._loss.n:
            self._loss.add(total, int(parcels) - self._loss.n)
            self._new.zero_()
        return self._loss.value()[0]

    def confusion_matrix(self) -> np.ndarray:
        """Counts (K, K) so far, rows true classes."""
        return add_up(self._counts.clone()).long().cpu().numpy()

    def summary(self, prefix: str) -> dict[str, float]:
        """The loss and all `METRICS`: accuracy in percent and mIoU in 0..1, under the published names."""
        mat = self.confusion_matrix()
        metrics = {f"{prefix}_{name}": float(metric(mat)) for name, metric in METRICS.items()}
        return {f"{prefix}_loss": self.fetch_loss(), **metrics}


class ReplayedSteps:
    """The training steps of a fold as a CUDA graph, and their scores, which stay in the same memory.

    Args:
        optimizer: that steps with numbers in the device's memory alone, if told so by its groups' "capturable".
        batch_size: parcels of the batches that are replayed; smaller ones are not.
        n_classes: K.
        device: a GPU.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, batch_size: int, n_classes: int, device: torch.device
    ) -> None:
        self.scores, self._step = Scores(n_classes, device), Replayed(batch_size, device)
        self._groups = optimizer.param_groups
        for group in self._groups:
            group["capturable"] = True
        self._lr: list[float] = []

    def take(self, loader: DeviceLoader, learn: Callable[[Any, Tensor], None]) -> Iterator[None]:
        """Takes the steps of an epoch, one after the other; all epochs must be drawn in the memory of the first."""
        lr = [group["lr"] for group in self._groups]
        if lr != self._lr:
            self._step.forget()  # what was captured has the old one
        self._lr = lr
        for items in loader.items():
            self._step(lambda items: learn(*loader.dataset.batch(items)), items)
            yield


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: nn.Module,
    loader: Loader,
    device: torch.device,
    n_classes: int,
    display_step: int = 50,
    name: str = "training",
    replayed: ReplayedSteps | None = None,
) -> dict[str, float]:
    """Trains for one epoch; with `replayed`, which the epochs of a fold share, as it does.

    Returns:
        train_loss, train_accuracy in percent, train_IoU in 0..1, of the batches as they were trained on.

    Raises:
        UserError: if the loss is no longer finite.
    """
    model.train()
    scores = Scores(n_classes, device) if replayed is None else replayed.scores
    scores.reset()

    def learn(x: Any, y: Tensor) -> None:
        optimizer.zero_grad()
        logits = _logits(model(x))
        loss = criterion(logits, y)
        backward(loss, model, len(y))
        optimizer.step()
        scores.add(loss, logits, y)

    def take_steps() -> Iterator[None]:
        for step, (x, y) in enumerate(loader, start=1):
            with alone(leaves_to_first(loader, step)):
                learn(recursive_todevice(x, device), y.to(device, non_blocking=True))
            yield

    steps = take_steps() if replayed is None else replayed.take(loader, learn)
    progress = progress_bar(steps, name, "batches", shown=is_main(), total=len(loader))
    for step, _ in enumerate(progress, start=1):
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
    loader: Loader,
    device: torch.device,
    n_classes: int,
    mode: str = "val",
    name: str = "validation",
    add: Callable[[Tensor, Tensor], None] = lambda logits, target: None,
) -> tuple[dict[str, float], np.ndarray]:
    """Evaluates a model; `add` is called with every batch's logits (B, K) and true classes (B,).

    Returns:
        <mode>_loss, <mode>_accuracy in percent and <mode>_IoU in 0..1; and the confusion matrix (K, K).
    """
    model.eval()
    scores = Scores(n_classes, device)
    for x, y in progress_bar(loader, name, "batches", shown=is_main()):
        x, y = recursive_todevice(x, device), y.to(device, non_blocking=True)
        logits = _logits(model(x))
        if isinstance(x, Batch):  # a parcel may have no pixel, among those drawn, on any date
            observed = (x.mask != 0).flatten(1).any(1)
            logits, y = logits[observed], y[observed]
        if not len(y):
            continue
        scores.add(criterion(logits, y), logits, y)
        add(logits, y)
    return scores.summary(mode), scores.confusion_matrix()


def _logits(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def backward(loss: Tensor, model: nn.Module, n_parcels: int) -> None:
    """Gradients of the mean loss over a batch, `loss` being the mean over this process's n_parcels of it."""
    if n_ranks() == 1:
        loss.backward()
        return
    (loss * n_parcels).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [loss.new_tensor([n_parcels])])
    flat = add_up(flat)
    flat /= flat[-1].clone()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients] + [1])):
        gradient.copy_(mean.view_as(gradient))


def leaves_to_first(loader: Loader, step: int) -> bool:
    """Whether a step, from 1 on, over the loader of a `RankBatches` is one of the first process by itself."""
    return n_ranks() > 1 and step == len(loader) and loader.sampler.last_is_small


def copy_from_first(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Gives all processes the weights and the optimiser's state of the first one."""
    states = optimizer.state_dict()["state"].values()
    for tensor in (*model.state_dict().values(), *(values[name] for values in states for name in values)):
        dist.broadcast(tensor, 0)
