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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from common.errors import UserError, as_user_error, run_cli
from common.files import write_folder
from common.progress import progress_bar
from data.moments import NORM, PUBLISHED_NORM, Moments, write_norm
from data.packing import write_days, write_pixels
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
    packed: bool = False,
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
        packed: whether pixels are written to PIXELS, instead of DATA.

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
    folder, shared = Path(folder).resolve(), draw_season(year, seed)
    per_date = irregular is None and not gaps
    labels, sizes, geometries, dates = {}, {}, {}, {}
    moments = Moments("date" if per_date else "channel")
    with (
        as_user_error(OSError, prefix=f"The simulated dataset cannot be written to {folder}: "),
        write_folder(folder) as work,
        write_pixels(work, packed, np.dtype(np.uint16), 0 if gaps else None) as add,
    ):
        (work / "META").mkdir()
        for index in progress_bar(range(parcels), "simulating", "parcels", shown=progress):
            season = shared if irregular is None else draw_own_season(year, seed, index, *irregular)
            parcel = simulate_parcel(seed, index, max_pixels, season, gaps)
            name, pixels = str(index + 1), parcel.pixels
            add(index + 1, pixels)
            labels[name], sizes[name], geometries[name] = parcel.label, pixels.shape[-1], parcel.geometry
            if irregular is not None:
                dates[name] = season.dates
            moments.add(pixels, (pixels == 0).all(1) if gaps else None)
        write_norm(work / (PUBLISHED_NORM if shared is PUBLISHED and per_date else NORM), moments.result())
        if irregular is None:
            dates = {str(t): day for t, day in enumerate(shared.dates)}
        elif packed:
            write_days(work, list(dates.values()))
        contents = {
            "labels": {"label_44class": labels},
            **({} if irregular and packed else {"dates": dates}),
            "sizes": sizes,
            "geomfeat": geometries,
            "info": {"simulated": True, "nodata": 0 if gaps else None, "bands": BANDS},
        }
        for name, content in contents.items():
            (work / "META" / f"{name}.json").write_text(json.dumps(content))


def embedded_dataset() -> Path:
    """Folder of the embedded simulated dataset: made on first use and kept in .cache of the repository.

    Of several processes that ask at once, such as those of torchrun, one makes it and the others wait for it.

    Raises:
        UserError: if it cannot be written.
    """
    name = f"simulated-{VERSION}-{EMBEDDED_PARCELS}-{EMBEDDED_SEED}"
    folder = Path(__file__).resolve().parent.parent / ".cache" / name
    if not (folder / "META").is_dir():
        with as_user_error(OSError, prefix=f"The embedded dataset cannot be written to {folder}: "):
            folder.parent.mkdir(exist_ok=True)
            with FileLock(folder.with_name(f".{name}.lock")):  # let go by the system if the process dies
                if not (folder / "META").is_dir():
                    simulate(folder, EMBEDDED_PARCELS, EMBEDDED_SEED, max_pixels=EMBEDDED_MAX_PIXELS)
    return folder


def main() -> None:
    """Command line: python -m preprocessing.simulate OUT."""
    parser = argparse.ArgumentParser(description="Writes a simulated Sentinel-Agri dataset.")
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to write, new or empty")
    add("--parcels", type=int, default=EMBEDDED_PARCELS, help="default: %(default)s")
    add("--seed", type=int, default=EMBEDDED_SEED, help="default: %(default)s")
    add("--max_pixels", type=int, help="cut larger parcels to this size; default: real sizes")
    add("--rasters", action="store_true", help="write images and parcel outlines instead of a dataset")
    years = "another year: other dates, clouds and weather; default: 2017, the published dates"
    add("--year", type=int, help=years)
    own = "each parcel has MIN to MAX dates of its own"
    add("--irregular", type=int, nargs=2, metavar=("MIN", "MAX"), help=own)
    add("--gaps", action="store_true", help="pixels under clouds are missing, 0, instead of mixed with cloud")
    packed = "write one file of all pixels, PIXELS, instead of one per parcel"
    add("--packed", action="store_true", help=packed)
    args = parser.parse_args()
    options = {name: getattr(args, name) for name in ("max_pixels", "year", "irregular", "gaps", "packed")}
    if args.rasters:
        for name, value in options.items():
            if value not in (None, False):
                raise UserError(f"--{name} has no meaning with --rasters; leave one of them out.")
        with as_user_error(ImportError, prefix="--rasters needs the packages of requirements-geo.txt: "):
            from preprocessing.images.simulated import simulate_rasters
        simulate_rasters(args.out, args.parcels, args.seed)
        what = f"{T} images of {C} bands and a cloud mask"
    else:
        year = PUBLISHED_YEAR if args.year is None else args.year
        simulate(args.out, args.parcels, args.seed, **options | {"year": year})
        n_dates = len(draw_season(year, args.seed).dates)
        if args.irregular:
            n_dates = f"{args.irregular[0]} to {args.irregular[1]}"
        what = f"{n_dates} dates of {year}, {C} bands, {len(CROPS)} classes"
    print(f"{args.out}: {args.parcels} simulated parcels, {what}; no real data")


if __name__ == "__main__":
    run_cli(main)
