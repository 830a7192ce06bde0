"""Mean and standard deviation, sizes and geometrical features of a folder, against plain NumPy."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from data import moments
from data.moments import Moments
from preprocessing import statistics
from tests.commands import run_command
from tests.folders import write_folder, write_meta

AXES = {"date": 2, "channel": (0, 2), "all": None}


def load_all(folder: Path) -> np.ndarray:
    """Pixels of all parcels, (T, C, P)."""
    return np.concatenate([np.load(path) for path in (folder / "DATA").iterdir()], axis=2).astype(np.float64)


def load_norm(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    return pickle.loads((folder / "normalisation_values.pkl").read_bytes())


@pytest.mark.parametrize("per", AXES)
@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32, np.float64])
def test_mean_and_deviation(tmp_path, monkeypatch, per, dtype):
    monkeypatch.setattr(moments, "_MOST_PIXELS", 7)
    folder = write_folder(tmp_path / "data", dtype=dtype)
    run_command(statistics.main, f"{folder} --per {per}", monkeypatch)
    values = load_all(folder)
    mean, std = load_norm(folder)
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, values.mean(AXES[per]), rtol=1e-6)
    np.testing.assert_allclose(std, values.std(AXES[per]), rtol=1e-6)


@pytest.mark.parametrize("nodata", [None, 0])
def test_missing_pixels_do_not_count(tmp_path, monkeypatch, nodata):
    folder = write_folder(tmp_path / "data", dtype=np.float32 if nodata is None else np.uint16)
    gap = np.nan if nodata is None else nodata
    for i, path in enumerate(sorted((folder / "DATA").iterdir())):
        values = np.load(path)
        values[i % 5, :, ::2] = gap
        values[2, 1, 0] = (
            values[2, 1, 0] if nodata is None else nodata
        )  # one channel alone is a value like others
        np.save(path, values)
    write_meta(folder, "info", {"nodata": nodata})
    run_command(statistics.main, str(folder), monkeypatch)
    values = load_all(folder)
    missing = (np.isnan(values) if nodata is None else values == nodata).all(1, keepdims=True)
    assert missing.any()
    values = np.ma.masked_where(np.broadcast_to(missing, values.shape), values)
    np.testing.assert_allclose(load_norm(folder)[0], values.mean(2), rtol=1e-6)
    np.testing.assert_allclose(load_norm(folder)[1], values.std(2), rtol=1e-6)


def test_numerically_stable():
    """A mean that is a billion times the deviation, in pieces."""
    values = 1e9 + np.random.default_rng(0).normal(0, 1, (2, 3, 5000))
    sums = Moments("date")
    for part in np.array_split(values, 50, axis=2):
        sums.add(part)
    np.testing.assert_allclose(sums.result()[1], values.std(2), rtol=1e-6)


def test_what_never_varies_is_divided_by_one():
    sums = Moments("date")
    sums.add(np.full((2, 1, 4), 5), np.array([[False] * 4, [True] * 4]))
    mean, std = sums.result()
    assert mean.tolist() == [[5], [0]] and std.tolist() == [[1], [1]]


def test_dates_of_their_own_give_statistics_per_channel(tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "data")
    np.save(folder / "DATA" / "3.npy", np.load(folder / "DATA" / "3.npy")[:2])
    run_command(statistics.main, str(folder), monkeypatch)
    values = [np.load(p).transpose(1, 0, 2).reshape(4, -1) for p in (folder / "DATA").iterdir()]
    np.testing.assert_allclose(load_norm(folder)[0], np.concatenate(values, 1).mean(1), rtol=1e-6)
    with pytest.raises(SystemExit):
        run_command(statistics.main, f"{folder} --per date --overwrite", monkeypatch)
    assert "from 2 to 5 dates" in capsys.readouterr().err


def test_only_what_is_lacking_is_written(tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "data")
    sizes = (folder / "META" / "sizes.json").read_bytes()
    (folder / "META" / "sizes.json").write_text("{}")
    run_command(statistics.main, str(folder), monkeypatch)
    assert (folder / "META" / "sizes.json").read_text() == "{}"
    norm = load_norm(folder)
    run_command(statistics.main, str(folder), monkeypatch)
    assert "already; --overwrite" in capsys.readouterr().out
    run_command(statistics.main, f"{folder} --overwrite", monkeypatch)
    assert json.loads((folder / "META" / "sizes.json").read_text()) == json.loads(sizes)
    np.testing.assert_array_equal(load_norm(folder), norm)


def test_the_published_name_stays(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "data", statistics=True)
    published = folder / "S2-2017-T31TFM-meanstd.pkl"
    expected = pickle.loads(published.read_bytes())
    published.write_bytes(b"other")
    run_command(statistics.main, str(folder), monkeypatch)
    assert published.read_bytes() == b"other"
    run_command(statistics.main, f"{folder} --overwrite", monkeypatch)
    np.testing.assert_allclose(pickle.loads(published.read_bytes()), expected, rtol=1e-6)
    assert not (folder / "normalisation_values.pkl").exists()


def test_geometrical_features(tmp_path, monkeypatch):
    geopandas = pytest.importorskip("geopandas", reason="needs requirements-geo.txt")
    from shapely import Polygon, box

    folder = write_folder(tmp_path / "data", n_parcels=3, sizes=[12, 12, 6])
    outlines = [box(0, 0, 30, 40), box(100, 0, 140, 30), Polygon([(0, 100), (30, 100), (0, 140)])]
    table = geopandas.GeoDataFrame({"id": [1, 2, 3]}, geometry=outlines, crs="EPSG:32631")
    table.to_file(folder / "META" / "parcels.gpkg")
    run_command(statistics.main, f"{folder} --overwrite", monkeypatch)
    found = json.loads((folder / "META" / "geomfeat.json").read_text())
    expected = {
        "1": [140, 1200, 1, 140 / 1200],
        "2": [140, 1200, 1, 140 / 1200],
        "3": [120, 600, 0.5, 0.2],
    }
    assert found.keys() == expected.keys()
    for parcel, values in expected.items():
        assert found[parcel] == pytest.approx(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no array", "1.npy is not a NumPy array file"),
        (np.zeros((5, 3, 2)), "2.npy has 4 channels, but"),
        (np.zeros((5, 4, 2, 1)), "1.npy has shape (5, 4, 2, 1)"),
        (np.array([[[np.nan], [1], [1], [1]]] * 5), "NaN in some of its channels only"),
    ],
)
def test_wrong_files_are_named(tmp_path, monkeypatch, capsys, content, message):
    folder = write_folder(tmp_path / "data")
    if isinstance(content, bytes):
        (folder / "DATA" / "1.npy").write_bytes(content)
    else:
        np.save(folder / "DATA" / "1.npy", content)
    with pytest.raises(SystemExit) as stop:
        run_command(statistics.main, str(folder), monkeypatch)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not (folder / "normalisation_values.pkl").exists()


def test_no_folder(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_command(statistics.main, str(tmp_path / "nowhere"), monkeypatch)
    assert "is not a folder" in capsys.readouterr().err
