"""Datasets whose parcels have dates of their own or lack observations, from the files to the scripts."""

import csv
import json
from datetime import date, timedelta

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from data import prepare
from data.batch import Batch
from data.draws import parcel_keys, stream_key, uniform_values
from data.samplers import BatchSampler
from dataset import PixelSetData, PixelSetData_preloaded, batch_loader, find_norm
from tests.commands import run_inference, run_train
from tests.folders import NOMENCLATURE, write_folder, write_meta

C, S = 4, 6
NODATA = 0


@pytest.fixture
def folder(tmp_path):
    """Sixteen parcels of 1 to 9 pixels and 3 to 7 dates, out of order and repeated, with gaps of value 0."""
    folder, random = write_folder(tmp_path / "data", 16, n_channels=C), np.random.default_rng(1)
    dates = {}
    for parcel in range(1, 17):
        n_dates, n_pixels = random.integers(3, 8), 1 + parcel % 9
        x = random.integers(1, 200, (n_dates, C, n_pixels)).astype(np.uint16)
        x[:, 0] += np.uint16(300 * (parcel % 3))  # so that the classes, in turn, can be told apart
        gaps = random.random((n_dates, n_pixels)) < 0.3
        gaps[random.integers(n_dates)] = True
        gaps[0, 0] = parcel == 4
        if parcel % 5 == 0:
            gaps[:] = False
        if parcel == 11:
            gaps[:] = True
        np.save(folder / "DATA" / f"{parcel}.npy", x * ~gaps[:, None])
        days = [date(2018, 1, 1) + timedelta(int(day)) for day in random.integers(0, 300, n_dates)]
        days[-1] = days[0]
        dates[str(parcel)] = [str(day) if parcel % 2 else int(day.strftime("%Y%m%d")) for day in days]
    write_meta(folder, "dates", dates)
    write_meta(folder, "info", {"nodata": NODATA})
    return folder


def open_folder(folder, **arguments) -> PixelSetData:
    """All parcels, not normalised, without jitter."""
    arguments = {"extra_feature": "geomfeat", "jitter": None, **arguments}
    return PixelSetData(folder, NOMENCLATURE, S, **arguments)


def reference(
    folder, parcel: str, first: date = date(2018, 1, 1)
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(day, pixels (C, S_i), whether each is there) of the dates with a pixel, in order, read plainly."""
    x = np.load(folder / "DATA" / f"{parcel}.npy").astype(np.float32)
    days = json.loads((folder / "META" / "dates.json").read_text())[parcel]
    series = []
    for day, pixels in zip(days, x):
        text = str(day).replace("-", "")
        number = (date(int(text[:4]), int(text[4:6]), int(text[6:])) - first).days
        series.append((number, pixels, ~np.all((pixels == NODATA) | np.isnan(pixels), axis=0)))
    return [item for item in sorted(series, key=lambda item: item[0]) if item[2].any()]


def first_day(folder) -> date:
    """The first date of any parcel."""
    dates = json.loads((folder / "META" / "dates.json").read_text()).values()
    text = min(str(day).replace("-", "") for own in dates for day in own)
    return date(int(text[:4]), int(text[4:6]), int(text[6:]))


def test_a_batch_holds_what_the_files_say(folder):
    dataset = open_folder(folder)
    assert dataset.varying and dataset.date_positions is None and dataset.n_unobserved == 1
    assert dataset.pid == [str(i) for i in range(1, 17) if i != 11]
    data, _ = dataset.evaluation(3).batch(range(len(dataset)))
    assert isinstance(data, Batch) and data.pixels.isfinite().all()
    for i, parcel in enumerate(dataset.pid):
        expected = reference(folder, parcel, first_day(folder))
        n_pixels = expected[0][1].shape[1]
        n = len(expected)
        assert (data.mask[i] != 0).any(1).tolist() == n * [True] + (data.mask.shape[1] - n) * [False]
        assert data.days[i, :n].tolist() == [day for day, *_ in expected]
        if n_pixels > S:  # drawn without replacement: find out which
            continue
        for t, (_, pixels, there) in enumerate(expected):
            mask = data.mask[i, t].numpy()
            assert mask[:n_pixels].tolist() == there.tolist() and not mask[n_pixels:].any()
            np.testing.assert_array_equal(data.pixels[i, t][:, mask > 0], pixels[:, there])
            copies = pixels[:, np.argmax(there)] if not there[0] else pixels[:, 0]
            for slot in np.flatnonzero(mask == 0):
                assert data.pixels[i, t, :, slot].tolist() == copies.tolist()


def test_large_parcels_are_drawn_without_replacement_and_keep_their_gaps(folder):
    dataset = open_folder(folder)
    large = [i for i, parcel in enumerate(dataset.pid) if 1 + int(parcel) % 9 > S]
    data, _ = dataset.evaluation(3).batch(large)
    for i, item in enumerate(large):
        expected = reference(folder, dataset.pid[item], first_day(folder))
        found = []
        for slot in range(S):
            there = data.mask[i, : len(expected), slot].numpy() > 0
            series = data.pixels[i, : len(expected), :, slot].numpy()
            fitting = [
                s
                for s in range(expected[0][1].shape[1])
                if [e[2][s] for e in expected] == there.tolist()
                and all((e[1][:, s] == x).all() for e, x, ok in zip(expected, series, there) if ok)
            ]
            assert fitting
            found.append(fitting)
        assert len({s for fitting in found for s in fitting}) >= S


def test_items_equal_the_batch(folder):
    dataset = open_folder(folder, return_id=True).evaluation(3)
    data, target, ids = dataset.batch([0, 3, 7])
    for i, item in enumerate([0, 3, 7]):
        series, label, parcel = dataset[item]
        n = len(series.days)
        assert series.mask.shape == (n, S) and (series.mask.sum(1) > 0).all()
        for one, whole in zip(series[:4], data[:4]):
            assert torch.equal(one, whole[i, :n])
        assert (label, parcel) == (target[i], ids[i])


def test_loading_does_not_depend_on_workers_batches_or_memory(folder):
    def load(kind, workers: int, batch_size: int) -> list[list[Tensor]]:
        dataset = kind(folder, NOMENCLATURE, S, norm=(3.0, 2.0)).epoch_draws(1, 2)
        loader = batch_loader(dataset, BatchSampler(range(15), batch_size), workers)
        rows = []
        for series, _ in loader:
            for i in range(len(series.mask)):
                n = int((series.mask[i].sum(1) > 0).sum())
                rows.append([x[i, :n] for x in (series.pixels, series.mask, series.days)])
        return rows

    expected = load(PixelSetData, 0, 15)
    assert len({len(row[2]) for row in expected}) > 2
    for found in (load(PixelSetData, 2, 4), load(PixelSetData_preloaded, 0, 1), load(PixelSetData, 0, 7)):
        assert all(torch.equal(a, b) for x, y in zip(expected, found, strict=True) for a, b in zip(x, y))


@pytest.mark.parametrize("n_parcels", [1, 2, 4])
def test_a_batch_equals_its_parts(folder, monkeypatch, n_parcels):
    """A batch is prepared in parts, of parcels with about as many dates."""
    dataset = open_folder(
        folder,
        norm=(3.0, 2.0),
        temporal_dropout=0.3,
        temporal_truncation=0.5,
        temporal_shift=5,
        jitter=(0.01, 0.05),
    )
    expected, _ = dataset.epoch_draws(1).batch(range(15))
    monkeypatch.setattr(prepare, "NUMBERS_PER_PART", n_parcels * S * 7 * C)
    found, _ = dataset.epoch_draws(1).batch(range(15))
    assert all(torch.equal(a, b) for a, b in zip(expected[:4], found[:4]))
    assert (expected.present == found.present).all()
    assert (expected.present == (expected.mask != 0).any(2).numpy()).all()


def test_normalisation_and_jitter_spare_nothing_and_nobody(folder):
    mean, std = np.array([10.0, 20, 30, 40]), np.array([2.0, 3, 4, 5])
    plain, _ = open_folder(folder).evaluation(3).batch(range(15))
    scaled, _ = open_folder(folder, norm=(mean, std)).evaluation(3).batch(range(15))
    there = (plain.mask > 0).any(2)
    expected = (plain.pixels - torch.tensor(mean).view(4, 1)) / torch.tensor(std).view(4, 1)
    assert torch.allclose(scaled.pixels[there].double(), expected[there], atol=1e-4)
    noisy, _ = open_folder(folder, norm=(mean, std), jitter=(0.01, 0.05)).epoch_draws(1).batch(range(15))
    again, _ = open_folder(folder, norm=(mean, std)).epoch_draws(1).batch(range(15))
    noise = (noisy.pixels - again.pixels)[there]
    assert 0.005 < noise.std() < 0.015 and noise.abs().max() <= 0.0501


def test_statistics_leave_missing_pixels_out(folder):
    norm, source = find_norm(open_folder(folder))
    pixels = [x[:, there].T for p in range(1, 17) if p != 11 for _, x, there in reference(folder, str(p))]
    pixels = np.concatenate(pixels).astype(np.float64)
    np.testing.assert_allclose(norm[0], pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(norm[1], pixels.std(0), rtol=1e-6)
    assert "per channel" in source


def test_mean_series_leave_missing_pixels_out(folder):
    dataset = open_folder(folder)
    for item, parcel in enumerate(dataset.pid):
        found = dataset.mean_series(item)
        expected = [pixels[:, there].mean(1) for _, pixels, there in reference(folder, parcel)]
        np.testing.assert_allclose(found[~np.isnan(found).any(1)], expected, rtol=1e-6)


def test_days_from_a_seasons_start(folder):
    ours, _ = open_folder(folder, season_start=(10, 1)).evaluation(3).batch(range(15))
    usual, _ = open_folder(folder).evaluation(3).batch(range(15))
    there = ours.mask.sum(2) > 0
    moved = (first_day(folder) - date(2017, 10, 1)).days
    late = (usual.days[there] + moved - ours.days[there]).unique().tolist()
    assert 0 in late and set(late) <= {
        0,
        365,
    }  # a parcel whose first date is in October or later counts from 2018


def test_missing_may_be_nan_too(folder):
    plain, _ = open_folder(folder).evaluation(3).batch(range(15))
    for path in (folder / "DATA").glob("*.npy"):
        x = np.load(path).astype(np.float32)
        np.save(path, np.where((x == 0).all(1, keepdims=True), np.nan, x))
    write_meta(folder, "info", {})
    found, _ = open_folder(folder).evaluation(3).batch(range(15))
    assert all(torch.equal(a, b) for a, b in zip(plain[:4], found[:4]))


def test_nodata_of_the_flag_wins(folder):
    write_meta(folder, "info", {"nodata": 65535})
    assert open_folder(folder).n_unobserved == 0
    assert open_folder(folder, nodata=0).n_unobserved == 1


def test_temporal_dropout_leaves_dates_out(folder):
    whole, _ = open_folder(folder).evaluation(1).batch(range(15))
    n_whole = (whole.mask.sum(2) > 0).sum(1)
    dataset = open_folder(folder, temporal_dropout=0.5)
    left = []
    for epoch in range(200):
        data, _ = dataset.epoch_draws(epoch).batch(range(15))
        there = data.mask.sum(2) > 0
        assert there[:, 0].all()
        for i in range(15):
            assert set(data.days[i][there[i]].tolist()) <= set(whole.days[i].tolist())
        left.append(there.sum(1))
    share = (torch.stack(left).float() / n_whole).mean(0)[n_whole >= 4]
    assert ((share > 0.43) & (share < 0.6)).all()
    fixed, _ = dataset.evaluation(1).batch(range(15))
    assert torch.equal(fixed.mask, whole.mask)


def test_temporal_truncation_ends_series_at_any_of_their_dates(folder):
    """The plain twin of one draw is a loop over the dates of one parcel."""
    whole, _ = open_folder(folder).evaluation(1).batch(range(15))
    n_whole = (whole.mask.sum(2) > 0).sum(1)
    dataset = open_folder(folder, temporal_truncation=0.8)
    ends = []
    for epoch in range(1000):
        data, _ = dataset.epoch_draws(epoch).batch(range(15))
        n = (data.mask.sum(2) > 0).sum(1)
        for i in range(15):  # what is left is the beginning
            assert torch.equal(data.days[i, : n[i]], whole.days[i, : n[i]])
        ends.append(n)
    ends = torch.stack(ends)
    for i, n in enumerate(n_whole.tolist()):
        shares = torch.bincount(ends[:, i], minlength=n + 1)[1:] / len(ends)
        expected = torch.full((n,), 0.8 / n)
        expected[-1] += 0.2
        assert len(shares) == n and (shares - expected).abs().max() < 0.06  # four standard deviations
    fixed, _ = dataset.evaluation(1).batch(range(15))
    assert torch.equal(fixed.mask, whole.mask)


def test_truncation_leaves_its_own_dates_to_dropout(folder):
    dataset = open_folder(folder, temporal_truncation=0.9, temporal_dropout=0.9)
    for epoch in range(50):
        data, _ = dataset.epoch_draws(epoch).batch(range(15))
        assert (data.mask.sum(2) > 0).any(1).all()


def test_temporal_shift_moves_calendars(folder):
    whole, _ = open_folder(folder).evaluation(1).batch(range(15))
    dataset = open_folder(folder, temporal_shift=3)
    moves = []
    for epoch in range(100):
        data, _ = dataset.epoch_draws(epoch).batch(range(15))
        there = data.mask.sum(2) > 0
        move = torch.where(there, data.days - whole.days, torch.nan)
        assert all(len(row[~row.isnan()].unique()) == 1 for row in move)
        moves += move[:, 0].tolist()
    assert set(moves) == set(range(-3, 4)) and abs(np.mean(moves)) < 0.3
    fixed, _ = dataset.evaluation(1).batch(range(15))
    assert torch.equal(fixed.days, whole.days)


def test_fixed_dates_as_a_series_hold_the_same(tmp_path):
    folder = write_folder(tmp_path / "data")
    arguments = {"norm": (5.0, 3.0), "extra_feature": "geomfeat"}
    (fixed, extra), _ = PixelSetData(folder, NOMENCLATURE, S, **arguments).epoch_draws(1).batch(range(12))
    dataset = PixelSetData(folder, NOMENCLATURE, S, **arguments, varying=True)
    series, _ = dataset.epoch_draws(1).batch(range(12))
    assert torch.allclose(series.pixels, fixed[0], atol=1e-6) and torch.equal(series.mask, fixed[1])
    assert torch.equal(series.extra, extra) and series.days[0].tolist() == dataset.date_positions


def test_shared_dates_out_of_order_are_put_in_order(tmp_path):
    folder = write_folder(tmp_path / "data")
    arguments = {"norm": (np.arange(20.0).reshape(5, 4), 1 + np.arange(20.0).reshape(5, 4)), "jitter": None}
    expected, _ = PixelSetData(folder, NOMENCLATURE, S, **arguments).evaluation(1).batch(range(12))
    days = json.loads((folder / "META" / "dates.json").read_text())
    order = [3, 1, 4, 0, 2]
    for path in (folder / "DATA").glob("*.npy"):
        np.save(path, np.load(path)[order])
    write_meta(folder, "dates", {str(i): days[str(t)] for i, t in enumerate(order)})
    arguments["norm"] = tuple(values[order] for values in arguments["norm"])
    dataset = PixelSetData(folder, NOMENCLATURE, S, **arguments)
    found, _ = dataset.evaluation(1).batch(range(12))
    assert dataset.date_positions == [0, 11, 22, 33, 44]
    assert torch.equal(found[0], expected[0])
    np.testing.assert_array_equal(dataset.norm[0], np.arange(20).reshape(5, 4))  # in the order of the dates
    dataset.set_norm(dataset.norm, in_order=True)
    assert torch.equal(dataset.evaluation(1).batch(range(12))[0][0], expected[0])


def test_a_table_of_median_series_is_a_dataset_of_single_pixels(tmp_path):
    folder = write_folder(tmp_path / "data", sizes=[1] * 12)
    expected, _ = PixelSetData(folder, NOMENCLATURE, S, jitter=None).evaluation(1).batch(range(12))
    for path in (folder / "DATA").glob("*.npy"):
        np.save(path, np.load(path)[:, :, 0])
    found, _ = PixelSetData(folder, NOMENCLATURE, S, jitter=None).evaluation(1).batch(range(12))
    assert torch.equal(found[0], expected[0]) and found[1].sum() == 12 * 5


# ------------------------------------------------------------------------------------------- functions of people


def fade(batch: Batch, keys: Tensor) -> Batch:
    """Multiplies each parcel by a number of its own, moves its days, and masks its second date."""
    factor = uniform_values(keys, 1).float()
    mask = batch.mask.clone()
    mask[:, 1:2] = 0
    return batch._replace(
        pixels=batch.pixels * factor.view(-1, 1, 1, 1), mask=mask, days=batch.days + 7, extra=batch.extra + 1
    )


def brighten(batch: Batch, keys: Tensor) -> Batch:
    """Adds to each parcel a number of its own, in place."""
    batch.pixels.add_(uniform_values(keys, 1).float().view(-1, 1, 1, 1))
    return batch


def test_own_functions_change_what_is_there_in_epochs_alone(folder):
    plain, changed = open_folder(folder), open_folder(folder, augment=fade)
    before, after = (dataset.epoch_draws(4).batch(range(15))[0] for dataset in (plain, changed))
    keys = parcel_keys(stream_key("augment 0", 4), torch.tensor([int(parcel) for parcel in plain.pid]))
    factor = uniform_values(keys, 1).float().flatten()
    assert len(factor.unique()) == 15
    for i, n in enumerate(before.present.sum(1)):
        rest = [t for t in range(n) if t != 1]
        assert after.present[i].tolist() == (len(rest) * [True] + (after.mask.shape[1] - len(rest)) * [False])
        here = slice(0, len(rest))
        assert torch.equal(after.pixels[i, here], before.pixels[i, rest] * factor[i])
        assert torch.equal(after.mask[i, here], before.mask[i, rest])
        assert torch.equal(after.days[i, here], before.days[i, rest] + 7)
        assert torch.equal(after.extra[i, here], before.extra[i, rest] + 1)
    fixed = [dataset.evaluation(1).batch(range(15))[0] for dataset in (plain, changed)]
    assert all(torch.equal(a, b) for a, b in zip(fixed[0][:4], fixed[1][:4]))


@pytest.mark.parametrize("varying", [False, True])
def test_own_functions_come_in_their_order_and_do_not_depend_on_the_company(tmp_path, varying):
    folder = write_folder(tmp_path / "data")
    parcels = torch.tensor([int(parcel) for parcel in PixelSetData(folder, NOMENCLATURE, S).pid])

    def load(items: list[int], augment: list | None) -> Tensor:
        options = {"jitter": None, "varying": varying, "extra_feature": "geomfeat", "augment": augment}
        data, _ = PixelSetData(folder, NOMENCLATURE, S, **options).epoch_draws(4).batch(items)
        return data.pixels if varying else data[0][0]

    first, second = (
        uniform_values(parcel_keys(stream_key(f"augment {i}", 4), parcels), 1).float().view(-1, 1, 1, 1)
        for i in range(2)
    )

    def stretch(batch: Batch, keys: Tensor) -> Batch:
        return batch._replace(pixels=batch.pixels * uniform_values(keys, 1).float().view(-1, 1, 1, 1))

    expected = (load(list(range(12)), None) + first) * second
    assert torch.equal(load(list(range(12)), [brighten, stretch]), expected)
    assert torch.equal(load([7], [brighten, stretch]), expected[7:8])


def test_own_functions_leave_the_rest_as_it_is(folder):
    plain, changed = (open_folder(folder, augment=own).epoch_draws(4) for own in (None, brighten))
    before, after = (dataset.batch(range(15))[0] for dataset in (plain, changed))
    assert torch.equal(after.mask, before.mask) and torch.equal(after.days, before.days)
    assert torch.equal(after.extra[before.present], before.extra[before.present])
    assert (after.pixels[~before.present] == 0).all() and (after.present == before.present).all()


def test_shared_dates_may_not_be_left_out(tmp_path):
    dataset = PixelSetData(
        write_folder(tmp_path / "data"), NOMENCLATURE, S, extra_feature="geomfeat", augment=fade
    )
    with pytest.raises(UserError, match="augment left no pixel on a date .*varying=True"):
        dataset.epoch_draws(1).batch(range(12))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda batch, keys: batch.pixels,
        lambda batch, keys: batch._replace(pixels=batch.pixels[:, :1]),
        lambda batch, keys: batch._replace(extra=None),
    ],
)
def test_an_own_function_that_returns_something_else_is_told_what_it_was_given(folder, wrong):
    dataset = open_folder(folder, augment=wrong).epoch_draws(1)
    with pytest.raises(UserError, match=r"augment .* pixels \(15, \d, 4, 6\), mask \(15, \d, 6\)"):
        dataset.batch(range(15))


# ------------------------------------------------------------------------------------------------- wrong input


def change_dates(folder, change) -> None:
    path = folder / "META" / "dates.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c["3"].pop(), ["3.npy has", "dates for it"]),
        (lambda c: c.pop("3"), ["no list of dates for parcel 3"]),
        (lambda c: c.update({"3": "20180101"}), ["no list of dates for parcel 3"]),
        (lambda c: c["3"].__setitem__(1, "2018-13-01"), ["date 1 of parcel 3 is '2018-13-01'", "YYYY-MM-DD"]),
        (lambda c: c["3"].__setitem__(1, 20180101.0), ["date 1 of parcel 3 is 20180101.0"]),
        (lambda c: c["3"].__setitem__(1, None), ["date 1 of parcel 3 is None"]),
    ],
)
def test_wrong_dates_are_named(folder, change, words):
    change_dates(folder, change)
    with pytest.raises(UserError) as error:
        open_folder(folder)
    assert all(word in str(error.value) for word in ["dates.json", *words]), error.value


def test_dates_that_change_after_packing_are_looked_at_again(folder):
    open_folder(folder)
    change_dates(folder, lambda content: content["3"].pop())
    with pytest.raises(UserError, match="3.npy has . dates"):
        open_folder(folder)


def test_nodata_that_covers_everything_is_refused(tmp_path):
    folder = write_folder(tmp_path / "data")
    for path in (folder / "DATA").glob("*.npy"):
        np.save(path, np.full_like(np.load(path), 7))
    with pytest.raises(UserError, match="no pixel of .* is present on any date; .*--nodata.* 7 mean missing"):
        open_folder(folder, nodata=7)


@pytest.mark.parametrize("info", ["[]", '{"nodata": "x"}', '{"nodata": true}', "{"])
def test_damaged_info_is_reported(folder, info):
    (folder / "META" / "info.json").write_text(info)
    with pytest.raises(UserError, match="info.json"):
        open_folder(folder)


def test_norm_per_date_does_not_serve_varying_dates(tmp_path):
    folder = write_folder(tmp_path / "data", statistics=True)
    _, source = find_norm(open_folder(folder))
    assert "meanstd.pkl" in source
    _, source = find_norm(open_folder(folder, varying=True))
    assert "per channel" in source
    with pytest.raises(UserError, match="per date, which do not serve varying dates"):
        find_norm(open_folder(folder, varying=True), folder / "S2-2017-T31TFM-meanstd.pkl")


# ------------------------------------------------------------------------------------------------- the scripts

MODELS = {
    "L-TAE": "--mlp3 [32,16] --n_head 4",
    "TAE": "--tae",
    "GRU": "--gru",
    "TempCNN": "--tcnn --grid_days 30",
}


@pytest.mark.parametrize("name", MODELS)
def test_training_and_predicting(folder, tmp_path, monkeypatch, name):
    results = run_train(folder, tmp_path / "results", f"--epochs 2 {MODELS[name]}", monkeypatch)
    config = json.loads((results / "conf.json").read_text())
    assert config["varying_dates"] and config["lms"] is None and config["nodata"] == NODATA
    output = run_inference(folder, results, tmp_path / "output", "", monkeypatch)
    with open(output / "predictions.csv") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert len(rows) == 16
    undefined = [parcel for parcel, row in rows.items() if row["predicted_label"] == ""]
    assert undefined == ["11"] and rows["11"]["confidence"] == rows["11"]["probability_1"] == ""
    assert rows["11"]["true_label"] != ""
    table = np.load(output / "Predictions_id_ytrue_y_pred.npy")
    assert (table[:, 2] == -1).tolist() == [row["id"] == "11" for row in rows.values()]


def test_a_model_for_any_dates_predicts_another_year(tmp_path, monkeypatch):
    first, second = write_folder(tmp_path / "a"), write_folder(tmp_path / "b", n_dates=7, seed=5)
    robust = (
        "--epochs 1 --season_start 10-01 --temporal_dropout 0.2 --temporal_truncation 0.5 --temporal_shift 5"
    )
    results = run_train(first, tmp_path / "results", robust, monkeypatch)
    output = run_inference(second, results, tmp_path / "output", "", monkeypatch)
    assert (np.load(output / "Predictions_id_ytrue_y_pred.npy")[:, 2] >= 0).sum() == 12


def test_a_model_of_fixed_dates_refuses_varying_ones(folder, tmp_path, monkeypatch, capsys):
    results = run_train(write_folder(tmp_path / "fixed"), tmp_path / "results", "--epochs 1", monkeypatch)
    with pytest.raises(SystemExit):
        run_inference(folder, results, tmp_path / "output", "", monkeypatch)
    assert "train one with --varying_dates" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--lms 24", "varying dates; leave --lms out"),
        ("--positions order", "--positions order"),
        ("--season_start 13-01", "'13-01' is not a day of the year"),
        ("--nodata nan", "NaN means missing in any case"),
    ],
)
def test_flags_that_varying_dates_contradict(folder, tmp_path, monkeypatch, capsys, flags, words):
    with pytest.raises(SystemExit):
        run_train(folder, tmp_path / "results", flags, monkeypatch)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("names", [["wheat", "maize, silage", "été"], ["1", "2", "10"]])
def test_labels_may_be_text(tmp_path, monkeypatch, names):
    folder = write_folder(tmp_path / "data", classes=names)
    labels = json.loads((folder / "META" / "labels.json").read_text())[NOMENCLATURE]
    write_meta(folder, "labels", {"crop": labels})
    results = run_train(folder, tmp_path / "results", "--epochs 1", monkeypatch)
    assert json.loads((results / "conf.json").read_text())["sub_classes"] == sorted(names)
    output = run_inference(folder, results, tmp_path / "output", "", monkeypatch)
    with open(output / "predictions.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["id"]: row["true_label"] for row in rows} == labels
    assert {row["predicted_label"] for row in rows} <= set(names)


def test_a_choice_of_text_labels(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "data", classes=["wheat", "maize", "rape"])
    results = run_train(folder, tmp_path / "results", "--epochs 1 --sub_classes [wheat,rape]", monkeypatch)
    assert json.loads((results / "conf.json").read_text())["sub_classes"] == ["wheat", "rape"]
