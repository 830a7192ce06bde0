"""What stored numbers mean, as far as files tell: reflectance = scale * (number + offset).

Since processing baseline 04.00 of January 2022, 1000 is added to the numbers of Sentinel-2, so that dark pixels need
not be cut off at 0. Providers take it away again, or not.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError

_FLAG = "give --offset NUMBER, or --offset NUMBER YYYYMMDD for the images from a day on"
_SINCE, _BASELINE_SINCE, _ADDED = 20220125, 400, -1000.0  # the first baseline with an offset, 04.00
_BASELINE = re.compile(r"_N(\d\d)(\d\d)_")
_SENTINEL_2 = re.compile(r"(?<![A-Za-z0-9])(S2[A-D]|T\d\d[A-Z]{3})_|sentinel.?2", re.IGNORECASE)
_IN_METADATA = re.compile(r"<(?:BOA|RADIO)_ADD_OFFSET\b[^>]*>\s*(-?\d+)\s*<")


class Units(NamedTuple):
    """Scale and offset of the numbers of one image, None where nothing tells; what told the offset, or several."""

    scale: float | None = None
    offset: float | None = None
    why: str = "nothing says otherwise"
    doubt: str = ""


def find_units(name: str, bands: Sequence[Any], baseline: str | None, is_applied: bool | None) -> Units:
    """What is known of an image.

    Args:
        name: of the image.
        bands: its sources.
        baseline: Sentinel-2's processing baseline by its STAC item, such as "04.00".
        is_applied: whether, by its STAC item, the provider has applied the offset to the numbers already.
    """
    declared = {band.declared for band in bands}
    if len(declared) > 1:
        told = sorted(declared, key=str)
        return Units(doubt=f"the bands of image {name} have different scales or offsets, {told}")
    scale, shift = declared.pop() or (None, None)
    found = {}
    if scale is not None:
        found["the file's scale and offset"] = round(shift / scale, 6)
    found |= _from_product(bands[0].path, baseline)
    if is_applied:  # what else is said was copied from the producer
        found = {"earthsearch:boa_offset_applied": 0.0}
    if len(set(found.values())) > 1:
        told = " but ".join(f"{offset:g} by {why}" for why, offset in found.items())
        return Units(scale, doubt=f"the offset of image {name} is {told}")
    if not found:
        return Units()
    why, offset = next(iter(found.items()))
    return Units(scale or 1e-4, offset, why)  # Sentinel-2 counts in ten thousandths


def find_product(path: str) -> Path | None:
    """The folder of the Sentinel-2 product that a file belongs to, if it does."""
    return next((folder for folder in Path(path).parents if folder.suffix == ".SAFE"), None)


def _from_product(path: str, baseline: str | None) -> dict[str, float]:
    """The offset by a Sentinel-2 product's metadata and by its baseline."""
    product, found = find_product(path), {}
    if product and (numbers := _read_metadata(product)):
        found["the product's metadata"] = numbers[0]
    if named := _BASELINE.findall(path) or re.findall(r"\A(\d\d?)\.(\d\d)\Z", str(baseline)):
        is_new = int("".join(named[-1])) >= _BASELINE_SINCE
        found[f"a baseline {'of 04.00 or later' if is_new else 'before 04.00'}"] = _ADDED if is_new else 0.0
    return found


@lru_cache(maxsize=None)
def _read_metadata(product: Path) -> list[float]:
    """The offsets that MTD_MSIL2A.xml names."""
    for path in sorted(product.glob("MTD_MSIL*.xml")):
        return [float(number) for number in _IN_METADATA.findall(path.read_text(errors="replace"))]
    return []


def choose_units(
    images: list[Any], scale: float | None = None, offset: Sequence[float] | None = None
) -> tuple[list[Any], float | None, list[dict[str, Any]]]:
    """Decides what is added to the numbers of every image, so that they mean the same.

    Args:
        images: with what is known of each as `units`.
        scale: of --scale; None where it was not given.
        offset: of --offset: a number and, for those images that it holds for, their first day.

    Returns:
        The images with `units` filled in; what a number of the dataset is in reflectance, None if unknown; and what was
        assumed: {"offset", "why", "images", "first", "last"} in groups.

    Raises:
        UserError: if an image's sources contradict each other, or nothing tells for some what is told for others.
    """
    if offset is not None:
        number, first = offset[0], offset[1] if len(offset) > 1 else 0
        images = [
            image._replace(units=Units(image.units.scale, number if image.date >= first else 0.0, "--offset"))
            for image in images
        ]
    else:
        for image in images:
            if image.units.doubt:
                raise UserError(f"{image.units.doubt}; {_FLAG} to decide.")
        _refuse_mixture(images)
    scales = {image.units.scale: image.name for image in images if image.units.scale is not None}
    if len(scales) > 1 and scale is None:
        told = " but ".join(f"{value:g} in {name}" for value, name in scales.items())
        raise UserError(f"the scale of values is {told}; give --scale, which then holds for all images.")
    images = [
        image._replace(units=Units(scale, image.units.offset or 0.0, image.units.why)) for image in images
    ]
    unit = 1.0 if scale is not None else next(iter(scales), None)
    dates: dict[tuple[float, str], list[int]] = {}
    for image in images:
        dates.setdefault(image.units[1:3], []).append(image.date)
    assumed = [
        {"offset": added, "why": why, "images": len(own), "first": min(own), "last": max(own)}
        for (added, why), own in sorted(dates.items())
    ]
    return images, unit, assumed


def _refuse_mixture(images: Sequence[Any]) -> None:
    """Raises a UserError if some images' numbers may have another offset than others', and nothing tells which."""
    known = [image for image in images if image.units.offset is not None]
    unknown = [image for image in images if image.units.offset is None]
    early = [image for image in unknown if image.date < _SINCE]
    late = [image for image in unknown if image.date >= _SINCE]
    if known and (late or (early and any(image.units.offset for image in known))):
        one, other = known[0], (late or early)[0]
        told = f"that of {one.name} is {one.units.offset:g} by {one.units.why}"
        raise UserError(f"nothing tells the offset of image {other.name}, but {told}; {_FLAG} to decide.")
    if early and late and any(_SENTINEL_2.search(image.bands[0].path) for image in unknown):
        raise UserError(
            f"{early[0].name} was taken before and {late[0].name} after 1000 began to be added to the numbers of "
            f"Sentinel-2, and nothing tells whether it was taken away again; {_FLAG} to decide (--offset 0 if it was)."
        )
