"""Makes a dataset folder from satellite images and parcel outlines.

    python -m preprocessing.prepare --images FOLDER --parcels FILE --output DIR --label_column crop

Every parcel is rasterised once; then each image is read once, block by block. A run that was killed goes on after the
last date it finished, when started again with the same images, parcels and options. With --packed the pixels are
written as PIXELS, without a file for each parcel.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import UserError, as_user_error, run_cli
from common.files import check_new, read_json, write_csv, write_json
from common.flags import Parser, finite, positive
from reports.plots import save_figure

LEFT_OUT, PREPARED = "left_out.csv", "prepared.json"


class _Pattern(argparse.Action):
    """A single word; several are what a shell makes of a pattern without quotes."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        args: argparse.Namespace,
        values: list[str],
        flag: str | None = None,
    ) -> None:
        if len(values) > 1:
            end = os.path.commonprefix([value[::-1] for value in values])[::-1]
            pattern = f"{os.path.commonprefix(values)}*{end}"
            parser.error(
                f"{flag} is followed by {len(values)} names, {values[0]} and so on, as the shell makes of a pattern; put "
                f"the pattern in quotes, such as {flag} '{pattern}'"
            )
        setattr(args, self.dest, values[0])


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(description="Makes a dataset folder from satellite images and parcel outlines.")
    add = parser.add_argument_group("input and output").add_argument
    images = "folder, such as one of .SAFE products, glob pattern in quotes, or STAC item collection; names contain dates"
    add("--images", required=True, nargs="+", action=_Pattern, help=images)
    add("--parcels", required=True, help="file with the outlines, in any vector format")
    add("--output", required=True, help="dataset folder to write, new or empty")
    add = parser.add_argument_group("parcels").add_argument
    add(
        "--label_column",
        help="column of the labels, empty where one is not known; without it, the dataset has none",
    )
    add("--class_column", help="column of the labels' names, where labels are numbers")
    add("--id_column", help="column of the ids; without it, parcels are numbered from 1")
    add("--layer", help="layer of the parcels' file; needed where it has several")
    add("--buffer", type=finite, default=0.0, help="metres by which outlines grow; negative: shrink")
    add("--min_pixels", type=positive, default=1, help="leave out parcels with fewer pixels")
    add("--skip_invalid", action="store_true", help="leave out empty outlines instead of stopping")
    add = parser.add_argument_group("images").add_argument
    add("--bands", nargs="+", help="names or numbers of the bands; without it, all of the first image")
    add("--nodata", type=finite, help="value of missing pixels, besides what the files name")
    add(
        "--cloud_mask",
        nargs="+",
        action=_Pattern,
        help="band of the images, or pattern of files in quotes, that shows clouds",
    )
    add("--clear", type=int, nargs="+", help="values of the cloud mask where the ground is seen")
    add("--scale", type=finite, help="factor of all values, such as 0.0001; writes float32")
    added = "number that is added to all values before, and the first day of the images that it holds for (default: all); "
    added += "without it, what the files and their names tell"
    add("--offset", type=finite, nargs="+", metavar=("NUMBER", "YYYYMMDD"), help=added)
    size = (
        "size of the pixels that bands are read in, such as 10; without it, that of the finest band asked for"
    )
    add("--resolution", type=_size, help=size)
    resample = "how bands with other pixels are read"
    add("--resampling", choices=("nearest", "bilinear"), default="nearest", help=resample)
    same = "what becomes of images of one date and place: a pixel of the first, by name, that sees it, their mean, or both"
    add(
        "--same_date",
        choices=("mosaic", "mean", "separate"),
        help=same + "; adjoining tiles are joined in any case",
    )
    packed = "write one file of all pixels, PIXELS, instead of one per parcel; needed for millions of parcels"
    add("--packed", action="store_true", help=packed)
    add = parser.add_argument_group("computing").add_argument
    add("--memory", type=_gigabytes, default=2.0, help="GB that pixels may take in memory")
    add("--scheduler", help="address of a Dask scheduler whose workers read the images")
    return parser.parse_args()


def _size(text: str) -> float:
    if finite(text) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return float(text)


def _gigabytes(text: str) -> float:
    if finite(text) < 0.05:
        raise argparse.ArgumentTypeError(f"{text!r} is not at least 0.05")
    return float(text)


def main() -> None:
    """Command line: python -m preprocessing.prepare."""
    args = parse_args()
    if (args.cloud_mask is None) != (args.clear is None):
        raise UserError(
            "--cloud_mask and --clear belong together: the mask, and its values where the ground is seen."
        )
    if args.class_column and not args.label_column:
        raise UserError("--class_column names the labels of --label_column; give both.")
    if args.scale == 0:
        raise UserError("--scale is 0; give the factor that turns values into reflectances, such as 0.0001.")
    if args.offset and len(args.offset) > 2:
        raise UserError(
            "--offset takes a number and, if it does not hold for all images, the first day of those."
        )
    output = Path(args.output).resolve()
    if not _unfinished(output):
        check_new(output)
    with as_user_error(ImportError, prefix="preparing images needs the packages of requirements-geo.txt: "):
        from preprocessing.images.grids import place_images
        from preprocessing.images.outlines import read_parcels
        from preprocessing.images.scenes import find_images
        from preprocessing.images.units import choose_units
    images, bands = find_images(args.images, args.bands, args.cloud_mask, args.resolution)
    images, unit, assumed = choose_units(images, args.scale, args.offset)
    grids = place_images(images, args.same_date)
    units = {"units": unit, "offsets": assumed}
    parcels = read_parcels(
        args.parcels, args.label_column, args.id_column, args.layer, args.skip_invalid, args.class_column
    )
    with as_user_error(OSError, prefix=f"the dataset cannot be written to {output}: "):
        images = [image for grid in grids for image in grid.images]
        with _working_folder(output, _fingerprint(args, images)) as (work, finished):
            summary = "complete; the run that prepared it was killed at its end"
            if not finished:
                summary = _prepare(args, output, work, grids, bands, parcels, units)
            _tell(output, summary)


def _unfinished(output: Path) -> set[Path]:
    """Working folders of runs that were killed, or are under way."""
    return set(output.parent.glob(f".{escape(output.name)}-{'[0-9a-f]' * 16}"))


@contextmanager
def _working_folder(output: Path, fingerprint: str) -> Iterator[tuple[Path, bool]]:
    """A hidden folder beside the output, where a run with the same input goes on, and whether one wrote the output.

    One run at a time. The folder is the last thing to go, so that where it is, its run was not over.
    """
    work, lock = output.with_name(f".{output.name}-{fingerprint}"), output.with_name(f".{output.name}.lock")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            try:
                for other in _unfinished(output) - {work}:
                    shutil.rmtree(other)  # of a run with other input that was killed
                finished = work.exists() and (output / "META" / PREPARED).exists()
                if not finished:
                    check_new(output)
                work.mkdir(exist_ok=True)
                yield work, finished
            finally:
                if (output / "META" / PREPARED).exists():
                    lock.unlink(missing_ok=True)
                    shutil.rmtree(work, ignore_errors=True)
                elif not any(work.glob("*.npy")):  # nothing to go on with
                    shutil.rmtree(work, ignore_errors=True)
                lock.unlink(missing_ok=True)
    except Timeout:
        raise UserError(
            f"{output} is being prepared already; wait for that run or choose another --output."
        ) from None


def _prepare(
    args: argparse.Namespace,
    output: Path,
    work: Path,
    grids: list,
    bands: list[str],
    parcels: object,
    units: dict,
) -> str:
    """Writes the dataset in the working folder, from where it is renamed; returns a line that sums it up."""
    from preprocessing.images.extract import choose_reading, extract, read_pixels
    from preprocessing.images.layout import lay_out
    from preprocessing.images.pixelsets import check_overlap, check_room, select, write_dataset
    from preprocessing.images.summary import plot_prepared, summarise
    from preprocessing.images.workers import open_workers

    images = [image for grid in grids for image in grid.images]
    reading = choose_reading(
        images,
        args.nodata,
        clear=tuple(args.clear or ()),
        scale=args.scale,
        averages=args.same_date == "mean",
        resampling=args.resampling,
    )
    check_overlap(parcels.table, grids, args.parcels)
    memory = int(args.memory * 1e9)
    with open_workers(args.scheduler, read_pixels, images[0].bands[0].path) as workers:
        layouts = lay_out(parcels.table.geometry, grids, args.buffer, work)
        left_out = [*parcels.left_out, *select(layouts, parcels.table, args.min_pixels, args.buffer)]
        check_room(layouts, len(bands), reading, work)
        extract(layouts, reading, work, memory, workers)
    complete = work / "complete"
    shutil.rmtree(complete, ignore_errors=True)
    nodata = None if math.isnan(reading.fill) else reading.fill
    info = {"nodata": nodata, "bands": bands, "scale": args.scale, **units}
    report = write_dataset(
        complete, layouts, parcels.table, reading, info, args.label_column, memory, args.packed
    )
    if parcels.classes:
        write_json(complete / "META" / "classes.json", {args.label_column: parcels.classes})
    left_out += report.left_out
    write_csv(complete / "META" / LEFT_OUT, [("parcel", "reason"), *left_out])
    kept = parcels.table["id"].isin(report.kept).to_numpy()
    n_unlabelled = int(parcels.table.label[kept].isna().sum()) if args.label_column else 0
    prepared = summarise(grids, report.dates, len(report.kept), n_unlabelled, left_out)
    prepared |= {"bands": bands, **units}
    write_json(complete / "META" / PREPARED, prepared)
    save_figure(complete / "META" / "prepared.png", plot_prepared(prepared, grids, parcels.table, kept))
    if output.exists():
        output.rmdir()
    complete.rename(output)
    return report.summary


def _tell(output: Path, summary: str) -> None:
    """Prints what was prepared."""
    from preprocessing.images.summary import describe

    meta = output / "META"
    prepared = read_json(meta / PREPARED)
    print(f"{output}: {summary}", *describe(prepared), sep="\n")
    if prepared["left_out"]:
        print(f"all that were left out: {meta / LEFT_OUT}")
    print(f"this table and a picture of it: {meta / PREPARED} and .png")


def _fingerprint(args: argparse.Namespace, images: list) -> str:
    """Changes whenever options, images or parcels do."""
    options = {name: value for name, value in vars(args).items() if name not in ("memory", "scheduler")}
    sources = [source for image in images for source in (*image.bands, image.mask) if source]
    files = {source.path for source in sources}
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for path in sorted({*files, args.parcels}):
        stat = Path(path).stat()
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    run_cli(main)
