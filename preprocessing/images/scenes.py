"""Satellite images on disk: which files belong to which date, which band of which file is which."""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from common.files import read_json
from common.progress import progress_bar
from preprocessing.images.headers import DATE, SUFFIXES, Header, Scene, Source, find_date, read_header
from preprocessing.images.units import Units, find_product, find_units

_BAND = re.compile(r"(?<![A-Za-z0-9])B\d{1,2}A?(?![A-Za-z0-9])")  # as Sentinel-2 and Landsat name theirs
_OFFSET_PROPERTIES = "s2:processing_baseline", "earthsearch:boa_offset_applied"  # of STAC items
_RESOLUTION = re.compile(r"(?<![A-Za-z0-9])R?[1-9]0m(?![A-Za-z0-9])")  # as in _10m.jp2 and /R10m/
_NO_REFLECTANCE = {"AOT", "WVP", "SCL", "TCI"}  # of a Sentinel-2 product
_OTHER_ROLES = {"thumbnail", "overview", "visual", "metadata"}  # of assets that are no bands
When = tuple[int, int]  # date, YYYYMMDD, and place among the images of this date that are kept apart


class Image(NamedTuple):
    """The bands of one acquisition that are wanted, and its cloud mask; `header` is the grid that they are read on."""

    name: str
    date: int  # YYYYMMDD
    header: Header
    bands: tuple[Source, ...]
    mask: Source | None
    units: Units = Units()
    place: int = 0  # among the images of its date that are kept apart

    @property
    def when(self) -> When:
        """Date and place; images that share both are one mosaic."""
        return self.date, self.place


def find_images(
    pattern: str,
    bands: Sequence[str] | None = None,
    cloud_mask: str | None = None,
    resolution: float | None = None,
) -> tuple[list[Image], list[str]]:
    """Finds all images and their dates.

    Args:
        pattern: folder (searched with its subfolders, such as Sentinel-2's .SAFE), glob pattern, or STAC item collection (.json).
        bands: names of the bands to take, in this order; None takes all that the first image has. A band is named by
            its description in a file of several bands (or its number, from 1), by a part of the name of a file with
            one band, and by its key among the assets of a STAC item.
        cloud_mask: name of a band, or pattern of files with one such file for every image.
        resolution: size of the pixels that bands are read in; None for that of the finest one.

    Returns:
        Images ordered by date and name, and names of their bands.

    Raises:
        UserError: if there are none, a name contains no date, or an image lacks a band or its mask.
    """
    masks = _find_masks(cloud_mask, pattern)
    if pattern.lower().endswith("json"):
        scenes = _read_stac(Path(pattern))
    else:
        known = [*(bands or ()), *([cloud_mask] if cloud_mask and masks is None else [])]
        scenes = _group_files(_list_files(pattern, masks or ()), known)
    scenes.sort(key=lambda scene: (scene.date, scene.name))
    mask_band = cloud_mask if masks is None else None
    names = list(bands or _reflectances(scenes[0], mask_band))
    chosen = [_choose(scene, names, mask_band, resolution) for scene in scenes]
    if not bands:
        for scene in scenes:
            if extra := set(_reflectances(scene, mask_band)) - set(names):
                raise UserError(
                    f"image {scene.name} has the band {min(extra)!r}, which the first image lacks; "
                    "name with --bands what all images have."
                )
    if masks is not None:
        chosen = [image._replace(mask=_match_mask(image, masks)) for image in chosen]
    return chosen, names


def _reflectances(scene: Scene, mask_band: str | None) -> list[str]:
    """All bands but the mask and what a Sentinel-2 product holds beside reflectances."""
    others = {mask_band} | (_NO_REFLECTANCE if ".SAFE" in scene.name else set())
    return [name for name in scene.bands if name not in others]


def _list_files(pattern: str, others: Iterable[str]) -> list[str]:
    """Raster files in a folder or matching a pattern, in order."""
    path = Path(pattern)
    matches = [path] if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    files = (file for match in matches for file in (match.rglob("*") if match.is_dir() else [match]))
    found = {os.path.abspath(file) for file in files if _may_be_image(file)} - set(others)
    if not found:
        raise UserError(
            f"{pattern} contains no images; expected a folder, a glob pattern in quotes or a STAC item collection "
            f"(.json), with files {', '.join(SUFFIXES)}."
        )
    return sorted(found)


def _may_be_image(file: Path) -> bool:
    """Whether a file is a raster; of a Sentinel-2 product only its bands are, no quality masks and previews."""
    in_product = any(part.endswith(".SAFE") for part in file.parts)
    wanted = not in_product or ("IMG_DATA" in file.parts and "_TCI" not in file.name)
    return wanted and file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def _find_masks(cloud_mask: str | None, images: str) -> dict[str, int] | None:
    """Dates of the cloud masks' files by path; None if `cloud_mask` is the name of a band or there is none."""
    if cloud_mask is None or not (set(cloud_mask) & set("*?/[") or cloud_mask.lower().endswith(SUFFIXES)):
        return None
    files = glob.glob(cloud_mask, recursive=True)
    if not files:  # beside the images
        parts = Path(images).parts
        fixed = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
        folder = Path(*parts[:fixed])
        folder = folder if folder.is_dir() else folder.parent
        files = glob.glob(os.path.join(glob.escape(str(folder)), "**", cloud_mask), recursive=True)
    paths = sorted(map(os.path.abspath, files))
    if not paths:
        raise UserError(
            f"no file matches --cloud_mask {cloud_mask!r}; give a band's name or a pattern in quotes."
        )
    return {path: find_date(Path(path).name, path) for path in paths}


def _group_files(paths: list[str], known: Sequence[str]) -> list[Scene]:
    """One scene per file of several bands.

    Files of one band are one scene where only band and resolution, such as _10m or R10m, differ in their paths.
    """
    scenes: dict[str, Scene] = {}
    for path in progress_bar(paths, "reading headers", "files"):
        stem, header = Path(path).stem, read_header(path)
        date = find_date(Path(path).name, path)
        key, found = stem, {name: Source(path, i + 1) for i, name in enumerate(header.names)}
        if len(header.names) == 1:
            start, stop = _band_in_name(stem, known)
            key, found = f"{stem[:start]}*{stem[stop:]}", {stem[start:stop]: Source(path, 1)}
        key = os.path.join(os.path.dirname(path), key)
        if len(header.names) == 1:
            key = _RESOLUTION.sub("*", key)
        scene = scenes.setdefault(key, Scene(str(find_product(path) or key), date, {}))
        for name, source in found.items():
            for other, _, _ in scene.bands.setdefault(name, []):
                if read_header(other).size == header.size:
                    raise UserError(
                        f"{other} and {path} are both band {name!r} of one image; remove one of them."
                    )
            scene.bands[name].append(source)
    return list(scenes.values())


def _band_in_name(stem: str, known: Sequence[str]) -> tuple[int, int]:
    """Where a file's name names its band: a band asked for, else a common name, else the last word but date and resolution."""
    for band in sorted(known, key=len, reverse=True):
        if match := re.search(rf"(?<![A-Za-z0-9]){re.escape(band)}(?![A-Za-z0-9])", stem):
            return match.span()
    if match := _BAND.search(stem):
        return match.span()
    dates = [match.span() for pattern in (DATE, _RESOLUTION) for match in pattern.finditer(stem)]
    words = [match.span() for match in re.finditer(r"[^_.\s]+", stem)]
    words = [(a, b) for a, b in words if not any(a < end and start < b for start, end in dates)]
    return words[-1] if words else (0, len(stem))


def _read_stac(path: Path) -> list[Scene]:
    """Scenes of an item collection; a band is named by its asset's key.

    Raises:
        UserError: if the file is something else, or an asset is not on this machine.
    """
    collection = read_json(path, "a STAC item collection")
    scenes = []
    try:
        for item in progress_bar(collection.get("features", [collection]), "reading headers", "items"):
            name, properties = item["id"], item["properties"]
            when = properties.get("datetime") or properties["start_datetime"]
            baseline, applied = (properties.get(key) for key in _OFFSET_PROPERTIES)
            date = find_date(when, f"item {name} of {path}")
            scene = Scene(f"{name} of {path}", date, {}, baseline, applied)
            for key, asset in item["assets"].items():
                if _OTHER_ROLES.isdisjoint({key, *asset.get("roles", ())}):
                    found = _read_asset(key, asset, path)
                    scene.bands.update({name: [source] for name, source in found.items()})
            scenes.append(scene)
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path} is not a STAC item collection ({error!r} where an item's id, datetime or assets were expected); "
            "write it again, such as by pystac's ItemCollection.save_object."
        ) from error
    if not scenes:
        raise UserError(f"{path} contains no items; expected a STAC item collection.")
    return scenes


def _read_asset(key: str, asset: dict[str, Any], collection: Path) -> dict[str, Source]:
    """The bands of one asset, if it is a raster; a file of several bands gives each under its own name."""
    href = asset["href"]
    if not href.lower().endswith(SUFFIXES):
        return {}
    if "://" in href and not href.startswith("file://"):
        raise UserError(f"{collection} refers to {href}; download its assets first and refer to local files.")
    path = os.path.abspath(collection.parent / href.removeprefix("file://"))
    names = read_header(path).names
    found = {}
    for i, name in enumerate(names):
        # As STAC 1.0 has it, as 1.1 has it for a band, as 1.1 has it for all bands.
        old, new = ((asset.get(entry) or [{}] * len(names))[i] for entry in ("raster:bands", "bands"))
        scale, offset = (
            old.get(what, new.get(f"raster:{what}", asset.get(f"raster:{what}")))
            for what in ("scale", "offset")
        )
        said = None if scale is offset is None else (float(1 if scale is None else scale), float(offset or 0))
        found[key if len(names) == 1 else name] = Source(path, i + 1, said)
    return found


def _choose(scene: Scene, names: Sequence[str], mask_band: str | None, resolution: float | None) -> Image:
    """The wanted bands of a scene, and the grid to read them on: that of the finest band, or of the resolution."""

    def sources(name: str) -> list[Source]:
        if name in scene.bands:
            return scene.bands[name]
        if name.isdigit() and 0 < int(name) <= len(scene.bands):
            return list(scene.bands.values())[int(name) - 1]
        raise UserError(
            f"image {scene.name} has no band {name!r}; it has {', '.join(scene.bands)}. {_why_missing(scene, name)}"
        )

    def size(source: Source) -> float:
        return read_header(source.path).size

    wanted = [sources(name) for name in names]
    aim = resolution or min(size(source) for each in wanted for source in each)
    # As made for this resolution, else from the pixels that are finer by least, else from the finest there are.
    bands = tuple(
        min(each, key=lambda source: (size(source) > aim, abs(size(source) - aim))) for each in wanted
    )
    headers = {source.path: read_header(source.path) for source in bands}
    grid = next((header for header in headers.values() if header.size == aim), None)
    grid = grid or min(headers.values(), key=lambda header: header.size).resampled(aim)
    for path, header in headers.items():
        apart = abs(header.bounds - grid.bounds).max()
        if header.crs != grid.crs or apart > max(header.size, grid.size) / 2:
            raise UserError(
                f"{path} and {bands[0].path} are bands of one image but differ in coordinate system, size or place; "
                "resample them to one grid with gdalwarp, or choose others with --bands."
            )
    mask = min(sources(mask_band), key=size) if mask_band else None
    units = find_units(scene.name, bands, scene.baseline, scene.is_applied)
    return Image(scene.name, scene.date, grid, bands, mask, units)


def _why_missing(scene: Scene, name: str) -> str:
    """Why a band may be missing, and what to do."""
    alike = {re.sub(r"^B0", "B", band): band for band in scene.bands}.get(re.sub(r"^B0", "B", name))
    if alike:
        return f"Name it {alike}."
    if "MSIL1C" in scene.name and name in _NO_REFLECTANCE:
        return f"Products of level 1C have no {name}; download level 2A."
    if "MSIL2A" in scene.name and name == "B10":
        return "Products of level 2A have no B10; leave it out, or download level 1C."
    if ".SAFE" in scene.name:
        return "The product lacks the file; it was not downloaded completely."
    return "Complete it, or name with --bands what all images have."


def _match_mask(image: Image, masks: dict[str, int]) -> Source:
    """The mask of the image's date that covers the image."""
    header = image.header
    x, y = header.transform @ (header.width / 2, header.height / 2)
    for path, date in masks.items():
        if date == image.date:
            mask = read_header(path)
            column, row = ~mask.transform @ (x, y)
            if mask.crs == header.crs and 0 <= row < mask.height and 0 <= column < mask.width:
                return Source(path, 1)
    raise UserError(f"image {image.name} has no file among the cloud masks; add it to --cloud_mask.")
