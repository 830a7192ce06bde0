"""Samples of the R package sits: a table of series in an .rda file."""

import warnings
from pathlib import Path

import numpy as np

from common.errors import UserError
from preprocessing.formats.source import Pixels, Source, require, to_numbers

COLUMNS = {"label", "time_series"}


def open_source(path: Path) -> Source:
    """Opens an .rda file with one sits table: columns label and time_series, tables of Index and bands."""
    import rdata
    from rdata.conversion import DEFAULT_CLASS_MAP

    # Days are numbers since 1970; other classes, such as that of a tibble, say nothing more.
    known = {**DEFAULT_CLASS_MAP, "Date": lambda values, attributes: values}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        objects = rdata.read_rda(require(path, "an .rda file"), constructor_dict=known)
    tables = [table for table in objects.values() if hasattr(table, "keys") and set(table) >= COLUMNS]
    if len(tables) != 1:
        raise UserError(f"{path} has {', '.join(objects)}; expected one table with label and time_series.")
    series = list(tables[0]["time_series"])
    bands = [column for column in series[0] if column != "Index"]

    def read(i: int) -> Pixels:
        days = np.asarray(series[i]["Index"]).astype(np.int64).astype("datetime64[D]")
        values = [np.asarray(series[i][band], np.float64) for band in bands]
        return np.stack(values, axis=1), to_numbers(days)

    return Source(
        range(len(series)),
        read,
        {"class": [str(label) for label in tables[0]["label"]]},
        bands,
        units=1.0,
        assumed=[
            "ids are rows of the table, counted from 0",
            "values are reflectances and indices themselves, as sits scales them",
        ],
    )
