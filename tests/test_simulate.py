"""The simulated dataset: its format, its reproducibility, and whether it tells good models from poor ones."""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import KFold, cross_val_score

from common.errors import UserError
from dataset import PixelSetData, find_norm
from preprocessing import simulate as simulation
from preprocessing.simulate import embedded_dataset, simulate
from preprocessing.simulation.crops import CROPS, ground_cover
from preprocessing.simulation.fields import FIRST_PARCELS, simulate_parcel
from preprocessing.simulation.seasons import DATES, draw_own_season, draw_season
from tests.processes import PATIENCE, start, stop_when, wait, wait_until_stopped

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED_CODES = {1, 3, 4, 5, 6, 8, 9, 12, 13, 14, 16, 18, 19, 23, 28, 31, 33, 34, 36, 39}
PARCELS = 120

# Pixel sums of a few parcels written by one version of the generator.
FINGERPRINTS = {version: [24216020, 25845664, 20738842] for version in (1, 2)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated") / "dataset"
    simulate(folder, PARCELS, seed=3, progress=False, max_pixels=60)
    return folder


def read_meta(folder: Path, name: str) -> dict:
    return json.loads((folder / "META" / f"{name}.json").read_text())


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_command(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "preprocessing.simulate", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


def test_folder_has_the_published_format(dataset):
    ids = {str(i) for i in range(1, PARCELS + 1)}
    assert {path.name for path in dataset.iterdir()} == {"DATA", "META", "S2-2017-T31TFM-meanstd.pkl"}
    assert {path.name for path in (dataset / "DATA").iterdir()} == {f"{i}.npy" for i in ids}
    assert read_meta(dataset, "dates") == {str(t): day for t, day in enumerate(DATES)}
    labels, sizes, geometries = (read_meta(dataset, name) for name in ("labels", "sizes", "geomfeat"))
    assert set(labels) == {"label_44class"}
    assert set(labels["label_44class"]) == set(sizes) == set(geometries) == ids
    for i in ids:
        pixels = np.load(dataset / "DATA" / f"{i}.npy", allow_pickle=False)
        assert pixels.dtype == np.uint16 and pixels.shape == (24, 10, sizes[i])
        assert 1 <= sizes[i] <= 60
        assert pixels.min() > 0 and pixels.max() < 10000


def test_every_class_has_five_parcels_and_the_published_codes(dataset):
    labels = read_meta(dataset, "labels")["label_44class"]
    codes, counts = np.unique(list(labels.values()), return_counts=True)
    assert set(codes.tolist()) == PUBLISHED_CODES == {crop.code for crop in CROPS}
    assert counts.min() >= 5


def test_classes_are_long_tailed():
    drawn = [simulate_parcel(0, i, max_pixels=1).label for i in range(FIRST_PARCELS, FIRST_PARCELS + 1000)]
    by_share = sorted(CROPS, key=lambda crop: crop.share)
    smallest, largest = by_share[0], by_share[-1]
    assert 0.25 < largest.share < 0.35 and smallest.share < 0.01
    assert sum(crop.share for crop in CROPS) == pytest.approx(1, abs=0.01)
    assert drawn.count(largest.code) / 1000 == pytest.approx(largest.share, abs=0.05)
    assert drawn.count(smallest.code) < 10


def test_sizes_are_those_of_sentinel_agri():
    sizes = np.array([simulate_parcel(0, i).pixels.shape[-1] for i in range(400)])
    assert 130 < np.median(sizes) < 200  # 162 in the real data
    assert 200 < sizes.mean() < 400  # 298
    assert (sizes <= 10).mean() == pytest.approx(0.055, abs=0.03)


def test_geometry_fits_the_size(dataset):
    sizes = read_meta(dataset, "sizes")
    for i, (perimeter, area, fill, ratio) in read_meta(dataset, "geomfeat").items():
        assert area == pytest.approx(100 * sizes[i], rel=0.2)
        assert perimeter >= 4 * np.sqrt(area) * (1 - 1e-9)  # that of a square
        assert 0 < fill <= 1
        assert ratio == pytest.approx(perimeter / area)


def test_statistics_are_those_of_all_pixels(dataset):
    mean, deviation = pickle.loads((dataset / "S2-2017-T31TFM-meanstd.pkl").read_bytes())
    parcels = [np.load(path).astype(np.float64) for path in (dataset / "DATA").iterdir()]
    pixels = np.concatenate(parcels, axis=-1)
    assert mean.dtype == deviation.dtype == np.float32
    np.testing.assert_allclose(mean, pixels.mean(-1), rtol=1e-6)
    np.testing.assert_allclose(deviation, pixels.std(-1), rtol=1e-6)


def test_same_seed_same_bytes_and_other_seed_other_pixels(dataset, tmp_path):
    simulate(tmp_path / "again", PARCELS, seed=3, progress=False, max_pixels=60)
    simulate(tmp_path / "other", PARCELS, seed=4, progress=False, max_pixels=60)
    assert read_files(tmp_path / "again") == read_files(dataset)
    written, other = read_files(dataset), read_files(tmp_path / "other")
    assert all(written[name] != other[name] for name in written if name.startswith("DATA"))


def test_a_parcel_does_not_depend_on_the_number_of_parcels(dataset, tmp_path):
    simulate(tmp_path / "fewer", FIRST_PARCELS, seed=3, progress=False, max_pixels=60)
    fewer, more = read_files(tmp_path / "fewer"), read_files(dataset)
    names = [name for name in fewer if name.startswith("DATA")]
    assert len(names) == FIRST_PARCELS and all(fewer[name] == more[name] for name in names)
    for name in ("sizes", "geomfeat"):
        assert read_meta(tmp_path / "fewer", name).items() <= read_meta(dataset, name).items()


def test_a_new_generator_has_a_new_version():
    sums = [int(simulate_parcel(1, i, max_pixels=50).pixels.sum()) for i in (0, 50, 5000)]
    assert simulation.VERSION in FINGERPRINTS, "store the pixel sums of the new version here"
    stored = FINGERPRINTS[simulation.VERSION]
    assert sums == pytest.approx(stored, rel=1e-6), "raise VERSION and store these sums"


@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: crop.name)
def test_ground_cover_is_a_set_of_fractions(crop):
    for parcel in ({}, {"shift": 20, "longer": -20, "vigour": 1.5, "weeds": 0.5, "weeds_day": 150}):
        cover = ground_cover(crop, **parcel)
        assert cover.min() >= 0
        np.testing.assert_allclose(cover.sum(1), 1)


def simulate_small(folder: Path, seed: int = 3, **options) -> Path:
    simulate(folder, FIRST_PARCELS, seed, progress=False, max_pixels=12, **options)
    return folder


def load_parcel(folder: Path, parcel: int) -> np.ndarray:
    return np.load(folder / "DATA" / f"{parcel}.npy", allow_pickle=False)


def test_another_year_has_its_own_dates_weather_and_parcels(tmp_path):
    first, again, third = (
        simulate_small(tmp_path / name, year=year) for name, year in (("a", 2018), ("b", 2018), ("c", 2019))
    )
    assert read_files(first) == read_files(again)
    dates = list(read_meta(first, "dates").values())
    assert 20 <= len(dates) <= 35 and dates == sorted(set(dates)) != list(read_meta(third, "dates").values())
    assert {day // 10000 for day in dates} == {2018}
    assert load_parcel(first, 7).shape[:2] == (len(dates), 10)
    geometries = [read_meta(folder, "geomfeat")["7"] for folder in (first, third)]
    assert geometries[0] != geometries[1] != simulate_parcel(3, 6, 12).geometry
    mean, deviation = pickle.loads((first / "normalisation_values.pkl").read_bytes())
    pixels = np.concatenate([load_parcel(first, i) for i in range(1, FIRST_PARCELS + 1)], axis=2)
    np.testing.assert_allclose(mean, pixels.mean(2), rtol=1e-6)
    np.testing.assert_allclose(deviation, pixels.std(2), rtol=1e-6)


@pytest.mark.parametrize("year", [2018, 2019, 2020])
def test_crops_of_another_year_are_earlier_or_later_by_some_days(year):
    season = draw_season(year, seed=1)
    assert 5 <= abs(season.later) <= 12 and 0.6 < season.vigour < 1.6
    assert (season.year, len(season.haze), len(season.cloudiness)) == (
        year,
        len(season.days),
        len(season.days),
    )
    same_weather = season._replace(later=0.0, vigour=1.0)
    moved = same_weather._replace(days=season.days - season.later)
    for crop in CROPS[:5]:
        np.testing.assert_allclose(
            ground_cover(crop, season=season._replace(vigour=1.0)), ground_cover(crop, season=moved)
        )
        usual, found = (ground_cover(crop, season=each)[:, 3].min() for each in (same_weather, season))
        assert usual != found


def test_every_day_of_a_year_has_one_weather():
    seasons = [draw_own_season(2018, 1, index, 300, 300) for index in range(2)] + [draw_season(2018, 1)]
    assert len({(season.later, season.vigour) for season in seasons}) == 1
    seen: dict[int, tuple[float, float]] = {}
    for season in seasons:
        for day, *weather in zip(season.dates, season.haze, season.cloudiness):
            assert seen.setdefault(day, tuple(weather)) == tuple(weather)


def test_irregular_dates_are_each_parcels_own(tmp_path):
    folder = simulate_small(tmp_path / "dataset", irregular=(5, 9))
    dates = read_meta(folder, "dates")
    assert set(dates) == {str(i) for i in range(1, FIRST_PARCELS + 1)}
    lengths = {len(own) for own in dates.values()}
    assert lengths == set(range(5, 10))
    assert len({tuple(own) for own in dates.values()}) == FIRST_PARCELS
    for parcel, own in dates.items():
        assert own == sorted(set(own)) and {day // 10000 for day in own} == {2017}
        pixels = load_parcel(folder, int(parcel))
        assert pixels.shape[:2] == (len(own), 10) and pixels.min() >= 1
    assert read_meta(folder, "geomfeat")["4"] == simulate_parcel(3, 3, 12).geometry  # the parcels of 2017
    assert draw_own_season(2017, 3, 0, 5, 9).later == 0


def test_gaps_are_where_clouds_would_be(tmp_path, dataset):
    simulate(tmp_path / "gaps", PARCELS, seed=3, progress=False, max_pixels=60, gaps=True)
    assert (
        read_meta(tmp_path / "gaps", "info")["nodata"] == 0 and read_meta(dataset, "info")["nodata"] is None
    )
    missing = total = 0
    present = []
    for parcel in range(1, PARCELS + 1):
        cloudy, pixels = (load_parcel(folder, parcel) for folder in (dataset, tmp_path / "gaps"))
        absent = pixels == 0
        assert (absent.all(1) == absent.any(1)).all()  # in all channels or in none
        assert (pixels == cloudy)[~absent].all()
        missing, total = missing + absent[:, 0].sum(), total + absent[:, 0].size
        present.append(pixels.transpose(1, 0, 2)[:, ~absent[:, 0]])
    assert 0.02 < missing / total < 0.12
    mean, deviation = pickle.loads((tmp_path / "gaps" / "normalisation_values.pkl").read_bytes())
    values = np.concatenate(present, axis=1)
    np.testing.assert_allclose(mean, values.mean(1), rtol=1e-6)
    np.testing.assert_allclose(deviation, values.std(1), rtol=1e-6)


def test_year_irregular_dates_and_gaps_combine_and_load(tmp_path):
    folder = simulate_small(tmp_path / "dataset", year=2019, irregular=(3, 6), gaps=True)
    loaded = PixelSetData(folder, "label_44class", 8, extra_feature="geomfeat", season_start=(1, 1))
    assert loaded.varying and len(loaded) == FIRST_PARCELS and loaded.store.nodata == 0
    first, last = loaded.day_range
    assert 0 <= first < last < 365
    assert find_norm(loaded)[0][0].shape == (10,)


def test_all_dates_tell_more_than_the_best_single_one():
    parcels = [simulate_parcel(1, i, max_pixels=30) for i in range(900)]
    features = np.stack([parcel.pixels.mean(-1) for parcel in parcels])
    labels = np.array([parcel.label for parcel in parcels])
    chosen = np.arange(len(labels)) >= FIRST_PARCELS  # whose classes are drawn

    def accuracy(x: np.ndarray) -> float:
        forest = RandomForestClassifier(25, random_state=0)
        return cross_val_score(forest, x[chosen], labels[chosen], cv=KFold(3)).mean()

    every_date = accuracy(features.reshape(len(labels), -1))
    best_date = max(accuracy(features[:, date]) for date in (6, 10, 13, 14, 15, 21))
    assert 0.70 < every_date < 0.95
    assert best_date < every_date - 0.12


def test_nothing_is_left_beside_the_dataset_nor_after_a_failure(dataset, tmp_path, monkeypatch):
    assert [path.name for path in dataset.parent.iterdir()] == ["dataset"]

    def fail(seed: int, index: int, *options) -> None:
        if index == 7:
            raise KeyboardInterrupt
        return simulate_parcel(seed, index, *options)

    monkeypatch.setattr(simulation, "simulate_parcel", fail)
    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path / "dataset", 100, seed=1, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"parcels": 99}, "at least 100"),
        ({"seed": -1}, "0 or more"),
        ({"max_pixels": 0}, "at least 1"),
        ({"year": 18}, "year is 18; give one of four digits"),
        ({"irregular": (9, 5)}, "9 to 5 dates; give 1 to 365, the smaller number first"),
        ({"irregular": (0, 5)}, "0 to 5 dates"),
        ({"irregular": (5, 366)}, "5 to 366 dates"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        simulate(tmp_path / "dataset", **({"parcels": 100, "seed": 1} | arguments))


def test_command_line(tmp_path):
    written = run_command(tmp_path / "new" / "dataset", "--parcels", 100, "--seed", 3, "--max_pixels", 60)
    assert written.returncode == 0, written.stderr
    assert "100 simulated parcels" in written.stdout.splitlines()[-1]
    before = read_files(tmp_path)

    again = run_command(tmp_path / "new" / "dataset", "--parcels", 100)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ") and "not an empty folder" in again.stderr
    assert len(again.stderr.splitlines()) == 1

    other = run_command(tmp_path / "other", "--year", 2018, "--irregular", 9, 5)
    assert other.returncode == 2 and other.stderr.startswith("error: irregular is 9 to 5 dates")

    few = run_command(tmp_path / "few", "--parcels", 20)
    assert few.returncode == 2 and few.stderr.startswith("error: parcels is 20; give at least 100")
    assert read_files(tmp_path) == before


@pytest.fixture
def small_embedded_dataset(tmp_path, monkeypatch) -> Path:
    """Lets `embedded_dataset` write a small one below tmp_path, and returns the folder it must get."""
    monkeypatch.setattr(simulation, "__file__", str(tmp_path / "preprocessing" / "simulate.py"))
    monkeypatch.setattr(simulation, "EMBEDDED_PARCELS", 100)
    monkeypatch.setattr(simulation, "EMBEDDED_MAX_PIXELS", 5)
    return tmp_path / ".cache" / f"simulated-{simulation.VERSION}-100-{simulation.EMBEDDED_SEED}"


def test_embedded_dataset_is_made_once(small_embedded_dataset, monkeypatch):
    assert embedded_dataset() == small_embedded_dataset
    assert len(list((small_embedded_dataset / "DATA").iterdir())) == 100
    monkeypatch.delattr(simulation, "simulate")
    assert embedded_dataset() == small_embedded_dataset


def test_one_process_makes_the_embedded_dataset_and_others_wait(
    small_embedded_dataset, tmp_path, monkeypatch
):
    """The first one is stopped in the middle, the second one where it asks for the lock; then both go on."""
    folder, simulated = small_embedded_dataset.parent, tmp_path / "simulated"
    folder.mkdir()

    def note(*args: object, **kwargs: object) -> None:
        with open(simulated, "a") as file:
            file.write("once\n")
        simulate(*args, **kwargs)

    monkeypatch.setattr(simulation, "simulate", note)

    def ask(is_there: Callable[[], bool]) -> int:
        def main() -> None:
            stop_when(folder, is_there)
            assert embedded_dataset() == small_embedded_dataset

        pid = start(main, [], tmp_path / "log")
        wait_until_stopped(pid)
        return pid

    first = ask(lambda: any(folder.rglob("DATA/50.npy")))
    second = ask(lambda: True)
    for pid in (second, first):
        os.kill(pid, signal.SIGCONT)
    assert [wait(second), wait(first)] == [0, 0], (tmp_path / "log").read_text()
    assert simulated.read_text() == "once\n" and len(list((small_embedded_dataset / "DATA").iterdir())) == 100


def test_unwritable_folder_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        simulate(tmp_path / "file" / "dataset", 100, seed=1)
