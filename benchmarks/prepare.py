"""Measures preprocessing.prepare against a loop over parcels and dates with rasterio.mask, and prints one table.

python -m benchmarks.prepare            2,000 parcels x 24 dates x 10 bands of 2,000 x 2,000 pixels; about 2 GB of disk
python -m benchmarks.prepare --quick    to see that it runs; its figures mean little
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import NamedTuple

import geopandas
import numpy as np
import rasterio
import rasterio.mask
from rasterio.transform import from_origin
from shapely import Point, affinity

from common.errors import run_cli
from common.flags import Parser
from common.progress import progress_bar

ROOT = Path(__file__).resolve().parent.parent
C, CRS, LEFT, TOP = 10, "EPSG:32631", 300_000, 4_900_000


class Sizes(NamedTuple):
    """How much is measured."""

    side: int  # of the images, in pixels
    parcels: int
    dates: tuple[int, ...]  # numbers of dates; the loop runs with the reference
    reference: int
    sample: int  # parcels of the first loop, which goes through all dates
    sampled_dates: int  # of the other loops, which go through all parcels


NORMAL = Sizes(2000, 2000, (6, 12, 24, 48), 24, 40, 2)
QUICK = Sizes(200, 20, (2,), 2, 5, 1)


class Run(NamedTuple):
    """Seconds, and peak memory in bytes: all that is resident, and what is not backed by a file."""

    seconds: float
    resident: int
    own: int


def write_images(folder: Path, side: int, dates: int) -> list[Path]:
    """Writes images of fields with noise: deflate, predictor 2, tiles of 256 pixels, uint16."""
    rng, paths = np.random.default_rng(0), []
    folder.mkdir()
    fields = rng.integers(200, 5000, (C, -(-side // 20), -(-side // 20))).repeat(20, 1).repeat(20, 2)
    fields = fields[:, :side, :side]
    for t in progress_bar(range(dates), "writing images", "dates"):
        day = date(2017, 1, 3) + timedelta(days=5 * t)
        values = (fields + rng.integers(-50, 50, fields.shape)).astype(np.uint16)
        paths.append(folder / f"{day:%Y%m%d}.tif")
        with rasterio.open(
            paths[-1],
            "w",
            driver="GTiff",
            count=C,
            height=side,
            width=side,
            dtype="uint16",
            crs=CRS,
            transform=from_origin(LEFT, TOP, 10, 10),
            tiled=True,
            compress="deflate",
            predictor=2,
        ) as file:
            file.write(values)
    return paths


def write_parcels(path: Path, side: int, parcels: int) -> list:
    """Writes ovals of 40 corners, some 230 pixels on average, all inside the images."""
    rng = np.random.default_rng(1)
    ovals = []
    for x, y in rng.uniform(150, 10 * side - 150, (parcels, 2)):
        oval = affinity.scale(Point(LEFT + x, TOP - y).buffer(100, quad_segs=10), *rng.uniform(0.4, 1.3, 2))
        ovals.append(affinity.rotate(oval, rng.uniform(0, 180)))
    geopandas.GeoDataFrame({"crop": ["wheat"] * parcels}, geometry=ovals, crs=CRS).to_file(path)
    return ovals


def run_ours(images: Path, parcels: Path, output: Path) -> Run:
    """Runs the whole command in a process of its own, its start included."""
    command = [sys.executable, "-m", "preprocessing.prepare", "--images", images, "--parcels", parcels]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--output", output, "--label_column", "crop"], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    peak = {"VmRSS": 0, "RssAnon": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for name, value in _memory(process.pid):
                if name in peak:
                    peak[name] = max(peak[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.wait()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError("preprocessing.prepare failed")
    return Run(seconds, peak["VmRSS"], peak["RssAnon"])


def _memory(process: int) -> Iterator[tuple[str, int]]:
    """Lines of /proc that count memory, in bytes; none where there is no /proc."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        name, value = line.split(":", 1)
        if value.endswith("kB"):
            yield name, 1024 * int(value.split()[0])


def loop_parcels(paths: list[Path], outlines: list) -> float:
    """Seconds of the loop that comes to mind first: for every parcel, for every date, open the image and mask it."""
    started = time.perf_counter()
    for outline in progress_bar(outlines, "loop over parcels", "parcels"):
        series = []
        for path in paths:
            with rasterio.open(path) as file:
                values, _ = rasterio.mask.mask(file, [outline], crop=True, filled=False)
                series.append(values.data[:, ~values.mask[0]])
        np.stack(series)
    return time.perf_counter() - started


def loop_dates(paths: list[Path], outlines: list) -> float:
    """Seconds of the same with each image opened once, so that GDAL's cache serves all parcels."""
    started = time.perf_counter()
    for path in paths:
        with rasterio.open(path) as file:
            for outline in progress_bar(outlines, "loop over dates", "parcels"):
                values, _ = rasterio.mask.mask(file, [outline], crop=True, filled=False)
                values.data[:, ~values.mask[0]].copy()
    return time.perf_counter() - started


def rewrite(folder: Path, dates: int, parcels: int, pixels: int) -> float:
    """Seconds of what comes on top where the loop over dates adds each date to the parcel's file, by rewriting it."""
    folder.mkdir()
    new = np.random.default_rng(0).integers(0, 5000, (1, C, pixels)).astype(np.uint16)
    started = time.perf_counter()
    for t in range(dates):
        for parcel in range(parcels):
            path = folder / f"{parcel}.npy"
            np.save(path, np.concatenate([np.load(path), new]) if t else new)
    return time.perf_counter() - started


def main() -> None:
    """Writes images, measures, prints."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--folder", type=Path, help="where images are written for the time being")
    args = parser.parse_args()
    sizes = QUICK if args.quick else NORMAL
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        measure(Path(temporary), sizes)


def measure(folder: Path, sizes: Sizes) -> None:
    """Measures both sides and prints the table."""
    paths = write_images(folder / "images", sizes.side, max(sizes.dates))
    outlines = write_parcels(folder / "parcels.gpkg", sizes.side, sizes.parcels)
    print(
        f"{sizes.parcels:,} parcels, {C} bands, {sizes.side:,} x {sizes.side:,} pixels, {os.cpu_count()} cores, load "
        f"average {os.getloadavg()[0]:.1f}\n\n| | dates | seconds | ratio | peak memory, MB | of its own, MB |\n"
        "|---|---:|---:|---:|---:|---:|"
    )
    ours = {}
    for n in sizes.dates:
        part = folder / f"images-{n}"
        part.mkdir()
        for path in paths[:n]:
            (part / path.name).symlink_to(path)
        ours[n] = run_ours(part, folder / "parcels.gpkg", folder / f"dataset-{n}")
    n = sizes.reference
    step = max(1, len(outlines) // sizes.sample)
    sample, dates = outlines[::step][: sizes.sample], paths[:n][: sizes.sampled_dates]
    by_parcel = loop_parcels(paths[:n], sample) * len(outlines) / len(sample)
    by_date = loop_dates(dates, outlines) * n / len(dates)
    again = rewrite(folder / "rewritten", n, len(sample), 230) * len(outlines) / len(sample)
    for dates_, run in ours.items():
        memory = f"{run.resident / 1e6:.0f} | {run.own / 1e6:.0f}"
        print(
            f"| preprocessing.prepare | {dates_} | {run.seconds:.1f} | {'1.0' if dates_ == n else ''} | {memory} |"
        )
    for name, seconds in (
        (f"for each parcel, for each date: open, mask (from {len(sample)} parcels)", by_parcel),
        (f"for each date: open; for each parcel: mask (from {len(dates)} dates)", by_date),
        ("the same, each parcel's file rewritten at each date, as published", by_date + again),
    ):
        print(f"| {name} | {n} | {seconds:.1f} | {seconds / ours[n].seconds:.1f} | | |")
    print(f"\nLoad average at the end {os.getloadavg()[0]:.1f}; more than the cores mean a busy machine.")


if __name__ == "__main__":
    run_cli(main)
