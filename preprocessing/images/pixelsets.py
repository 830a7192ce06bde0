"""Cuts the pixels that were read into parcels, and writes what stands beside them."""

import shutil
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from geopandas import GeoDataFrame
from pyogrio import write_dataframe

from common.errors import UserError
from common.files import write_json, write_json_line
from common.progress import progress_bar
from data.moments import NORM, Moments, write_norm
from data.packing import write_days, write_pixels
from preprocessing.images.extract import Reading, is_missing, plane_path
from preprocessing.images.grids import Grid
from preprocessing.images.layout import Layout
from preprocessing.images.outlines import GEOMFEAT, features, ids_in_file, name_crs, to_metres
from preprocessing.images.scenes import When


class Report(NamedTuple):
    """What was written.

    Attributes:
        summary: one line.
        kept: ids of the parcels.
        left_out: id and reason of parcels that no image sees.
        dates: of every date, pixels of parcels, how many are missing, and how many are 0 in all channels of their image.
    """

    summary: str
    kept: list[int]
    left_out: list[tuple[str, str]]
    dates: dict[When, np.ndarray]


def check_overlap(table: GeoDataFrame, grids: Sequence[Grid], path: str) -> None:
    """Raises a UserError unless some parcel's bounding box meets an image."""
    for grid in grids:
        bounds = table.geometry.to_crs(grid.crs).bounds.to_numpy()
        left, top = grid.transform @ (0, 0)
        right, bottom = grid.transform @ (grid.width, grid.height)
        meets_columns = (bounds[:, 0] < right) & (bounds[:, 2] > left)
        if (meets_columns & (bounds[:, 1] < top) & (bounds[:, 3] > bottom)).any():
            return
    here = ", ".join(f"{value:.6g}" for value in np.nanquantile(bounds, 0.5, axis=0))
    raise UserError(
        f"no parcel of {path} lies on an image: in the images' coordinate system ({name_crs(grid.crs)}) a "
        f"typical parcel is at {here}, the images are at {left:.6g}, {bottom:.6g}, {right:.6g}, {top:.6g} (left, bottom, right, top); "
        "check both coordinate systems."
    )


def select(
    layouts: list[Layout], table: GeoDataFrame, min_pixels: int, buffer: float
) -> list[tuple[str, str]]:
    """Marks parcels with fewer than `min_pixels` pixels as left out, in `layouts`, and returns who is left out and why."""
    counts = np.zeros(len(table), np.int64)
    for layout in layouts:
        counts[layout.parcels] = np.diff(layout.offsets)
        layout.kept = np.diff(layout.offsets) >= min_pixels
    if not (counts >= min_pixels).any():
        raise UserError(
            f"no parcel has {min_pixels} pixel(s) of the images, --buffer {buffer:g}; check --min_pixels, --buffer and "
            "the coordinate systems."
        )
    after = f" after --buffer {buffer:g}" if buffer else ""
    few = f"fewer pixels than --min_pixels {min_pixels}{after}"
    none = f"no pixel centre inside, or outside all images{after}"
    left_out = counts < min_pixels
    return [(name, few if n else none) for name, n in zip(ids_in_file(table)[left_out], counts[left_out])]


def check_room(layouts: Sequence[Layout], n_channels: int, reading: Reading, folder: Path) -> None:
    """Raises a UserError unless all pixels fit on the disk twice: as they are read, and as the files of the parcels."""
    values = sum(int(layout.offsets[-1]) * len(layout.grid.dates) for layout in layouts) * n_channels
    there = sum(path.stat().st_size for path in folder.glob("*.npy"))  # of a run that was killed
    needed, free = 2 * values * reading.dtype.itemsize - there, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"preparing needs {needed / 1e9:.1f} GB in {folder.parent}, where {free / 1e9:.1f} GB are free; make room or "
            "choose another --output."
        )


def write_dataset(
    folder: Path,
    layouts: Sequence[Layout],
    table: GeoDataFrame,
    reading: Reading,
    info: dict[str, Any],
    nomenclature: str | None,
    memory: int,
    packed: bool,
) -> Report:
    """Writes pixels, META and the statistics of a dataset folder.

    Args:
        folder: made here.
        layouts: of the parcels, whose dates were extracted into the folder's parent.
        table: the parcels.
        reading: what missing pixels look like.
        info: of META/info.json, completed here.
        nomenclature: name of the labels; None for none.
        memory: bytes that pixels may take.
        packed: whether pixels are written to PIXELS, instead of DATA.
    """
    (folder / "META").mkdir(parents=True)
    ids, own_ids = table["id"].to_numpy(), ids_in_file(table).to_numpy()
    dates = {}
    for layout in layouts:
        dates |= dict(zip(ids[layout.parcels[layout.kept]], compress(layout.dates(), layout.kept)))
    shared = len(set(dates.values())) == 1
    moments = Moments("date" if shared else "channel")
    sizes, geometry, left_out, totals = {}, {}, [], {}
    total = sum(int(layout.kept.sum()) for layout in layouts)
    pixels = write_pixels(folder, packed, reading.dtype, info["nodata"])
    with pixels as add, progress_bar(None, "writing parcels", "parcels") as bar:
        bar.total = total
        for g, layout in enumerate(layouts):
            outlines = to_metres(table.geometry.iloc[layout.parcels], layout.grid.crs)
            described = features(outlines, layout.filled).tolist()
            offsets = {image.when: image.units.offset for image in layout.grid.images}
            zero = [reading.convert(np.zeros(1), offsets[when]) for when in layout.grid.dates]
            zero = np.array(zero, reading.dtype)
            counts = np.zeros((len(layout.grid.dates), 3), np.int64)
            for i, values in _cut(layout, g, folder.parent, memory // 6):
                parcel = layout.parcels[i]
                own, rows = dates[ids[parcel]], slice(None)
                if len(own) < len(values):
                    rows = [t for t, when in enumerate(layout.grid.dates) if when in own]
                    values = values[rows]
                missing = is_missing(values, reading.fill)
                bar.update()
                if missing.all():
                    left_out.append((own_ids[parcel], "missing or under clouds on all dates"))
                    continue
                moments.add(values, missing)
                blank = (values == zero[rows, None]).all(1) & ~missing
                n_pixels = np.full(len(values), missing.shape[1])
                counts[rows] += np.stack((n_pixels, missing.sum(1), blank.sum(1)), axis=1)
                add(ids[parcel], values)
                sizes[ids[parcel]], geometry[ids[parcel]] = values.shape[2], described[i]
            for when, count in zip(layout.grid.dates, counts):
                totals[when] = totals.get(when, 0) + count
        if not sizes:
            raise UserError(
                "no image sees any parcel: all is missing or under clouds; check --nodata, --cloud_mask and --clear."
            )
    write_norm(folder / NORM, moments.result())
    _write_dates(folder, {parcel: dates[parcel] for parcel in sorted(sizes)}, packed)
    _write_meta(folder / "META", table, sizes, geometry, layouts[0].grid.crs, info, nomenclature)
    n_dates = {len(dates[parcel]) for parcel in sizes}
    spread = f"{min(n_dates)}" if len(n_dates) == 1 else f"{min(n_dates)} to {max(n_dates)}"
    summary = (
        f"{len(sizes):,} parcels, {sum(sizes.values()):,} pixels, {spread} dates, {len(info['bands'])} bands"
    )
    return Report(summary, list(sizes), left_out, totals)


def _cut(layout: Layout, grid: int, folder: Path, memory: int) -> Iterator[tuple[int, np.ndarray]]:
    """Place in the layout and values (T, C, S) of every kept parcel, from the files of the dates."""
    paths = [plane_path(folder, grid, date) for date in layout.grid.dates]
    first = np.load(paths[0], mmap_mode="r")
    most = max(1, memory // (len(paths) * len(first) * first.itemsize))  # pixels at a time
    start = 0
    while start < len(layout.parcels):
        begin = layout.offsets[start]
        stop = max(start + 1, int(np.searchsorted(layout.offsets, begin + most, side="right")) - 1)
        end = layout.offsets[stop]
        values = np.empty((len(paths), len(first), end - begin), first.dtype)
        for t, path in enumerate(paths):
            values[t] = np.load(path, mmap_mode="r")[:, begin:end]
        for i in range(start, stop):
            if layout.kept[i]:
                yield i, values[:, :, layout.offsets[i] - begin : layout.offsets[i + 1] - begin]
        start = stop


def _write_dates(folder: Path, dates: dict[int, tuple[When, ...]], packed: bool) -> None:
    """Writes the dates of the parcels, in the order of ids: once if they are the same, else those of each."""
    path = folder / "META" / "dates.json"
    numbers = {whens: [date for date, _ in whens] for whens in set(dates.values())}
    if len(set(map(tuple, numbers.values()))) == 1:
        write_json(path, {str(t): date for t, date in enumerate(min(numbers.values()))})
    elif packed:
        arrays = {whens: np.array(own, np.int32) for whens, own in numbers.items()}
        write_days(folder, [arrays[whens] for whens in dates.values()])
    else:
        write_json_line(path, {int(parcel): numbers[whens] for parcel, whens in dates.items()})


def _write_meta(
    meta: Path,
    table: GeoDataFrame,
    sizes: dict[int, int],
    geometry: dict[int, list[float]],
    crs: Any,
    info: dict[str, Any],
    nomenclature: str | None,
) -> None:
    """Writes the files of META for the parcels in `sizes`; outlines in the coordinate system of the first grid."""
    rows = table[table["id"].isin(sizes)].sort_values("id")
    keys = [str(parcel) for parcel in rows["id"]]
    outlines = rows.to_crs(crs)
    write_json_line(meta / "sizes.json", {key: int(sizes[int(key)]) for key in keys})
    write_json_line(meta / "geomfeat.json", {key: geometry[int(key)] for key in keys})
    if nomenclature:
        labels = {key: label for key, label in zip(keys, rows["label"]) if label is not None}
        write_json_line(meta / "labels.json", {nomenclature: labels})
    else:
        outlines = outlines.drop(columns="label")
    write_json(meta / "info.json", info | {"crs": name_crs(crs), "geomfeat": GEOMFEAT})
    write_dataframe(outlines, meta / "parcels.gpkg", driver="GPKG", layer="parcels", promote_to_multi=True)
