"""The simulated images and outlines: what they promise, and that they go through preparation."""

import json
from pathlib import Path

import numpy as np
import pytest

from preprocessing import simulate
from preprocessing.simulation.crops import CROPS, TYPICAL
from preprocessing.simulation.seasons import DATES
from tests.commands import run_command
from tests.rasters import geopandas, rasterio

from preprocessing import prepare  # isort: skip  # after the packages are known to be there


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rasters") / "simulated"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_command(simulate.main, f"{path} --rasters --parcels 150 --seed 3", monkeypatch)
    return path


def test_images(folder):
    paths = sorted((folder / "images").iterdir())
    assert [path.name for path in paths] == [f"sim_{day}.tif" for day in DATES]
    for path in paths:
        with rasterio.open(path) as file:
            assert file.descriptions[:2] == ("B2", "B3") and file.descriptions[10] == "CLOUD"
            assert (file.dtypes[0], file.crs, file.res, file.nodata) == (
                "uint16",
                "EPSG:32631",
                (10, 10),
                None,
            )
            values = file.read()
        assert values[:10].min() >= 1 and values[:10].max() < 10_000
        assert set(np.unique(values[10])) <= {0, 1, 2}


def test_outlines_of_every_kind(folder):
    table = geopandas.read_file(folder / "parcels.gpkg")
    assert list(table["parcel"]) == list(range(1, 151))
    assert set(table["crop"]) == {crop.name for crop in CROPS}
    assert table.is_valid.all()
    parts = [list(getattr(outline, "geoms", [outline])) for outline in table.geometry]
    assert any(len(polygons) > 1 for polygons in parts)
    assert any(polygon.interiors for polygons in parts for polygon in polygons)
    pairs = table.sindex.query(table.geometry, predicate="overlaps")
    assert pairs.shape[1] >= 2


def test_the_seed_decides(folder, tmp_path, monkeypatch):
    for seed in (3, 4):
        run_command(
            simulate.main, f"{tmp_path / str(seed)} --rasters --parcels 150 --seed {seed}", monkeypatch
        )
    names = ["images/sim_20170513.tif", "images/sim_20171015.tif"]
    expected, same, other = (
        [rasterio.open(path / name).read() for name in names]
        for path in (folder, tmp_path / "3", tmp_path / "4")
    )
    assert all(np.array_equal(a, b) for a, b in zip(expected, same))
    assert not any(np.array_equal(a, b) for a, b in zip(expected, other))


def test_prepared_parcels_grow_their_crop(folder, tmp_path, monkeypatch):
    """Without clouds, the mean series of a crop is close to its growth curve; with them, it is not."""
    for name, options in (
        ("clear", "--cloud_mask CLOUD --clear 0"),
        ("all", "--bands B2 B3 B4 B5 B6 B7 B8 B8A B11 B12"),
    ):
        run_command(
            prepare.main,
            f"--images {folder / 'images'} --parcels {folder / 'parcels.gpkg'} --output {tmp_path / name} "
            f"--id_column parcel --label_column crop {options}",
            monkeypatch,
        )
    labels = json.loads((tmp_path / "clear" / "META" / "labels.json").read_text())["crop"]
    errors = {"clear": [], "all": []}
    for parcel, label in labels.items():
        typical = TYPICAL[[crop.name for crop in CROPS].index(label)]
        for name, errors_ in errors.items():
            values = np.load(tmp_path / name / "DATA" / f"{parcel}.npy")
            seen = (values != 65535).any(1)
            means = [date[:, there].mean(1) for date, there in zip(values, seen) if there.any()]
            errors_.append(np.abs(means - typical[seen.any(1)]).max())
    assert np.median(errors["clear"]) < 1200 < np.median(errors["all"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--parcels 0", "parcels is 0"),
        ("--parcels 5 --max_pixels 4", "no meaning with --rasters"),
    ],
)
def test_wrong_options(tmp_path, monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        run_command(simulate.main, f"{tmp_path / 'new'} --rasters {options}", monkeypatch)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_in_use_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit):
        run_command(simulate.main, f"{tmp_path} --rasters --parcels 5", monkeypatch)
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
