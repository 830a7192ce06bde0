"""Groups that the parcels of a dataset belong to, such as regions, farms or years."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import UserError
from common.files import read_json
from data.metadata import read_column
from data.outlines import JOINT, to_dataset_ids

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

GROUPS = "groups.json"  # in META
_FORM = "{parcel id: group}, where a group is text, a number or a list of these"


def read_groups(
    named: Sequence[str],
    ids: np.ndarray,
    id_column: str,
    own_ids: Mapping[str, str],
    outlines: GeoDataFrame | None,
) -> np.ndarray:
    """Group of each parcel as text, (N,).

    Args:
        named: a JSON file; a CSV file and columns of it; or columns that `outlines` were read with.
        ids: of the dataset's parcels, (N,).
        id_column: column of the CSV file with the dataset's ids, or with the parcels' own.
        own_ids: of the parcels, by the dataset's.
        outlines: of the parcels in their order, with a column `group`; needed for columns of theirs alone.

    Raises:
        UserError: if the file is something else, or a parcel is in no group.
    """
    first, *columns = named
    if not is_file(first):
        found = dict(zip(map(str, ids), outlines["group"]))
        first = f"column {' '.join(named)} of the outlines"
    elif first.endswith(".json"):
        found = _read_json(Path(first))
    elif columns:
        each = [read_column("--groups", first, id_column, "--groups FILE COLUMN", name) for name in columns]
        shared = [parcel for parcel in each[0] if all(parcel in values for values in each)]
        found = {parcel: JOINT.join(values[parcel] for values in each) for parcel in shared}
    else:
        raise UserError(f"--groups {first} names no column; name one or several after the file.")
    found = dict(zip(to_dataset_ids(list(found), own_ids), found.values()))
    groups = [found.get(str(parcel)) for parcel in ids]
    if None in groups:
        raise UserError(
            f"{first} has no group for parcel {ids[groups.index(None)]} ({groups.count(None)} missing in all); add it, in a "
            "group of its own if need be."
        )
    return np.array(groups)


def is_file(name: str) -> bool:
    """Whether groups are named by a file, not by a column of the outlines."""
    return name.endswith((".json", ".csv"))


def _read_json(path: Path) -> dict[str, str]:
    """Groups by parcel id."""
    content = read_json(path, _FORM)
    lists = content.values() if isinstance(content, dict) else [None]
    lists = [value if isinstance(value, list) else [value] for value in lists]
    if not all(own and all(isinstance(item, str | int | float) for item in own) for own in lists):
        raise UserError(f"{path} is something else; expected {_FORM}.")
    return {parcel: JOINT.join(map(str, own)) for parcel, own in zip(content, lists)}
