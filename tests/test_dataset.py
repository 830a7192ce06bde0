"""The pixel-set dataset: recorded items and splits, draws that are pure functions, batches and their order."""

import inspect
import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

from common.errors import UserError
from data import prepare
from data.folds import fold_splits
from data.samplers import BatchSampler
from dataset import PixelSetData, PixelSetData_preloaded, batch_loader, find_norm
from tests import golden_numbers as golden
from tests.folders import NOMENCLATURE, write_folder, write_meta

TINY = golden.FOLDER / "pixelset_tiny"
ITEMS = np.load(golden.FOLDER / "golden_dataset.npz")
FACTS = json.loads((golden.FOLDER / "golden_dataset.json").read_text())
MEAN, STD = pickle.loads((TINY / "S2-2017-T31TFM-meanstd.pkl").read_bytes())
NORMS = {
    "none": None,
    "scalar": (MEAN.mean(), STD.mean()),
    "per_channel": (MEAN[0], STD[0]),
    "per_date": (MEAN, STD),
}
BOTH = pytest.mark.parametrize("kind", [PixelSetData, PixelSetData_preloaded])
IMPROBABLE = 1e-6


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Keeps packed copies out of the recorded dataset."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve parcels of 0 to 40 pixels, whose ids are not in the order of their names."""
    ids = (3, 11, 2, 100, 7, 41, 6, 1000, 20, 5, 12, 9)
    return write_folder(
        tmp_path_factory.mktemp("data"), ids=ids, sizes=(0, 1, 7, 8, 9, 40, 3, 25, 8, 2, 30, 12)
    )


def open_folder(folder: Path, kind: type = PixelSetData, **options) -> PixelSetData:
    return kind(
        folder, NOMENCLATURE, **{"npixel": 8, "norm": (128, 64), "extra_feature": "geomfeat", **options}
    )


def read_pixels(folder: Path, parcel: str) -> np.ndarray:
    return np.load(folder / "DATA" / f"{parcel}.npy")


def flatten(data: tuple | list) -> list:
    """The tensors of an item or a batch, then the id or the list of ids."""
    nested = (isinstance(part, (tuple, list)) and not isinstance(part[0], str) for part in data)
    return [
        leaf for part, is_nested in zip(data, nested) for leaf in (flatten(part) if is_nested else [part])
    ]


def same(first: tuple | list, second: tuple | list) -> bool:
    pairs = list(zip(flatten(first), flatten(second), strict=True))
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


# ----------------------------------------------------------------------------------------------- recorded values


@BOTH
@pytest.mark.parametrize("extra", [None, "sizes", "geomfeat"])
@pytest.mark.parametrize("norm", NORMS)
def test_items_as_recorded(kind, norm, extra, cache):
    options = {"norm": NORMS[norm], "extra_feature": extra, "jitter": None, "return_id": True}
    dataset = kind(TINY, NOMENCLATURE, FACTS["npixel"], cache_dir=cache, **options)
    checked = 0
    for data, target, parcel in dataset:
        expected = {
            name: ITEMS[f"{norm}/{extra}/{parcel}/{name}"]
            for name in ("pixels", "mask", "target", *(["extra"] if extra else []))
            if f"{norm}/{extra}/{parcel}/{name}" in ITEMS
        }
        if not expected:  # a parcel of more pixels than npixel
            continue
        (pixels, mask), features = data if extra else (data, None)
        found = {"pixels": pixels, "mask": mask, "target": target, "extra": features}
        for name, values in expected.items():
            assert found[name].shape == values.shape and str(found[name].dtype)[6:] == values.dtype
            np.testing.assert_allclose(
                found[name].numpy(), values, rtol=1e-6, atol=1e-6 * np.abs(values).max(), err_msg=name
            )
        checked += 1
    assert (
        checked
        == sum(key.startswith(f"{norm}/{extra}/") and key.endswith("/mask") for key in ITEMS.files)
        == 6
    )


def test_ids_and_dates_as_recorded(cache):
    dataset = PixelSetData(TINY, NOMENCLATURE, 8, cache_dir=cache)
    assert dataset.pid == FACTS["pid"] == sorted(FACTS["pid"], key=int)
    assert dataset.date_positions == FACTS["date_positions"]


def test_sub_classes_as_recorded(cache):
    dataset = PixelSetData(TINY, NOMENCLATURE, 8, FACTS["sub_classes"], cache_dir=cache)
    assert dataset.pid == FACTS["sub_pid"]
    assert dataset.target.tolist() == FACTS["sub_target"]
    assert [int(dataset[i][1]) for i in range(len(dataset))] == FACTS["sub_target"]


@pytest.mark.parametrize("case", golden.VALUES["splits"])
def test_splits_as_recorded(case):
    n, seed, kfold = map(int, case.split("/"))
    np.random.seed(99)  # the global state is neither read nor changed
    state = np.random.get_state()[1].copy()
    splits = fold_splits(n, kfold, seed)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    recorded = golden.VALUES["splits"][case]
    assert len(splits) == len(recorded) == kfold
    assert len({id(i) for parts in splits for part in parts for i in part}) == n  # which folds share
    for parts, expected in zip(splits, recorded):
        assert sorted(i for part in parts for i in part) == list(range(n))
        for part, values in zip(parts, expected, strict=True):
            if n < 1000:
                assert part == values
            else:
                digest = zlib.crc32(np.array(part, "<i8").tobytes())
                assert [digest, len(part), part[0], part[-1]] == values
    assert sorted(i for _, _, test in splits for i in test) == list(range(n))


def test_constructor_as_published(folder):
    for kind in (PixelSetData, PixelSetData_preloaded):
        parameters = inspect.signature(kind).parameters.values()
        positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
        assert list(positional) == (
            "folder labels npixel sub_classes norm extra_feature jitter return_id".split()
        )
        assert list(positional.values())[3:] == [None, None, None, (0.01, 0.05), False]
        dataset = kind(str(folder), NOMENCLATURE, 8, [9, 1], (128, 64), "geomfeat", None, True)
        data, target, parcel = dataset[0]
        assert len(data) == 2 and int(target) in (0, 1) and parcel == dataset.pid[0]


# --------------------------------------------------------------------------------------------- labels and features


def test_label_codes_stay_without_sub_classes(folder):
    labels = json.loads((folder / "META" / "labels.json").read_text())[NOMENCLATURE]
    dataset = open_folder(folder)
    assert dataset.target.tolist() == [labels[parcel] for parcel in dataset.pid]


def test_parcels_without_a_class_are_left_out_or_kept(tmp_path):
    write_folder(tmp_path, 6, classes=(1, 3, 9))
    labels = {str(i): (1, 3, 9)[i % 3] for i in range(1, 6)}  # none for 6
    write_meta(tmp_path, "labels", {NOMENCLATURE: labels})
    labelled = PixelSetData(tmp_path, NOMENCLATURE, 8)
    assert labelled.pid == ["1", "2", "3", "4", "5"] and labelled.n_unlabelled == 1
    kept = PixelSetData(tmp_path, NOMENCLATURE, 8, [9, 1], keep_all=True)
    assert kept.pid == ["1", "2", "3", "4", "5", "6"]
    assert kept.target.tolist() == [-1, 0, 1, -1, 0, -1]
    assert PixelSetData(tmp_path, None, 8).target.tolist() == [-1] * 6
    write_meta(tmp_path, "labels", {NOMENCLATURE: labels | {"6": 1}})
    chosen = PixelSetData(tmp_path, NOMENCLATURE, 8, [9, 1], norm=(0, 1), jitter=None, return_id=True)
    assert chosen.pid == ["2", "3", "5", "6"] and chosen.target.tolist() == [0, 1, 0, 1]
    for (pixels, mask), _, parcel in chosen:  # their own pixels, not those of the parcels left out
        n = int(mask[0].sum())
        assert set(pixels[2, 1, :n].tolist()) <= set(read_pixels(tmp_path, parcel)[2, 1].tolist())


def test_extra_features_are_standardised_over_the_whole_file(tmp_path):
    write_folder(tmp_path, 6)
    # Three parcels more than have pixels, in another order.
    values = {str(i): [float(i * i), 3.0] for i in (7, 2, 9, 1, 4, 3, 6, 8, 5)}
    write_meta(tmp_path, "geomfeat", values)
    dataset = PixelSetData(tmp_path, NOMENCLATURE, 8, [3, 9], extra_feature="geomfeat")
    column = np.array([v[0] for v in values.values()])
    expected = [(values[p][0] - column.mean()) / column.std(ddof=1) for p in dataset.pid]
    (_, extra), _ = dataset.batch(range(len(dataset)))
    assert extra.shape == (len(dataset), 5, 2) and dataset.n_extra == 2
    np.testing.assert_allclose(extra[:, :, 0], np.repeat(expected, 5).reshape(-1, 5), rtol=1e-5)
    assert (extra[:, :, 1] == 0).all()  # a feature that never varies
    own = PixelSetData(tmp_path, NOMENCLATURE, 8, extra_feature="geomfeat", extra_stats=([1, 1], [2, 4]))
    np.testing.assert_allclose(own[3][0][1][0], [(16 - 1) / 2, (3 - 1) / 4])


def test_find_norm_prefers_what_is_given_then_the_folder_then_computes(tmp_path):
    write_folder(tmp_path)
    dataset = PixelSetData(tmp_path, NOMENCLATURE, 8)
    pixels = np.concatenate([read_pixels(tmp_path, p) for p in dataset.pid], 2).astype(np.float64)
    (mean, std), source = find_norm(dataset)
    assert "computed" in source
    np.testing.assert_allclose(mean, pixels.mean(2), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std(2), rtol=1e-6)
    for level, path in enumerate(
        (tmp_path / "normalisation_values.pkl", tmp_path / "S2-2017-T31TFM-meanstd.pkl", tmp_path / "mine"), 1
    ):
        path.write_bytes(pickle.dumps((np.full(4, level), np.full(4, 2.0))))
        (mean, _), source = find_norm(dataset, path if level == 3 else None)
        assert mean.tolist() == [level] * 4 and str(path) in source


def test_a_channel_that_never_varies_is_only_centred(tmp_path):
    write_folder(tmp_path)
    for path in (tmp_path / "DATA").iterdir():
        pixels = np.load(path)
        pixels[2, 1] = 7
        np.save(path, pixels)
    dataset = PixelSetData(tmp_path, NOMENCLATURE, 8, jitter=None)
    dataset.set_norm(find_norm(dataset)[0])
    (pixels, _), _ = dataset.batch(range(12))
    assert torch.isfinite(pixels).all() and (pixels[:, 2, 1] == 0).all()


# ------------------------------------------------------------------------------------------------ pixels of a set


@BOTH
def test_pixels_are_a_true_subset_or_filled_up(folder, kind):
    dataset = open_folder(folder, kind, norm=None, jitter=None, return_id=True)
    for item in range(len(dataset)):
        ((pixels, mask), _), _, parcel = dataset[item]
        values = read_pixels(folder, parcel).astype(np.float32)
        assert pixels.shape == (5, 4, 8) and mask.shape == (5, 8) and pixels.dtype == torch.float32
        assert (mask == mask[0]).all()
        n = values.shape[2]
        if n > 8:
            columns = {tuple(column) for column in values.reshape(20, n).T}
            assert len(columns) == n  # so that repetitions would be seen
            found = {tuple(column) for column in pixels.reshape(20, 8).T.tolist()}
            assert len(found) == 8 and found <= columns and (mask == 1).all()
        elif n > 0:
            filled = np.concatenate([values, np.repeat(values[:, :, :1], 8 - n, 2)], 2)
            np.testing.assert_array_equal(pixels, filled)
            assert mask[0].tolist() == [1] * n + [0] * (8 - n)
        else:
            assert (pixels == 0).all() and mask[0].tolist() == [1] + [0] * 7


def test_a_parcel_without_pixels_is_zeros_then_normalised(folder):
    dataset = open_folder(folder, norm=(128, 64), jitter=None)
    ((pixels, mask), _), _ = dataset[dataset.pid.index("3")]
    assert (pixels == -2).all() and mask.sum() == 5


def test_the_last_parcel_may_be_empty(tmp_path):
    write_folder(tmp_path, 4, sizes=(5, 0, 9, 0))
    (pixels, mask), _ = PixelSetData(tmp_path, NOMENCLATURE, 8, jitter=None).batch([3, 1, 0])
    assert (pixels[:2] == 0).all() and mask[:, 0].sum(1).tolist() == [1, 1, 5]


@BOTH
@pytest.mark.parametrize(
    "dtype",
    [
        "|b1",
        "i1",
        "u1",
        "<i2",
        ">i2",
        "<u2",
        ">u2",
        "<i4",
        ">i4",
        "u4",
        "i8",
        "u8",
        "<f2",
        "<f4",
        ">f4",
        "<f8",
        ">f8",
    ],
)
def test_every_numeric_type_is_read_right(tmp_path, kind, dtype):
    write_folder(tmp_path, 3, dtype=dtype, sizes=(1, 8, 5))
    dataset = kind(tmp_path, NOMENCLATURE, 8, jitter=None, return_id=True)
    for (pixels, mask), _, parcel in dataset:
        values = read_pixels(tmp_path, parcel)
        assert values.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(pixels[:, :, : values.shape[2]], values.astype(np.float32))
    (mean, _), _ = find_norm(dataset)
    pixels = np.concatenate([read_pixels(tmp_path, p) for p in dataset.pid], 2).astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean(2), rtol=1e-6)


def test_types_may_differ_between_files(tmp_path):
    write_folder(tmp_path, 3, dtype=np.uint16, sizes=(3, 4, 5))
    big = np.full((5, 4, 2), 70000.5)
    np.save(tmp_path / "DATA" / "2.npy", big)
    np.save(tmp_path / "DATA" / "3.npy", np.asfortranarray(big.astype(">f4")))
    dataset = PixelSetData(tmp_path, NOMENCLATURE, 8, jitter=None)
    np.testing.assert_array_equal(dataset[0][0][0][:, :, :3], read_pixels(tmp_path, "1"))
    for item in (1, 2):
        np.testing.assert_array_equal(dataset[item][0][0], np.full((5, 4, 8), 70000.5))


# --------------------------------------------------------------------------------------------------------- jitter


def noise_of(jittered: PixelSetData, plain: PixelSetData) -> np.ndarray:
    """What jitter added, with and without it the same pixels being drawn; one number each."""
    (((x, _), _), _), (((y, _), _), _) = (d.batch(range(len(d))) for d in (jittered, plain))
    return (x.double() - y.double()).numpy()


def open_pair(folder: Path, jitter: tuple[float, float]) -> tuple[PixelSetData, PixelSetData]:
    return tuple(open_folder(folder, npixel=64, jitter=j).epoch_draws(1, 1, 1) for j in (jitter, None))


def test_jitter_is_a_clipped_normal(folder):
    noise = noise_of(*open_pair(folder, (0.01, 0.05)))
    assert 0 < np.abs(noise).max() <= 0.05 + 1e-6
    assert stats.kstest(noise.reshape(-1), stats.norm(0, 0.01).cdf).pvalue > IMPROBABLE
    assert noise.std() == pytest.approx(0.01, rel=0.03)


def test_jitter_is_clipped_at_clip(folder):
    noise = noise_of(*open_pair(folder, (1.0, 0.5))).reshape(-1)
    assert np.abs(noise).max() == pytest.approx(0.5, abs=1e-6)
    clipped = np.isclose(np.abs(noise), 0.5, atol=1e-6)
    assert clipped.mean() == pytest.approx(2 * stats.norm.sf(0.5), abs=0.02)
    within = stats.truncnorm(-0.5, 0.5)
    assert stats.kstest(noise[~clipped], within.cdf).pvalue > IMPROBABLE


def test_jitter_differs_between_pixels_dates_channels_and_copies(folder):
    noise = noise_of(*open_pair(folder, (0.01, 0.05)))  # (B, T, C, S), most pixels copies of the first
    rows = noise.transpose(0, 3, 1, 2).reshape(-1, 20)
    assert len(np.unique(rows.round(7), axis=0)) == len(rows)
    assert np.abs(np.corrcoef(rows.T) - np.eye(20)).max() < 0.2
    assert np.abs(rows.mean(1)).max() < 0.012  # no row is shifted as a whole


def test_evaluation_has_no_jitter_and_the_same_pixels_at_every_call(folder):
    dataset = open_folder(folder, norm=None)
    first, second, other = (
        dataset.evaluation(1),
        open_folder(folder, norm=None).evaluation(1),
        dataset.evaluation(2),
    )
    batch = first.batch(range(12))
    assert same(batch, second.batch(range(12))) and not same(batch, other.batch(range(12)))
    pixels = batch[0][0][0]
    assert torch.equal(pixels, pixels.round())
    assert dataset.jitter == (0.01, 0.05)  # the dataset itself is left as it was
    assert not torch.equal(dataset[0][0][0][0], dataset[0][0][0][0].round())


# ---------------------------------------------------------------------------------------------------------- draws


@BOTH
def test_an_epoch_is_the_same_in_any_order_and_company(folder, kind):
    whole = open_folder(folder).epoch_draws(1, 2, 3).batch(range(12))
    dataset = open_folder(folder, kind).epoch_draws(1, 2, 3)
    order = [7, 0, 11, 3, 3]
    ((pixels, mask), extra), target = dataset.batch(order)
    assert torch.equal(pixels, whole[0][0][0][order]) and torch.equal(mask, whole[0][0][1][order])
    assert torch.equal(extra, whole[0][1][order]) and torch.equal(target, whole[1][order])
    for item in range(12):
        assert same(dataset[item], dataset.__getitems__([5, item])[1])
        assert torch.equal(dataset[item][0][0][0], whole[0][0][0][item])


def test_evaluation_is_the_same_in_any_order_and_company(folder):
    dataset = open_folder(folder).evaluation(1)
    ((pixels, _), _), _ = dataset.batch(range(12))
    ((again, _), _), _ = dataset.batch(range(11, -1, -1))
    assert torch.equal(again, pixels.flip(0)) and torch.equal(dataset[4][0][0][0], pixels[4])


@BOTH
def test_an_epoch_is_the_same_for_any_number_of_workers(folder, kind):
    """And its dataset may be pickled, as it is for workers that do not fork."""
    dataset = open_folder(folder, kind, return_id=True).epoch_draws(1, 2, 3)
    sampler = BatchSampler(range(12), 5, shuffle_key=3)
    alone = list(batch_loader(dataset, sampler, 0))
    assert len(alone) == 3
    for first, second in zip(alone, batch_loader(dataset, sampler, 2), strict=True):
        assert same(first, second)
    assert same(pickle.loads(pickle.dumps(dataset)).batch([1, 5]), dataset.batch([1, 5]))


@pytest.mark.parametrize("words", [(2, 2, 3), (1, 1, 3), (1, 2, 4), (1, 2)])
def test_other_seed_fold_or_epoch_other_draws(folder, words):
    dataset = open_folder(folder, jitter=None)
    large = [i for i, parcel in enumerate(dataset.pid) if read_pixels(folder, parcel).shape[2] > 11]
    first, other = (dataset.epoch_draws(*w).batch(large)[0][0][0] for w in ((1, 2, 3), words))
    assert len(large) == 4 and not (first == other).flatten(1).all(1).any()
    jittered = open_folder(folder, npixel=64)  # every pixel chosen: noise alone tells the draws apart
    first, other = (jittered.epoch_draws(*w).batch(range(12))[0][0][0] for w in ((1, 2, 3), words))
    assert not (first == other).flatten(1).all(1).any()


def test_parcels_of_the_same_pixels_are_drawn_differently(tmp_path):
    write_folder(tmp_path, 6, sizes=[40] * 6)
    for i in range(2, 7):
        np.save(tmp_path / "DATA" / f"{i}.npy", read_pixels(tmp_path, "1"))
    (pixels, _), _ = PixelSetData(tmp_path, NOMENCLATURE, 8, jitter=None).epoch_draws(1).batch(range(6))
    assert len(pixels.flatten(1).unique(dim=0)) == 6


def test_draws_depend_on_the_parcel_not_on_its_place(tmp_path):
    """A parcel keeps its draws when others are added before it."""
    write_folder(tmp_path, 4, sizes=[40] * 4, ids=(5, 6, 7, 8))
    first = PixelSetData(tmp_path, None, 8).epoch_draws(1)
    pixels = first[first.pid.index("7")][0][0]
    np.save(tmp_path / "DATA" / "3.npy", read_pixels(tmp_path, "5"))
    second = PixelSetData(tmp_path, None, 8).epoch_draws(1)
    assert len(second) == 5 and torch.equal(second[second.pid.index("7")][0][0], pixels)


@BOTH
def test_without_an_epoch_every_access_draws_anew(folder, kind):
    dataset = open_folder(folder, kind)
    item = dataset.pid.index("41")
    first, second = (dataset[item][0][0][0] for _ in range(2))
    columns = [set(map(tuple, x.mul(64).add(128).round().reshape(20, 8).T.tolist())) for x in (first, second)]
    assert columns[0] != columns[1]  # other pixels
    small = dataset.pid.index("2")
    assert not torch.equal(dataset[small][0][0][0], dataset[small][0][0][0])  # other jitter
    torch.manual_seed(5)
    first = dataset[item]
    torch.manual_seed(5)
    assert same(first, dataset[item])


def test_published_way_of_loading_works(folder):
    """A plain DataLoader with its own collation and workers, each of which draws for itself."""
    dataset = open_folder(folder, return_id=True)
    for workers in (0, 2):
        loader = DataLoader(dataset, batch_size=6, num_workers=workers)
        (((pixels, mask), extra), target, parcels), _ = loader
        assert pixels.shape == (6, 5, 4, 8) and mask.shape == (6, 5, 8) and extra.shape == (6, 5, 4)
        assert target.tolist() == dataset.target[:6].tolist() and list(parcels) == dataset.pid[:6]


# -------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    "options", [{}, {"extra_feature": None}, {"return_id": True}, {"extra_feature": None, "return_id": True}]
)
def test_batch_equals_items(folder, options):
    dataset = open_folder(folder, **options).epoch_draws(4)
    items = [3, 9, 0, 5]
    batch = flatten(dataset.batch(items))
    for i, item in enumerate(items):
        for together, alone in zip(batch, flatten(dataset[item]), strict=True):
            if isinstance(alone, str):
                assert together[i] == alone
            else:
                assert torch.equal(together[i], alone) and together.dtype == alone.dtype


def test_a_large_batch_equals_its_parts(folder, monkeypatch):
    """Batches are prepared in parts; this one has many, the last one smaller."""
    monkeypatch.setattr(prepare, "NUMBERS_PER_PART", 7 * 5 * 4 * 8)
    dataset = open_folder(folder).epoch_draws(4)
    items = [(5 * i) % 12 for i in range(200)]
    ((pixels, _), _), _ = dataset.batch(items)
    ((expected, _), _), _ = dataset.batch(range(12))
    assert torch.equal(pixels, expected[items])


def test_pixels_lie_pixel_major_in_memory(folder):
    ((pixels, mask), extra), _ = open_folder(folder).batch(range(6))
    assert pixels.shape == (6, 5, 4, 8) and pixels.permute(0, 3, 1, 2).is_contiguous()
    assert mask.stride(1) == 0 and extra.stride(1) == 0  # one row per parcel, repeated


@pytest.mark.parametrize(
    "size, n, expected", [(4, 12, [4, 4, 4]), (5, 12, [5, 5, 2]), (11, 12, [11, 1]), (20, 12, [12])]
)
def test_sampler_covers_everything_once(size, n, expected):
    indices = list(range(100, 100 + n))
    for key in (None, 3, -3, 2**63 - 1, -(2**63)):
        sampler = BatchSampler(indices, size, key)
        batches = list(sampler)
        assert [len(batch) for batch in batches] == expected and len(sampler) == len(expected)
        assert sorted(sum(batches, [])) == indices


def test_sampler_shuffles_as_its_key_says():
    indices = list(range(50, 150))
    plain, one, again, other = (sum(BatchSampler(indices, 7, key), []) for key in (None, 1, 1, 2))
    assert plain == indices and one == again and len({tuple(order) for order in (plain, one, other)}) == 3
    sampler = BatchSampler(indices, 7, 1)
    assert list(sampler) == list(sampler)
    firsts = [next(iter(BatchSampler(range(10), 1, key)))[0] for key in range(2000)]
    assert stats.chisquare(np.bincount(firsts, minlength=10)).pvalue > IMPROBABLE


@pytest.mark.parametrize("n, expected", [(12, [4, 4, 4]), (13, [4, 4, 4]), (14, [4, 4, 4, 2]), (1, [])])
def test_sampler_drops_a_last_batch_of_one(n, expected):
    sampler = BatchSampler(range(n), 4, 1, drop_single=True)
    assert [len(batch) for batch in sampler] == expected and len(sampler) == len(expected)
    if n == 13:  # the one that is left out differs between epochs
        left = {
            tuple(set(range(13)) - set(sum(BatchSampler(range(13), 4, key, True), []))) for key in range(20)
        }
        assert len(left) > 3


@pytest.mark.parametrize(
    "kfold, n, message",
    [(2, 10, "at least 3"), (5, 4, "4 parcels"), (3, 3, "3 parcels"), (3, 5, "5 parcels")],
)
def test_folds_that_cannot_be_trained_are_refused(kfold, n, message):
    """Of 5 parcels in 3 folds, two are for validation and two for test: one is too few to train on."""
    with pytest.raises(UserError, match=message):
        fold_splits(n, kfold, 1)


@pytest.mark.parametrize("kfold, n", [(3, 6), (4, 4), (5, 5), (5, 100)])
def test_folds_that_can_be_trained_are_made(kfold, n):
    assert all(len(train) >= 2 and val and test for train, val, test in fold_splits(n, kfold, 1))


def test_mean_series_is_that_of_all_pixels(folder):
    dataset = open_folder(folder)
    for item, parcel in enumerate(dataset.pid):
        values = read_pixels(folder, parcel).astype(np.float64)
        expected = values.mean(2) if values.shape[2] else np.zeros((5, 4))
        np.testing.assert_allclose(dataset.mean_series(item), expected, rtol=1e-12)


@pytest.mark.gpu
def test_batches_are_the_same_on_a_gpu(folder):
    for dataset in (open_folder(folder).epoch_draws(1, 2, 3), open_folder(folder).evaluation(1)):
        expected = flatten(dataset.batch([3, 9, 0, 5]))
        found = flatten(dataset.to(torch.device("cuda")).batch([3, 9, 0, 5]))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)
