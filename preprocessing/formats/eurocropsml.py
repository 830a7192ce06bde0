"""EuroCropsML: median series of parcels, a .npz each, whose name tells region, parcel and class."""

import re
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import read_json
from preprocessing.formats.source import ALL_S2, Pixels, Source, to_numbers

LEVELS = (4, 6, 8, 10)  # digits of the class that make a nomenclature; the others become 0
PARTS = {"train": "train", "validation": "val", "test": "test"}


def open_source(folder: Path, split: Path | None = None) -> Source:
    """Opens a folder of .npz files, such as preprocess/S2/2021.

    Args:
        folder: of the files.
        split: an official split, JSON with the file names of "train", "val" and "test"; without it, one country after
            the other is left out for testing.
    """
    paths = sorted(folder.glob("*.npz"))
    named = {path: re.fullmatch(r"([A-Z]{2})\w*_\w+_(\d{10})", path.stem) for path in paths}
    wrong = next((path for path in paths if not named[path]), folder)
    if wrong != folder or not paths:
        raise UserError(
            f"{wrong} is no file <region>_<parcel>_<10-digit class>.npz, nor a folder of such files."
        )
    codes, groups = [named[path][2] for path in paths], [named[path][1] for path in paths]

    def read(i: int) -> Pixels:
        with np.load(paths[i]) as file:
            return file["data"], to_numbers(file["dates"])

    countries = sorted(set(groups))
    splits = [{"train": set(countries) - {country}, "test": {country}} for country in countries]
    note = "one country after the other is left out for testing; --split FILE takes an official split"
    if split is not None:
        listed = read_json(split, 'an official split, {"train": [file, ...], "val": [...], "test": [...]}')
        lists = [listed.get(key) for key in PARTS.values()] if isinstance(listed, dict) else [None]
        if not all(isinstance(own, list) for own in lists):
            raise UserError(
                f'--split {split} has no lists "train", "val" and "test"; give one for fine-tuning.'
            )
        part_of = {Path(name).name: part for part, key in PARTS.items() for name in listed[key]}
        groups, splits = [part_of.get(path.name) for path in paths], [{part: {part} for part in PARTS}]
        note = f"{groups.count(None):,} parcels are in no part of {split.name}"
    labels = {f"hcat{n}": [int(code[:n].ljust(10, "0")) for code in codes] for n in LEVELS}
    names = _class_names(folder)
    return Source(
        [path.stem for path in paths],
        read,
        labels,
        ALL_S2,
        units=0.0001,
        nodata=-999,
        classes={level: {str(k): names[k] for k in set(own) & set(names)} for level, own in labels.items()},
        groups=groups,
        splits=splits,
        assumed=[
            "channels are the 13 bands of level 1C in their order, reflectance times 10,000",
            note,
            *([] if names else ["classes have no names, since raw_data/labels is not beside preprocess"]),
        ],
    )


def _class_names(folder: Path) -> dict[int, str]:
    """Names by class, from raw_data/labels beside preprocess; none where it is not there."""
    names = {}
    places = [place / "raw_data/labels" for place in folder.resolve().parents[:3]]
    for path in (path for place in places for path in place.rglob("*.parquet")):
        from pyarrow.parquet import read_table

        table = read_table(path, columns=["EC_hcat_c", "EC_hcat_n"])
        rows = set(zip(*(column.to_pylist() for column in table.columns)))
        names |= {int(code): name for code, name in rows if code and name}
    return names
