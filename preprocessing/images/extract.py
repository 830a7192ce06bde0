"""Reads the pixels of all parcels from images, block by block."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
from rasterio.enums import MaskFlags, Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from common.errors import UserError
from common.progress import progress_bar
from preprocessing.images.grids import block_shape
from preprocessing.images.layout import Blocks, Layout, sort_by_blocks
from preprocessing.images.scenes import Image, Source, When, read_header
from preprocessing.images.workers import Workers, run_ahead


class Reading(NamedTuple):
    """How values are read and written.

    Attributes:
        dtype: of what is written.
        fill: what is written for missing pixels, in all channels.
        nodata: value of missing pixels in the images, besides what their files name; None for none.
        clear: values of the cloud mask where the ground is seen.
        scale: factor; None leaves values as they are.
        averages: whether a pixel that several images of one date see is their mean, not that of the first.
        resampling: "nearest" or "bilinear", of bands with other pixels than the image is read in.
    """

    dtype: np.dtype
    fill: float
    nodata: float | None = None
    clear: tuple[int, ...] = ()
    scale: float | None = None
    averages: bool = False
    resampling: str = "nearest"

    def convert(self, values: np.ndarray, offset: float) -> np.ndarray:
        """Stored numbers with the image's offset added and scaled; whole ones are cut off where the type ends."""
        if self.dtype.kind == "f":
            values = values + np.float32(offset) if offset else values
            return values if self.scale is None else values * np.float32(self.scale)
        if not offset:
            return values
        limits = np.iinfo(self.dtype)
        low, high = limits.min + (self.fill == limits.min), limits.max - (self.fill == limits.max)
        return np.clip(values.astype(np.int64) + int(offset), low, high)


def choose_reading(images: Sequence[Image], nodata: float | None, **options: Any) -> Reading:
    """Type and missing value of the output; `options` are other attributes of `Reading`.

    Whole numbers keep their type; their missing pixels get `nodata`, else the value the first image names, else the
    largest of an unsigned or the smallest of a signed type. Floating point, as with `scale`, gets NaN.
    """
    dtype = np.result_type(*{source.dtype for image in images for source in image.bands})
    if options.get("scale") is not None or not all(image.units.offset.is_integer() for image in images):
        dtype = np.dtype(np.float32)
    if dtype.kind == "f":
        return Reading(dtype, np.nan, nodata, **options)
    limits = np.iinfo(dtype)
    wanted = images[0].bands[0].nodata if nodata is None else nodata
    if not fits(wanted, dtype):
        wanted = limits.max if dtype.kind == "u" else limits.min
    return Reading(dtype, int(wanted), nodata, **options)


def fits(value: float | None, dtype: np.dtype) -> bool:
    """Whether values of a type can equal `value`."""
    if value is None or np.isnan(value):
        return False
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return True
    return float(value).is_integer() and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max


def is_missing(values: np.ndarray, fill: float) -> np.ndarray:
    """Pixels that are missing, (..., S), from values (..., C, S)."""
    return (np.isnan(values) if np.isnan(fill) else values == fill).all(axis=-2)


def read_pixels(
    image: Image, window: Window, rows: np.ndarray, columns: np.ndarray, reading: Reading
) -> tuple[np.ndarray, np.ndarray]:
    """Values of some pixels of a block of an image.

    Args:
        image: the image.
        window: the block, in the image's pixels.
        rows, columns: of the pixels, from the block's first one, (S,).
        reading: how.

    Returns:
        Values (C, S), and whether they are there, (S,): a pixel that misses one channel, or lies under a cloud, is
        missing in all.
    """
    values = np.empty((len(image.bands), len(rows)), reading.dtype)
    seen = np.ones(len(rows), bool)
    try:
        for path in dict.fromkeys(source.path for source in image.bands):
            places = [i for i, source in enumerate(image.bands) if source.path == path]
            bands = [image.bands[i].band for i in places]
            with rasterio.open(path) as raw, _on_grid(raw, image, reading) as file:
                found = file.read(bands, window=window)[:, rows, columns]
                if any(set(raw.mask_flag_enums[band - 1]) - _PLAIN_MASKS for band in bands):
                    seen &= (file.read_masks(bands, window=window)[:, rows, columns] > 0).all(0)
            for band, channel in zip(bands, found):
                for missing in {read_header(path).nodata[band - 1], reading.nodata}:
                    if fits(missing, channel.dtype):
                        seen &= channel != channel.dtype.type(missing)
            if found.dtype.kind == "f":
                seen &= np.isfinite(found).all(0)
            values[places] = reading.convert(found, image.units.offset)
        if image.mask is not None:
            mask = _read_mask(image, image.mask, window, rows, columns)
            seen &= np.isin(mask, reading.clear)
    except RasterioError as error:
        raise UserError(f"image {image.name} cannot be read ({error}); copy its files again.") from error
    return values, seen


_PLAIN_MASKS = {MaskFlags.all_valid, MaskFlags.nodata}


def _on_grid(file: DatasetReader, image: Image, reading: Reading) -> DatasetReader | WarpedVRT:
    """A file as it is, or as if its pixels were those that the image is read in."""
    grid = image.header
    if read_header(file.name).is_same_grid(grid):
        return file
    nodata = reading.nodata if file.nodata is None else file.nodata
    place = {"crs": file.crs, "transform": grid.transform, "height": grid.height, "width": grid.width}
    return WarpedVRT(
        file, **place, resampling=Resampling[reading.resampling], src_nodata=nodata, nodata=nodata
    )


def _read_mask(
    image: Image, mask: Source, window: Window, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Values of the cloud mask at the pixels' centres; its own pixels may be larger or smaller than the image's."""
    header = read_header(mask.path)
    to_mask = ~header.transform @ image.header.transform
    mask_columns, mask_rows = to_mask @ (columns + window.col_off + 0.5, rows + window.row_off + 0.5)
    mask_rows = np.clip(np.floor(mask_rows).astype(int), 0, header.height - 1)
    mask_columns = np.clip(np.floor(mask_columns).astype(int), 0, header.width - 1)
    row, column = mask_rows.min(), mask_columns.min()
    part = Window(column, row, np.ptp(mask_columns) + 1, np.ptp(mask_rows) + 1)
    with rasterio.open(mask.path) as file:
        return file.read(mask.band, window=part)[mask_rows - row, mask_columns - column]


def extract(layouts: Sequence[Layout], reading: Reading, folder: Path, memory: int, workers: Workers) -> None:
    """Reads all images once, into one file (C, P) per grid and date; files that are there already are kept.

    Several images of one date on one grid are one: a pixel comes from the first, by name, that sees it, or from all.

    Args:
        layouts: which pixels.
        reading: how.
        folder: where the files are written, see `plane_path`.
        memory: bytes that blocks may take.
        workers: from `open_workers`.
    """
    submit, ahead = workers[0], workers[1] + 1
    with rasterio.Env(GDAL_CACHEMAX=memory // 8):
        for g, layout in enumerate(layouts):
            dates = [date for date in layout.grid.dates if not plane_path(folder, g, date).exists()]
            images = layout.grid.images
            sizes = [np.dtype(source.dtype).itemsize for image in images for source in image.bands]
            n_bytes = len(images[0].bands) * max(4, *sizes)  # of a pixel, as read or as written scaled
            most = memory // 2 // ahead // (3 * n_bytes + 16)
            blocks, todo = {}, []
            for image, place in zip(images, layout.grid.footprints):
                key = place, block_shape(image, most)
                if key not in blocks:
                    blocks[key] = sort_by_blocks(layout, *key, folder / f"order-{g}-{len(blocks)}")
                todo.append((image, blocks[key]))
            name = "reading" if len(layouts) == 1 else f"reading grid {g + 1}/{len(layouts)}"
            with progress_bar(None, name, "blocks") as bar:
                bar.total = sum(len(each.windows) for image, each in todo if image.when in dates)
                for date in dates:
                    parts = [(image, each) for image, each in todo if image.when == date]
                    path, run = plane_path(folder, g, date), partial(run_ahead, submit, ahead=ahead)
                    _extract_date(parts, len(layout.pixels), reading, path, run, bar)


def plane_path(folder: Path, grid: int, when: When) -> Path:
    """File of the pixels of one grid at one date."""
    return folder / f"{grid}-{when[0]}{f'-{when[1]}' if when[1] else ''}.npy"


def _extract_date(
    parts: list[tuple[Image, Blocks]], n_pixels: int, reading: Reading, path: Path, run: Callable, bar: Any
) -> None:
    """Writes the file of one date; under its final name only once it is complete."""
    shape = len(parts[0][0].bands), n_pixels
    temporary, sums = path.with_suffix(".part"), path.with_suffix(".sum")
    plane = np.lib.format.open_memmap(temporary, "w+", reading.dtype, shape)
    averages = reading.averages and len(parts) > 1
    total = np.lib.format.open_memmap(sums, "w+", np.float64, shape) if averages else plane
    count = np.zeros(n_pixels, np.int32)  # of images that see a pixel
    wheres: deque = deque()

    def tasks() -> Iterator[tuple]:
        for image, blocks in parts:
            for i, window in enumerate(blocks.windows):
                where, rows, columns = blocks.pixels(i)
                wheres.append(where)
                yield image, window, rows, columns, reading

    for values, seen in run(read_pixels, tasks()):
        where = wheres.popleft()
        new = seen if averages else seen & (count[where] == 0)
        if not new.all():
            where, values = where[new], values[:, new]
        total[:, where] = total[:, where] + values if averages else values
        count[where] += 1
        bar.update()
    for start in range(0, n_pixels if averages or not count.all() else 0, 2**20):
        part = slice(start, start + 2**20)
        if averages:
            mean = total[:, part] / np.maximum(count[part], 1)
            plane[:, part] = mean if reading.dtype.kind == "f" else np.rint(mean)
        plane[:, start + np.flatnonzero(count[part] == 0)] = reading.fill
    plane.flush()
    del plane, total
    sums.unlink(missing_ok=True)
    temporary.rename(path)
