"""Spatial blocks, and folds that are read from a file."""

import json
from pathlib import Path

import numpy as np
import pytest

import train
from common.arrays import load_arrays
from common.errors import UserError
from data.folds import choose_splits, describe_splits, fold_splits, read_folds, read_splits
from dataset import PixelSetData
from learning import crossvalidation
from tests.commands import run_command, run_inference, run_train
from tests.folders import write_folder, write_meta

PARTS = [[7, 2], [30], [4, 11], [5]]
IDS = ["2", "4", "5", "7", "11", "30"]


def write_parts(path: Path, parts: object) -> Path:
    path.write_text(json.dumps({"folds": parts}))
    return path


def test_every_part_is_tested_once_and_validates_the_one_before(tmp_path: Path) -> None:
    path = write_parts(tmp_path / "f.json", PARTS)
    assert read_folds(path, IDS) == [
        ([1, 2, 4], [5], [0, 3]),
        ([0, 2, 3], [1, 4], [5]),
        ([0, 3, 5], [2], [1, 4]),
        ([1, 4, 5], [0, 3], [2]),
    ]


def test_parcels_of_other_classes_may_be_named(tmp_path: Path) -> None:
    path = write_parts(tmp_path / "f.json", PARTS)
    kept = [parcel for parcel in IDS if parcel not in ("2", "11")]
    splits = read_folds(path, kept, known=[2, 11])
    assert [test for _, _, test in splits] == [[2], [3], [0], [1]]
    with pytest.raises(
        UserError, match=r"names parcel 2, which the dataset does not have \(2 unknown in all\)"
    ):
        read_folds(path, kept)
    with pytest.raises(UserError, match=r"0 validation parcel\(s\) of the classes"):
        read_folds(path, IDS[:-1], known=IDS)


@pytest.mark.parametrize(
    "parts, message",
    [
        ([[1], [2], [3, 1]], "parcel 1 is in part 1 and again in part 3"),
        ([[1, 1], [2], [3]], "parcel 1 is in part 1 and again in part 1"),
        ([[1], [2, 3]], r"has 2 part\(s\); at least 3"),
        ([[1], ["2"], [3]], "part 2 contains '2'"),
        ([[1], [True], [3]], "part 2 contains True"),
        ({"1": [1]}, "is something else"),
        ([1, 2, 3], "is something else"),
        ([[1], [2], [4]], r"puts parcel 3 of the dataset in no part \(1 missing in all\)"),
    ],
)
def test_wrong_folds_in_one_sentence(parts: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_folds(write_parts(tmp_path / "f.json", parts), ["1", "2", "3"])


def test_training_uses_the_folds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "set", n_parcels=20)
    parts = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13], [14, 15, 16, 17, 18, 19, 20]]
    path = write_parts(tmp_path / "f.json", parts)
    seen = []
    original = crossvalidation.train_fold
    monkeypatch.setattr(crossvalidation, "train_fold", lambda *args: seen.append(args[1]) or original(*args))
    results = run_train(folder, tmp_path / "res", f"--epochs 1 --folds {path}", monkeypatch)
    assert [[i + 1 for i in test] for _, _, test in seen] == parts
    assert all(sorted([*a, *b, *c]) == list(range(20)) for a, b, c in seen)
    sums = [load_arrays(results / f"Fold_{k}" / "conf_mat.pkl").sum() for k in (1, 2, 3, 4)]
    assert sums == [6, 3, 4, 7] and not (results / "Fold_5").exists()
    assert json.loads((results / "conf.json").read_text())["kfold"] == 4


def test_wrong_folds_stop_before_the_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train, "resolve_data", lambda *args: pytest.fail("read the data first"))
    path = write_parts(tmp_path / "f.json", [[1], [1], [2]])
    with pytest.raises(SystemExit) as end:
        run_command(train.main, f"--res_dir {tmp_path / 'res'} --folds {path}", monkeypatch)
    assert end.value.code == 2
    assert (
        capsys.readouterr().err
        == f"error: {path}: parcel 1 is in part 1 and again in part 2; leave it in one.\n"
    )


# --- from here on, geographic libraries are needed ---


@pytest.fixture
def split():
    pytest.importorskip("geopandas")
    import preprocessing.split

    return preprocessing.split


def test_blocks_are_squares_of_the_size_asked_for(split) -> None:
    points = np.random.default_rng(0).uniform(-50, 50, (300, 2))
    blocks = split.block_numbers(points, 15.0)
    west, south = min(x for x, _ in points), min(y for _, y in points)
    plain = [(int((x - west) // 15), int((y - south) // 15)) for x, y in points]
    pairs = set(zip(plain, blocks.tolist()))
    assert len(pairs) == len(set(plain)) == len(set(blocks.tolist())) == 49
    assert set(blocks.tolist()) == set(range(49))


def test_blocks_stay_whole_and_parts_are_alike(split) -> None:
    random = np.random.default_rng(1)
    blocks = random.integers(0, 150, 3000)
    labels = np.where(random.random(3000) < 0.1 + 0.8 * (blocks % 10 == 0), "rare", "common")
    labels[:2] = ["once", "twice"]
    part = split.deal(blocks, labels, 5, seed=1)
    assert len(set(zip(blocks.tolist(), part.tolist()))) == 150  # no block in two parts
    for chosen in (np.full(3000, True), labels == "rare", labels == "common"):
        counts = np.bincount(part[chosen], minlength=5)
        assert counts.max() < 1.15 * counts.min()
    assert (part == split.deal(blocks, labels, 5, seed=1)).all()
    assert (part != split.deal(blocks, labels, 5, seed=2)).any()
    with pytest.raises(UserError, match=r"lie in 4 block\(s\), too few for 5 parts"):
        split.deal(blocks % 4, labels, 5, seed=1)


def test_picture_shows_parts_and_blocks(split, tmp_path: Path) -> None:
    from data.outlines import to_ground
    from preprocessing.parcels import read_outlines
    from reports.folds import plot_parts
    from tests.outlines import write_outlines
    from tests.test_plots import check_texts

    corners = [(500_000 + 700 * i, 4_800_000 + 400 * j) for i in range(4) for j in range(4)]
    outlines = to_ground(read_outlines(write_outlines(tmp_path / "in.gpkg", range(16), corners))).geometry
    centres = outlines.centroid.get_coordinates().to_numpy()
    part = np.arange(16) // 4
    figure = plot_parts(outlines, part, "4 parts of blocks of 1 km", grid=(centres.min(0), 1000.0))
    (panel,) = figure.axes
    check_texts(figure, [panel.title, *figure.legends[0].get_texts()])
    parcels, upright, level = panel.collections
    assert len({tuple(colour) for colour in parcels.get_facecolors()}) == 4
    assert len(parcels.get_paths()) == 16
    np.testing.assert_allclose(
        [line[0, 0] for line in upright.get_segments()], centres[:, 0].min() + [0, 1000, 2000]
    )
    np.testing.assert_allclose([line[0, 1] for line in level.get_segments()], centres[:, 1].min() + [0, 1000])


@pytest.mark.parametrize("crs", [32631, 4326, 3857])
def test_neighbours_share_a_part_in_any_reference_system(
    crs: int, split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """16 pairs of parcels, and blocks of 10 km whose edges lie over 3 km from every pair."""
    from tests.outlines import write_outlines

    middles = [(x, y) for x in (0, 25_000, 45_000, 65_000) for y in (0, 25_000, 45_000, 65_000)]
    corners = [(450_000 + x + 150 * i, 5_500_000 + y) for x, y in middles for i in (0, 1)]
    folder = write_folder(tmp_path / "set", n_parcels=32, classes=(1, 2))
    write_outlines(folder / "META" / "parcels.gpkg", range(1, 33), corners, crs)
    run_command(split.main, f"{folder} --blocks 10 --kfold 4", monkeypatch)
    content = json.loads((folder / "META" / "folds.json").read_text())
    assert content["blocks_km"] == 10 and content["seed"] == 1
    parts = [split["test"] for split in read_splits(folder / "META" / "folds.json")]
    assert sorted(parcel for part in parts for parcel in part) == list(range(1, 33))
    for part in parts:
        assert len(part) == 8 and {(parcel - 1) // 2 for parcel in part} == {(p - 1) // 2 for p in part[::2]}
    assert (folder / "META" / "folds.png").read_bytes().startswith(b"\x89PNG")
    assert "Part 1: 8 parcels (25.0%) in 4 blocks, 2 classes" in capsys.readouterr().out


@pytest.mark.parametrize("options", ["--blocks 0.3", "--groups farm --buffer 60", "--blocks 0.3 --buffer 60"])
def test_outlines_taken_a_few_at_a_time_give_the_same_folds(
    options: str, split, parcels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import geopandas

    import data.outlines
    from reports import cartography

    outlines = geopandas.read_file(parcels / "META" / "parcels.gpkg")
    path, expected = parcels / "META" / "folds.json", data.outlines.ground_crs(outlines)
    run_command(split.main, f"{parcels} {options} --kfold 3", monkeypatch)
    folds = path.read_text()
    path.unlink()
    for module in (split, cartography):
        monkeypatch.setattr(module, "MOST_OUTLINES", 5)
    monkeypatch.setattr(data.outlines, "_CHUNK", 5)
    run_command(split.main, f"{parcels} {options} --kfold 3", monkeypatch)
    assert path.read_text() == folds and data.outlines.ground_crs(outlines) == expected


def test_a_block_is_a_kilometre_on_the_ground_in_web_mercator(split, tmp_path: Path) -> None:
    """At 60 degrees north, Web Mercator's metres are half a metre: a block must not shrink with them."""
    import geopandas
    import shapely

    folder = write_folder(tmp_path / "set", n_parcels=3)
    points = geopandas.GeoSeries(shapely.points([[10.0, 60.0], [10.012, 60.0], [10.1, 60.05]]), crs=4326)
    squares = points.to_crs(3857).buffer(20, cap_style="square")
    geopandas.GeoDataFrame({"id": [1, 2, 3]}, geometry=squares).to_file(folder / "META" / "parcels.gpkg")
    with pytest.raises(UserError, match=r"lie in 2 block\(s\)"):  # 0.67 km apart, 1.3 km in Web Mercator
        split.split(folder, 1.0, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--blocks 0", "'0' is not a length above 0"),
        ("--blocks 1 --kfold 2", "--kfold is 2; at least 3"),
        ("--blocks 1 --parcels nowhere.gpkg", "nowhere.gpkg does not exist"),
        ("--blocks 1 --id_column nr", "has no column 'nr'"),
        ("--blocks 1 --labels other", "has no nomenclature 'other'; it has label_44class"),
        ("--blocks 1", r"has no outline of parcel 12 (1 missing in all)"),
    ],
)
def test_wrong_input_in_one_sentence(
    options: str,
    message: str,
    split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    from tests.outlines import write_outlines

    folder = write_folder(tmp_path / "set", n_parcels=12)
    write_outlines(folder / "META" / "parcels.gpkg", range(1, 12))
    with pytest.raises(SystemExit) as end:
        run_command(split.main, f"{folder} {options}", monkeypatch)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1
    assert not (folder / "META" / "folds.json").exists()


def test_works_without_labels(split, tmp_path: Path) -> None:
    from tests.outlines import write_outlines

    folder = write_folder(tmp_path / "set", n_parcels=12)
    (folder / "META" / "labels.json").unlink()
    write_outlines(folder / "META" / "parcels.gpkg", range(1, 13))
    split.split(folder, 0.1, 3)
    assert [len(split["test"]) for split in read_splits(folder / "META" / "folds.json")] == [4, 4, 4]


def test_parcels_without_a_label_are_dealt_too(split, tmp_path: Path) -> None:
    from tests.outlines import write_outlines

    folder = write_folder(tmp_path / "set", n_parcels=12)
    write_meta(folder, "labels", {"crops": {"1": "maize", "2": "maize"}})
    write_outlines(folder / "META" / "parcels.gpkg", range(1, 13))
    split.split(folder, 0.1, 3)
    assert sum(len(split["test"]) for split in read_splits(folder / "META" / "folds.json")) == 12


# ------------------------------------------------------------------------------------------------ groups and distances


def grid_of_parcels(n: int = 36, own: bool = False) -> dict[str, list]:
    """Columns of parcels in rows of 6: regions of two rows, farms of two columns, and ids of their own."""
    ids = list(range(1, n + 1))
    return {
        "id": [f"F{i:03d}" for i in ids] if own else ids,
        "region": [("north", "middle", "south")[i // 12] for i in range(n)],
        "farm": [i % 6 // 2 for i in range(n)],
    }


@pytest.fixture
def parcels(tmp_path: Path) -> Path:
    """A dataset whose outlines have these columns."""
    geopandas = pytest.importorskip("geopandas")
    from tests.outlines import write_outlines

    folder = write_folder(tmp_path / "set", n_parcels=36, classes=(1, 2))
    corners = [(500_000 + 150 * (i % 6), 4_800_000 + 200 * (i // 6)) for i in range(36)]
    path = write_outlines(folder / "META" / "parcels.gpkg", range(1, 37), corners)
    table = geopandas.read_file(path).assign(**grid_of_parcels())
    path.unlink()
    table.to_file(path, layer="parcels")
    return folder


def read_tests(folder: Path) -> list[list[int]]:
    return [split["test"] for split in read_splits(folder / "META" / "folds.json")]


def test_groups_by_column_table_and_json_are_the_same(split, parcels: Path, tmp_path: Path) -> None:
    columns = grid_of_parcels()
    rows = "\n".join(";".join(map(str, row)) for row in zip(*columns.values()))
    (tmp_path / "t.csv").write_text(f"{';'.join(columns)}\n{rows}\n")
    pairs = {str(i): [a, b] for i, a, b in zip(*columns.values())}
    (tmp_path / "g.json").write_text(json.dumps(pairs))
    found = []
    for named in (
        ["region", "farm"],
        [f"{tmp_path / 't.csv'}", "region", "farm"],
        [f"{tmp_path / 'g.json'}"],
    ):
        split.split(parcels, kfold=4, groups=named)
        found.append(read_tests(parcels))
        assert json.loads((parcels / "META" / "folds.json").read_text())["groups"] == named
    assert found[0] == found[1] == found[2]
    assert sorted(parcel for part in found[0] for parcel in part) == columns["id"]
    groups = [{tuple(pairs[str(parcel)]) for parcel in part} for part in found[0]]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 9  # none in two parts


def test_own_ids_name_the_parcels(split, parcels: Path, tmp_path: Path) -> None:
    import geopandas

    split.split(parcels, kfold=3, groups=["region"])
    expected, columns = read_tests(parcels), grid_of_parcels(own=True)
    path = parcels / "META" / "parcels.gpkg"
    table = geopandas.read_file(path)[["id", "geometry"]].assign(parcel=columns["id"])
    path.unlink()
    table.to_file(path, layer="parcels")
    table = table.drop(columns="id").assign(FIELD=columns["id"], region=columns["region"])
    shuffled = table.drop(columns="parcel").sample(frac=1, random_state=1)
    shuffled.to_file(tmp_path / "agency.gpkg")
    shuffled[["FIELD", "region"]].to_csv(tmp_path / "agency.csv", index=False)
    split.split(parcels, None, 3, 1, tmp_path / "agency.gpkg", "FIELD", groups=["region"])
    assert read_tests(parcels) == expected
    split.split(parcels, None, 3, id_column="FIELD", groups=[str(tmp_path / "agency.csv"), "region"])
    assert read_tests(parcels) == expected


def test_groups_of_a_table_need_no_outlines(split, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_folder(tmp_path / "set", n_parcels=12)
    write_meta(folder, "groups", {str(i): 2015 + i % 4 for i in range(1, 13)})
    split.split(folder, kfold=4, groups=[str(folder / "META" / "groups.json")])
    assert {frozenset(part) for part in read_tests(folder)} == {
        frozenset(range(i or 4, 13, 4)) for i in range(4)
    }
    assert not (folder / "META" / "folds.png").exists()
    assert "No picture of the folds: " in capsys.readouterr().out


@pytest.mark.parametrize("options", ["--groups farm --kfold 3", "--blocks 0.3 --kfold 3"])
@pytest.mark.parametrize("buffer", [50.0, 60.0])
def test_what_is_too_near_a_test_parcel_is_in_no_part(
    options: str,
    buffer: float,
    split,
    parcels: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Squares of 100 m, 50 m apart to the east and 100 m to the north: 50 m leaves none out, more does."""
    import geopandas

    from data.outlines import to_ground

    run_command(split.main, f"{parcels} {options}", monkeypatch)
    without = read_splits(parcels / "META" / "folds.json")
    run_command(split.main, f"{parcels} {options} --buffer {buffer - 0.5}", monkeypatch)
    outlines = to_ground(geopandas.read_file(parcels / "META" / "parcels.gpkg")).set_index("id").geometry
    splits = read_splits(parcels / "META" / "folds.json")
    n_left_out = 0
    for before, after in zip(without, splits, strict=True):
        assert after["test"] == before["test"]
        for part in ("train", "validation"):
            apart = {
                parcel: outlines[after["test"]].distance(outlines[parcel]).min() for parcel in before[part]
            }
            assert after[part] == [parcel for parcel in before[part] if apart[parcel] >= buffer - 0.5]
            n_left_out += len(before[part]) - len(after[part])
    assert (n_left_out > 0) == (buffer > 50)
    assert ("too near" in capsys.readouterr().out) == (buffer > 50)


def test_near_parcels_are_those_of_a_plain_comparison(split) -> None:
    shapely = pytest.importorskip("shapely")
    random = np.random.default_rng(3)
    centres = random.uniform(0, 2000, (200, 2))
    outlines = shapely.buffer(shapely.points(centres), random.uniform(5, 80, 200), quad_segs=2)
    part = random.integers(0, 4, 200)
    for distance in (1.0, 60.0):
        near = split.near_test(outlines, part, distance)
        apart = shapely.distance(outlines[:, None], outlines)
        for k in range(4):
            expected = (apart[:, part == k].min(1) < distance) & (part != k)
            assert expected.any() and (near[k] == expected).all()


def test_picture_shows_groups(split, parcels: Path) -> None:
    from data.outlines import to_ground
    from preprocessing.parcels import read_outlines
    from reports.folds import plot_parts
    from tests.test_plots import check_texts

    outlines = to_ground(read_outlines(parcels / "META" / "parcels.gpkg", group_columns=["region"]))
    part = np.arange(36) // 12
    figure = plot_parts(outlines.geometry, part, "3 parts of groups", outlines["group"].to_numpy(str))
    (panel,) = figure.axes
    texts = figure.legends[0].get_texts()
    check_texts(figure, [panel.title, *texts])
    assert [text.get_text().split(": ")[1] for text in texts] == ["north", "middle", "south"]
    _, lines = panel.collections
    bounds = {tuple(np.round([*line.min(0), *line.max(0)])) for line in lines.get_segments()}
    expected = {tuple(np.round(outlines.geometry[part == k].total_bounds)) for k in range(3)}
    assert bounds == expected


@pytest.mark.parametrize(
    "options, words",
    [
        ("--groups region", ["3 group(s)", "5 parts", "--groups"]),
        ("--groups soil", ["no column 'soil'", "region, farm"]),
        ("--groups {}/t.csv", ["t.csv", "column"]),
        ("--groups {}/t.csv soil", ["t.csv", "no column 'soil'", "id, farm"]),
        ("--groups {}/t.csv farm --kfold 3", ["t.csv", "parcel 6 ", "31 missing"]),
        ("--groups {}/t.json", ["t.json", "{parcel id: group}"]),
        ("--groups {}/nowhere.json", ["nowhere.json"]),
        ("--groups farm --kfold 3 --buffer 5000", ["--buffer 5000", "train", "fold 1"]),
        ("--groups farm --blocks 1", ["--groups", "--blocks"]),
        ("--kfold 3", ["--blocks", "--groups"]),
    ],
)
def test_wrong_groups_in_one_sentence(
    options: str,
    words: list[str],
    split,
    parcels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "t.csv").write_text("id,farm\n1,a\n2,b\n3,c\n4,d\n5,e\n6,\n")
    (tmp_path / "t.json").write_text('{"1": {"farm": 3}}')
    with pytest.raises(SystemExit) as end:
        run_command(split.main, f"{parcels} {options.format(tmp_path)}", monkeypatch)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (parcels / "META" / "folds.json").exists()


def test_a_group_that_holds_most_parcels_is_said(split) -> None:
    groups = np.array(["large"] * 30 + ["a", "b", "c"] * 3)
    part = split.deal(groups, np.array(["x"] * 39), 3, 1, "group")
    (line,) = (line for line in split.describe(groups, groups, part, "group") if line.startswith("Uneven"))
    assert "'large'" in line and "30 of 39" in line and f"part {part[0] + 1} " in line
    assert not any("Uneven" in line for line in split.describe(groups[21:], groups[21:], part[21:], "group"))


# ------------------------------------------------------------------------------------------- splits listed by hand


def write_splits(path: Path, splits: object) -> Path:
    path.write_text(json.dumps({"splits": splits}))
    return path


def test_splits_may_leave_parcels_out_and_overlap_between_folds(tmp_path: Path) -> None:
    path = write_splits(
        tmp_path / "f.json",
        [
            {"train": [5, 1], "validation": [2], "test": [3]},
            {"train": [1, 2, 3, 4, 5], "test": [6, 7]},
        ],
    )
    ids = [str(i) for i in range(1, 9)]  # 8 is nowhere
    first, second = read_folds(path, ids, seed=3)
    assert first == ([0, 4], [1], [2])
    train, val, test = second
    assert test == [5, 6] and len(val) == 1 and sorted(train + val) == [0, 1, 2, 3, 4]
    assert read_folds(path, ids, seed=3)[1] == second
    assert len({tuple(read_folds(path, ids, seed=seed)[1][1]) for seed in range(20)}) > 1  # drawn by the seed


@pytest.mark.parametrize(
    "splits, words",
    [
        ([], ["split"]),
        ([{"train": [1], "test": []}], ["split 1", "test"]),
        (
            [{"train": [1], "validation": [2], "test": [3]}, {"train": [1, 2], "test": [2]}],
            ["parcel 2", "split 2"],
        ),
        ([{"train": [1], "validation": 3, "test": [2]}], ["split 1"]),
        ([{"train": [1], "validation": ["x"], "test": [2]}], ["'x'"]),
        ([{"train": [1], "validation": [3], "test": [77]}], ["77"]),
        ([{"train": [1], "valid": [3], "test": [2]}], ["split 1", "'valid'", "train, validation, test"]),
        ([{"train": [1], "validation": [3], "test": [2]}], ["1 train parcel(s)", "at least 2"]),
    ],
)
def test_wrong_splits_in_one_sentence(splits: object, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_folds(write_splits(tmp_path / "f.json", splits), ["1", "2", "3"])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_training_on_splits_and_predicting_what_they_leave_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = write_folder(tmp_path / "set", n_parcels=20)
    parts = [{"train": [*range(1, 13)], "validation": [13, 14], "test": [15, 16]}]
    path = write_splits(tmp_path / "f.json", parts)
    results = run_train(folder, tmp_path / "res", f"--epochs 1 --folds {path}", monkeypatch)
    assert load_arrays(results / "Fold_1" / "conf_mat.pkl").sum() == 2 and not (results / "Fold_2").exists()
    output = run_inference(folder, results, tmp_path / "out", "", monkeypatch)
    rows = (output / "predictions.csv").read_text().splitlines()[1:]
    by = [row.split(",")[5] for row in rows]
    assert by == ["seen"] * 14 + ["1"] * 2 + ["all"] * 4
    assert "on 6 parcels with a known class" in capsys.readouterr().out


def test_what_a_training_part_lacks_is_said_before() -> None:
    targets = np.array([0, 0, 0, 1, 1, 2])
    splits = [([0, 1], [2], [3, 4, 5]), ([3, 5, 0], [1, 4], [2])]
    lines = describe_splits(splits, targets, ["wheat", "maize", "rape"])
    assert all(line.startswith("Fold 1") for line in lines) and len(lines) == 3
    assert "maize, rape" in lines[0]
    assert describe_splits([([0, 3], [5], [1])], targets, ["wheat"] * 3)[0].startswith("Fold 1: 2 parcel(s)")
    assert describe_splits(fold_splits(60, 5, 1), np.arange(60) % 2, ["a", "b"]) == []


@pytest.mark.parametrize("from_file", [False, True])
def test_a_share_of_the_validation_is_trained_on(from_file: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", n_parcels=60)
    dataset = PixelSetData(folder, "label_44class", 4, None)
    path = None
    if from_file:
        parts = [list(range(k, 61, 5)) for k in range(1, 6)]
        path = str(tmp_path / "folds.json")
        Path(path).write_text(json.dumps({"folds": parts}))
    plain = choose_splits(dataset, path, 5, 1)
    assert choose_splits(dataset, path, 5, 1, 0.0) == plain
    moved = []
    for share, left in ((0.8, 3), (0.5, 6), (0.99, 1)):
        splits = choose_splits(dataset, path, 5, 1, share)
        assert splits == choose_splits(dataset, path, 5, 1, share)
        for (learned, val, test), (learned_before, val_before, test_before) in zip(splits, plain):
            assert test == test_before and len(val) == left and set(val) < set(val_before)
            assert learned[: len(learned_before)] == learned_before
            assert sorted(learned + val) == sorted(learned_before + val_before)
        moved.append([set(before[1]) - set(now[1]) for now, before in zip(splits, plain)])
    assert all(half < most < nearly for most, half, nearly in zip(*moved))  # of one order
    assert choose_splits(dataset, path, 5, 1, 0.8) != choose_splits(dataset, path, 5, 2, 0.8)


def test_training_on_a_share_of_the_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, flags = (
        write_folder(tmp_path / "set", n_parcels=20, classes=(1, 3)),
        "--epochs 1 --train_on_validation 0.5",
    )
    parts = [{"train": [1, 3, 5, 7], "validation": [2, 4], "test": [*range(8, 21)]}]  # classes by turns
    path = write_splits(tmp_path / "f.json", parts)
    results = run_train(folder, tmp_path / "few", f"--epochs 1 --folds {path}", monkeypatch)
    notes = json.loads((results / "conf.json").read_text())["notes"]
    assert (
        len(notes) == 4
        and "\n".join(notes) in capsys.readouterr().out
        and "no training parcel of 3" in notes[1]
    )
    results = run_train(folder, tmp_path / "more", f"{flags} --folds {path}", monkeypatch)
    notes = json.loads((results / "conf.json").read_text())["notes"]
    assert len(notes) == 2 and "validation" in notes[1]
    assert np.load(results / "Fold_1" / "validation_scores.npy").shape == (1,)
    output = run_inference(folder, results, tmp_path / "out", "", monkeypatch)
    rows = (output / "predictions.csv").read_text().splitlines()[1:]
    assert [row.split(",")[5] for row in rows] == ["seen"] * 5 + ["all", "seen"] + ["1"] * 13
    with pytest.raises(SystemExit, match="2"):
        run_train(folder, results, f"--epochs 1 --folds {path} --resume", monkeypatch)
    assert "train_on_validation is 0.0 but was 0.5" in capsys.readouterr().err
