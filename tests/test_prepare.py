"""From images and outlines to a dataset folder, against a plain loop with rasterio.mask."""

import csv
import json
import os
import pickle
import re
import sqlite3
import subprocess
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from tests.commands import run_command
from tests.processes import PATIENCE, contents, kill_at_every_stage, start, wait
from tests.rasters import (
    LEFT,
    SIDE,
    TOP,
    difficult_outlines,
    geopandas,
    random_values,
    rasterio,
    read_data,
    read_meta,
    read_plainly,
    square,
    write_image,
    write_parcels,
)

# isort: split
# After the packages are known to be there.
from data.days import read_days
from data.packing import open_store
from preprocessing import prepare, statistics
from preprocessing.images import extract, grids, layout, pixelsets, workers

ROOT = Path(__file__).resolve().parent.parent
DAYS = ("20170103", "2017-02-14", "20170520")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """One image of three bands per date."""
    return [
        write_image(tmp_path / "images" / f"tile_{day}.tif", random_values(i)) for i, day in enumerate(DAYS)
    ]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs prepare on the images and parcels of the test's folder, and returns the dataset folder."""

    def command(options: str = "", output: str = "dataset", images: str = "images") -> Path:
        run_command(
            prepare.main,
            f"--images '{tmp_path / images}' --parcels {tmp_path / 'parcels.gpkg'} --output {tmp_path / output} {options}",
            monkeypatch,
        )
        return tmp_path / output

    return command


def left_out(folder: Path) -> dict[str, str]:
    with open(folder / "META" / "left_out.csv", newline="") as file:
        return {row["parcel"]: row["reason"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("buffer", [0, 15, -10])
@pytest.mark.parametrize("crs", ["EPSG:32631", "EPSG:4326"])
def test_every_parcel_has_the_pixels_of_a_plain_loop(images, run, tmp_path, buffer, crs):
    outlines = geopandas.GeoSeries(difficult_outlines(), crs="EPSG:32631").to_crs(crs)
    write_parcels(tmp_path / "parcels.gpkg", outlines, crs)
    data = read_data(run(f"--buffer {buffer}"))
    grown = outlines.to_crs("EPSG:32631").buffer(buffer) if buffer else outlines.to_crs("EPSG:32631")
    present = {str(i + 1): outline for i, outline in enumerate(grown) if not outline.is_empty}
    assert set(data) == set(present) and len(data) >= 7
    for parcel, outline in present.items():
        np.testing.assert_array_equal(data[parcel], read_plainly(images, outline), strict=True)


def test_everything_beside_the_pixels(images, run, tmp_path):
    outlines = difficult_outlines()
    crops = ["wheat", "maize"] * 4
    write_parcels(tmp_path / "parcels.gpkg", outlines, crop=crops, plot=[f"p{i}" for i in range(8)])
    folder = run("--label_column crop --id_column plot")
    data, keys = read_data(folder), [str(i + 1) for i in range(8)]
    assert read_meta(folder, "labels") == {"crop": dict(zip(keys, crops))}
    assert read_meta(folder, "dates") == {"0": 20170103, "1": 20170214, "2": 20170520}
    assert read_meta(folder, "sizes") == {key: data[key].shape[2] for key in keys}
    info = read_meta(folder, "info")
    assert (info["bands"], info["crs"], info["nodata"]) == (["1", "2", "3"], "EPSG:32631", 65535)
    for key, outline in zip(keys, outlines):
        perimeter, area, filled, ratio = read_meta(folder, "geomfeat")[key]
        assert (perimeter, area, ratio) == pytest.approx(
            (outline.length, outline.area, outline.length / outline.area)
        )
        with rasterio.open(images[0]) as file:
            inside = ~rasterio.features.geometry_mask([outline], file.shape, file.transform)
        rows, columns = np.nonzero(inside)
        assert filled == pytest.approx(len(rows) / (np.ptp(rows) + 1) / (np.ptp(columns) + 1))
    pixels = np.concatenate(list(data.values()), axis=2).astype(np.float64)
    mean, std = pickle.loads((folder / "normalisation_values.pkl").read_bytes())
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, pixels.mean(2), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std(2), rtol=1e-6)
    table = geopandas.read_file(folder / "META" / "parcels.gpkg")
    assert (list(table["id"]), list(table["label"]), table.crs) == (list(range(1, 9)), crops, "EPSG:32631")
    assert list(table["parcel"]) == [f"p{i}" for i in range(8)]
    assert all(a.equals(b) for a, b in zip(table.geometry, outlines))
    assert left_out(folder) == {}


def test_whole_ids_and_labels_stay(images, run, tmp_path):
    write_parcels(
        tmp_path / "parcels.gpkg", difficult_outlines()[:3], code=[4.0, 9.0, None], plot=["70", "5", "12"]
    )
    folder = run("--label_column code --id_column plot")
    assert read_meta(folder, "labels") == {"code": {"5": 9, "70": 4}}
    assert set(read_data(folder)) == {"5", "12", "70"}  # without a label it can be predicted
    assert left_out(folder) == {} and read_meta(folder, "prepared")["unlabelled"] == 1
    assert not (folder / "META" / "classes.json").exists()


def test_names_of_classes(images, run, tmp_path):
    columns = {"code": [4, 9, 4], "crop": ["maize", "wheat", "maize"]}
    write_parcels(tmp_path / "parcels.gpkg", difficult_outlines()[:3], **columns)
    folder = run("--label_column code --class_column crop")
    assert read_meta(folder, "classes") == {"code": {"4": "maize", "9": "wheat"}}
    folder = run("--label_column crop", output="other")
    assert read_meta(folder, "classes") == {"crop": {"maize": "maize", "wheat": "wheat"}}


def test_reasons_of_those_left_out(images, run, tmp_path, capsys):
    outlines = [square(50, 50, 200), square(500, 500, 20), square(5000, 0, 50), square(301, 301, 3)]
    write_parcels(tmp_path / "parcels.gpkg", outlines, plot=["a", "b", "c", "d"])
    folder = run("--id_column plot --min_pixels 5")
    assert set(read_data(folder)) == {"1"}
    outside = "no pixel centre inside, or outside all images"
    assert left_out(folder) == {"b": "fewer pixels than --min_pixels 5", "c": outside, "d": outside}
    assert f"left out 2: {outside}\n" in capsys.readouterr().out


@pytest.mark.parametrize("side", [16, 40, 1024])
def test_tiles_are_one_mosaic_and_the_first_valid_image_wins(run, tmp_path, monkeypatch, side):
    """Two tiles that overlap by 200 m; in the first, part of the overlap is missing."""
    monkeypatch.setattr(grids, "_SIDE", side)
    merged = []
    for i, day in enumerate(DAYS):
        whole, other = random_values(i, 3, SIDE, 172), random_values(10 + i)
        first = whole[:, :, :SIDE].copy()
        first[1, 30:50, 80:90] = 0  # one channel missing: all are
        whole[:, :, SIDE:] = other[:, :, 20:]
        whole[:, 30:50, 80:90] = other[:, 30:50, 4:14]
        write_image(tmp_path / "images" / f"a_{day}.tif", first, nodata=0)
        write_image(tmp_path / "images" / f"b_{day}.tif", other, LEFT + 760, nodata=0)
        merged.append(write_image(tmp_path / "merged" / f"{day}.tif", whole))
    outlines = [square(650, 150, 420, 400), square(900, 20, 150), square(20, 20, 150), square(700, 300, 200)]
    write_parcels(tmp_path / "parcels.gpkg", outlines)
    folder = run()
    for parcel, values in read_data(folder).items():
        np.testing.assert_array_equal(values, read_plainly(merged, outlines[int(parcel) - 1]))
    assert len(read_data(folder)) == 4 and read_meta(folder, "info")["nodata"] == 0


def test_tiles_of_different_dates_give_dates_per_parcel(run, tmp_path):
    a = [
        write_image(tmp_path / "images" / f"a_{day}.tif", random_values(i)) for i, day in enumerate(DAYS[:2])
    ]
    b = [
        write_image(tmp_path / "images" / f"b_{day}.tif", random_values(9), LEFT + 10 * SIDE)
        for day in DAYS[1:]
    ]
    outlines = [square(100, 100, 200), square(1200, 100, 200), square(860, 500, 200)]
    write_parcels(tmp_path / "parcels.gpkg", outlines)
    folder = run()
    data = read_data(folder)
    assert read_meta(folder, "dates") == {
        "1": [20170103, 20170214],
        "2": [20170214, 20170520],
        "3": [20170103, 20170214, 20170520],
    }
    np.testing.assert_array_equal(data["1"], read_plainly(a, outlines[0]))
    np.testing.assert_array_equal(data["2"], read_plainly(b, outlines[1]))
    left, right = read_plainly(a, outlines[2]), read_plainly(b, outlines[2])
    columns = np.tile(np.arange(20) < 10, 20)  # of the pixels, row by row: in the left tile
    expected = np.full((3, 3, 400), 65535, np.uint16)
    expected[:2, :, columns], expected[1:, :, ~columns] = left, right
    np.testing.assert_array_equal(data["3"], expected)
    mean, _ = pickle.loads((folder / "normalisation_values.pkl").read_bytes())
    values = np.concatenate([v.transpose(1, 0, 2).reshape(3, -1) for v in data.values()], axis=1)
    np.testing.assert_allclose(mean, values[:, values[0] < 65535].mean(1), rtol=1e-6)
    packed = run("--packed", output="packed")
    store, days = open_store(packed), [read_days(each, [1, 2, 3]) for each in (folder, packed)]
    for place, parcel in enumerate(store.ids):
        np.testing.assert_array_equal(store.parcel(place).transpose(1, 2, 0), data[str(parcel)], strict=True)
    for first, second in zip(*days, strict=True):  # days and how many each parcel has
        np.testing.assert_array_equal(first, second)
    expected, found = contents(folder), contents(packed)
    changed = {name for name in found if expected.get(name) != found[name] and not name.startswith("PIXELS")}
    assert changed <= {"META/parcels.gpkg"} and not (packed / "META" / "dates.json").exists()


def test_parcels_at_the_border_of_two_utm_zones(run, tmp_path):
    """Each comes whole from the zone whose images hold most of it."""
    centre = geopandas.points_from_xy([6.0], [45.0], crs="EPSG:4326")
    places = {}
    for zone in ("EPSG:32631", "EPSG:32632"):
        x, y = (round(float(v) / 10) * 10 for v in (centre.to_crs(zone).x[0], centre.to_crs(zone).y[0]))
        left = x - 860 if zone == "EPSG:32631" else x - 100  # 100 m overlap on either side of the border
        places[zone] = [
            write_image(tmp_path / "images" / f"{zone[-2:]}_{day}.tif", random_values(i), left, y + 480, zone)
            for i, day in enumerate(DAYS)
        ]
    outlines = [
        geopandas.GeoSeries(centre.to_crs("EPSG:32631")).translate(shift, 0).buffer(70, cap_style="square")
        for shift in (-300, -40, 60, 300)
    ]
    outlines = geopandas.GeoSeries([series.iloc[0] for series in outlines], crs="EPSG:32631")
    write_parcels(tmp_path / "parcels.gpkg", outlines.to_crs("EPSG:4326"), "EPSG:4326")
    folder = run()
    data = read_data(folder)
    outlines = outlines.to_crs("EPSG:4326")
    for i, zone in enumerate(["EPSG:32631", "EPSG:32631", "EPSG:32632", "EPSG:32632"]):
        expected = read_plainly(places[zone], outlines.to_crs(zone).iloc[i])
        np.testing.assert_array_equal(data[str(i + 1)], expected)
    assert geopandas.read_file(folder / "META" / "parcels.gpkg").crs == "EPSG:32631"


def cloudy(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of three bands, and a mask in blocks of two pixels with the values 0 to 3."""
    mask = np.random.default_rng(seed).integers(0, 4, (SIDE // 2, SIDE // 2)).astype(np.uint16)
    return random_values(seed), mask


@pytest.mark.parametrize("kind", ["band", "file", "coarse file", "file per band", "stac"])
def test_clouds_are_missing_in_all_channels(run, tmp_path, monkeypatch, kind):
    names, expected, features = ("blue", "red", "nir", "SCL"), [], []
    for i, day in enumerate(DAYS):
        values, coarse = cloudy(i)
        mask = coarse.repeat(2, 0).repeat(2, 1)
        every = np.concatenate((values, mask[None]))
        item = {"id": day, "properties": {"datetime": f"2017-0{i + 1}-03T10:00:00Z"}, "assets": {}}
        if kind == "band":
            write_image(tmp_path / "images" / f"{day}.tif", every, names=names)
        elif kind == "coarse file":
            write_image(tmp_path / "images" / f"{day}.tif", values, names=names[:3])
            write_image(tmp_path / "images" / f"{day}_SCL.tif", coarse[None], size=20)
        elif kind == "file":
            write_image(tmp_path / "images" / f"{day}.tif", values, names=names[:3])
            write_image(tmp_path / "masks" / f"clouds_{day}.tif", mask[None])
        else:
            for name, band in zip(names, every):
                path = write_image(tmp_path / "images" / f"T31_{day}_{name}_10m.tif", band[None])
                item["assets"][name] = {"href": f"images/{path.name}", "roles": ["data"]}
        item["assets"]["thumbnail"] = {"href": "https://example.org/a.jpg", "roles": ["thumbnail"]}
        features.append(item)
        values[:, (mask != 1) & (mask != 2)] = 65535
        expected.append(write_image(tmp_path / "expected" / f"{day}.tif", values))
    (tmp_path / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    outlines = difficult_outlines()
    write_parcels(tmp_path / "parcels.gpkg", outlines)
    pattern = {"file": tmp_path / "masks" / "*.tif", "coarse file": "*_SCL.tif"}.get(kind, "SCL")
    bands = "" if kind == "stac" else "--bands blue red nir"
    folder = run(
        f"--cloud_mask '{pattern}' --clear 1 2 {bands}", images="items.json" if kind == "stac" else "images"
    )
    data = read_data(folder)
    assert read_meta(folder, "info")["bands"] == ["blue", "red", "nir"] and len(data) >= 7
    for parcel, values in data.items():
        np.testing.assert_array_equal(values, read_plainly(expected, outlines[int(parcel) - 1]))
    missing = (read_plainly(expected, outlines[7]) == 65535).all()
    assert ("8" in left_out(folder)) == missing
    mean, std = pickle.loads((folder / "normalisation_values.pkl").read_bytes())
    pixels = np.ma.masked_equal(np.concatenate(list(data.values()), axis=2), 65535)
    np.testing.assert_allclose(mean, pixels.mean(2), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std(2), rtol=1e-6)
    sizes = read_meta(folder, "sizes")
    run_command(statistics.main, f"{folder} --overwrite", monkeypatch)
    again = pickle.loads((folder / "normalisation_values.pkl").read_bytes())
    np.testing.assert_allclose(again, (mean, std), rtol=1e-6)
    assert read_meta(folder, "sizes") == sizes


def test_scaled_values_are_float_with_nan(images, run, tmp_path):
    outlines = difficult_outlines()
    write_parcels(tmp_path / "parcels.gpkg", outlines)
    folder = run("--scale 0.0001 --nodata 7")
    for parcel, values in read_data(folder).items():
        expected = read_plainly(images, outlines[int(parcel) - 1])
        gaps = (expected == 7).any(1)
        assert values.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(values).any(1), gaps)
        np.testing.assert_array_equal(np.isnan(values).all(1), gaps)
        np.testing.assert_allclose(values[:, 0][~gaps], expected[:, 0][~gaps] * 1e-4, rtol=1e-6)
    assert read_meta(folder, "info")["nodata"] is None


def test_floating_point_images_keep_nan(run, tmp_path):
    values = random_values(1).astype(np.float32)
    values[0, 20:30] = np.nan
    values[2, 40:45] = -9999
    path = write_image(tmp_path / "images" / "20170103.tif", values, nodata=-9999)
    write_parcels(tmp_path / "parcels.gpkg", difficult_outlines()[:5])
    for parcel, found in read_data(run()).items():
        expected = read_plainly([path], difficult_outlines()[int(parcel) - 1])
        expected[:, :, (np.isnan(expected) | (expected == -9999)).any(1)[0]] = np.nan
        np.testing.assert_array_equal(found, expected)


def test_bands_in_the_order_asked_for(images, run, tmp_path):
    write_parcels(tmp_path / "parcels.gpkg", difficult_outlines()[:1])
    data = read_data(run("--bands 3 1"))["1"]
    np.testing.assert_array_equal(data, read_plainly(images, difficult_outlines()[0])[:, [2, 0]])


def test_little_memory_and_small_blocks_change_nothing(images, run, tmp_path, monkeypatch):
    write_parcels(tmp_path / "parcels.gpkg", difficult_outlines())
    expected = read_data(run())
    monkeypatch.setattr(grids, "_SIDE", 32)
    monkeypatch.setattr(layout, "_CHUNK", 100)
    monkeypatch.setattr(layout, "_CELL", 32)
    data = read_data(run("--memory 0.05", "again"))
    assert data.keys() == expected.keys()
    for parcel, values in data.items():
        np.testing.assert_array_equal(values, expected[parcel])


def test_parcels_are_cut_piece_by_piece(images, run, tmp_path, monkeypatch):
    write_parcels(tmp_path / "parcels.gpkg", difficult_outlines())
    expected, cut = read_data(run()), pixelsets._cut
    monkeypatch.setattr(pixelsets, "_cut", lambda *arguments: cut(*arguments[:-1], 3 * 3 * 2 * 500))
    data = read_data(run(output="again"))
    assert data.keys() == expected.keys()
    for parcel, values in data.items():
        np.testing.assert_array_equal(values, expected[parcel])


def test_between_tiles_there_are_no_pixels(run, tmp_path):
    """Two tiles that touch at a corner: parcels in the mosaic's empty quarters."""
    for day in DAYS:
        write_image(tmp_path / "images" / "a" / f"{day}.tif", random_values(0))
        write_image(tmp_path / "images" / "b" / f"{day}.tif", random_values(1), LEFT + 960, TOP - 960)
    outlines = [square(1100, 100, 200), square(860, 860, 200)]
    write_parcels(tmp_path / "parcels.gpkg", outlines)
    folder = run()
    data = read_data(folder)["2"]
    assert left_out(folder).keys() == {"1"} and data.shape == (3, 3, 200)
    np.testing.assert_array_equal(data[0, :, :100].reshape(3, 10, 10), random_values(0)[:, 86:, 86:])
    np.testing.assert_array_equal(data[0, :, 100:].reshape(3, 10, 10), random_values(1)[:, :10, :10])


@pytest.fixture
def scheduler(tmp_path: Path):
    """Address of a Dask scheduler that does not know this repository, with a worker that does."""
    distributed = pytest.importorskip("dask.distributed", reason="needs requirements-geo.txt")
    file, command = tmp_path / "scheduler.json", [sys.executable, "-m", "dask"]
    options = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", file]
    processes = [subprocess.Popen([*command, *start], **options)]
    try:
        while not file.exists():
            assert processes[0].poll() is None
            time.sleep(0.05)
        address = json.loads(file.read_text())["address"]
        start = ["worker", address, "--no-nanny", "--nthreads", "2", "--no-dashboard"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        processes.append(subprocess.Popen([*command, *start], env=environment, **options))
        with distributed.Client(address) as client:
            client.wait_for_workers(1, timeout=PATIENCE)
        yield address
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_dask_workers_read_the_same(images, run, tmp_path, monkeypatch, scheduler):
    write_parcels(tmp_path / "parcels.gpkg", difficult_outlines())
    expected = read_data(run())
    monkeypatch.setattr(grids, "_SIDE", 32)
    data = read_data(run(f"--scheduler {scheduler}", "dask"))
    for parcel, values in expected.items():
        np.testing.assert_array_equal(data[parcel], values)


@pytest.mark.parametrize("known", [True, False])
def test_dask_workers_that_cannot(images, run, tmp_path, monkeypatch, capsys, known):
    """A worker that misses the images, or this code; one sentence before anything is read."""
    distributed = pytest.importorskip("dask.distributed", reason="needs requirements-geo.txt")
    write_parcels(tmp_path / "parcels.gpkg", difficult_outlines())
    if known:
        monkeypatch.setattr(workers.os.path, "exists", lambda path: False)
    else:
        monkeypatch.setattr(workers, "callable", lambda _: 1 / 0, raising=False)
    with distributed.LocalCluster(1, processes=False, dashboard_address=None) as cluster:
        with pytest.raises(SystemExit):
            run(f"--scheduler {cluster.scheduler_address}")
    assert ("does not see" if known else "cannot run this code") in capsys.readouterr().err


def test_a_stopped_run_goes_on_after_the_last_date(images, run, tmp_path, monkeypatch):
    write_parcels(tmp_path / "parcels.gpkg", difficult_outlines())
    expected = read_data(run(output="expected"))
    read, dates = extract.read_pixels, []

    def stops(image, *arguments):
        if image.date == 20170520 and 20170214 in dates:
            raise MemoryError
        dates.append(image.date)
        return read(image, *arguments)

    monkeypatch.setattr(extract, "read_pixels", stops)
    with pytest.raises(MemoryError):
        run()
    assert not (tmp_path / "dataset").exists()
    dates.clear()
    data = read_data(run())
    assert set(dates) == {20170520}
    assert data.keys() == expected.keys()
    for parcel, values in data.items():
        np.testing.assert_array_equal(values, expected[parcel])
    assert not list(tmp_path.glob(".dataset*"))


def test_other_options_start_anew(images, run, tmp_path, monkeypatch):
    write_parcels(tmp_path / "parcels.gpkg", difficult_outlines())
    monkeypatch.setattr(prepare, "write_csv", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        run("--bands 1")
    monkeypatch.undo()
    assert len(list(tmp_path.glob(".dataset-*"))) == 1
    assert read_data(run("--bands 2"))["1"].shape[1] == 1
    assert not list(tmp_path.glob(".dataset*"))


def test_one_run_at_a_time(images, run, tmp_path, capsys):
    write_parcels(tmp_path / "parcels.gpkg", difficult_outlines())
    with FileLock(tmp_path / ".dataset.lock"), pytest.raises(SystemExit):
        run()
    assert "is being prepared already" in capsys.readouterr().err


@pytest.mark.parametrize("packed", [False, True])
def test_killed_at_every_stage(tmp_path, packed):
    """Killed again and again, each time later; the result is that of an undisturbed run, and nothing else is left."""
    for day in DAYS:
        write_image(tmp_path / "images" / f"{day}.tif", random_values(int(day[5:7].strip("-"))))
    write_parcels(tmp_path / "parcels.gpkg", difficult_outlines(), crop=["wheat", "maize"] * 4)
    results = tmp_path / "results"
    results.mkdir()
    line = (
        f"--images {tmp_path / 'images'} --parcels {tmp_path / 'parcels.gpkg'} --label_column crop "
        f"{'--packed ' if packed else ''}--output "
    )

    def main() -> None:
        """Steps that other packages take, in threads or by themselves, are told to those who watch."""
        grids._SIDE = 64  # several blocks per image
        read, write = extract.read_pixels, pixelsets.write_dataframe

        def read_pixels(image, window, *arguments):
            sys.audit("open", str(results / f"block {image.date} {window.row_off} {window.col_off}"), "r", 0)
            return read(image, window, *arguments)

        def write_dataframe(table, path, **options):
            write(table, path, **options)
            sys.audit("open", str(path), "w", 0)

        extract.read_pixels, pixelsets.write_dataframe = read_pixels, write_dataframe
        prepare.main()

    assert wait(start(main, [*line.split(), str(tmp_path / "whole")], tmp_path / "log")) == 0
    output = results / "killed"

    def before() -> None:
        """What has its final name is complete."""
        if output.exists():
            check()

    def check() -> None:
        expected, found = contents(tmp_path / "whole"), contents(output)
        assert expected.keys() == found.keys()
        assert [name for name in expected if expected[name] != found[name] and name != outlines] == []
        assert geopandas.read_file(output / outlines).equals(
            geopandas.read_file(tmp_path / "whole" / outlines)
        )

    outlines = "META/parcels.gpkg"  # holds the time of its writing

    def same(stage: str) -> str:
        """Of what both forms have in common, and the other one shows, a single stage is enough."""
        return stage if not packed or "PIXELS" in stage else "another"

    killed = kill_at_every_stage(
        main, [*line.split(), str(output)], results, tmp_path / "log", before, same=same
    )
    check()
    assert [path.name for path in results.iterdir()] == ["killed"]
    stages = [re.sub(r"\.killed-\w+", "work", stage) for stage in killed]
    for date in () if packed else (20170103, 20170214, 20170520):
        assert sum(stage.startswith(f"read block {date} ") for stage in stages) == 4
        assert {
            f"{step} work/0-{date}.{kind}" for step, kind in (("write", "part"), ("rename", "npy"))
        } <= set(stages)
    for name in contents(output):
        if name.startswith("PIXELS") or not packed:
            assert any(
                stage.startswith(("write", "rename")) and f"work/complete/{name}" in stage for stage in stages
            ), name
    assert (output / "PIXELS").exists() == packed
    if not packed:
        assert any(stage.startswith("within work/complete/") for stage in stages)
        reached = {"rename killed", "write .killed.lock", "remove .killed.lock anew", "rmdir work anew"}
        assert reached <= set(stages)


WRONG = {
    "no overlap": "no parcel of .* lies on an image",
    "no image's date": "has no date in 'late.tif'; expected YYYYMMDD",
    "bands missing in one image": "has no band '3'; it has 1, 2",
    "bands missing in the first image": "has the band '3', which the first image lacks",
    "no such band": "has no band 'nir'; it has 1, 2, 3",
    "unknown label column": "has no column 'crops'; it has number",
    "unknown id column": "has no column 'plot'; it has number",
    "nothing but empty geometry": "outline of parcel 1 is empty",
    "empty geometry": "outline of parcel 9 is empty or not an area",
    "point": "outline of parcel 9 is empty or not an area",
    "duplicate ids": "the id 'x' in column 'number' stands more than once",
    "an id is missing": "has no id in column 'number'",
    "no label at all": "column 'number' is empty",
    "other resolution": "has pixels of 20 x 20, .* of 10 x 10",
    "shifted": "is shifted by part of a pixel",
    "image without crs": "has no coordinate system; assign one, such as by gdal_edit.py",
    "parcels without crs": "has no coordinate system; assign the one it was drawn in",
    "damaged image": "cannot be read as an image",
    "truncated image": "cannot be read",
    "no images": "contains no images; expected a folder",
    "no parcels": "does not exist; give a file with parcel outlines",
    "parcels are no parcels": "cannot be read as parcel outlines",
    "no mask file": "no file matches --cloud_mask",
    "a mask is missing": "has no file among the cloud masks",
    "mask without values": "--cloud_mask and --clear belong together",
    "output in use": "exists and is not an empty folder",
    "too few pixels": "no parcel has 999 pixel",
    "all clouds": "no image sees any parcel",
    "a band twice": "are both band 'B2' of one image",
    "bands of other size": "are bands of one image but differ",
    "no scheduler": "no Dask scheduler answers at tcp://127.0.0.1:1",
    "two names": "label 1 is named 'a' and 'b'",
    "names without labels": "--class_column names the labels of --label_column",
    "two layers": "has the layers parcels, other; choose one with --layer",
    "damaged stac": "is not a STAC item collection",
    "remote stac": "download its assets first",
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence(images, run, tmp_path, monkeypatch, capsys, case):
    monkeypatch.setattr(workers, "PATIENCE", "1s")
    outlines, parcels = difficult_outlines(), tmp_path / "parcels.gpkg"
    write_parcels(parcels, outlines)
    options, source = "", "images"
    match case:
        case "no overlap":
            write_parcels(parcels, [square(90_000, 0, 300)])
        case "no image's date":
            write_image(tmp_path / "images" / "late.tif", random_values(0))
        case "bands missing in one image":
            write_image(tmp_path / "images" / "20180101.tif", random_values(0, 2))
        case "bands missing in the first image":
            write_image(tmp_path / "images" / "20160101.tif", random_values(0, 2))
        case "no such band":
            options = "--bands 1 nir"
        case "unknown label column":
            options = "--label_column crops"
        case "unknown id column":
            options = "--id_column plot"
        case "empty geometry":
            write_parcels(parcels, [*outlines, square(0, 0, 10).buffer(-20)])
        case "nothing but empty geometry":
            write_parcels(parcels, [None])
            options = "--skip_invalid"
        case "point":
            write_parcels(parcels, [*outlines, outlines[0].centroid])
        case "duplicate ids":
            write_parcels(parcels, outlines, number=list("abcxxfgh"))
            options = "--id_column number"
        case "an id is missing":
            write_parcels(parcels, outlines, number=["a", None, *"cdefgh"])
            options = "--id_column number"
        case "no label at all":
            write_parcels(parcels, outlines, number=[None] * 8)
            options = "--label_column number"
        case "other resolution":
            write_image(tmp_path / "images" / "20180101.tif", random_values(0), size=20)
        case "shifted":
            write_image(tmp_path / "images" / "20180101.tif", random_values(0), left=LEFT + 4)
        case "image without crs":
            write_image(tmp_path / "images" / "20180101.tif", random_values(0), crs=None)
        case "parcels without crs":
            parcels.unlink()
            with pytest.warns(UserWarning, match="'crs' was not provided"):
                write_parcels(parcels, outlines, crs=None)
        case "damaged image":
            (tmp_path / "images" / "20180101.tif").write_bytes(b"no image")
        case "truncated image":
            images[1].write_bytes(images[1].read_bytes()[:-20_000])
        case "no images":
            source = "nowhere"
        case "no parcels":
            parcels.unlink()
        case "parcels are no parcels":
            parcels.write_text("nothing")
        case "no mask file":
            options = "--cloud_mask '*_SCL.tif' --clear 4"
        case "a mask is missing":
            write_image(tmp_path / "masks" / f"{DAYS[0]}.tif", random_values(0, 1))
            options = f"--cloud_mask '{tmp_path}/masks/*.tif' --clear 4"
        case "mask without values":
            options = "--cloud_mask 3"
        case "output in use":
            (tmp_path / "dataset").mkdir()
            (tmp_path / "dataset" / "mine").touch()
        case "too few pixels":
            options = "--min_pixels 999"
        case "all clouds":
            options = "--cloud_mask 3 --clear 5000"
        case "a band twice":
            for name in ("B2.tif", "B2.tiff"):
                write_image(tmp_path / "images" / f"20180101_{name}", random_values(0, 1))
        case "bands of other size":
            source = "bands"
            write_image(tmp_path / source / "20180101_B2.tif", random_values(0, 1))
            write_image(tmp_path / source / "20180101_B3.tif", random_values(0, 1), size=20)
        case "no scheduler":
            options = "--scheduler tcp://127.0.0.1:1"
        case "two names":
            write_parcels(parcels, outlines, code=[1] * 8, crop=list("aaaabbbb"))
            options = "--label_column code --class_column crop"
        case "names without labels":
            options = "--class_column crop"
        case "two layers":
            geopandas.read_file(parcels).to_file(parcels, layer="other")
        case "damaged stac":
            source = "items.json"
            (tmp_path / source).write_text('{"features": [{"id": "a"}]}')
        case "remote stac":
            source = "items.json"
            assets = {"blue": {"href": "https://example.org/blue.tif"}}
            item = {"id": "a", "properties": {"datetime": "2017-01-03T10:00:00Z"}, "assets": assets}
            (tmp_path / source).write_text(json.dumps({"features": [item]}))
    with pytest.raises(SystemExit) as stop:
        run(options, images=source)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert re.search(WRONG[case], message), message
    assert case in ("all clouds", "truncated image") or not list(tmp_path.glob(".dataset*"))


@pytest.mark.parametrize("flag", ["--images", "--cloud_mask"])
def test_patterns_without_quotes(images, tmp_path, monkeypatch, capsys, flag):
    write_parcels(tmp_path / "parcels.gpkg", difficult_outlines())
    other = "" if flag == "--images" else f"--images {tmp_path / 'images'} --clear 1"
    files = " ".join(map(str, images))
    with pytest.raises(SystemExit) as stop:
        run_command(
            prepare.main,
            f"{other} {flag} {files} --parcels {tmp_path / 'parcels.gpkg'} --output {tmp_path / 'new'}",
            monkeypatch,
        )
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "quotes" in message
    assert f"{flag} '{tmp_path}/images/tile_2017*.tif'" in message


def test_columns_of_forms_that_nobody_asked_for_are_no_news(images, run, tmp_path, recwarn):
    """As other programs write them, GDAL warns of every column that has a limited length."""
    path = write_parcels(tmp_path / "parcels.gpkg", difficult_outlines(), crop=["a", "b"] * 4, note=["x"] * 8)
    with closing(sqlite3.connect(path)) as file:
        ((sql,),) = file.execute("SELECT sql FROM sqlite_master WHERE name = 'parcels'")
        changed = sql.replace('"note" TEXT', '"note" TEXT (96)')
        assert changed != sql
        file.execute("PRAGMA writable_schema = 1")
        file.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'parcels'", (changed,))
        file.commit()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        geopandas.read_file(path)
    assert any("TEXT (96)" in str(warning.message) for warning in seen)
    assert len(read_data(run("--label_column crop"))) == 8
    assert not [warning for warning in recwarn if "TEXT (96)" in str(warning.message)]


def test_empty_outlines_can_be_skipped(images, run, tmp_path):
    outlines = [*difficult_outlines()[:2], square(0, 0, 10).buffer(-20), None]
    write_parcels(tmp_path / "parcels.gpkg", outlines)
    folder = run("--skip_invalid")
    assert set(read_data(folder)) == {"1", "2"}
    assert set(left_out(folder)) == {"3", "4"}


@pytest.mark.skipif(not os.environ.get("SOAK"), reason="a benchmark of its own: make soak runs it")
@pytest.mark.parametrize(
    "name, n_rows", [("prepare", 5), ("prepare --large", 4), ("million", 7), ("million --own", 7)]
)
def test_the_benchmark_runs(tmp_path, name, n_rows):
    command, environment = (
        [sys.executable, "-m", *f"benchmarks.{name} --quick".split()],
        {"TMPDIR": str(tmp_path)},
    )
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=PATIENCE
    )
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert done.returncode == 0 and len(rows) == n_rows, done.stderr
    assert all(float(row[3]) >= 0 for row in rows[1:]) and float(rows[1][-2]) > 0
    assert not list(tmp_path.iterdir())
