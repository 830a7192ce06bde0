"""Sentinel-2 products as they are downloaded: .SAFE folders of JPEG 2000 files in three resolutions."""

from pathlib import Path

import numpy as np
import pytest

from tests.commands import run_command
from tests.rasters import (
    CRS,
    LEFT,
    SIDE,
    TOP,
    difficult_outlines,
    random_values,
    rasterio,
    read_data,
    read_meta,
    read_plainly,
    write_image,
    write_parcels,
)

from preprocessing import prepare  # isort: skip  # after the packages are known to be there
from rasterio.transform import from_origin

# Sizes of the files of each band, in metres.
BANDS = {"B02": (10, 20), "B05": (20, 60), "B8A": (20, 60), "B09": (60,), "SCL": (20, 60), "AOT": (10,)}
OUTLINES = difficult_outlines()
Bands = dict[tuple[str, int], np.ndarray]


def write_jp2(path: Path, values: np.ndarray, size: int) -> None:
    """Writes one band without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    place = {"crs": CRS, "transform": from_origin(LEFT, TOP, size, size)}
    form = {"driver": "JP2OpenJPEG", "count": 1, "dtype": values.dtype, "quality": 100, "reversible": "YES"}
    with rasterio.open(path, "w", height=len(values), width=values.shape[1], **place, **form) as file:
        file.write(values, 1)


def write_product(folder: Path, day: str, baseline: str = "0301", seed: int = 0, added: int = 0) -> Bands:
    """Writes a product; returns its bands by name and size."""
    product = folder / f"S2A_MSIL2A_{day}T105441_N{baseline}_R051_T31TFM_{day}T142547.SAFE"
    granule = product / "GRANULE" / f"L2A_T31TFM_A034114_{day}T105438"
    rng, bands = np.random.default_rng(seed), {}
    for name, sizes in BANDS.items():
        for size in sizes:
            side = SIDE * 10 // size
            values = (
                rng.integers(1, 5, (side, side))
                if name == "SCL"
                else rng.integers(1, 1000, (side, side)) + added
            )
            bands[name, size] = values.astype(np.uint8 if name == "SCL" else np.uint16)
            file = f"T31TFM_{day}T105441_{name}_{size}m.jp2"
            write_jp2(granule / "IMG_DATA" / f"R{size}m" / file, bands[name, size], size)
    write_jp2(granule / "QI_DATA" / f"MSK_CLDPRB_{day}_20m.jp2", bands["SCL", 20], 20)
    write_jp2(granule / "IMG_DATA" / "R10m" / f"T31TFM_{day}T105441_TCI_10m.jp2", bands["B02", 10], 10)
    if baseline >= "0400":
        text = f'<a><BOA_ADD_OFFSET band_id="0">{-added}</BOA_ADD_OFFSET></a>'
        (product / "MTD_MSIL2A.xml").write_text(text)
    return bands


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Prepares the products in the test's folder."""
    write_parcels(tmp_path / "parcels.gpkg", OUTLINES)

    def command(options: str = "", images: str = "products") -> Path:
        output = tmp_path / f"set{len(list(tmp_path.iterdir()))}"
        run_command(
            prepare.main,
            f"--images '{tmp_path / images}' --parcels {tmp_path / 'parcels.gpkg'} --output {output} {options}",
            monkeypatch,
        )
        return output

    return command


def check(folder: Path, expected: list[np.ndarray], size: int, tmp_path: Path) -> None:
    """Compares all parcels with images (C, H, W) of pixels of `size`."""
    paths = [
        write_image(tmp_path / "expected" / f"{i}.tif", values, size=size)
        for i, values in enumerate(expected)
    ]
    data = read_data(folder)
    assert len(data) >= 5
    for parcel, values in data.items():
        np.testing.assert_array_equal(values, read_plainly(paths, OUTLINES[int(parcel) - 1]))


def enlarged(values: np.ndarray, times: int) -> np.ndarray:
    return values.repeat(times, 0).repeat(times, 1)


@pytest.mark.parametrize("images", ["products", "products/*.SAFE"])
def test_all_bands_on_the_grid_of_the_finest(tmp_path, run, images):
    days = ("20210103", "20210202")
    products = [write_product(tmp_path / "products", day, seed=i) for i, day in enumerate(days)]
    folder = run(images=images)
    names = read_meta(folder, "info")["bands"]
    assert set(names) == {"B02", "B05", "B8A", "B09"}
    sources = {"B02": 10, "B05": 20, "B8A": 20, "B09": 60}
    expected = [
        np.stack([enlarged(bands[name, sources[name]], sources[name] // 10) for name in names])
        for bands in products
    ]
    check(folder, expected, 10, tmp_path)
    assert list(read_meta(folder, "dates").values()) == [int(day) for day in days]


@pytest.mark.parametrize("mask", ["SCL", "**/*_SCL_20m.jp2", "*_SCL_20m.jp2"])
def test_clouds_of_the_product(tmp_path, run, mask):
    bands = write_product(tmp_path / "products", "20210103")
    folder = run(f"--bands B02 B05 --cloud_mask '{mask}' --clear 2 3")
    expected = np.stack((bands["B02", 10], enlarged(bands["B05", 20], 2)))
    scl = enlarged(bands["SCL", 20], 2)
    expected[:, (scl != 2) & (scl != 3)] = 65535
    check(folder, [expected], 10, tmp_path)


def test_a_coarser_resolution_takes_the_files_made_for_it(tmp_path, run):
    bands = write_product(tmp_path / "products", "20210103")
    folder = run("--bands B8A B02 --resolution 20")
    check(folder, [np.stack((bands["B8A", 20], bands["B02", 20]))], 20, tmp_path)


def test_a_resolution_that_no_file_has(tmp_path, run):
    """Pixels of 30 m: the centre of each is that of a pixel of 10 m."""
    bands = write_product(tmp_path / "products", "20210103")
    folder = run("--bands AOT --resolution 30")
    check(folder, [bands["AOT", 10][None, 1::3, 1::3]], 30, tmp_path)


def test_bilinear(tmp_path, run):
    """A value at a place is the mean of the four pixels around it, weighted by how near they are."""
    bands = write_product(tmp_path / "products", "20210103")
    data = read_data(run("--bands B02 B05 --resampling bilinear --scale 1"))
    coarse = bands["B05", 20].astype(float)
    fine = np.full((SIDE, SIDE), np.nan)
    for row in range(1, SIDE - 1):
        for column in range(1, SIDE - 1):
            y, x = (row + 0.5) / 2 - 0.5, (column + 0.5) / 2 - 0.5
            i, j = int(y), int(x)
            below, right = y - i, x - j
            upper = coarse[i, j] * (1 - right) + coarse[i, j + 1] * right
            lower = coarse[i + 1, j] * (1 - right) + coarse[i + 1, j + 1] * right
            fine[row, column] = upper * (1 - below) + lower * below
    path = write_image(tmp_path / "expected.tif", fine[None])
    for parcel in ("1", "2", "3", "5"):
        expected = read_plainly([path], OUTLINES[int(parcel) - 1])[0, 0]
        np.testing.assert_allclose(data[parcel][0, 1], expected, atol=0.5)  # GDAL rounds to whole numbers
        plain = read_plainly(
            [write_image(tmp_path / "b.tif", bands["B02", 10][None])], OUTLINES[int(parcel) - 1]
        )
        np.testing.assert_array_equal(data[parcel][0, 0], plain[0, 0])


def test_the_offset_of_the_product(tmp_path, run):
    write_product(tmp_path / "products", "20211203")
    write_product(tmp_path / "products", "20220203", "0400", added=1000)
    for values in read_data(run("--bands B02 B09")).values():
        np.testing.assert_array_equal(values[0], values[1])


@pytest.mark.parametrize(
    ("bands", "words"),
    [
        ("B2", "Name it B02"),
        ("B10", "level 2A have no B10"),
        ("B11", "not downloaded completely"),
    ],
)
def test_why_a_band_is_missing(tmp_path, run, capsys, bands, words):
    write_product(tmp_path / "products", "20210103")
    with pytest.raises(SystemExit) as stop:
        run(f"--bands {bands}")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and words in message
    assert f"{bands!r}" in message and ".SAFE has no band" in message


def test_products_of_level_1_have_no_scene_classes(tmp_path, run, capsys):
    values = random_values(0, 1)[0]
    name = "S2A_MSIL1C_20210103T105441_N0301_R051_T31TFM_20210103T142547.SAFE"
    write_jp2(
        tmp_path / "products" / name / "GRANULE" / "a" / "IMG_DATA" / "T31TFM_20210103T105441_B02.jp2",
        values,
        10,
    )
    with pytest.raises(SystemExit):
        run("--cloud_mask SCL --clear 4")
    assert "level 1C have no SCL" in capsys.readouterr().err
