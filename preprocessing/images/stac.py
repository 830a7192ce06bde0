"""STAC item collections on disk, whose assets are local files."""

import os
from pathlib import Path

from common.errors import UserError
from common.files import read_json
from common.progress import progress_bar
from preprocessing.images.headers import SUFFIXES, Scene, Source, find_date, read_header

_OTHER_ROLES = {"thumbnail", "overview", "visual", "metadata"}  # of assets that are no bands


def read_stac(path: Path) -> list[Scene]:
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
            scene = Scene(f"{name} of {path}", find_date(when, f"item {name} of {path}"), {})
            for key, asset in item["assets"].items():
                if _OTHER_ROLES.isdisjoint({key, *asset.get("roles", ())}):
                    scene.bands.update(_read_asset(key, asset["href"], path))
            scenes.append(scene)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is not a STAC item collection ({error!r} where an item's id, datetime or assets were expected); "
            "write it again, such as by pystac's ItemCollection.save_object."
        ) from error
    if not scenes:
        raise UserError(f"{path} contains no items; expected a STAC item collection.")
    return scenes


def _read_asset(key: str, href: str, collection: Path) -> dict[str, Source]:
    """The bands of one asset, if it is a raster; a file of several bands gives each under its own name."""
    if not href.lower().endswith(SUFFIXES):
        return {}
    if "://" in href and not href.startswith("file://"):
        raise UserError(f"{collection} refers to {href}; download its assets first and refer to local files.")
    path = os.path.abspath(collection.parent / href.removeprefix("file://"))
    names = read_header(path).names
    return {key if len(names) == 1 else name: Source(path, i + 1) for i, name in enumerate(names)}
