"""TimeMatch: pixel sets as zarr arrays, tile by tile, and a pickle about them, which is read as data."""

from pathlib import Path
from typing import Any

import numpy as np

from common.arrays import load_arrays
from common.errors import UserError, as_user_error
from preprocessing.formats.source import TEN_S2, Pixels, Source, require, require_files

STORED = ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12")  # those of 10 m, then of 20 m
ORDER = [STORED.index(band) for band in TEN_S2]
FEATURES = {  # and where each is stored
    "perimeter (m)": 0,
    "area (m2)": 1,
    "pixels / pixels of the bounding box": 3,
    "perimeter / area (1/m)": 2,
}


def open_source(folder: Path, class_mapping: Path | None = None) -> Source:
    """Opens a tile, <country>/<tile>/<year>, or a folder above several.

    Args:
        folder: of the tile or tiles.
        class_mapping: <country>_class_mapping.yml of the authors' code, or the folder of such files; without it,
            labels are the national codes alone.
    """
    import zarr

    found = [path for depth in range(4) for path in sorted(folder.glob("*/" * depth + "meta/metadata.pkl"))]
    if not found:
        raise UserError(f"{folder} has no tile; expected meta/metadata.pkl in it or in a folder of it.")
    paths, names, days, parcels, tiles = [], [], [], [], []
    for path in found:
        tile = "/".join(path.resolve().parts[-5:-2])
        with as_user_error(ValueError):
            meta = load_arrays(path)
        n = len(meta["parcels"])
        paths += require_files(path.parent.parent / "data", [f"{i}.zarr" for i in range(n)])
        names += [i if len(found) == 1 else f"{tile}/{i}" for i in range(n)]
        days += [[int(day) for day in meta["dates"]]] * n
        parcels += meta["parcels"]
        tiles += [tile] * n
    countries = [tile.split("/")[0] for tile in tiles]
    codes = [_code(parcel["label"]) for parcel in parcels]
    if len(set(countries)) > 1:  # each has codes of its own
        codes = [f"{country} {code}" for country, code in zip(countries, codes)]
    classes, described = [], {}
    if class_mapping is not None:
        mapping = {}
        for country in sorted(set(countries)):
            mapping |= _read_mapping(class_mapping, country, f"{country} " if len(set(countries)) > 1 else "")
        classes = [mapping[code][0] if code in mapping else "unknown" for code in codes]
        described = {code: mapping[code][1] for code in set(codes) & set(mapping)}
    n_channels = zarr.open_array(paths[0], mode="r").shape[1]
    if n_channels not in (10, 11):
        raise UserError(
            f"{paths[0]} has {n_channels} channels; expected 10 bands, or these and a cloud mask."
        )

    def read(i: int) -> Pixels:
        array = zarr.open_array(paths[i], mode="r")
        if array.nchunks_initialized < array.nchunks:  # which zarr reads as zeros
            raise UserError(f"{paths[i]} lacks some of its files; unpack the archive again.")
        stored = np.asarray(array[:])
        pixels = stored[:, ORDER]
        if n_channels == 11:
            np.moveaxis(pixels, 1, -1)[stored[:, 10] > 0] = 0
        return pixels, days[i]

    whole = all(code.isdigit() for code in codes)
    return Source(
        names,
        read,
        ({"class": classes} if classes else {}) | {"code": [int(code) for code in codes] if whole else codes},
        TEN_S2,
        units=0.0001,
        nodata=0 if n_channels == 11 else None,
        classes={"code": described},
        groups=[(tile, int(parcel["block"])) for tile, parcel in zip(tiles, parcels)],
        extra=[[float(parcel["geometric_features"][k]) for k in FEATURES.values()] for parcel in parcels],
        extra_names=tuple(FEATURES),
        assumed=[
            f"channels are stored as {' '.join(STORED)}; they were put in the order of wavelengths",
            "there is no official split, the authors draw parcels at random; parts are made of whole blocks",
            *(["pixels that the cloud mask marks are missing"] if n_channels == 11 else []),
            *([] if classes else ["labels are national codes; classes need --class_mapping"]),
        ],
    )


def _code(label: Any) -> str:
    """A national code as text; numbers without point or leading zeros."""
    text = str(label).removesuffix(".0")
    return str(int(text)) if text.isdigit() else text


def _read_mapping(path: Path, country: str, prefix: str) -> dict[str, tuple[str, str]]:
    """Class and description of each national code of a country, by prefix and code."""
    import yaml

    path = path / f"{country}_class_mapping.yml" if path.is_dir() else path
    content = yaml.safe_load(require(path, "classes and their national codes").read_text(encoding="utf-8"))
    mapping = {}
    for crop, codes in content.items():
        seasons = codes if codes and {"spring", "winter"} <= set(codes) else {"": codes}
        for season, listed in seasons.items():
            for code, text in (listed or {}).items():
                mapping[prefix + _code(code)] = (f"{season}_{crop}" if season else crop, str(text))
    return mapping
