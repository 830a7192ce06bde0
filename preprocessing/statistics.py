"""Mean and standard deviation, sizes and geometrical features of a dataset folder, in one pass over its pixels.

    python -m preprocessing.statistics DIR

writes normalisation_values.pkl, META/sizes.json and, where META/parcels.gpkg holds the outlines, META/geomfeat.json;
what is there already stays, unless --overwrite is given.
"""

import os
from pathlib import Path

import numpy as np

from common.errors import UserError, as_user_error, run_cli
from common.files import write_json
from common.flags import Parser
from common.progress import progress_bar
from data.files import Files, read_headers
from data.metadata import read_info
from data.missing import check_values, find_missing
from data.moments import AXES, NORM, PUBLISHED_NORM, Moments, write_norm
from data.packing import check_folder, is_packed, open_store
from data.store import PixelStore
from preprocessing.parcels import read_outlines


def scan(files: Files | PixelStore, per: str | None, nodata: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of all pixels, each read once.

    Args:
        files: of the dataset folder, or its PIXELS.
        per: see `Moments`; None for "date" where all parcels have as many dates, else "channel".
        nodata: value that, in all channels, marks a missing pixel, besides NaN.

    Raises:
        UserError: if the number of dates differs in statistics per date, or a pixel is NaN in some channels only.
    """
    fewest, most = files.dates.min(), files.dates.max()
    if per == "date" and fewest < most:
        raise UserError(
            f"parcels have from {fewest} to {most} dates; statistics per date need the same number for all, use --per "
            "channel."
        )
    moments = Moments(per or ("date" if fewest == most else "channel"))
    for i in progress_bar(range(len(files.ids)), "mean and standard deviation", "parcels"):
        values = files.parcel(i).transpose(1, 2, 0)
        check_values(files.name(i), values, nodata)
        missing = find_missing(values.transpose(2, 0, 1), nodata)
        moments.add(values, None if missing is None else missing.T)
    return moments.result()


def geometrical_features(path: Path, sizes: dict[str, int]) -> dict[str, list[float]]:
    """Perimeter (m), area (m2), pixels over pixels of the bounding box, perimeter / area (1/m) of every parcel.

    The box is that of the outline, in pixels of the size that the parcels have on the median, since a dataset folder
    does not say where its pixels are.

    Args:
        path: file of the outlines, with a column id.
        sizes: pixels of every parcel by id.

    Raises:
        UserError: if an outline is missing, or the geographic libraries are.
    """
    table = read_outlines(path)
    from preprocessing.images.outlines import features, to_metres

    missing = set(sizes) - set(table["id"].astype(str))
    if missing:
        raise UserError(
            f"{path} has no outline for parcel {min(missing)} ({len(missing)} missing in all); add it."
        )
    table = table[table["id"].astype(str).isin(sizes)]
    ids = table["id"].astype(str).tolist()
    outlines, count = to_metres(table.geometry), np.array([sizes[name] for name in ids])
    pixel = float(np.median(outlines.area[count > 0] / count[count > 0]))
    box = outlines.bounds.to_numpy()
    box = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / pixel
    return dict(zip(ids, features(outlines, count / np.maximum(box, count)).tolist()))


def main() -> None:
    """Command line: python -m preprocessing.statistics DIR."""
    parser = Parser(
        description="Mean and standard deviation, sizes and geometrical features of a dataset folder."
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="dataset folder")
    axes = "date (and channel), channel, or all; by date where all parcels share the dates"
    add("--per", choices=AXES, help=axes)
    add("--nodata", type=float, help="value of missing pixels; without it, that of META/info.json")
    add("--overwrite", action="store_true", help="also write what is there already")
    args = parser.parse_args()
    folder = Path(args.folder)
    check_folder(folder)
    meta = folder / "META"
    published = folder / PUBLISHED_NORM
    files = [
        published if published.exists() else folder / NORM,
        meta / "sizes.json",
        *([meta / "geomfeat.json"] if (meta / "parcels.gpkg").exists() else []),
    ]
    wanted = [path for path in files if args.overwrite or not path.exists()]
    if not wanted:
        print(
            f"{folder} has {', '.join(path.name for path in files)} already; --overwrite writes them again."
        )
        return
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written; copy the dataset to where it can be.")
    nodata = read_info(folder).get("nodata") if args.nodata is None else args.nodata
    found = open_store(folder, nodata=nodata) if is_packed(folder) else read_headers(folder)
    sizes = dict(zip(map(str, found.ids), found.sizes.tolist()))
    contents = {}
    if meta / "sizes.json" in wanted:
        contents[meta / "sizes.json"] = sizes
    if meta / "geomfeat.json" in wanted:
        contents[meta / "geomfeat.json"] = geometrical_features(meta / "parcels.gpkg", sizes)
    norm = scan(found, args.per, nodata) if files[0] in wanted else None
    with as_user_error(OSError, prefix="a file cannot be written: "):
        meta.mkdir(exist_ok=True)
        for path, content in contents.items():
            write_json(path, content)
        if norm is not None:
            write_norm(files[0], norm)
    print(f"{len(sizes)} parcels; wrote {', '.join(str(path) for path in wanted)}")


if __name__ == "__main__":
    run_cli(main)
