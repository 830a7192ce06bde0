"""Simulated Sentinel-Agri: a dataset folder in the published format that contains no measurement.

    python -m preprocessing.simulate OUT --parcels 2000 --seed 1
    python -m preprocessing.simulate OUT --year 2018 --irregular 43 96 --gaps   another year, other dates, missing pixels
    python -m preprocessing.simulate OUT --parcels 2000 --seed 1 --rasters   images and outlines instead

Every parcel grows one of twenty crops. Growth curves say how much of the ground is covered by leaves, straw,
flowers and soil at each date, and mix their four spectra accordingly. A parcel has its own timing, vigour,
weeds and soil; a pixel its own density and noise; border pixels see part of a neighbour; some dates lie under
clouds or shadows. Dates, parcel sizes and mean reflectances are like those of Sentinel-Agri; the names of the
crops are invented and stand for no real nomenclature.
"""

import argparse
import json
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, as_user_error, run_cli
from common.progress import progress_bar
from preprocessing.simulation.crops import BANDS, CROPS, C
from preprocessing.simulation.fields import FIRST_PARCELS, simulate_parcel
from preprocessing.simulation.seasons import (
    PUBLISHED,
    PUBLISHED_YEAR,
    T,
    check_seasons,
    draw_own_season,
    draw_season,
)

VERSION = 2  # raise it whenever other bytes are written, so that no stale embedded dataset is used
EMBEDDED_PARCELS = 2000
EMBEDDED_SEED = 1
EMBEDDED_MAX_PIXELS = 75  # real parcels are larger; this keeps the embedded dataset at 60 MB


def simulate(
    folder: str | Path,
    parcels: int,
    seed: int,
    progress: bool = True,
    max_pixels: int | None = None,
    *,
    year: int = PUBLISHED_YEAR,
    irregular: Sequence[int] | None = None,
    gaps: bool = False,
) -> None:
    """Writes a simulated dataset in the published format; under its final name only once it is complete.

    Parcel number i, counted from 1, depends on i and the other arguments, not on the number of parcels.

    Args:
        folder: must not exist, or be empty.
        parcels: at least 100, so that each of the 20 classes has at least five.
        seed: at least 0.
        progress: show a progress bar.
        max_pixels: larger parcels are cut to this size; None leaves the sizes of Sentinel-Agri.
        year: other years than 2017 have dates, clouds and weather of their own, drawn from year and seed.
        irregular: fewest and most dates of a parcel, each with days of its own; None for dates that all share.
        gaps: whether pixels under clouds or shadows are missing, 0, instead of mixed with these.

    Raises:
        UserError: if an argument is out of its range, or the folder is in use or cannot be written.
    """
    if parcels < FIRST_PARCELS:
        raise UserError(f"parcels is {parcels}; give at least {FIRST_PARCELS}, five for each of the classes.")
    if seed < 0:
        raise UserError(f"seed is {seed}; give 0 or more.")
    if max_pixels is not None and max_pixels < 1:
        raise UserError(f"max_pixels is {max_pixels}; give at least 1.")
    check_seasons(year, irregular)
    folder = Path(folder).resolve()
    with as_user_error(OSError, prefix=f"The simulated dataset cannot be written to {folder}: "):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder; name a new one or remove it.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            complete = Path(temporary) / folder.name
            complete.mkdir()
            write_dataset(complete, parcels, seed, max_pixels, progress, year, irregular, gaps)
            complete.rename(folder)


def write_dataset(
    folder: Path,
    parcels: int,
    seed: int,
    max_pixels: int | None,
    progress: bool,
    year: int,
    irregular: Sequence[int] | None,
    gaps: bool,
) -> None:
    """Writes DATA, META and the statistics into an existing folder; arguments as in `simulate`."""
    (folder / "DATA").mkdir()
    (folder / "META").mkdir()
    shared = draw_season(year, seed)
    labels, sizes, geometries, dates = {}, {}, {}, {}
    statistics = Statistics(per_date=irregular is None and not gaps)
    for index in progress_bar(range(parcels), "simulating", "parcels", shown=progress):
        season = shared if irregular is None else draw_own_season(year, seed, index, *irregular)
        parcel = simulate_parcel(seed, index, max_pixels, season, gaps)
        name = str(index + 1)
        np.save(folder / "DATA" / f"{name}.npy", parcel.pixels)
        labels[name], sizes[name], geometries[name] = parcel.label, parcel.pixels.shape[-1], parcel.geometry
        dates[name] = season.dates
        statistics.add(parcel.pixels)
    published = shared is PUBLISHED and statistics.per_date
    statistics.write(folder / ("S2-2017-T31TFM-meanstd.pkl" if published else "normalisation_values.pkl"))
    meta = {
        "labels": {"label_44class": labels},
        "dates": {str(t): day for t, day in enumerate(shared.dates)} if irregular is None else dates,
        "sizes": sizes,
        "geomfeat": geometries,
        "info": {"simulated": True, "nodata": 0 if gaps else None, "bands": BANDS},
    }
    for name, content in meta.items():
        (folder / "META" / f"{name}.json").write_text(json.dumps(content))


class Statistics:
    """Mean and standard deviation of all pixels that are present, above 0.

    Args:
        per_date: for each date and channel, of series that share their dates and are complete; else for each channel.
    """

    def __init__(self, per_date: bool) -> None:
        self.per_date = per_date
        # Sums of integers are exact, so mean and standard deviation need no second pass.
        self._count: Any = 0
        self._total: Any = 0
        self._squares: Any = 0

    def add(self, pixels: np.ndarray) -> None:
        """Adds a parcel's pixels, (T, C, S) uint16."""
        if not self.per_date:
            pixels = pixels.transpose(1, 0, 2).reshape(C, -1)
        self._count += np.count_nonzero(pixels, axis=-1)
        self._total += pixels.sum(-1, dtype=np.int64)
        self._squares += np.einsum("...s,...s->...", pixels, pixels, dtype=np.int64)

    def write(self, path: Path) -> None:
        """Pickles them, (T, C) or (C,) float32 each."""
        mean = self._total / self._count
        deviation = np.sqrt(self._squares / self._count - mean**2)
        # Protocol 4 writes arrays in the form that older numpy and Python releases wrote too.
        path.write_bytes(pickle.dumps((mean.astype(np.float32), deviation.astype(np.float32)), protocol=4))


def embedded_dataset() -> Path:
    """Folder of the embedded simulated dataset: made on first use and kept in .cache of the repository.

    Two processes may ask at once: the first to finish provides it, the other's copy is discarded.

    Raises:
        UserError: if it cannot be written.
    """
    name = f"simulated-{VERSION}-{EMBEDDED_PARCELS}-{EMBEDDED_SEED}"
    folder = Path(__file__).resolve().parent.parent / ".cache" / name
    complete = (folder / "META").is_dir
    if not complete():
        try:
            simulate(folder, EMBEDDED_PARCELS, EMBEDDED_SEED, max_pixels=EMBEDDED_MAX_PIXELS)
        except UserError:
            if not complete():  # otherwise another process was faster
                raise
    return folder


def main() -> None:
    """Command line: python -m preprocessing.simulate OUT."""
    parser = argparse.ArgumentParser(description="Writes a simulated Sentinel-Agri dataset.")
    parser.add_argument("out", metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--parcels", type=int, default=EMBEDDED_PARCELS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=EMBEDDED_SEED, help="default: %(default)s")
    parser.add_argument("--max_pixels", type=int, help="cut larger parcels to this size; default: real sizes")
    parser.add_argument(
        "--rasters", action="store_true", help="write images and parcel outlines instead of a dataset"
    )
    parser.add_argument(
        "--year",
        type=int,
        help="another year: other dates, clouds and weather; default: 2017, the published dates",
    )
    parser.add_argument(
        "--irregular",
        type=int,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="each parcel has MIN to MAX dates of its own",
    )
    parser.add_argument(
        "--gaps", action="store_true", help="pixels under clouds are missing, 0, instead of mixed with cloud"
    )
    args = parser.parse_args()
    if args.rasters:
        for name in ("max_pixels", "year", "irregular", "gaps"):
            if getattr(args, name) not in (None, False):
                raise UserError(f"--{name} has no meaning with --rasters; leave one of them out.")
        with as_user_error(ImportError, prefix="--rasters needs the packages of requirements-geo.txt: "):
            from preprocessing.simulation.rasters import simulate_rasters
        simulate_rasters(args.out, args.parcels, args.seed)
        print(
            f"{args.out}: {args.parcels} simulated parcels, {T} images of {C} bands and a cloud mask; no real data"
        )
        return
    year = PUBLISHED_YEAR if args.year is None else args.year
    simulate(
        args.out,
        args.parcels,
        args.seed,
        max_pixels=args.max_pixels,
        year=year,
        irregular=args.irregular,
        gaps=args.gaps,
    )
    n_dates = (
        f"{args.irregular[0]} to {args.irregular[1]}"
        if args.irregular
        else len(draw_season(year, args.seed).dates)
    )
    print(
        f"{args.out}: {args.parcels} simulated parcels, {n_dates} dates of {year}, {len(BANDS)} bands, "
        f"{len(CROPS)} classes; no real data"
    )


if __name__ == "__main__":
    run_cli(main)
