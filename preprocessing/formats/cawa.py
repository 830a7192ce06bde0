"""CAWa crop types of Central Asia: a table of NDVI series and the attributes of the parcels, in the same order."""

from pathlib import Path

import numpy as np

from common.errors import UserError, as_user_error
from preprocessing.formats.source import Pixels, Source, require, to_numbers

SERIES, ATTRIBUTES = "CAWa_CropType_time-series.csv", "CAWa_CropType_samples.dbf"
YEAR = "2016"  # that days of the year are written in


def open_source(folder: Path) -> Source:
    """Opens the folder with the table of series and the shapefile of the parcels."""
    from pyogrio.raw import read as read_attributes

    path = require(folder / SERIES, "the table of series")
    with as_user_error(ValueError, prefix=f"{path} is no table of numbers and NA: "):
        text = path.read_text(encoding="utf-8-sig").replace('"', "").replace("NA", "nan")
        header, *lines = text.splitlines()
        values = np.array([line.split(",") for line in lines], np.float64)
        days = to_numbers(np.datetime64(f"{YEAR}-01-01") + np.array(header.split(","), np.int64) - 1)
    path = require(folder / ATTRIBUTES, "the attributes of the parcels, part of their shapefile")
    meta, _, _, columns = read_attributes(path, read_geometry=False)
    table = dict(zip(meta["fields"], columns))
    if not {"label_1", "year", "country"} <= set(table):
        raise UserError(f"{path} has {', '.join(table)}; expected label_1, year and country among them.")
    labels, place = table["label_1"], "region" if "region" in table else "country"
    if len(labels) != len(values):
        raise UserError(
            f"{path} has {len(labels)} parcels, but {SERIES} has {len(values)} rows; give both of one release."
        )

    def read(i: int) -> Pixels:
        return values[i][:, None], days

    return Source(
        range(len(values)),
        read,
        {"class": [None if label is None else str(label) for label in labels]},
        ["NDVI"],
        groups=[(str(where), str(year)[:4]) for where, year in zip(table[place], table["year"])],
        assumed=[
            "ids are rows of the tables, counted from 0; both list the parcels in the same order",
            f"days of the year are written as days of {YEAR}, whatever the year of a parcel",
            f"there is no official split; parts are made of whole pairs of {place} and year",
        ],
    )
