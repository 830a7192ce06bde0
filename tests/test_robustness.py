"""The benchmark of dates: it runs, and what is done to dates in training does not reach the tests."""

import json
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from benchmarks import robustness
from benchmarks.cases import Cases
from preprocessing.simulate import simulate


@pytest.fixture(autouse=True)
def few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "MAX_PIXELS", 4)
    variants = {
        name: variant._replace(data=replace(variant.data, npixel=4))
        for name, variant in robustness.VARIANTS.items()
    }
    monkeypatch.setattr(robustness, "VARIANTS", variants)


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["robustness", "--quick", "--seeds", "1", "--preset", "LTAE/9k"])
    robustness.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(robustness.VARIANTS)
    header, _, fixed, *varying = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header[1:] == ["2017", "2018", "2017, irregular with gaps", "2018, irregular with gaps"]
    assert fixed[2:] == 3 * ["not possible"]
    for cells in (fixed[:2], *varying):
        for cell in cells[1:]:
            accuracy, iou = map(float, cell.split(" / "))
            assert 0 <= iou <= 1 and 0 <= accuracy <= 100


def test_training_options_do_not_reach_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dates are left out and moved in training alone; the season's start and all statistics hold for both."""
    training, other = tmp_path / "training", tmp_path / "other"
    simulate(training, 100, 1, max_pixels=4)
    simulate(other, 100, 2, max_pixels=4, year=2018)
    cases = Cases(robustness.VARIANTS["... both"]._replace(folder=training, preset="LTAE/9k"))
    assert cases.dataset.temporal_dropout == 0.2 and cases.dataset.temporal_shift == 10
    seen = []
    scores = {"val_accuracy": 50.0, "val_IoU": 0.25}
    monkeypatch.setattr(Cases, "evaluate", lambda self, dataset: seen.append(dataset) or scores)
    assert robustness.test(cases, [other, other]) == (50.0, 0.25)
    for tested in seen:
        assert tested.folder == other and tested.varying
        assert tested.temporal_dropout == 0 and tested.temporal_shift == 0
        assert all(np.array_equal(*pair) for pair in zip(tested.norm, cases.dataset.norm))
        assert all(np.array_equal(*pair) for pair in zip(tested.extra_stats, cases.dataset.extra_stats))
        first = str(json.loads((other / "META" / "dates.json").read_text())["0"])
        since_january = date(int(first[:4]), int(first[4:6]), int(first[6:])) - date(int(first[:4]), 1, 1)
        assert tested.day_range[0] == since_january.days


def test_fixed_dates_do_not_serve_others(tmp_path: Path) -> None:
    simulate(tmp_path / "training", 100, 1, max_pixels=4)
    simulate(tmp_path / "other", 100, 2, max_pixels=4, year=2018)
    fixed = robustness.VARIANTS["fixed dates"]._replace(folder=tmp_path / "training", preset="LTAE/9k")
    assert robustness.test(Cases(fixed), [tmp_path / "other"]) is None
