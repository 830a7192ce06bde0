"""Folds: drawn at random as published, or read from a file such as `preprocessing.split` writes."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from sklearn.model_selection import KFold

from common.errors import UserError
from common.files import read_json

Split = tuple[list[int], list[int], list[int]]
_FOLDS = (
    '{"folds": [[parcel id, ...], ...]}, one list of ids per part, as python -m preprocessing.split writes it'
)


def read_parts(path: str | Path) -> list[list[int]]:
    """The parts of a folds file, each a list of parcel ids.

    Raises:
        UserError: if the file is something else, has fewer than three parts or names a parcel twice.
    """
    content = read_json(Path(path), _FOLDS)
    parts = content.get("folds") if isinstance(content, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, list) for part in parts):
        raise UserError(f"{path} is something else; expected {_FOLDS}.")
    if len(parts) < 3:
        raise UserError(
            f"{path} has {len(parts)} part(s); at least 3 are needed, one each for training, validation and test."
        )
    part_of: dict[int, int] = {}
    for number, part in enumerate(parts, start=1):
        for parcel in part:
            if not isinstance(parcel, int) or isinstance(parcel, bool) or parcel < 0:
                raise UserError(
                    f"{path}: part {number} contains {parcel!r}; expected parcel ids, whole numbers from 0."
                )
            if parcel in part_of:
                raise UserError(
                    f"{path}: parcel {parcel} is in part {part_of[parcel]} and again in part {number}; leave it in one."
                )
            part_of[parcel] = number
    return parts


def read_folds(
    path: str | Path, ids: Sequence[str | int], known: Iterable[str | int] | None = None
) -> list[Split]:
    """Train, validation and test indices of every fold: fold k tests part k, validates on the next, trains on the rest.

    Args:
        path: JSON file of parts, see `read_parts`.
        ids: ids of the dataset's parcels, in its order; each must be in exactly one part.
        known: ids that the file may name beside these, such as parcels of classes left out; none if not given.

    Returns:
        Per fold three lists of positions in `ids`, in increasing order.

    Raises:
        UserError: if a parcel is in no part or in two, a part names an unknown parcel, or a part is left empty.
    """
    parts = read_parts(path)
    position = {int(parcel): i for i, parcel in enumerate(ids)}
    named = {parcel for part in parts for parcel in part}
    missing = [parcel for parcel in position if parcel not in named]
    if missing:
        raise UserError(
            f"{path} puts parcel {missing[0]} of the dataset in no part ({len(missing)} missing in all); "
            "make the file again with python -m preprocessing.split."
        )
    unknown = sorted(named.difference(position, map(int, known or ())))
    if unknown:
        raise UserError(
            f"{path} names parcel {unknown[0]}, which the dataset does not have ({len(unknown)} unknown in all); "
            "give the folds of this dataset."
        )
    indices = [sorted(position[parcel] for parcel in part if parcel in position) for part in parts]
    for number, part in enumerate(indices, start=1):
        if not part:
            raise UserError(
                f"{path}: part {number} has no parcel of the classes to tell apart; use fewer folds or smaller blocks."
            )
    K = len(indices)
    return [
        (
            sorted(i for j in range(K) if j not in (k, (k + 1) % K) for i in indices[j]),
            indices[(k + 1) % K],
            indices[k],
        )
        for k in range(K)
    ]


def fold_splits(n_parcels: int, kfold: int, seed: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Train, validation and test indices of every fold, exactly as published.

    The shuffled parcels are cut into kfold test parts; of the rest, the last as many as the first test part holds
    are for validation.
    """
    if kfold < 3:
        raise UserError(
            f"--kfold is {kfold}; at least 3 are needed, one part each for training, validation and test."
        )
    if n_parcels < kfold:
        raise UserError(
            f"the dataset has {n_parcels} parcels for --kfold {kfold}; use more parcels or fewer folds."
        )
    order = np.arange(n_parcels)
    np.random.RandomState(seed).shuffle(order)
    folds = list(KFold(n_splits=kfold, shuffle=False).split(order))
    n_val = len(folds[0][1])
    if n_parcels - 2 * n_val < 2:
        raise UserError(
            f"the dataset has {n_parcels} parcels for --kfold {kfold}, which leaves fewer than two to train on; "
            "use more parcels."
        )
    return [
        (order[rest[:-n_val]].tolist(), order[rest[-n_val:]].tolist(), order[test].tolist())
        for rest, test in folds
    ]
