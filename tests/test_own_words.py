"""Predictions in the words of who asked: ids and names of their own, doubts, areas."""

import csv
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data.metadata import LabelsTable
from data.outlines import read_own_ids, to_dataset_ids
from data.settings import DataSettings
from learning.predictions import Predictions, Telling, read_rows
from learning.run import open_run
from reports.areas import write_areas
from tests.commands import Predict, read_table, run_train
from tests.folders import write_folder, write_meta

geopandas = pytest.importorskip("geopandas")

from tests.outlines import write_outlines

NAMES = {"1": "Wheat", "3": "Maize"}  # 9 has none
FIRST = ["id", "true_label", "predicted_label", "confidence", "agreement", "predicted_by"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As prepare makes it of parcels A0, A1, ... and names in a column of their own."""
    folder = write_folder(tmp_path_factory.mktemp("data") / "set", n_parcels=15)
    write_meta(folder, "classes", {"label_44class": NAMES})
    path = write_outlines(folder / "META" / "parcels.gpkg", range(1, 16))
    table = geopandas.read_file(path)
    table["parcel"] = [f"A{i}" for i in table["id"]]
    path.unlink()
    table.to_file(path, layer="parcels")
    return folder


@pytest.fixture(scope="module")
def weights(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_train(folder, tmp_path_factory.mktemp("run") / "res", "--epochs 1", monkeypatch)


def test_table_suspects_and_areas(predict: Predict, tmp_path: Path) -> None:
    options = f"--doubt 0.4 --map {tmp_path / 'map.png'}"
    output = predict(options)
    with open(output / "predictions.csv", newline="") as file:
        header = next(csv.reader(file))
    told = ["parcel", "true_name", "predicted_name", "doubt"]
    assert header == [*FIRST, *told, *(f"probability_{label}" for label in (1, 3, 9))]
    rows = read_table(output)
    doubts = [row["doubt"] for row in rows]
    for row, doubt in zip(rows, doubts):
        assert row["parcel"] == f"A{row['id']}" and doubt == str(int(float(row["confidence"]) < 0.4))
        for which in ("true", "predicted"):
            label = row[f"{which}_label"]
            assert row[f"{which}_name"] == NAMES.get(label, label)
    wrong = {row["parcel"] for row in rows if row["true_name"] != row["predicted_name"]}
    suspects = list(read_rows(output / "suspects.csv"))
    assert wrong and {row["parcel"] for row in suspects} == wrong
    assert list(suspects[0])[:4] == ["id", "parcel", "true_label", "true_name"]
    frame = geopandas.read_file(output / "predictions.gpkg")
    assert frame["parcel"].tolist() == [row["parcel"] for row in rows]
    assert frame["doubt"].astype(int).astype(str).tolist() == doubts
    areas = list(read_rows(output / "areas.csv"))
    assert [(row["label"], row["name"]) for row in areas] == [("1", "Wheat"), ("3", "Maize"), ("9", "9")]
    predicted = [row["predicted_label"] for row in rows]
    # Of the first square: a polygon of 64 corners, radius 30 m.
    hole = 4 * 900 * np.sin(np.pi / 32) * 8 / 10_000
    for row in areas:
        n = predicted.count(row["label"])
        assert int(row["parcels"]) == n and float(row["share"]) == pytest.approx(n / 15, abs=1e-6)
        expected = n - (predicted[0] == row["label"]) * hole
        assert float(row["hectares"]) == pytest.approx(expected, rel=2e-3)
    assert sum(float(row["share_of_hectares"]) for row in areas) == pytest.approx(1, abs=1e-5)


def test_in_python_they_are_the_same_words(folder: Path, weights: Path, predict: Predict) -> None:
    predicted = open_run(weights).predict(folder, device="cpu")
    rows = read_table(predict())
    for name, column in predicted.told.items():
        assert [row[name] for row in rows] == list(map(str, column))
    assert predicted.told["parcel"][:2] == ["A1", "A2"] and "predicted_name" in predicted.told


def test_outlines_of_the_agency_itself(
    folder: Path, predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """With its ids, in another order, one missing and one more, moved so that they can be told from the dataset's."""
    table = geopandas.read_file(folder / "META" / "parcels.gpkg").rename(columns={"parcel": "FIELD"})
    table = table.drop(columns="id").translate(7).to_frame("geometry").assign(FIELD=table["FIELD"])
    table.loc[0, "FIELD"] = "B77"
    table[::-1].to_file(tmp_path / "agency.gpkg")
    options = f"--parcels {tmp_path / 'agency.gpkg'} --id_column FIELD"
    output = predict(options)
    said = capsys.readouterr().out
    assert "1 of 15 parcels have none" in said and "1 are of no parcel" in said
    frame = geopandas.read_file(output / "predictions.gpkg").set_index("parcel")
    assert sorted(frame.index) == sorted(f"A{i}" for i in range(2, 16))
    for own, outline in zip(table["FIELD"], table.geometry):
        assert own == "B77" or frame.loc[own].geometry.equals(outline)
    rows = {row["parcel"]: row for row in read_table(output)}
    assert all(frame.loc[own, "predicted_label"] == rows[own]["predicted_label"] for own in frame.index)


def test_labels_of_the_agency_itself(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("FIELD,crop\nA3,maize\nA1,wheat\nB77,rape\n")
    labels = DataSettings(labels_table=LabelsTable(str(tmp_path / "t.csv"), "FIELD", "crop")).labels_in(
        folder
    )
    assert labels == {"3": "maize", "1": "wheat"}  # no parcel of the dataset is B77


@pytest.mark.parametrize(
    "names, expected",
    [
        (["1", "3", "9"], ["1", "3", "9"]),  # the dataset's
        (["2", "3", "A"], ["1", "2", "3"]),  # their own, which look alike
        (["A", "B"], ["3", None]),
        (["B", "C"], ["B", "C"]),
    ],
)
def test_ids_are_the_kind_that_more_of_them_are(names: list[str], expected: list[str | None]) -> None:
    assert to_dataset_ids(names, {"1": "2", "2": "3", "3": "A", "9": "X"}) == expected
    assert to_dataset_ids(names, {}) == names


def test_areas_without_outlines_and_of_parcels_never_observed(tmp_path: Path) -> None:
    predicted = np.array([0, 1, 1, -1])
    none, some = np.zeros(4), np.array([0.5, 0.49, 1, np.nan])
    predictions = Predictions(
        [*"1234"],
        predicted,
        predicted,
        some,
        some,
        np.empty((4, 0)),
        none,
        none,
        [1, 3, 9],
        Telling({}, NAMES),
    )
    rows = list(read_rows(write_areas(predictions, None, tmp_path)))
    assert predictions.told["doubt"] == [0, 1, 0, None]
    assert list(predictions.told) == ["true_name", "predicted_name", "doubt"]
    assert list(predictions._replace(telling=Telling()).told) == ["doubt"]  # where nothing else is known
    assert [row["parcels"] for row in rows] == ["1", "2", "0", "1"]
    assert [row["label"] for row in rows] == ["1", "3", "9", ""]
    assert [row["share"] for row in rows] == ["0.333333", "0.666667", "0", ""]
    assert {row["hectares"] + row["share_of_hectares"] for row in rows} == {""}


def test_own_ids_need_no_geographic_library(folder: Path, tmp_path: Path) -> None:
    assert read_own_ids(folder) == {str(i): f"A{i}" for i in range(1, 16)}
    assert read_own_ids(tmp_path) == {}
    write_outlines(tmp_path / "whole" / "META" / "parcels.gpkg", range(3))  # ids that are whole numbers
    assert read_own_ids(tmp_path / "whole") == {}
    path = tmp_path / "META" / "parcels.gpkg"
    path.parent.mkdir()
    path.touch()
    assert read_own_ids(tmp_path) == {}
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE fields (id, parcel)")
    other.close()
    assert read_own_ids(tmp_path) == {}
    path.write_bytes(b"no database, but as long as the head of one" * 10)
    with pytest.raises(UserError, match="parcels.gpkg is damaged"):
        read_own_ids(tmp_path)
