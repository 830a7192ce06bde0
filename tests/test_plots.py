"""Figures: that they show the numbers given, and that their texts can be read."""

import re
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from reports.plots import (
    plot_attention,
    plot_calibration,
    plot_confusion,
    plot_training,
    shorten,
    to_svg,
)

LONG = [
    "Winter durum wheat (bread quality)",
    "Winter durum wheat (bread quality) under sown meadow",
    "Prairie permanente - herbe predominante",
    "Prairie permanente - herbe predominante (ressources fourrageres ligneuses absentes)",
    "Mais grain",
    "$5 & $6 <maize>",
]


def long_names(n: int) -> dict[str, str]:
    """Names, all different, of the labels 0 to n - 1."""
    return {str(k): LONG[k % len(LONG)] + (f" {k}" if k >= len(LONG) else "") for k in range(n)}


def check_texts(figure: Figure, texts: Sequence[Text] | None = None) -> None:
    """Asserts that all texts lie within the figure and none on another."""
    FigureCanvasAgg(figure).draw()
    if texts is None:
        texts = figure.findobj(Text)
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    assert boxes
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    for one, other in combinations(boxes, 2):
        assert not (one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 and other.y0 < one.y1)


@pytest.mark.parametrize("n", [1, 2, 4, 20, 44])
@pytest.mark.parametrize("named", [True, False])
def test_matrix_can_be_read(n: int, named: bool) -> None:
    mat = np.random.default_rng(0).integers(0, 1000, (n, n))
    figure = plot_confusion(
        mat, range(n), "All 5 test folds: accuracy 89.3%, mIoU 0.512", long_names(n) if named else {}
    )
    axis = figure.axes[0]
    check_texts(
        figure,
        [*axis.get_xticklabels(), *axis.get_yticklabels(), axis.xaxis.label, axis.yaxis.label, *figure.texts]
        + axis.texts,
    )
    columns = [text.get_text() for text in axis.get_xticklabels()]
    assert len(set(columns)) == n


def test_matrix_shows_shares_of_the_true_class_by_frequency() -> None:
    mat = np.array([[1, 3, 0], [0, 100, 100], [0, 0, 0]])
    axis = plot_confusion(mat, ["a", "b", "c"], "title", {"a": "Maize"}).axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["b", "Maize", "c"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["b (200)", "Maize (4)", "c (0)"]
    shown = {text.get_position(): text.get_text() for text in axis.texts}
    assert shown == {(0, 0): "50", (2, 0): "50", (0, 1): "75", (1, 1): "25"}
    depth = axis.images[0].get_array()[..., 3]
    np.testing.assert_allclose(depth / 0.9, [[0.5, 0, 0.5], [0.75, 0.25, 0], [0, 0, 0]], atol=0.005)


def test_short_names_stay_different() -> None:
    assert shorten(["Rice", "Winter wheat"], 8) == ["Rice", "Winter\u2026"]
    cut = shorten(LONG, 26)
    assert len(set(cut)) == len(LONG) and max(map(len, cut)) == 26
    assert cut[1].startswith("Winter durum") and cut[1].endswith("meadow")
    assert shorten(["abcdefgh", "abcdefgx"], 5) == ["ab\u2026gh", "ab\u2026gx"]


def test_curves_are_those_of_the_folds_and_their_mean() -> None:
    logs = {
        1: {"1": {"train_loss": 3.0, "val_loss": None}, "2": {"train_loss": 1.0, "val_loss": 4.0}},
        2: {"1": {"train_loss": 5.0, "val_loss": 1.0}, "2": {"train_loss": 2.0, "val_loss": 2.0}},
        3: {"1": {"train_loss": 9.0, "val_loss": 9.0}},  # not finished: not in the mean
    }
    figure = plot_training(logs, ["loss"])
    lines = figure.axes[0].get_lines()
    assert [line.get_ydata().tolist() for line in lines[:3]] == [[3, 1], [5, 2], [9]]
    means = {line.get_label(): line.get_ydata() for line in lines if not line.get_label().startswith("_")}
    assert means["training"].tolist() == [4, 1.5]
    np.testing.assert_array_equal(means["validation"], [np.nan, 3])
    full = {"train_loss": 1.0, "train_accuracy": 50.0, "train_IoU": 0.2}
    full |= {key.replace("train", "val"): value for key, value in full.items()}
    figure = plot_training({1: {1: full}})
    assert [axis.get_lines()[1].get_ydata().tolist() for axis in figure.axes] == [[1], [50], [0.2]]
    assert all(
        axis.get_lines()[1].get_marker() == "o" for axis in figure.axes
    )  # a line of one point is not seen


def test_calibration_shows_shares_intervals_and_numbers() -> None:
    edges, count = np.linspace(0, 1, 4), np.array([0.0, 4.0, 12.0])
    curve = np.array([count, [0, 2, 9], [0, 1, 12]])
    axis = plot_calibration(edges, {"before": 2 * curve, "after": curve}).axes[0]
    assert [bar.get_height() for bar in axis.patches] == [0, 0.25, 0.75]
    _, _, points = axis.get_lines()
    np.testing.assert_allclose(points.get_xydata(), [[0.5, 0.25], [0.75, 1]])
    (low, high) = axis.collections[1].get_segments()[0][:, 1]
    z, n, p = 1.959964, 4, 0.25  # Wilson's interval, written out
    middle, half = (p + z**2 / (2 * n)), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    np.testing.assert_allclose(
        [low, high], np.array([middle - half, middle + half]) / (1 + z**2 / n), rtol=1e-5
    )


@pytest.mark.parametrize("folds, heads", [([3], 4), ([1, 2, 3, 4, 5], 16)])
@pytest.mark.parametrize("with_ndvi", [True, False])
def test_attention_shows_all_folds(folds: list[int], heads: int, with_ndvi: bool) -> None:
    random, T = np.random.default_rng(0), 6
    weight = random.dirichlet(np.ones(T), (len(folds), 3, heads))
    weight[:, 1, :, 2] = np.nan  # a date without observations
    ndvi = random.uniform(0, 1, (3, T)) if with_ndvi else np.full((3, T), np.nan)
    dates = np.datetime64("2017-01-03") + 11 * np.arange(T)
    title = f"{LONG[3]}: 1,234 parcels"
    figure = plot_attention(weight, ndvi, ndvi / 5, 1, dates, title, None, folds)
    assert len(figure.axes) == (4 if with_ndvi else 3)  # with the colours' scale
    mean, image = figure.axes[-3], figure.axes[-2].collections[0]
    there = [0, 1, 3, 4, 5]
    flat = weight[:, 1].reshape(-1, T)
    np.testing.assert_allclose(mean.get_lines()[0].get_ydata(), flat[:, there].mean(0))
    band = mean.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx((flat.mean(0) + flat.std(0))[there].max())
    np.testing.assert_allclose(image.get_array().filled(np.nan), flat)
    check_texts(figure, [figure._suptitle, *(axis.yaxis.label for axis in figure.axes)])
    check_texts(figure, figure.axes[-2].get_yticklabels())
    assert figure._suptitle.get_text().replace("\n", " ") == title


def test_svg_is_text_in_the_colour_of_the_page() -> None:
    figure = plot_confusion(np.eye(3, dtype=int), range(3), "title", {"0": "$5 & <maize>"})
    svg = to_svg(figure)
    assert "$5 &amp; &lt;maize&gt; (1)" in svg and "currentColor" in svg
    assert "#000000" not in svg and "http" not in svg
    assert to_svg(plot_confusion(np.eye(3, dtype=int), range(3), "title", {"0": "$5 & <maize>"})) == svg
    assert not re.search(r'<g id="patch_1">\s*<path [^>]*fill: #ffffff', svg)  # no background
