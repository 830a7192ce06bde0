"""PASTIS-R pixel sets: a file per parcel and satellite, dates by patch."""

import json
from pathlib import Path

import numpy as np

from common.files import read_json
from preprocessing.formats.source import TEN_S2, Pixels, Source, read_table, require_files

RADAR = ("VV", "VH", "VV/VH")
BANDS = {"S2": TEN_S2, "S1A": RADAR, "S1D": RADAR}
CROPS = (
    *("Meadow", "Soft winter wheat", "Corn", "Winter barley", "Winter rapeseed", "Spring barley"),
    *("Sunflower", "Grapevine", "Beet", "Winter triticale", "Winter durum wheat"),
    *("Fruits, vegetables, flowers", "Potatoes", "Leguminous fodder", "Soybeans", "Orchard"),
    *("Mixed cereal", "Sorghum"),
)
VOID = 19
PARTS = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}  # of the first split, folds counted from 0


def open_source(folder: Path, satellite: str = "S2") -> Source:
    """Opens the unpacked archive, for one of its satellites: S2, S1A or S1D."""
    rows = read_table(folder / "metadata_parcel.csv", ("ID_PARCEL", "ID_PATCH", "Label", "Fold"))
    names, patch, labels, fold = (
        [int(float(row[column])) for row in rows] for column in ("ID_PARCEL", "ID_PATCH", "Label", "Fold")
    )
    paths = require_files(folder / f"DATA_{satellite}", [f"{satellite}_{name}.npy" for name in names])
    patches = read_json(folder / "metadata.geojson", "the patches and their dates")["features"]
    dates = {int(own["properties"]["ID_PATCH"]): own["properties"][f"dates-{satellite}"] for own in patches}
    days = {key: _in_order(listed) for key, listed in dates.items()}
    of_parcel = [days[key] for key in patch]

    def read(i: int) -> Pixels:
        pixels, own = np.load(paths[i]), of_parcel[i]
        # The authors' loader takes a day that is listed twice for one date.
        return pixels, own if len(own) == len(pixels) else sorted(set(own))

    features = [column for column in rows[0] if column.startswith("GF_")]
    official = folder / f"NORM_PARCEL_{satellite}_set.json"
    norms = list(read_json(official).values()) if official.exists() else []
    return Source(
        names,
        read,
        {"class": [None if label == VOID else label for label in labels]},
        BANDS[satellite],
        units=0.0001 if satellite == "S2" else None,
        classes={"class": {str(label): name for label, name in enumerate(CROPS, start=1)}},
        groups=fold,
        splits=[
            {part: [(k + step) % 5 + 1 for step in steps] for part, steps in PARTS.items()} for k in range(5)
        ],
        extra=[[float(row[column]) for column in features] for row in rows] if features else None,
        extra_names=[column.removeprefix("GF_") for column in features],
        norm=tuple(np.mean([own[key] for own in norms], axis=0) for key in ("mean", "std"))
        if norms
        else None,
        assumed=[
            "bands and class names are those of the documentation, the files do not name them",
            f"parcels of class {VOID}, void, have no label",
            *(["mean and deviation are the official ones, averaged over the five folds"] if norms else []),
        ],
    )


def _in_order(listed: dict[str, int] | str) -> list[int]:
    """Days of a patch, in the order of its images."""
    listed = json.loads(listed) if isinstance(listed, str) else listed
    return [int(listed[key]) for key in sorted(listed, key=int)]
