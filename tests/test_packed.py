"""A folder with PIXELS in the place of DATA: the same numbers everywhere, and never anything but the original."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import train
from benchmarks import baselines
from common.errors import UserError
from data.days import read_days
from data.packing import check_folder, list_parcels, open_store, write_days, write_pixels
from dataset import PixelSetData
from preprocessing import simulate, statistics
from tests.commands import run_command, run_inference, run_train
from tests.folders import NOMENCLATURE, write_folder, write_meta
from tests.processes import contents

TIMES = {"training_time.json"}  # which tells how long it took


def give_own_dates(folder: Path) -> None:
    """Parcels get from 3 to 5 dates of their own, out of order, and some pixels are missing."""
    dates = {}
    for path in sorted((folder / "DATA").iterdir()):
        n = 3 + int(path.stem) % 3
        dates[path.stem] = [20170401 + (7 * int(path.stem) + 11 * t) % 29 for t in range(n)]
        values = np.load(path)[:n]
        values[1, :, ::2] = 0
        np.save(path, values)
    write_meta(folder, "dates", dates)
    write_meta(folder, "info", {"nodata": 0})


def pack(folder: Path, nodata: float | None = None) -> None:
    """Puts PIXELS, written in an order of its own, in the place of DATA; dates by parcel go there too."""
    paths = sorted((folder / "DATA").iterdir(), key=lambda path: path.stem[::-1])
    with write_pixels(folder, True, np.load(paths[0]).dtype, nodata) as add:
        for path in paths:
            add(int(path.stem), np.load(path))
    meta = folder / "META" / "dates.json"
    dates = json.loads(meta.read_text())
    if isinstance(next(iter(dates.values())), list):
        write_days(folder, [dates[str(parcel)] for parcel in list_parcels_of(paths)])
        meta.unlink()
    shutil.rmtree(folder / "DATA")


def list_parcels_of(paths: list[Path]) -> list[int]:
    return sorted(int(path.stem) for path in paths)


@pytest.fixture(params=["shared dates", "own dates"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = write_folder(tmp_path / "set", 18, ids=[3 + 5 * i for i in range(18)])
    if request.param == "own dates":
        give_own_dates(path)
    return path


def test_every_parcel_and_day_is_that_of_the_files(folder: Path, tmp_path: Path) -> None:
    store, parcels = open_store(folder, tmp_path / "cache"), list_parcels(folder)
    days = read_days(folder, parcels)
    pack(folder)
    packed = open_store(folder)
    assert list_parcels(folder) == parcels == packed.ids.tolist()
    assert (packed.sizes == store.sizes).all() and (packed.dates == store.dates).all()
    for i in range(18):
        np.testing.assert_array_equal(packed.parcel(i), store.parcel(i), strict=True)
    found = read_days(folder, parcels[3:9])
    if days.counts is None:
        np.testing.assert_array_equal(found.values, days.values)
    else:
        np.testing.assert_array_equal(found.counts, days.counts[3:9])
        np.testing.assert_array_equal(found.values, days.values[days.begin[3] : days.begin[9]])


def test_training_and_predictions_are_the_same_to_the_byte(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for packed in (False, True):
        if packed:
            pack(folder)
            original = contents(folder)
        monkeypatch.setattr(train, "save_figure", lambda *arguments: None)
        monkeypatch.setattr(train, "write_report", lambda *arguments: None)
        res_dir = run_train(folder, tmp_path / "res", "--epochs 1", monkeypatch)
        run_inference(folder, res_dir, tmp_path / "res" / "predicted", "", monkeypatch)
        found.append({name: data for name, data in contents(res_dir).items() if Path(name).name not in TIMES})
        shutil.rmtree(res_dir)
    assert found[0].keys() == found[1].keys() and "predicted/predictions.csv" in found[0]
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []
    after = contents(folder)
    assert {name: after[name] for name in original} == original
    assert {Path(name).parts[0] for name in after} == {Path(name).parts[0] for name in original}


def test_statistics_and_the_forest_say_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    found, own = [], (folder / "META" / "info.json").exists()
    files = folder / "META" / "sizes.json", folder / "normalisation_values.pkl"
    for packed in (False, True):
        if packed:
            pack(folder)
        run_command(statistics.main, f"{folder} --overwrite", monkeypatch)
        if not own:
            run_command(
                baselines.main, f"--dataset_folder {folder} --kfold 3 --trees 2 --only forest", monkeypatch
            )
        found.append(([path.read_bytes() for path in files], capsys.readouterr().out))
    assert found[0] == found[1]


def both(folder: Path) -> None:
    (folder / "DATA").mkdir()


def later(folder: Path) -> None:
    (folder / "PIXELS" / "format.json").write_text('{"version": 2, "more": []}')


def unfinished(folder: Path) -> None:
    (folder / "PIXELS" / "format.json").unlink()


def cut(folder: Path) -> None:
    path = folder / "PIXELS" / "pixels.npy"
    path.write_bytes(path.read_bytes()[:-1])


def no_index(folder: Path) -> None:
    (folder / "PIXELS" / "index.npz").write_bytes(b"PK")


def beyond(folder: Path) -> None:
    path = folder / "PIXELS" / "index.npz"
    with np.load(path) as index:
        arrays = dict(index)
    arrays["first"][2] += 10**6
    np.savez(path, **arrays)


WRONG = {
    both: "contains both DATA and PIXELS",
    later: "version 2 .* up to 1",
    unfinished: "format.json cannot be read",
    cut: "PIXELS is damaged .* copy it again",
    no_index: "damaged.* copy it again",
    beyond: "PIXELS is damaged .*beyond",
}


@pytest.mark.parametrize("damage", WRONG, ids=lambda damage: damage.__name__)
def test_one_sentence(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", 6)
    pack(folder)
    damage(folder)
    with pytest.raises(UserError, match=WRONG[damage]) as error:
        check_folder(folder)
        PixelSetData(folder, NOMENCLATURE, 6)
    assert "\n" not in str(error.value)


def test_days_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", 6)
    give_own_dates(folder)
    pack(folder)
    for dates, message in (([20170101], "does not hold 24 dates"), ([20171301] * 24, "20171301")):
        np.save(folder / "PIXELS" / "days.npy", np.array(dates))
        with pytest.raises(UserError, match=f"days.npy.*{message}"):
            PixelSetData(folder, NOMENCLATURE, 6)


@pytest.mark.parametrize("options", ["", "--irregular 3 6 --gaps"])
def test_simulated(options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"--parcels 100 --max_pixels 3 {options}"
    for name, form in (("files", ""), ("packed", "--packed")):
        run_command(simulate.main, f"{tmp_path / name} {line} {form}", monkeypatch)
    files, packed = tmp_path / "files", tmp_path / "packed"
    left = contents(packed)
    changed = {
        name
        for name, data in contents(files).items()
        if not name.startswith("DATA") and left.get(name) != data
    }
    assert changed == ({"META/dates.json"} if options else set())
    nodata = 0 if options else None
    stores = open_store(files, nodata=nodata), open_store(packed, nodata=nodata)
    for place, parcel in enumerate(stores[0].ids):
        np.testing.assert_array_equal(stores[0].parcel(place), stores[1].parcel(place), strict=True)
        days = [read_days(folder, [parcel]) for folder in (files, packed)]
        np.testing.assert_array_equal(*(each.values for each in days))
    assert (stores[0].complete == stores[1].complete).all() and stores[0].complete.all() == (not options)
