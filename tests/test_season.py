"""--until, and the scores of a model as the season goes on."""

import json
import shutil
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch

from common.flags import is_until
from data.days import Days, find_used
from dataset import PixelSetData, find_norm
from learning.predictions import read_rows
from reports import season
from tests.commands import run_command, run_inference, run_train
from tests.folders import NOMENCLATURE, write_folder, write_meta

DAYS = [20161201, 20170115, 20170301, 20170415, 20170601]


def ordinal(number: int) -> int:
    return date(number // 10_000, number // 100 % 100, number % 100).toordinal()


def write(path: Path, own: bool) -> Path:
    """A folder with five dates, which parcels share out of order, or each has its own of, with missing pixels."""
    folder = write_folder(path, n_parcels=15, dtype=np.float32)
    if not own:
        write_meta(folder, "dates", {str(i): day for i, day in enumerate([*DAYS[2:], *DAYS[:2]])})
        return folder
    dates = {}
    for parcel in range(1, 16):
        values = np.load(folder / "DATA" / f"{parcel}.npy")[: 3 + parcel % 3]
        values[0, :, 0] = np.nan
        if parcel == 4:
            values[:3] = np.nan
        np.save(folder / "DATA" / f"{parcel}.npy", values)
        dates[str(parcel)] = DAYS[: len(values)]
    write_meta(folder, "dates", dates)
    return folder


def cut(source: Path, path: Path, last: int) -> Path:
    """The same folder whose files end with a day: the plain twin of --until."""
    folder = Path(shutil.copytree(source, path, ignore=shutil.ignore_patterns("*PACKED*")))
    dates = json.loads((folder / "META" / "dates.json").read_text())
    own = isinstance(next(iter(dates.values())), list)
    kept = None
    for parcel in range(1, 16):
        listed = dates[str(parcel)] if own else [dates[str(i)] for i in range(5)]
        rows = [i for i, day in enumerate(listed) if day <= last]
        kept = [listed[i] for i in rows]
        name = folder / "DATA" / f"{parcel}.npy"
        np.save(name, np.load(name)[rows])
        if own:
            dates[str(parcel)] = kept
    write_meta(folder, "dates", dates if own else {str(i): day for i, day in enumerate(kept)})
    return folder


@pytest.mark.parametrize("own", [False, True])
def test_a_dataset_until_a_day_is_that_of_files_that_end_there(tmp_path: Path, own: bool) -> None:
    folder = write(tmp_path / "set", own)
    twin = cut(folder, tmp_path / "cut", 20170301)
    for until, keep_all in (("20170301", False), ("03-31", True)):
        kwargs = {"sub_classes": [1, 3, 9], "norm": (3.0, 50.0), "keep_all": keep_all}
        ours = PixelSetData(folder, NOMENCLATURE, 6, until=until, **kwargs)
        plain = PixelSetData(twin, NOMENCLATURE, 6, varying=True, **kwargs)
        assert ours.pid == plain.pid and len(ours) == 15 - (own and not keep_all)
        assert ours.n_unobserved == plain.n_unobserved and ours.day_range == plain.day_range
        for found, expected in zip(find_norm(ours)[0], find_norm(plain)[0]):
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        a, b = (each.evaluation(3).batch(range(len(each)))[0] for each in (ours, plain))
        L = b.mask.shape[1]
        assert not a.mask[:, L:].any() and torch.equal(a.mask[:, :L], b.mask)
        assert torch.equal(a.days[:, :L] * (b.mask != 0).any(2), b.days * (b.mask != 0).any(2))
        here = b.mask.bool().unsqueeze(2)
        assert torch.equal(a.pixels[:, :L] * here, b.pixels * here)


def test_dropout_leaves_a_date_that_is_used(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", own=False)
    data = PixelSetData(folder, NOMENCLATURE, 6, until="02-01", temporal_dropout=0.9).epoch_draws(1)
    x = data.batch(range(15))[0]
    n = (x.mask != 0).any(2).sum(1)
    assert (n >= 1).all() and (n <= 2).all() and (x.days <= 45).all() and (n == 1).any()


@pytest.mark.parametrize(
    "until, start, expected",
    [
        ("20170301", None, 3),
        ("03-01", None, 3),
        ("02-28", None, 2),
        ("12-01", None, 1),  # the first date itself
        ("11-30", None, 5),  # the end of the year that begins there
        ("12-31", (10, 1), 1),
        ("11-15", (10, 1), 0),
    ],
)
def test_days_of_the_year_are_those_of_the_season(
    until: str, start: tuple[int, int] | None, expected: int
) -> None:
    days = np.array([ordinal(day) for day in DAYS])
    if not expected:
        with pytest.raises(Exception, match="--until 11-15 leaves no date, since the first one is 20161201"):
            find_used(Days(days), start, until)
        return
    assert find_used(Days(days), start, until).values.sum() == expected
    n = len(days)
    own = find_used(Days(np.concatenate([days, days + 365]), np.array([n, n])), start, until)
    assert own.values[:n].sum() == expected
    if start is not None:  # each parcel's own season
        assert own.values[n:].sum() == expected


def test_what_is_a_day() -> None:
    right = ["06-30", "20170630", "01-01"]
    wrong = ["6-30", "02-30", "02-29", "20170631", "2017-06-30", "0630", "", 20170630, None, "201706 1"]
    assert all(map(is_until, right)) and not any(map(is_until, wrong))


def test_the_run_remembers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = write(tmp_path / "set", own=False)
    weights = run_train(folder, tmp_path / "res", "--epochs 1 --until 04-30", monkeypatch)
    config = json.loads((weights / "conf.json").read_text())
    assert config["until"] == "04-30" and config["lms"] is None
    first = run_inference(folder, weights, tmp_path / "a", "", monkeypatch)
    changed = Path(shutil.copytree(folder, tmp_path / "changed", ignore=shutil.ignore_patterns("*PACKED*")))
    for path in (changed / "DATA").glob("*.npy"):
        values = np.load(path)
        values[2] = 999  # 20170601
        np.save(path, values)
    tables = {}
    for name, options in (("same", ""), ("later", "--until 20171231")):
        for each in (folder, changed, cut(folder, tmp_path / f"cut{name}", 20170415)):
            output = run_inference(each, weights, tmp_path / name / each.name, options, monkeypatch)
            tables[name, each.name] = (output / "predictions.csv").read_bytes()
            by = {row["predicted_by"] for row in read_rows(output / "predictions.csv")}
            assert by == {"1", "2", "3"}  # recognised by the dates that the training used
    assert tables["same", "set"] == tables["same", "changed"] == tables["same", "cutsame"]
    assert len({tables[name, "set"] for name in ("same", "later")} | {tables["later", "changed"]}) == 3
    rows = list(read_rows(first / "predictions.csv"))
    capsys.readouterr()
    run_command(season.main, f"{weights} --device cpu", monkeypatch)
    stages = list(read_rows(weights / "season.csv"))
    assert [row["until"] for row in stages] == [str(day) for day in DAYS[:4]]  # none after 04-30
    assert {row["parcels"] for row in stages} == {"15"}
    right = sum(row["true_label"] == row["predicted_label"] for row in rows)
    assert float(stages[-1]["accuracy"]) == pytest.approx(right / 15, abs=1e-5)
    early = run_inference(folder, weights, tmp_path / "d", "--until 20161201", monkeypatch)
    right = sum(row["true_label"] == row["predicted_label"] for row in read_rows(early / "predictions.csv"))
    assert float(stages[0]["accuracy"]) == pytest.approx(right / 15, abs=1e-5)
    assert (weights / "season.png").read_bytes().startswith(b"\x89PNG")
