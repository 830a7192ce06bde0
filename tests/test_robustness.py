"""The benchmarks of dates: they run, and what they count and compare is what they say."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import dates, robustness
from benchmarks.dates import COLUMNS, MISSING, Epochs, build_model, count_pairs, count_pairs_of_folder, draw
from data.batch import Series
from data.metadata import read_days
from data.settings import NPIXEL


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("dates")
    return {name: dates.write_folder(folder / name.replace(" ", "-"), 100, name) for name in COLUMNS}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_drawn_batch_is_laid_out_as_the_loader_gives_it(folders, name):
    drawn, _ = draw(name, 12)
    loaded, _ = next(iter(Epochs(folders[name], 12).fixed()))
    assert isinstance(drawn, Series) == isinstance(loaded, Series)
    assert isinstance(drawn, Series) != COLUMNS[name].shared

    def parts(data: object) -> list[torch.Tensor]:
        return [*data] if isinstance(data, Series) else [*data[0], data[1]]

    for ours, theirs in zip(parts(drawn), parts(loaded), strict=True):
        assert ours.dtype == theirs.dtype and ours.dim() == theirs.dim()
        assert ours.shape[2:] == theirs.shape[2:] and len(ours) == len(theirs)
        assert (ours.stride(1) == 0) == (theirs.stride(1) == 0)
        assert np.argsort(ours.stride()).tolist() == np.argsort(theirs.stride()).tolist()
    assert torch.isfinite(build_model(name)(loaded)).all()


def test_pairs_are_dates_with_a_pixel(folders):
    for name, (fewest, most, shared, gaps) in COLUMNS.items():
        drawn, _ = draw(name, 40)
        loaded = [data for data, _ in Epochs(folders[name], 100).fixed()]
        for data, n in ((drawn, 40), (loaded[0], 100)):
            pairs = count_pairs(data)
            assert (0.8 if gaps else 1) * fewest * n <= pairs <= most * n
            assert shared <= (pairs == fewest * n)
        found = count_pairs_of_folder(Path(folders[name]))
        assert found == pytest.approx(
            count_pairs(loaded[0]), rel=0.02
        )  # a loaded parcel is a sample of its pixels
        assert isinstance(read_days(Path(folders[name]), range(1, 101)), np.ndarray) == shared


def test_absent_dates_come_last_and_days_are_in_order():
    complete, gaps = (draw(name, 30)[0] for name in ("43 to 96", "43 to 96, gaps"))
    lengths = (complete.mask != 0).any(2).sum(1)
    assert lengths.min() >= 43 and lengths.max() == complete.mask.shape[1] <= 96
    for parcel, n in enumerate(lengths.tolist()):
        assert not complete.mask[parcel, n:].any()
        assert (complete.days[parcel, 1:n] > complete.days[parcel, : n - 1]).all()
    share = float(gaps.mask.sum() / complete.mask.sum())
    assert share == pytest.approx(1 - MISSING, abs=0.01) and gaps.pixels.shape[3] == NPIXEL


def test_the_table_of_robustness(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["robustness", "--quick", "--seeds", "1", "--preset", "LTAE/9k"])
    monkeypatch.setattr(robustness, "MAX_PIXELS", 4)
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


def test_training_options_do_not_reach_the_test(tmp_path, monkeypatch):
    """Dates are left out and moved in training alone; the season's start holds for both."""
    opened = []
    real = robustness.open_dataset

    def watch(path, options, *rest):
        opened.append((path.name, dict(options)))
        return real(path, options, *rest)

    monkeypatch.setattr(robustness, "open_dataset", watch)
    monkeypatch.setattr(robustness, "train", lambda *arguments: None)
    monkeypatch.setattr(robustness, "score", lambda model, dataset: (dataset.temporal_dropout, 0.0))
    monkeypatch.setattr(robustness, "MAX_PIXELS", 4)
    training, tests = robustness.write_datasets(tmp_path, robustness.QUICK)
    options = robustness.VARIANTS["... both"]
    assert options["temporal_dropout"] == 0.2 and options["temporal_shift"] == 10
    scores = robustness.train_and_test(training, tests, "LTAE/9k", options, 1, 1, "test")
    assert scores == dict.fromkeys(tests, (0.0, 0.0)) and len(opened) == 1 + len(tests)
    assert opened[0] == ("training", options)
    for name, used in opened[1:]:
        assert name != "training" and used == {"varying": True, "season_start": (1, 1)}
