"""learning/engine.py: one pass over a part of the data, against plain loops."""

import copy

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score
from torch import nn
from torch.utils.data import DataLoader

from common.errors import UserError
from data.batch import Series
from learning import engine
from learning.engine import OPTIMIZERS, SCHEDULES, Scores, evaluation, train_epoch
from learning.focal_loss import LOSSES, FocalLoss
from learning.metrics import METRICS

CPU, N_CLASSES = torch.device("cpu"), 4


def batches(n: int, sizes: tuple[int, ...] = (5, 5, 3)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(n)
    return [
        (torch.randn(size, 6, generator=random), torch.randint(N_CLASSES, (size,), generator=random))
        for size in sizes
    ]


def load(data: list) -> DataLoader:
    return DataLoader(data, batch_size=None)


def test_scores_are_those_of_all_parcels() -> None:
    """The mean over parcels, not over batches, which are of unequal size."""
    model, criterion = nn.Linear(6, N_CLASSES), FocalLoss(1)
    data = batches(0, (7, 2, 1))
    seen = []
    metrics, mat = evaluation(
        model, criterion, load(data), CPU, N_CLASSES, "test", add=lambda *x: seen.append(x)
    )
    x, y = (torch.cat(values) for values in zip(*data))
    logits = model(x)
    expected = confusion_matrix(y, logits.argmax(1), labels=range(N_CLASSES))
    np.testing.assert_array_equal(mat, expected)
    assert metrics["test_loss"] == pytest.approx(criterion(logits, y).item(), rel=1e-6)
    assert metrics["test_accuracy"] == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())
    present = sorted(set(y.tolist()) | set(logits.argmax(1).tolist()))
    assert metrics["test_IoU"] == pytest.approx(
        jaccard_score(y, logits.argmax(1), labels=present, average="macro", zero_division=0)
    )
    torch.testing.assert_close(torch.cat([logits for logits, _ in seen]), logits)
    assert torch.equal(torch.cat([target for _, target in seen]), y)
    assert not model.training


def test_an_epoch_takes_the_steps_that_a_plain_loop_takes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, N_CLASSES)).double()
    plain, criterion = copy.deepcopy(model), LOSSES["focal"](2.0)
    data = [(x.double(), y) for x, y in batches(1)]
    optimizers = [OPTIMIZERS["adam"](each.parameters(), 0.01) for each in (model, plain)]
    metrics = train_epoch(model, optimizers[0], criterion, load(data), CPU, N_CLASSES)
    losses, right = [], 0
    plain.train()
    for x, y in data:
        optimizers[1].zero_grad()
        logits = plain(x)
        loss = criterion(logits, y)
        loss.backward()
        optimizers[1].step()
        losses.append((loss.item(), len(y)))
        right += int((logits.argmax(1) == y).sum())
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values()):
        torch.testing.assert_close(ours, theirs)
    assert metrics["train_loss"] == pytest.approx(
        np.average([loss for loss, _ in losses], weights=[n for _, n in losses])
    )
    assert metrics["train_accuracy"] == pytest.approx(100 * right / 13)


def test_a_loss_that_is_not_finite_names_epoch_and_step() -> None:
    model = nn.Linear(6, N_CLASSES)
    nn.init.constant_(model.weight, torch.inf)
    with pytest.raises(UserError) as error:
        train_epoch(
            model,
            OPTIMIZERS["adam"](model.parameters(), 0.01),
            FocalLoss(),
            load(batches(2)),
            CPU,
            N_CLASSES,
            1,
            "Fold 2",
        )
    assert "Fold 2" in str(error.value) and "--lr" in str(error.value) and "step 1" in str(error.value)


def test_parcels_without_an_observation_are_not_scored() -> None:
    class Mean(nn.Module):
        def forward(self, series: Series) -> torch.Tensor:
            return series.pixels.flatten(1)[:, :N_CLASSES]

    pixels, mask = torch.randn(3, 2, 4, 5), torch.ones(3, 2, 5)
    mask[1] = 0
    series = Series(pixels, mask, None, torch.zeros(3, 2))
    y = torch.tensor([0, 1, 2])
    metrics, mat = evaluation(Mean(), FocalLoss(), load([(series, y)]), CPU, N_CLASSES)
    logits = pixels.flatten(1)[[0, 2], :N_CLASSES]
    assert mat.sum() == 2 and mat[1].sum() == 0
    assert metrics["val_loss"] == pytest.approx(FocalLoss()(logits, y[[0, 2]]).item(), rel=1e-6)


def test_scores_are_added_up_between_looks_at_the_loss() -> None:
    scores = Scores(2, CPU)
    logits, target = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0])
    scores.add(torch.tensor(1.0), logits, target)
    assert scores.fetch_loss() == 1
    scores.add(torch.tensor(4.0), logits[:1], target[:1])
    assert scores.fetch_loss() == pytest.approx((2 * 1 + 4) / 3)
    assert scores.confusion_matrix().tolist() == [[2, 1], [0, 0]]


def test_a_metric_that_is_added_stands_in_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "errors", lambda mat: float(mat.sum() - np.trace(mat)))
    metrics, mat = evaluation(nn.Linear(6, N_CLASSES), FocalLoss(), load(batches(3)), CPU, N_CLASSES)
    assert metrics["val_errors"] == mat.sum() - np.trace(mat)


def test_the_default_schedule_leaves_the_learning_rate_alone() -> None:
    assert [SCHEDULES["constant"](epoch, 9) for epoch in range(1, 10)] == [1] * 9
    assert engine.OPTIMIZERS["adam"](nn.Linear(1, 1).parameters(), 0.25).param_groups[0]["lr"] == 0.25
