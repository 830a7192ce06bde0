"""Several images of one date and one place: nothing is dropped unless it was asked for."""

from pathlib import Path

import numpy as np
import pytest

from dataset import PixelSetData
from tests.commands import run_command
from tests.rasters import (
    LEFT,
    difficult_outlines,
    random_values,
    read_data,
    read_meta,
    read_plainly,
    write_image,
    write_parcels,
)

from preprocessing import prepare  # isort: skip  # after the packages are known to be there

OUTLINES = difficult_outlines()[:5]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Prepares the images in the test's folder."""
    write_parcels(tmp_path / "parcels.gpkg", OUTLINES, crop=["wheat", "maize", "wheat", "maize", "wheat"])

    def command(options: str = "") -> Path:
        output = tmp_path / f"dataset{len(list(tmp_path.iterdir()))}"
        run_command(
            prepare.main,
            f"--images {tmp_path / 'images'} --parcels {tmp_path / 'parcels.gpkg'} --label_column crop "
            f"--output {output} {options}",
            monkeypatch,
        )
        return output

    return command


@pytest.fixture
def orbits(tmp_path: Path) -> list[Path]:
    """A morning and an evening of one day, each with gaps of its own, and another day."""
    paths = []
    for name, seed in (("a_20170103", 0), ("b_20170103", 1), ("a_20170214", 2)):
        values = random_values(seed)
        values[:, random_values(seed + 10, 1)[0] % 5 == 0] = 0
        paths.append(write_image(tmp_path / "images" / f"{name}.tif", values, nodata=0))
    return paths


def test_what_is_ambiguous_is_asked(orbits, run, capsys):
    with pytest.raises(SystemExit) as stop:
        run()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    for word in ("a_20170103", "b_20170103", "--same_date", "mosaic", "mean", "separate"):
        assert word in message


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("choice", ["mosaic", "mean", "separate"])
def test_choices(orbits, run, choice, dtype):
    folder = run(f"--same_date {choice} {'--scale 0.5' if dtype == 'float32' else ''}")
    for parcel, values in read_data(folder).items():
        a, b, other = read_plainly(orbits, OUTLINES[int(parcel) - 1]).astype(float)
        match choice:
            case "separate":
                expected = np.stack((a, b, other))
            case "mosaic":
                expected = np.stack((np.where(a, a, b), other))
            case "mean":
                count = (a > 0).astype(float) + (b > 0)
                expected = np.stack(((a + b) / np.maximum(count, 1), other))
        if dtype == "float32":
            np.testing.assert_allclose(values, np.where(expected, expected * 0.5, np.nan), rtol=1e-6)
        else:
            np.testing.assert_array_equal(values, np.rint(expected))
        assert values.dtype == dtype
    dates = [20170103, 20170214] if choice != "separate" else [20170103, 20170103, 20170214]
    assert list(read_meta(folder, "dates").values()) == dates
    assert len(PixelSetData(folder, "crop", 4)) == 5


def test_adjoining_tiles_are_kept_together_where_orbits_are_kept_apart(tmp_path, run):
    """Two orbits with two tiles each, which overlap by a tenth: two dates, each of them a mosaic."""
    names = {(orbit, tile): f"{orbit}{tile}_20170103.tif" for orbit in "xy" for tile in "ab"}
    paths = {
        (orbit, tile): write_image(
            tmp_path / "images" / name, random_values(i), LEFT + (860 if tile == "b" else 0)
        )
        for i, ((orbit, tile), name) in enumerate(names.items())
    }
    data = read_data(run("--same_date separate"))["1"]
    assert data.shape[0] == 2
    for t, orbit in enumerate("xy"):
        np.testing.assert_array_equal(data[t], read_plainly([paths[orbit, "a"]], OUTLINES[0])[0])


@pytest.mark.parametrize(("offset", "tagged"), [(0, False), (-1000, False), (0, True)])
def test_zeros_that_nothing_declares_missing_are_pointed_out(tmp_path, run, capsys, offset, tagged):
    values = random_values(0) + 1500
    values[:, :48] = 0
    write_image(tmp_path / "images" / "20170103.tif", values, nodata=0 if tagged else None)
    run(f"--offset {offset}")
    pixels = np.concatenate([read_plainly([tmp_path / "images" / "20170103.tif"], o)[0] for o in OUTLINES], 1)
    told = capsys.readouterr().out
    assert ("--nodata 0" in told) == (not tagged)
    assert tagged or f"{100 * (pixels == 0).all(0).mean():.1f}%" in told
    assert (pixels == 0).any()
    run(f"--offset {offset} --nodata 0")
    assert "--nodata 0" not in capsys.readouterr().out
