"""preprocessing.convert: every format from a tiny folder in its layout, to the last value, label, day and fold."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from data.folds import read_folds
from data.outlines import read_own_ids
from preprocessing import convert
from tests import published
from tests.commands import run_command, run_inference, run_train

for package in ("zarr", "h5py", "rdata", "pyogrio", "yaml"):
    pytest.importorskip(package, reason="needs requirements-formats.txt")
S2 = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]
ALL = ["B01", *S2[:8], "B09", "B10", "B11", "B12"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Converts a source by the command line and returns the dataset folder."""

    def convert_source(name: str, source: Path, options: str = "", out: str = "out") -> Path:
        run_command(convert.main, f"{name} {source} {tmp_path / out} {options}", monkeypatch)
        return tmp_path / out

    return convert_source


@pytest.fixture
def refuse(run: object, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> object:
    """The one sentence that converting ends with, exit code 2; nothing is left behind."""

    def convert_wrong(name: str, source: Path, options: str = "") -> str:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(SystemExit) as stop:
            run(name, source, options, "refused")
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1 and sorted(tmp_path.iterdir()) == before
        return message

    return convert_wrong


def meta(folder: Path, name: str) -> object:
    return json.loads((folder / "META" / f"{name}.json").read_text())


def pixels(folder: Path, parcel: int) -> np.ndarray:
    return np.load(folder / "DATA" / f"{parcel}.npy")


def ids(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in (folder / "DATA").iterdir())


def test_pastis(run: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = published.write_pastis(tmp_path / "PASTIS-R")
    folder = run("pastis", tmp_path / "PASTIS-R")
    assert ids(folder) == list(range(10, 20)) and read_own_ids(folder) == {}
    for parcel, own in arrays.items():
        assert pixels(folder, parcel).dtype == np.int16
        np.testing.assert_array_equal(pixels(folder, parcel), own["S2"])
    days = meta(folder, "dates")
    assert days["10"] == [20180917, 20181007, 20190101] and days["11"] == [20181001 + t for t in range(12)]
    assert meta(folder, "labels") == {"class": {str(i): 1 + i % 2 for i in range(10, 19)}}
    names = meta(folder, "classes")["class"]
    assert len(names) == 18 and names["2"] == "Soft winter wheat" and names["18"] == "Sorghum"
    info = meta(folder, "info")
    assert (info["bands"], info["units"], info["nodata"]) == (S2, 0.0001, None)
    assert info["geomfeat"] == ["Perimeter", "Area"] and meta(folder, "geomfeat")["12"] == [102.5, 2002]
    mean, std = pickle.loads((folder / "normalisation_values.pkl").read_bytes())
    assert mean.tolist() == [3 + c for c in range(10)] and std.tolist() == [6] * 10
    splits = meta(folder, "folds")["splits"]
    assert len(splits) == 5 and splits[0]["test"] == [18, 19] and splits[1]["test"] == [10, 11]
    assert splits[0]["validation"] == [16, 17] and splits[0]["train"] == list(range(10, 16))
    shown = capsys.readouterr().out
    assert (
        "10, 1 of them unlabelled" in shown and "3 to 12" in shown and f"--folds {folder / 'META'}" in shown
    )

    folder = run("pastis", tmp_path / "PASTIS-R", "--satellite S1A", "radar")
    assert pixels(folder, 13).dtype == np.float16
    np.testing.assert_array_equal(pixels(folder, 13), arrays[13]["S1A"])
    assert meta(folder, "dates")["13"] == [20180901, 20180902]
    assert meta(folder, "info")["bands"] == ["VV", "VH", "VV/VH"] and meta(folder, "info")["units"] is None


def test_timematch(run: object, refuse: object, tmp_path: Path) -> None:
    tile = tmp_path / "data" / "denmark" / "32VNH" / "2017"
    arrays = published.write_timematch(tile, [216.0, 1, 216, 999, 10, 11, 1, 1, 1, 5])
    (tmp_path / "yml").mkdir()
    mapping = tmp_path / "yml" / "denmark_class_mapping.yml"
    mapping.write_text(
        "corn:\n  216: Silomajs (5)\n  5: Majs\nbarley:\n  spring:\n    1: Vårbyg\n  winter:\n    10: Vinterbyg\n"
        "peas:\n  spring:\n    30: Ærter\n  winter:\nwheat:\n  winter:\n    11: Hvede\n  spring:\nunknown:\n"
    )
    folder = run("timematch", tile, f"--class_mapping {tmp_path / 'yml'}")
    stored = ["B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12"]
    assert meta(folder, "info")["bands"] == S2 and ids(folder) == list(range(10))
    for parcel, values in enumerate(arrays):
        for band in S2:
            own = pixels(folder, parcel)[:, S2.index(band)]
            np.testing.assert_array_equal(own, values[:, stored.index(band)])
    assert meta(folder, "dates") == {"0": 20170103, "1": 20170602, "2": 20171231}
    labels = meta(folder, "labels")
    crops = [
        "corn",
        "spring_barley",
        "corn",
        "unknown",
        "winter_barley",
        "winter_wheat",
        *["spring_barley"] * 3,
    ]
    assert [labels["class"][str(i)] for i in range(10)] == [*crops, "corn"]
    assert [labels["code"][str(i)] for i in range(10)] == [216, 1, 216, 999, 10, 11, 1, 1, 1, 5]
    assert meta(folder, "classes")["code"]["216"] == "Silomajs (5)"
    assert meta(folder, "geomfeat")["3"] == [103, 500, 0.75, 0.2]
    parts = meta(folder, "folds")["folds"]
    assert sorted(map(sorted, parts)) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert meta(folder, "groups")["5"] == ["denmark/32VNH/2017", 2]

    mapping.unlink()
    assert "denmark_class_mapping.yml" in refuse("timematch", tile, f"--class_mapping {tmp_path / 'yml'}")

    other = tmp_path / "data" / "france" / "30TXT" / "2017"
    clouded = published.write_timematch(other, ["BTH", "MIS"], clouds=True)
    folder = run("timematch", other, out="clouds")
    assert meta(folder, "info")["nodata"] == 0 and meta(folder, "labels") == {
        "code": {"0": "BTH", "1": "MIS"}
    }
    hidden = clouded[1][:, 10] > 0
    assert hidden.any() and ((pixels(folder, 1) == 0).all(1) == hidden).all()
    clear = np.moveaxis(pixels(folder, 1), 1, -1)[~hidden]
    np.testing.assert_array_equal(clear[:, 6], clouded[1][:, 3][~hidden])  # B08
    folder = run("timematch", tmp_path / "data", out="both")
    assert (
        read_own_ids(folder)["11"] == "france/30TXT/2017/0"
        and meta(folder, "labels")["code"]["1"] == "denmark 216"
    )


def test_pickles_are_never_followed(refuse: object, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    tile = tmp_path / "x" / "y" / "2017"
    published.write_timematch(tile, ["a"])
    (tile / "meta" / "metadata.pkl").write_bytes(pickle.dumps({"parcels": [Hostile()], "dates": []}))
    assert "metadata.pkl" in refuse("timematch", tile) and not (tmp_path / "executed").exists()


def test_what_an_archive_lacks_is_not_made_up(refuse: object, tmp_path: Path) -> None:
    tile = tmp_path / "x" / "y" / "2017"
    published.write_timematch(tile, ["a", "b"])
    chunk = next(path for path in sorted((tile / "data" / "1.zarr").rglob("*")) if path.name[0].isdigit())
    chunk.unlink()
    assert "1.zarr lacks" in refuse("timematch", tile)
    published.write_breizhcrops(tmp_path / "breizh")
    (tmp_path / "breizh" / "2017" / "L1C" / "frh03.h5").unlink()
    assert "frh03.csv" in refuse("breizhcrops", tmp_path / "breizh" / "2017" / "L1C")
    (tmp_path / "ucr").mkdir()
    for line in ("", "0.5\t2"):
        (tmp_path / "ucr" / "A_TRAIN.tsv").write_text("1\t0.5\t2\n" if line else "")
        (tmp_path / "ucr" / "A_TEST.tsv").write_text(f"\t{line}\n" if line else "1\t2\t3\n")
        assert "expected series, each of a class" in refuse("ucr", tmp_path / "ucr")


@pytest.mark.parametrize("level", ["L1C", "L2A"])
def test_breizhcrops(level: str, run: object, tmp_path: Path) -> None:
    tables = published.write_breizhcrops(tmp_path / "breizh", level)
    folder = run("breizhcrops", tmp_path / "breizh" / "2017" / level)
    assert ids(folder) == [1, 2, 101, 102, 201, 202, 301, 302]
    bands, columns = (ALL, slice(0, 13)) if level == "L1C" else (S2, slice(1, 11))
    assert meta(folder, "info")["bands"] == bands and meta(folder, "info")["units"] == 0.0001
    for parcel in ids(folder):
        np.testing.assert_array_equal(pixels(folder, parcel), tables[parcel][:, columns].astype(np.float32))
    assert meta(folder, "dates")["102"] == [20170103, 20170123, 20170212, 20170304, 20170324]
    assert meta(folder, "labels")["class"] == {str(i): i % 2 ^ 1 for i in ids(folder)}
    assert meta(folder, "classes") == {"class": {"0": "barley", "1": "wheat"}}
    split = {"train": [1, 2, 101, 102], "validation": [201, 202], "test": [301, 302]}
    assert meta(folder, "folds") == {"splits": [split]}


def test_eurocropsml(run: object, refuse: object, tmp_path: Path) -> None:
    files = published.write_eurocropsml(tmp_path)
    source = tmp_path / "preprocess" / "S2" / "2021"
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "raw_data" / "labels" / "2021").mkdir(parents=True)
    names = {"EC_hcat_c": [3301010101, 3301010000, None], "EC_hcat_n": ["winter_wheat", "cereal", None]}
    parquet.write_table(pyarrow.table(names), tmp_path / "raw_data" / "labels" / "2021" / "EE_labels.parquet")
    folder = run("eurocropsml", source)
    assert read_own_ids(folder) == {str(i): name for i, name in enumerate(sorted(files), start=1)}
    for parcel, name in enumerate(sorted(files), start=1):
        np.testing.assert_array_equal(pixels(folder, parcel), files[name]["data"])
        days = [int(str(day).replace("-", "")) for day in files[name]["dates"]]
        assert meta(folder, "dates")[str(parcel)] == days
    info, labels = meta(folder, "info"), meta(folder, "labels")
    assert (info["bands"], info["units"], info["nodata"]) == (ALL, 0.0001, -999)
    assert [labels[level]["1"] for level in ("hcat4", "hcat6", "hcat8", "hcat10")] == [
        *(3301000000, 3301010000, 3301010100, 3301010101)
    ]
    assert meta(folder, "classes") == {
        "hcat6": {"3301010000": "cereal"},
        "hcat10": {"3301010101": "winter_wheat"},
    }
    splits = meta(folder, "folds")["splits"]
    assert [split["test"] for split in splits] == [[1, 2], [3, 4], [5, 6]] and splits[0]["train"] == [
        3,
        4,
        5,
        6,
    ]

    name = sorted(files)
    split = {
        "train": [f"{name[k]}.npz" for k in (0, 5)],
        "val": [f"{name[1]}.npz"],
        "test": [f"{name[2]}.npz"],
    }
    (tmp_path / "split.json").write_text(json.dumps(split))
    folder = run("eurocropsml", source, f"--split {tmp_path / 'split.json'}", "official")
    assert meta(folder, "folds") == {"splits": [{"train": [1, 6], "validation": [2], "test": [3]}]}
    (tmp_path / "split.json").write_text(json.dumps({"train": [], "val": []}))
    assert "test" in refuse("eurocropsml", source, f"--split {tmp_path / 'split.json'}")
    np.savez(source / "notes.npz", data=np.zeros(1))
    assert "notes.npz" in refuse("eurocropsml", source)


def test_sits(run: object, refuse: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    series = published.write_sits(tmp_path / "samples.rda")
    folder = run("sits", tmp_path / "samples.rda")
    assert "1 observations that lacked" in capsys.readouterr().out
    for parcel, own in enumerate(series):
        expected = np.stack([own["NDVI"], own["NIR"]], axis=1).astype(np.float32)
        expected[np.isnan(expected).any(1)] = np.nan
        np.testing.assert_array_equal(pixels(folder, parcel), expected)
    assert np.isnan(pixels(folder, 0)).tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert meta(folder, "dates")["0"] == [20130914, 20130930, 20131016]
    assert meta(folder, "dates")["1"] == [20140914, 20140930, 20141016]
    assert meta(folder, "labels")["class"]["1"] == "Soy_Corn" and meta(folder, "info")["bands"] == [
        "NDVI",
        "NIR",
    ]
    assert not (folder / "META" / "folds.json").exists()
    import rdata

    rdata.write_rda(tmp_path / "other.rda", {"numbers": np.arange(3)})
    assert "numbers" in refuse("sits", tmp_path / "other.rda")


def test_ucr(run: object, refuse: object, tmp_path: Path) -> None:
    (tmp_path / "tsv").mkdir()
    for part, lines in (("TRAIN", "1\t0.5\t2\n-1\t3\tNaN\n1\t4\t5\n"), ("TEST", "-1\t6\t7\n")):
        (tmp_path / "tsv" / f"Some_{part}.tsv").write_text(lines)
    folder = run("ucr", tmp_path / "tsv")
    assert ids(folder) == [0, 1, 2, 3] and meta(folder, "dates") == {"0": 20010101, "1": 20010102}
    series = [pixels(folder, i)[:, 0].tolist() for i in ids(folder)]
    np.testing.assert_equal(series, [[0.5, 2], [3, np.nan], [4, 5], [6, 7]])
    assert meta(folder, "labels") == {"class": {"0": 1, "1": -1, "2": 1, "3": -1}}
    assert meta(folder, "folds") == {"splits": [{"train": [0, 1, 2], "test": [3]}]}

    header = "#words\n@problemName X\n@timeStamps false\n@univariate false\n@classLabel true a b\n@data\n"
    (tmp_path / "ts").mkdir()
    (tmp_path / "ts" / "X_TRAIN.ts").write_text(f"{header}1,2,3:4,?,6:a\n7,8:9,10:b\n")
    (tmp_path / "ts" / "X_TEST.ts").write_text(f"{header}1,2:3,4:a\n")
    folder = run("ucr", tmp_path / "ts", out="ts_out")
    np.testing.assert_equal(pixels(folder, 0), np.array([[1, 4], [np.nan, np.nan], [3, 6]], np.float32))
    np.testing.assert_equal(pixels(folder, 1), np.array([[7, 9], [8, 10]], np.float32))
    assert meta(folder, "dates")["1"] == [20010101, 20010102] and len(meta(folder, "dates")["0"]) == 3
    assert meta(folder, "labels")["class"] == {"0": "a", "1": "b", "2": "a"}
    (tmp_path / "ts" / "X_TEST.ts").write_text(header.replace("Stamps false", "Stamps true"))
    assert "X_TEST.ts" in refuse("ucr", tmp_path / "ts")
    (tmp_path / "ts" / "X_TEST.ts").unlink()
    assert "X_TEST.ts" in refuse("ucr", tmp_path / "ts")


def test_cawa(run: object, refuse: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = published.write_cawa(tmp_path / "central_asia")
    folder = run("cawa", tmp_path / "central_asia")
    assert "5.6%" in capsys.readouterr().out  # 2 of 36 are missing
    np.testing.assert_array_equal([pixels(folder, i)[:, 0] for i in range(12)], values.astype(np.float32))
    assert meta(folder, "dates") == {"0": 20160101, "1": 20160117, "2": 20160202}
    assert meta(folder, "labels")["class"]["3"] == "wheat-other" and meta(folder, "info")["bands"] == ["NDVI"]
    groups = meta(folder, "groups")
    assert groups["0"] == ["Uzbekistan", "2015"] and groups["11"] == ["Tajikistan", "2018"]
    parts = meta(folder, "folds")["folds"]
    assert sorted(map(sorted, parts)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9], [10, 11]]
    path = tmp_path / "central_asia" / "CAWa_CropType_time-series.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    message = refuse("cawa", tmp_path / "central_asia")
    assert "11 rows" in message and " 12" in message


def test_wrong_input_ends_in_one_sentence(refuse: object, tmp_path: Path) -> None:
    published.write_pastis(tmp_path / "pastis")
    assert "--split" in refuse("pastis", tmp_path / "pastis", "--split x.json")
    first = tmp_path / "pastis" / "DATA_S2" / "S2_10.npy"
    np.save(first, np.zeros((2, 10, 4)))  # of three dates
    message = refuse("pastis", tmp_path / "pastis")
    assert "parcel 10" in message and "(2, 10, 4)" in message and "3 dates" in message
    first.write_bytes(b"damaged")
    assert "parcel 10" in refuse("pastis", tmp_path / "pastis")
    first.unlink()
    assert "S2_10.npy" in refuse("pastis", tmp_path / "pastis")
    published.write_pastis(tmp_path / "other")
    (tmp_path / "other" / "metadata.geojson").write_text("{}")
    assert f"{tmp_path / 'other'}" in refuse("pastis", tmp_path / "other")
    for name in convert.FORMATS:
        assert str(tmp_path / "nothing") in refuse(name, tmp_path / "nothing")


def test_a_missing_package_is_named(refuse: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published.write_breizhcrops(tmp_path / "breizh")
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "requirements-formats.txt" in refuse("breizhcrops", tmp_path / "breizh" / "2017" / "L1C")


def test_a_converted_folder_trains_and_predicts(
    run: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an official split, dates by parcel and missing dates; own ids reach the predictions."""
    names = sorted(published.write_eurocropsml(tmp_path))
    split = {"train": names[:4], "val": names[4:5], "test": names[5:]}
    split = {part: [f"{name}.npz" for name in own] for part, own in split.items()}
    (tmp_path / "split.json").write_text(json.dumps(split))
    folder = run("eurocropsml", tmp_path / "preprocess" / "S2" / "2021", f"--split {tmp_path / 'split.json'}")
    folds = folder / "META" / "folds.json"
    assert read_folds(folds, range(1, 7)) == [([0, 1, 2, 3], [4], [5])]
    options = f"--epochs 1 --labels hcat10 --folds {folds}"
    results = run_train(folder, tmp_path / "results", options, monkeypatch)
    output = run_inference(folder, results, tmp_path / "predicted", "", monkeypatch)
    table = (output / "predictions.csv").read_text()
    source, options = tmp_path / "preprocess" / "S2" / "2021", f"--split {tmp_path / 'split.json'} --packed"
    packed = run("eurocropsml", source, options, "packed")
    assert not (packed / "DATA").exists() and (packed / "PIXELS").exists()
    again = run_inference(packed, results, tmp_path / "again", "", monkeypatch)
    assert (again / "predictions.csv").read_text() == table
    assert "EE001_77_3301010101" in table and "PT11A_78_3302000000" in table
