"""What preprocessing.prepare says about what it made, on the screen and in META, against counts of the written pixels."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.commands import run_command
from tests.rasters import LEFT, random_values, read_data, read_meta, square, write_image, write_parcels

from preprocessing import prepare  # isort: skip  # after the packages are known to be there
from preprocessing.images import summary  # isort: skip
from reports import cartography  # isort: skip


@pytest.mark.parametrize("centres", [False, True])
def test_table_file_and_picture(tmp_path: Path, monkeypatch, capsys, centres):
    if centres:
        monkeypatch.setattr(cartography, "MOST_OUTLINES", 2)
    drawn = []
    plot = summary.plot_prepared
    monkeypatch.setattr(summary, "plot_prepared", lambda *args: drawn.append(plot(*args)) or drawn[-1])
    for name, day, x, seed in (("a", 20170103, 0, 1), ("a", 20170214, 0, 2), ("b", 20170214, 960, 3)):
        values = random_values(seed)
        values[:, random_values(seed + 5, 1)[0] % 4 == 0] = 0
        write_image(tmp_path / "images" / f"{name}_{day}.tif", values, LEFT + x, nodata=0)
    outlines = [square(100, 100, 200), square(900, 100, 200), square(1500, 500, 100), square(5000, 0, 50)]
    write_parcels(tmp_path / "parcels.gpkg", [*outlines, square(301, 301, 3)])
    folder = tmp_path / "set"
    line = f"--images {tmp_path / 'images'} --parcels {tmp_path / 'parcels.gpkg'} --output {folder}"
    run_command(prepare.main, line, monkeypatch)
    told = capsys.readouterr().out
    found = read_meta(folder, "prepared")
    assert (found["images"], found["tiles"], found["crs"], found["bands"]) == (
        3,
        2,
        ["EPSG:32631"],
        list("123"),
    )
    assert found["parcels"] == 3 and list(found["left_out"].values()) == [2]
    dates = read_meta(folder, "dates")
    pixels, missing = {20170103: 0, 20170214: 0}, {20170103: 0, 20170214: 0}
    for parcel, values in read_data(folder).items():
        for date, plane in zip(dates[parcel], values):
            pixels[date] += plane.shape[1]
            missing[date] += (plane == 0).all(0).sum()
    assert [row["images"] for row in found["dates"]] == [1, 2]
    for row in found["dates"]:
        date = row["date"]
        assert (row["pixels"], row["missing"]) == (pixels[date], pytest.approx(missing[date] / pixels[date]))
        assert re.search(rf"{date} .*{100 * row['missing']:.1f}%", told)
    assert found["missing"] == pytest.approx(sum(missing.values()) / sum(pixels.values()))
    for words in (
        "3 on 2 dates",
        "2 in EPSG:32631",
        "3 kept, 2 left out",
        "left out 2: no pixel",
        "prepared.json",
    ):
        assert words in told
    assert (folder / "META" / "prepared.png").read_bytes().startswith(b"\x89PNG")
    coverage, panel = drawn[0].axes
    heights = [segment[1][1] for segment in coverage.collections[0].get_segments()]
    np.testing.assert_allclose(heights, [100 * (1 - row["missing"]) for row in found["dates"]])
    shapes = panel.collections[0]
    assert len(shapes.get_offsets() if centres else shapes.get_paths()) == 5
    colours = shapes.get_facecolors().tolist()
    assert len(set(map(tuple, colours))) == 2  # kept and left out
