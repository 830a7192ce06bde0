"""Loss, metrics and initial weights against recorded values and against their plain definitions."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from learning.focal_loss import FocalLoss
from learning.metrics import confusion_matrix_analysis, mIou
from learning.weight_init import weight_init
from models.stclassifier import PseGru, PseLTae, PseTempCNN
from tests import golden_numbers as golden
from tests import textbook

# ----------------------------------------------------------------------------------------------- focal loss

RECORDED_LOSSES = [key for key in golden.ARRAYS.files if key.startswith("focal/") and key != "focal/alpha"]


def recorded_logits() -> tuple[Tensor, Tensor]:
    r = golden.rs(golden.VALUES["salt"], "focal")
    logits = torch.from_numpy(r.standard_normal((11, 5)).astype(np.float32)).requires_grad_()
    return logits, torch.from_numpy(r.randint(0, 5, 11))


def draw_logits(*shape: int) -> tuple[Tensor, Tensor]:
    """Logits (B, K, ...) in float64 and targets (B, ...)."""
    r = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, generator=r, dtype=torch.float64).requires_grad_()
    return logits, torch.randint(shape[1], (shape[0], *shape[2:]), generator=r)


@pytest.mark.parametrize("key", RECORDED_LOSSES)
def test_focal_loss_as_recorded(key: str):
    _, gamma, reduction = key.split("/")
    logits, target = recorded_logits()
    loss = FocalLoss(gamma=float(gamma), size_average=reduction == "mean")(logits, target)
    loss.backward()
    found = torch.cat([loss.detach().view(1), logits.grad.flatten()])
    assert golden.relative_error(found, golden.ARRAYS[key]) < 1e-6


def test_focal_loss_with_class_weights_as_recorded():
    loss = FocalLoss(gamma=2, alpha=[0.1, 0.2, 0.3, 0.4, 0.5])(*recorded_logits())
    assert float(loss.detach()) == pytest.approx(float(golden.ARRAYS["focal/alpha"]), rel=1e-6)


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 5])
@pytest.mark.parametrize("size_average", [True, False])
def test_focal_loss_and_its_gradient(gamma: float, size_average: bool):
    """The gradient is (1 - p)^gamma (softmax - onehot): the factor itself carries none."""
    logits, target = draw_logits(13, 4)
    loss = FocalLoss(gamma, size_average=size_average)(logits, target)
    loss.backward()
    each = textbook.focal_loss(logits.detach(), target, gamma)
    assert float(loss.detach()) == pytest.approx(
        float(each.mean() if size_average else each.sum()), rel=1e-12
    )

    probabilities = torch.softmax(logits.detach(), dim=1)
    factor = (1 - probabilities.gather(1, target.view(-1, 1))) ** gamma
    gradient = factor * (probabilities - nn.functional.one_hot(target, 4))
    assert torch.allclose(logits.grad, gradient / 13 if size_average else gradient, rtol=1e-12, atol=1e-14)


def test_focal_loss_without_gamma_is_cross_entropy():
    logits, target = draw_logits(13, 4)
    assert torch.allclose(FocalLoss()(logits, target), nn.functional.cross_entropy(logits, target))


@pytest.mark.parametrize("alpha", [[0.5, 0.25, 2.0, 1.0], torch.tensor([0.5, 0.25, 2.0, 1.0])])
def test_focal_loss_weighs_classes(alpha: list[float] | Tensor):
    logits, target = draw_logits(13, 4)
    expected = textbook.focal_loss(logits, target, 2, torch.as_tensor(alpha)).sum()
    assert torch.allclose(FocalLoss(2, alpha=alpha, size_average=False)(logits, target), expected)


def test_focal_loss_with_one_number_for_two_classes():
    logits, target = draw_logits(13, 2)
    expected = textbook.focal_loss(logits, target, 1, torch.tensor([0.25, 0.75])).mean()
    assert torch.allclose(FocalLoss(1, alpha=0.25)(logits, target), expected)


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 5, 2)])
def test_focal_loss_per_position(shape: tuple[int, ...]):
    logits, target = draw_logits(*shape)
    rows, classes = [], []
    for position in np.ndindex(*target.shape):
        rows.append(logits[(position[0], slice(None), *position[1:])])
        classes.append(target[position])
    expected = textbook.focal_loss(torch.stack(rows), torch.stack(classes), 2)
    assert torch.allclose(FocalLoss(2)(logits, target), expected.mean())
    assert torch.allclose(FocalLoss(2, size_average=False)(logits, target), expected.sum())


@pytest.mark.parametrize("gamma", [0.5, 1])
def test_focal_loss_of_certain_predictions_is_finite(gamma: float):
    logits = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]]).requires_grad_()
    loss = FocalLoss(gamma)(logits, torch.tensor([0, 0]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(500)
    assert torch.equal(logits.grad, torch.tensor([[0.0, 0.0], [-0.5, 0.5]]))


# -------------------------------------------------------------------------------------------------- metrics


def plain_miou(y_true: list[int], y_pred: list[int], n_classes: int) -> float:
    """Mean over the classes present of |both| / |either|."""
    scores = []
    pairs = list(zip(y_true, y_pred, strict=True))
    for k in range(n_classes):
        either = sum(k in pair for pair in pairs)
        if either:
            scores.append(sum(pair == (k, k) for pair in pairs) / either)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("n_classes", golden.VALUES["miou"])
def test_miou_as_recorded(n_classes: str):
    vectors = golden.ARRAYS["metrics/y_true"], golden.ARRAYS["metrics/y_pred"]
    assert mIou(*vectors, int(n_classes)) == pytest.approx(golden.VALUES["miou"][n_classes], rel=1e-12)


@pytest.mark.parametrize("n_classes", [1, 4, 9, 10, 30])
def test_miou_is_its_definition(n_classes: int):
    """With fewer classes than occur, the others still count where they are confused with one asked for."""
    r = np.random.RandomState(0)
    y_true, y_pred = r.randint(0, 9, 200), r.randint(1, 10, 200)
    y_pred[:80] = y_true[:80]
    expected = plain_miou(y_true.tolist(), y_pred.tolist(), n_classes)
    assert mIou(y_true, y_pred, n_classes) == pytest.approx(expected, rel=1e-12)
    assert mIou(y_true.tolist(), y_pred.tolist(), n_classes) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("y_true", "y_pred", "n_classes", "expected"),
    [
        ([0, 1, 1], [0, 1, 1], 2, 1),
        ([0, 1, 1], [0, 1, 1], 20, 1),  # classes that do not occur are left out
        ([0, 0], [1, 1], 2, 0),
        ([0, 0, 0, 0], [0, 0, 0, 1], 2, 0.375),  # class 1, predicted but never true, counts as 0
        ([0, 0, 0, 1], [0, 0, 0, 0], 2, 0.375),
        ([0, 1, 2], [0, 0, 2], 2, 0.25),
        ([0, 7], [0, 0], 1, 0.5),
    ],
)
def test_miou_by_hand(y_true: list[int], y_pred: list[int], n_classes: int, expected: float):
    assert mIou(y_true, y_pred, n_classes) == pytest.approx(expected)


@pytest.mark.parametrize("vectors", [([5, 4], [4, 4]), ([], [])])
def test_miou_without_any_class_is_undefined(vectors: tuple[list[int], list[int]]):
    with warnings.catch_warnings(action="error"):
        assert math.isnan(mIou(*vectors, 3))


def assert_scores(found: dict[str, float], expected: dict[str, float | None]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(math.nan if value is None else value, rel=1e-12, nan_ok=True), (
            name
        )


def test_confusion_matrix_analysis_as_recorded():
    with warnings.catch_warnings(action="error"):
        per_class, overall = confusion_matrix_analysis(golden.ARRAYS["metrics/conf_mat"])
    assert list(per_class) == list(golden.VALUES["per_class"])
    for k, expected in golden.VALUES["per_class"].items():
        assert_scores(per_class[k], expected)
    assert_scores(overall, golden.VALUES["overall"])


def test_confusion_matrix_analysis_by_hand():
    """Rows are true classes: class 0 has 3 of its 4 parcels found, and nothing else is taken for it."""
    per_class, overall = confusion_matrix_analysis(np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]]))
    assert_scores(per_class["0"], {"IoU": 3 / 4, "Precision": 1, "Recall": 3 / 4, "F1-score": 6 / 7})
    assert_scores(per_class["1"], {"IoU": 2 / 3, "Precision": 2 / 3, "Recall": 1, "F1-score": 4 / 5})
    assert_scores(per_class["2"], dict.fromkeys(["IoU", "Precision", "Recall", "F1-score"]))
    expected = {
        "micro_IoU": 5 / 7,
        "micro_Precision": 5 / 6,
        "micro_Recall": 5 / 6,
        "micro_F1-score": 5 / 6,
        "MACRO_IoU": (3 / 4 + 2 / 3) / 2,
        "MACRO_Precision": (1 + 2 / 3) / 2,
        "MACRO_Recall": (3 / 4 + 1) / 2,
        "MACRO_F1-score": (6 / 7 + 4 / 5) / 2,
        "Accuracy": 5 / 6,
    }
    assert_scores(overall, expected)


def test_each_score_is_left_out_where_it_alone_is_undefined():
    """A class that is predicted but never true has a precision and no recall."""
    per_class, overall = confusion_matrix_analysis(np.array([[2, 2], [0, 0]]))
    assert_scores(per_class["1"], {"IoU": 0, "Precision": 0, "Recall": None, "F1-score": 0})
    assert overall["MACRO_Recall"] == pytest.approx(0.5)
    assert overall["MACRO_Precision"] == pytest.approx(0.5)


def test_confusion_matrix_without_samples_is_undefined():
    with warnings.catch_warnings(action="error"):
        per_class, overall = confusion_matrix_analysis(np.zeros((2, 2), dtype=int))
    assert all(math.isnan(value) for scores in (*per_class.values(), overall) for value in scores.values())


def test_confusion_matrix_analysis_changes_nothing_and_can_be_saved():
    mat = np.array([[3, 1], [0, 2]])
    json.dumps(confusion_matrix_analysis(mat))
    assert mat.tolist() == [[3, 1], [0, 2]]


# ------------------------------------------------------------------------------------------ initial weights


def assert_normal(values: Tensor, std: float) -> None:
    """Mean, deviation and fourth moment are a normal distribution's (a uniform one has 1.8, not 3)."""
    values = values.detach().double().flatten() / std
    n = len(values)
    assert abs(float(values.mean())) < 5 / math.sqrt(n)
    assert float(values.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * n))
    assert float((values**4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / n))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("layer", "fans"),
    [
        (nn.Linear(300, 2000), 300 + 2000),
        (nn.Conv2d(20, 2000, 3), (20 + 2000) * 9),
        (nn.Conv3d(6, 2000, 3), (6 + 2000) * 27),
    ],
    ids=["Linear", "Conv2d", "Conv3d"],
)
def test_xavier_layers(layer: nn.Module, fans: int):
    layer.apply(weight_init)
    assert_normal(layer.weight, math.sqrt(2 / fans))
    assert_normal(layer.bias, 1)


def test_convolutions_over_dates():
    layer = nn.Conv1d(50, 2000, 3).apply(weight_init)
    assert_normal(layer.weight, 1)
    assert_normal(layer.bias, 1)


@pytest.mark.parametrize("batch_norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_batch_norm(batch_norm: type[nn.Module]):
    layer = batch_norm(5000)
    nn.init.ones_(layer.bias)
    layer.apply(weight_init)
    assert_normal(layer.weight, 1)
    assert torch.equal(layer.bias, torch.zeros(5000))
    assert torch.equal(layer.running_var, torch.ones(5000))


@pytest.mark.parametrize("recurrent", [nn.GRU, nn.LSTM])
def test_recurrent_layers(recurrent: type[nn.Module]):
    layer = recurrent(50, 400).apply(weight_init)
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 2:
            columns = parameter.detach()  # longer than wide: orthonormal columns
            assert torch.allclose(columns.T @ columns, torch.eye(columns.shape[1]), atol=1e-5), name
        else:
            assert_normal(parameter, 1)


def test_layers_without_bias():
    for layer in (nn.Linear(3, 4, bias=False), nn.Conv1d(3, 4, 3, bias=False)):
        layer.apply(weight_init)
        assert layer.bias is None


def test_a_whole_model_is_initialised():
    """The queries, a bare parameter, keep their own values; the keys' layer is a Linear like any other."""
    model = PseLTae(n_head=64, d_model=512, mlp3=[512, 128])
    heads = model.temporal_encoder.attention_heads
    queries = heads.Q.detach().clone()
    model.apply(weight_init)
    assert torch.equal(heads.Q, queries)
    assert_normal(heads.fc1_k.weight, math.sqrt(2 / (512 + 512)))
    assert_normal(model.temporal_encoder.inconv[0].weight, 1)
    norm = model.temporal_encoder.outlayernorm
    assert torch.equal(norm.weight, torch.ones(128)) and torch.equal(norm.bias, torch.zeros(128))
    encoder = model.spatial_encoder
    assert_normal(encoder.mlp2[0].weight, math.sqrt(2 / (132 + 128)))
    assert torch.equal(encoder.mlp1[0].bn.bias, torch.zeros(32))


def test_the_same_seed_gives_the_same_weights():
    for build in (PseLTae, PseGru, PseTempCNN):
        first, second = build(), build()
        for model in (first, second):
            torch.manual_seed(1)
            model.apply(weight_init)
        for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
            if not name.endswith(".Q") and "layernorm" not in name and "inconv.1" not in name:
                assert torch.equal(a, b), name
