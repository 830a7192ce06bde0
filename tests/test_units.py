"""Images whose numbers have different offsets and scales become one dataset, or are refused with the flag that decides."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.commands import run_command, run_inference, run_train
from tests.folders import write_folder, write_meta
from tests.rasters import difficult_outlines, random_values, read_data, read_meta, write_image, write_parcels

from preprocessing import prepare, statistics  # isort: skip  # after the packages are known to be there

OLD = "S2A_MSIL2A_20211203T105441_N0301_R051_T31TFM_20211203T142547"
NEW = "S2A_MSIL2A_20220203T105441_N0400_R051_T31TFM_20220203T142547"
PLAIN_OLD, PLAIN_NEW = "T31TFM_20211203T105441", "T31TFM_20220203T105441"
VALUES = random_values(0) + 1000


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Prepares the images in the test's folder; returns the pixels, one array (T, C, P), and META/info.json."""
    write_parcels(tmp_path / "parcels.gpkg", difficult_outlines()[:3])

    def command(options: str = "", images: str = "images") -> tuple[np.ndarray, dict]:
        output = tmp_path / f"dataset{len(list(tmp_path.iterdir()))}"
        run_command(
            prepare.main,
            f"--images {tmp_path / images} --parcels {tmp_path / 'parcels.gpkg'} --output {output} {options}",
            monkeypatch,
        )
        return np.concatenate(list(read_data(output).values()), axis=2), read_meta(output, "info")

    return command


def write_pair(folder: Path, old: str, new: str, added: int = 1000, **options: object) -> None:
    """The same scene twice; to the numbers of the second, something was added."""
    write_image(folder / "images" / f"{old}.tif", VALUES, **(options.get("first") or {}))
    write_image(folder / "images" / f"{new}.tif", VALUES + np.uint16(added), **(options.get("second") or {}))


def test_the_same_scene_before_and_after_the_baseline(tmp_path, run, capsys):
    write_pair(tmp_path, OLD, NEW)
    pixels, info = run()
    np.testing.assert_array_equal(pixels[0], pixels[1])
    assert pixels.dtype == np.uint16 and set(np.unique(pixels)) <= set(np.unique(VALUES))
    assert info["units"] == pytest.approx(1e-4)
    old, new = sorted(info["offsets"], key=lambda group: group["first"])
    assert (old["offset"], old["images"], old["first"]) == (0, 1, 20211203)
    assert (new["offset"], new["images"], new["last"]) == (-1000, 1, 20220203)
    told = capsys.readouterr().out
    assert "offset -1000 of 1 image" in told and "20220203" in told and "04.00" in told
    pixels, info = run("--scale 0.0001")
    np.testing.assert_array_equal(pixels[0], pixels[1])
    assert pixels.dtype == np.float32 and info["units"] == 1
    assert set(np.unique(pixels)) <= set(np.unique(VALUES * np.float32(0.0001)))


@pytest.mark.parametrize("applied", [True, False, None])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_stac_items(tmp_path, run, applied, version):
    """Where the provider took the offset away, it may still be named in the description of the bands."""
    write_pair(tmp_path, "20211203", "20220203", 0 if applied else 1000)
    items = []
    for day, baseline, offset in (("2021-12-03", "03.01", 0), ("2022-02-03", "04.00", -0.1)):
        said = {"scale": 0.0001, "offset": offset}
        if version == "1.0":
            asset = {"raster:bands": 3 * [said]}
        else:
            asset = {"bands": 3 * [{}], "raster:scale": said["scale"], "raster:offset": said["offset"]}
        properties = {"datetime": f"{day}T10:00:00Z", "s2:processing_baseline": baseline}
        if applied is not None:
            properties["earthsearch:boa_offset_applied"] = applied
        href = f"images/{day.replace('-', '')}.tif"
        items.append({"id": day, "properties": properties, "assets": {"all": {"href": href, **asset}}})
    (tmp_path / "items.json").write_text(json.dumps({"features": items}))
    pixels, info = run(images="items.json")
    np.testing.assert_array_equal(pixels[0], pixels[1])
    assert info["units"] == 1e-4 and set(np.unique(pixels)) <= set(np.unique(VALUES))
    assert {group["offset"] for group in info["offsets"]} == ({0} if applied else {0, -1000})


def test_scale_and_offset_of_the_file(tmp_path, run):
    write_pair(tmp_path, "20211203", "20220203", first={"scaled": (1e-4, 0)}, second={"scaled": (1e-4, -0.1)})
    pixels, info = run()
    np.testing.assert_array_equal(pixels[0], pixels[1])
    assert info["units"] == 1e-4


def test_dark_pixels_stay_and_missing_ones_stay_missing(tmp_path, run):
    values = VALUES.copy()
    values[:, 5:20, 5:20] = 500  # darker than black
    values[:, :10] = 0
    write_image(tmp_path / "images" / f"{NEW}.tif", values, nodata=0)
    write_image(tmp_path / "images" / f"{OLD}.tif", values, nodata=0)
    pixels, _ = run()
    np.testing.assert_array_equal(pixels[1] == 0, pixels[0] == 0)
    assert (pixels[0] == 0).any() and (pixels[1] == 1).any()
    old = pixels[0].astype(int)
    np.testing.assert_array_equal(pixels[1], np.where(old == 0, 0, np.maximum(old - 1000, 1)))


@pytest.mark.parametrize("names", [(PLAIN_OLD, PLAIN_NEW), (PLAIN_OLD, NEW), (OLD, PLAIN_NEW)])
def test_what_nothing_tells_is_asked(tmp_path, run, capsys, names):
    write_pair(tmp_path, *names)
    with pytest.raises(SystemExit) as stop:
        run()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "--offset" in message
    assert "20211203" in message and "20220203" in message
    pixels, info = run("--offset -1000 20220125")
    np.testing.assert_array_equal(pixels[0], pixels[1])
    assert [group["why"] for group in info["offsets"]] == 2 * ["--offset"]
    pixels, _ = run("--offset 0")
    np.testing.assert_array_equal(pixels[0].astype(int) + 1000, pixels[1])


@pytest.mark.parametrize(
    ("name", "scaled"), [(NEW, (1e-4, 0)), (OLD, (1e-4, -0.1))], ids=["new but none", "old but one"]
)
def test_contradictions_are_asked(tmp_path, run, capsys, name, scaled):
    write_image(tmp_path / "images" / f"{name}.tif", VALUES, scaled=scaled)
    with pytest.raises(SystemExit):
        run()
    message = capsys.readouterr().err
    assert "-1000" in message and "--offset" in message and message.count("\n") == 1
    assert run("--offset 0")[1]["offsets"][0]["offset"] == 0


def test_different_scales_are_asked(tmp_path, run, capsys):
    write_pair(tmp_path, "20211203", "20220203", 0, first={"scaled": (1e-4, 0)}, second={"scaled": (1e-3, 0)})
    with pytest.raises(SystemExit):
        run()
    message = capsys.readouterr().err
    assert "0.0001" in message and "0.001" in message and "--scale" in message
    assert run("--scale 0.01")[0].dtype == np.float32


def test_images_that_say_nothing_stay_as_they_are(tmp_path, run):
    write_pair(tmp_path, "20211203", "20220203", 7)
    pixels, info = run()
    np.testing.assert_array_equal(pixels[0] + 7, pixels[1])
    assert info["units"] is None and [group["offset"] for group in info["offsets"]] == [0]


def test_inference_refuses_data_in_other_units(tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "set", n_parcels=12, classes=(1, 2))
    write_meta(folder, "info", {"nodata": None, "units": 1e-4})
    results = run_train(folder, tmp_path / "results", "--epochs 1 --sub_classes [1,2]", monkeypatch)
    assert json.loads((results / "conf.json").read_text())["units"] == 1e-4
    for units in (1e-4, None, 1.0):
        write_meta(folder, "info", {"nodata": None, "units": units})
        arguments = folder, results, tmp_path / f"out{units}", "", monkeypatch
        if units != 1.0:
            run_inference(*arguments)
            continue
        with pytest.raises(SystemExit) as stop:
            run_inference(*arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert "0.0001" in message and "--scale" in message and "--norm" in message
    run_command(statistics.main, str(folder), monkeypatch)
    own = f"--norm {folder / 'normalisation_values.pkl'}"
    run_inference(folder, results, tmp_path / "own", own, monkeypatch)
