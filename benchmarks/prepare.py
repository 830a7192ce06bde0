"""Measures preprocessing.prepare against loops over parcels and dates with rasterio.mask.

python -m benchmarks.prepare            2,000 parcels x 24 dates x 10 bands of 2,000 x 2,000 pixels; about 1 GB of disk
python -m benchmarks.prepare --large    100,000 parcels x 30 dates x 4 bands of 4 tiles of 2,500 x 2,500 pixels; 15 GB
python -m benchmarks.prepare --quick    to see that it runs; its figures mean little

--large compares with the decompression of all images alone, in seconds of processors, which others on the machine
hardly change. The dates of a tile have one content.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from pathlib import Path

import geopandas
import numpy as np
import rasterio
import rasterio.mask
from rasterio.transform import from_origin
from rasterio.windows import Window
from shapely import Point, Polygon

from benchmarks.measure import read_memory
from common.errors import run_cli
from common.flags import Parser
from common.progress import progress_bar
from preprocessing.images.workers import THREADS

ROOT = Path(__file__).resolve().parent.parent
C, CRS, LEFT, TOP = 10, "EPSG:32631", 300_000, 4_900_000


# Side of the images in pixels, parcels, numbers of dates, and parcels and dates that the loops go through.
NORMAL, QUICK = (2000, 2000, (6, 12, 24), 40, 2), (200, 20, (1, 2), 5, 1)
# Side of a tile, parcels, numbers of dates.
LARGE, QUICK_LARGE = (2500, 100_000, (10, 20, 30)), (200, 50, (1, 2))


def name_image(folder: Path, t: int, tile: int = 0) -> Path:
    """Path of the image of a date."""
    return folder / f"{tile}_{date(2017, 1, 3) + timedelta(days=5 * t):%Y%m%d}.tif"


def write_image(folder: Path, t: int, side: int, n_bands: int = C, tile: int = 0) -> Path:
    """Writes the image of a date, fields with noise: deflate, predictor 2, tiles of 256 pixels, uint16."""
    path = name_image(folder, t, tile)
    fields = np.random.default_rng(0).integers(200, 5000, (n_bands, -(-side // 20), -(-side // 20)))
    fields = fields.repeat(20, 1).repeat(20, 2)[:, :side, :side]
    corner = LEFT + tile % 2 * side * 10, TOP - tile // 2 * side * 10
    options = {"crs": CRS, "transform": from_origin(*corner, 10, 10), "dtype": "uint16", "tiled": True}
    options |= {"count": n_bands, "height": side, "width": side, "compress": "deflate", "predictor": 2}
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


def run_ours(images: Path, parcels: Path, output: Path, *options: str) -> tuple[float, float, int]:
    """Seconds of the whole command, start included, those of processors, and most bytes of memory that no file backs."""
    command = [sys.executable, "-m", "preprocessing.prepare", "--images", images, "--parcels", parcels]
    command += ["--output", output, "--label_column", "crop", *options]
    started, before, peak = time.perf_counter(), os.times(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, read_memory("RssAnon", process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError("preprocessing.prepare failed")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, used, peak


def loop(paths: list[Path], outlines: list[Polygon]) -> float:
    """Seconds of reading every parcel from every image, each image opened once."""
    started = time.perf_counter()
    for path in paths:
        with rasterio.open(path) as file:
            for outline in outlines:
                values, _ = rasterio.mask.mask(file, [outline], crop=True, filled=False)
                values.data[:, ~values.mask[0]].copy()
    return time.perf_counter() - started


def decompress(paths: list[Path]) -> float:
    """Seconds of processors that reading all images takes, by as many threads as prepare them, and nothing else."""

    def read(path: Path) -> None:
        with rasterio.open(path) as file:
            for top in range(0, file.height, 1024):
                file.read(window=Window(0, top, file.width, min(1024, file.height - top)))

    started = time.process_time()
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(read, paths))
    return time.process_time() - started


def measure_large(side: int, n_parcels: int, numbers: tuple[int, ...]) -> None:
    """Prints a line for each number of dates, of parcels on four tiles side by side; for the last one in both forms."""
    print(
        f"{n_parcels:,} parcels, 4 bands, 4 tiles of {side:,} x {side:,} pixels, {os.cpu_count()} cores.\n\n"
        "| | dates | seconds | of processors | decompression alone | ratio | memory, MB |\n"
        "|---|---:|---:|---:|---:|---:|---:|"
    )
    with tempfile.TemporaryDirectory() as folder:
        images, parcels, paths = Path(folder, "images"), Path(folder, "parcels.gpkg"), []
        images.mkdir()
        write_parcels(parcels, 2 * side, n_parcels)
        tiles = [write_image(Path(folder), 0, side, 4, tile) for tile in range(4)]
        for n in numbers:
            for t in range(len(paths) // 4, n):
                paths += [name_image(images, t, tile) for tile in range(4)]
                for tile, path in zip(tiles, paths[-4:]):
                    path.hardlink_to(tile)
            floor = decompress(paths)
            for form in [("--packed",), ()][: 1 + (n == numbers[-1])]:
                seconds, used, peak = run_ours(images, parcels, Path(folder, "dataset"), *form)
                shutil.rmtree(Path(folder, "dataset"))
                name = " ".join(("preprocessing.prepare", *form))
                figures = f"{seconds:.0f} | {used:.0f} | {floor:.0f} | {used / floor:.1f} | {peak / 1e6:.0f}"
                print(f"| {name} | {n} | {figures} |", flush=True)


def main() -> None:
    """Writes images, measures, and prints a line for each number of dates and, for the last number, for each loop."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--large", action="store_true", help="four tiles, against decompression alone")
    args = parser.parse_args()
    if args.large:
        measure_large(*(QUICK_LARGE if args.quick else LARGE))
        return
    side, n_parcels, numbers, few_parcels, few_dates = QUICK if args.quick else NORMAL
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
            seconds, _, peak = run_ours(images, parcels, Path(folder, f"dataset-{n}"))
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
