"""BreizhCrops: mean series of parcels, an HDF5 file and a table per region."""

from pathlib import Path

import numpy as np

from common.errors import UserError
from preprocessing.formats.source import ALL_S2, TEN_S2, Pixels, Source, read_table, to_numbers

# By the number of columns: level, bands, column of the first band, column of the day.
LAYOUTS = {17: ("L1C", ALL_S2, 0, 16), 14: ("L2A", TEN_S2, 1, 0)}


def open_source(folder: Path) -> Source:
    """Opens <year>/<level> of the dataset, such as 2017/L1C."""
    import h5py

    opened = {path.stem: h5py.File(path, "r") for path in sorted(folder.glob("*.h5"))}
    if not opened:
        raise UserError(f"{folder} has no .h5 file; give a folder such as 2017/L1C, with one per region.")
    for table in sorted(folder.glob("frh*.csv")):
        if table.stem not in opened:
            raise UserError(f"{table} has no {table.stem}.h5 beside it; add that, or remove the table.")
    places = [place / "classmapping.csv" for place in (folder, *folder.resolve().parents[:2])]
    mapping = next((path for path in places if path.exists()), places[-1])
    classes = {row["code"]: row for row in read_table(mapping, ("id", "classname", "code"))}
    tables = {name: read_table(folder / f"{name}.csv", ("id", "CODE_CULTU", "path")) for name in opened}
    every = [(region, row) for region, rows in tables.items() for row in rows]
    found = [(region, row) for region, row in every if row["CODE_CULTU"] in classes]
    for region, row in found:
        if row["path"] not in opened[region]:
            raise UserError(
                f"{folder / region}.h5 has no series {row['path']}, which {region}.csv lists; give both of one release."
            )
    if not found:
        raise UserError(f"no parcel of {folder} has a code that {mapping} lists.")
    width = opened[found[0][0]][found[0][1]["path"]].shape[1]
    if width not in LAYOUTS:
        raise UserError(f"{folder / found[0][0]}.h5 has {width} columns; expected 17 (L1C) or 14 (L2A).")
    level, bands, first, day = LAYOUTS[width]

    def read(i: int) -> Pixels:
        region, row = found[i]
        table = opened[region][row["path"]][:]
        days = table[:, day].astype(np.int64).astype("datetime64[ns]")
        return table[:, first : first + len(bands)], to_numbers(days)

    return Source(
        [int(float(row["id"])) for _, row in found],
        read,
        {"class": [int(classes[row["CODE_CULTU"]]["id"]) for _, row in found]},
        bands,
        units=0.0001,
        classes={"class": {row["id"]: row["classname"] for row in classes.values()}},
        groups=[region for region, _ in found],
        splits=[{"train": ["frh01", "frh02"], "validation": ["frh03"], "test": ["frh04"]}],
        assumed=[
            f"the {width} columns are those of {level}; the masks among them are left out",
            f"{len(every) - len(found):,} parcels whose code has no class are left out, as by the authors' loader",
        ],
    )
