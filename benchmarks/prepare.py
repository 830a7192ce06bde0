"""Measures preprocessing.prepare against loops over parcels and dates with rasterio.mask.

python -m benchmarks.prepare            2,000 parcels x 24 dates x 10 bands of 2,000 x 2,000 pixels; about 1 GB of disk
python -m benchmarks.prepare --quick    to see that it runs; its figures mean little
"""

import os
import subprocess
import sys
import tempfile
import time
from datetime import date, timedelta
from pathlib import Path

import geopandas
import numpy as np
import rasterio
import rasterio.mask
from rasterio.transform import from_origin
from shapely import Point, Polygon

from benchmarks.measure import read_memory
from common.errors import run_cli
from common.flags import Parser
from common.progress import progress_bar

ROOT = Path(__file__).resolve().parent.parent
C, CRS, LEFT, TOP = 10, "EPSG:32631", 300_000, 4_900_000


# Side of the images in pixels, parcels, numbers of dates, and parcels and dates that the loops go through.
NORMAL, QUICK = (2000, 2000, (6, 12, 24), 40, 2), (200, 20, (1, 2), 5, 1)


def write_image(folder: Path, t: int, side: int) -> Path:
    """Writes the image of a date, fields with noise: deflate, predictor 2, tiles of 256 pixels, uint16."""
    path = folder / f"{date(2017, 1, 3) + timedelta(days=5 * t):%Y%m%d}.tif"
    fields = np.random.default_rng(0).integers(200, 5000, (C, -(-side // 20), -(-side // 20)))
    fields = fields.repeat(20, 1).repeat(20, 2)[:, :side, :side]
    options = {"crs": CRS, "transform": from_origin(LEFT, TOP, 10, 10), "dtype": "uint16", "tiled": True}
    options |= {"count": C, "height": side, "width": side, "compress": "deflate", "predictor": 2}
    with rasterio.open(path, "w", driver="GTiff", **options) as file:
        file.write((fields + np.random.default_rng(t).integers(-50, 50, fields.shape)).astype(np.uint16))
    return path


def write_parcels(path: Path, side: int, parcels: int) -> list[Polygon]:
    """Writes discs of 40 corners, some 230 pixels on average, all inside the images."""
    rng = np.random.default_rng(1)
    places, radii = rng.uniform(150, 10 * side - 150, (parcels, 2)), rng.uniform(40, 125, parcels)
    discs = [Point(LEFT + x, TOP - y).buffer(r, quad_segs=10) for (x, y), r in zip(places, radii)]
    geopandas.GeoDataFrame({"crop": ["wheat"] * parcels}, geometry=discs, crs=CRS).to_file(path)
    return discs


def run_ours(images: Path, parcels: Path, output: Path) -> tuple[float, int]:
    """Seconds of the whole command, its start included, and most bytes of memory that no file backs."""
    command = [sys.executable, "-m", "preprocessing.prepare", "--images", images, "--parcels", parcels]
    command += ["--output", output, "--label_column", "crop"]
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, read_memory("RssAnon", process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError("preprocessing.prepare failed")
    return time.perf_counter() - started, peak


def loop(paths: list[Path], outlines: list[Polygon]) -> float:
    """Seconds of reading every parcel from every image, each image opened once."""
    started = time.perf_counter()
    for path in paths:
        with rasterio.open(path) as file:
            for outline in outlines:
                values, _ = rasterio.mask.mask(file, [outline], crop=True, filled=False)
                values.data[:, ~values.mask[0]].copy()
    return time.perf_counter() - started


def main() -> None:
    """Writes images, measures, and prints a line for each number of dates and, for the last number, for each loop."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    side, n_parcels, numbers, few_parcels, few_dates = QUICK if parser.parse_args().quick else NORMAL
    print(
        f"{n_parcels:,} parcels, {C} bands, {side:,} x {side:,} pixels, {os.cpu_count()} cores.\n\n"
        "| | dates | seconds | ratio | memory, MB |\n|---|---:|---:|---:|---:|"
    )
    with tempfile.TemporaryDirectory() as folder:
        images, parcels, paths = Path(folder, "images"), Path(folder, "parcels.gpkg"), []
        images.mkdir()
        outlines = write_parcels(parcels, side, n_parcels)
        for n in numbers:
            for t in progress_bar(range(len(paths), n), "writing images", "dates"):
                paths.append(write_image(images, t, side))
            seconds, peak = run_ours(images, parcels, Path(folder, f"dataset-{n}"))
            print(f"| preprocessing.prepare | {n} | {seconds:.1f} | | {peak / 1e6:.0f} |", flush=True)
        sample = outlines[:few_parcels]
        by_parcel = sum(loop(paths, [outline]) for outline in progress_bar(sample, "loop", "parcels"))
        by_date = loop(paths[:few_dates], outlines)
    for name, theirs in (
        ("for each parcel, for each date: open, mask", by_parcel * n_parcels / few_parcels),
        ("for each date: open; for each parcel: mask", by_date * n / few_dates),
    ):
        print(f"| {name} (from a part) | {n} | {theirs:.1f} | {theirs / seconds:.1f} | |")


if __name__ == "__main__":
    run_cli(main)
