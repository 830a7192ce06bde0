"""Measures what is done with all parcels of a large dataset before any batch: opening, folds, recognising parcels.

python -m benchmarks.million             a million simulated parcels of one pixel, 24 dates; about 1.5 GB of disk
python -m benchmarks.million --own       the same, each parcel with 20 to 24 dates of its own
python -m benchmarks.million --quick     to see that it runs; its figures mean little
"""

import argparse
import json
import os
import tempfile
import threading
import time
from datetime import date, timedelta
from pathlib import Path

import geopandas
import numpy as np
import shapely

from benchmarks.measure import read_memory, start_process
from common.errors import run_cli
from common.flags import Parser
from data.folds import fold_splits, read_folds
from data.moments import NORM, write_norm
from data.packing import list_parcels, write_days, write_pixels
from data.parts import PARTS, Parts, data_key, fingerprints
from learning.options import TEMPORAL, add_data_options, resolve_data
from preprocessing.split import FOLDS, split

L, C, CLASSES = 24, 10, 20
DAYS = np.array([int(f"{date(2017, 1, 3) + timedelta(days=12 * t):%Y%m%d}") for t in range(L)], np.int32)


def write_folder(folder: Path, n: int, own: bool) -> None:
    """A dataset of random pixels, labels and features, and squares in rows as outlines."""
    rng, meta = np.random.default_rng(1), folder / "META"
    meta.mkdir()
    n_dates = rng.integers(20, L + 1, n) if own else np.full(n, L)
    with write_pixels(folder, True, np.dtype(np.uint16), None) as add:
        for parcel, k in enumerate(n_dates.tolist(), start=1):
            add(parcel, rng.integers(1, 5000, (k, C, 1), np.uint16))
    if own:
        write_days(folder, [DAYS[np.sort(rng.permutation(L)[:k])] for k in n_dates])
    features, labels = rng.uniform(1, 100, (n, 4)).round(3).tolist(), rng.integers(0, CLASSES, n).tolist()
    ids = list(map(str, range(1, n + 1)))
    contents = {"labels": {"label_44class": dict(zip(ids, labels))}, "geomfeat": dict(zip(ids, features))}
    if not own:
        contents["dates"] = dict(enumerate(DAYS.tolist()))
    for name, content in contents.items():
        (meta / f"{name}.json").write_text(json.dumps(content))
    write_norm(folder / NORM, (np.full(C, 2500, np.float32), np.full(C, 1443, np.float32)))
    rows, columns = np.divmod(np.arange(n), int(n**0.5))
    x, y = 400_000 + 100 * columns, 5_000_000 - 100 * rows
    table = geopandas.GeoDataFrame(
        {"id": range(1, n + 1)}, geometry=shapely.box(x, y, x + 80, y + 80), crs=32631
    )
    table.to_file(meta / "parcels.gpkg", layer="parcels")


class Notes:
    """Seconds of the processor that each step takes, and most bytes of memory, that no file backs, during it."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float]] = []
        self._clock, self._peak, self._ends = time.process_time(), 0, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._ends.wait(0.02):
            self._peak = max(self._peak, read_memory("RssAnon"))

    def add(self, name: str) -> None:
        """Notes a step that is over."""
        now, peak = time.process_time(), max(self._peak, read_memory("RssAnon"))
        self.rows.append((name, now - self._clock, peak))
        self._clock, self._peak = now, 0


def train(folder: Path) -> list[tuple[str, float, float]]:
    """What train.py does before its first batch, and inference.py to tell who predicts which parcel; after `divide`."""
    parser, notes = argparse.ArgumentParser(), Notes()
    add_data_options(parser)
    parser.set_defaults(npixel=None, rdm_seed=1, varying_dates=False, season_start=None)
    parser.set_defaults(**dict.fromkeys(TEMPORAL, 0))
    dataset = resolve_data(parser.parse_args([]), folder)[0]
    notes.add("opening, as train.py does")
    read_folds(folder / "META" / FOLDS, dataset.pid, dataset.store.ids.tolist())
    notes.add("reading the folds of preprocessing.split")
    splits = fold_splits(len(dataset), 5, 1)
    data_key(dataset.pid, dataset.target, splits)
    notes.add("random folds")
    marks = fingerprints(folder, dataset.pid, dataset.store)
    notes.add("fingerprints of the parcels")
    Parts.of(marks, splits).save(folder / PARTS)
    held_out, seen = Parts.load(folder / PARTS).look_up(marks, range(1, 6))
    assert held_out.all() and not seen.any()
    notes.add(f"{PARTS}: written, read, searched")
    return notes.rows


def divide(folder: Path) -> list[tuple[str, float, float]]:
    """Spatial folds."""
    notes = Notes()
    split(folder, len(list_parcels(folder)) ** 0.5 / 200)  # some 400 blocks
    notes.add("preprocessing.split")
    return notes.rows


def main() -> None:
    """Writes a dataset, measures in new processes, and prints a line for each step."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--own", action="store_true", help="dates of its own for each parcel")
    parser.add_argument("--quick", action="store_true", help="few parcels")
    args = parser.parse_args()
    n = 1000 if args.quick else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), n, args.own)
        print(
            f"{n:,} parcels of one pixel, {os.cpu_count()} cores.\n\n"
            "| | seconds of a processor | memory, MB |\n|---|---:|---:|"
        )
        for function in (divide, train):
            with start_process(False, 1) as process:
                for name, seconds, peak in process.submit(function, Path(folder)).result():
                    print(f"| {name} | {seconds:.1f} | {peak / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    run_cli(main)
