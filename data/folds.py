"""Folds: drawn at random as published, or read from a file such as `preprocessing.split` writes."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from sklearn.model_selection import KFold

from common.errors import UserError
from common.files import read_json
from data.draws import stream_key
from data.parcels import Parcels

Split = tuple[list[int], list[int], list[int]]
PARTS = ("train", "validation", "test")
_FOLDS = (
    '{"folds": [[parcel id, ...], ...]}, one list of ids per part, as python -m preprocessing.split writes it, or '
    '{"splits": [{"train": [parcel id, ...], "validation": [...], "test": [...]}, ...]}'
)


def read_splits(path: str | Path) -> list[dict[str, list[int]]]:
    """Ids of the training, validation and test parcels of every fold of a folds file.

    A file of parts, {"folds": [...]}, has the folds of `split_parts`. A file of {"splits": [...]} lists them itself; ids
    may be in no part, and "validation" may be left out.

    Raises:
        UserError: if the file is something else, has fewer than three parts, or names a parcel twice.
    """
    content = read_json(Path(path), _FOLDS)
    content = content if isinstance(content, dict) else {}
    if isinstance(content.get("splits"), list):
        splits = [_read_split(path, number, split) for number, split in enumerate(content["splits"], start=1)]
        if not splits:
            raise UserError(f"{path} has no split; expected {_FOLDS}.")
        return splits
    parts = content.get("folds")
    if not isinstance(parts, list) or not all(isinstance(part, list) for part in parts):
        raise UserError(f"{path} is something else; expected {_FOLDS}.")
    if len(parts) < 3:
        raise UserError(
            f"{path} has {len(parts)} part(s); at least 3 are needed, one each for training, validation and test."
        )
    _check_ids(path, {f"part {number}": part for number, part in enumerate(parts, start=1)})
    return split_parts(parts)


def split_parts(parts: Sequence[list[int]]) -> list[dict[str, list[int]]]:
    """Folds of parts: fold k tests part k, validates on the next and trains on the rest."""
    K = len(parts)
    return [
        {
            "train": [parcel for j in range(K) if j not in (k, (k + 1) % K) for parcel in parts[j]],
            "validation": parts[(k + 1) % K],
            "test": parts[k],
        }
        for k in range(K)
    ]


def _read_split(path: str | Path, number: int, split: object) -> dict[str, list[int]]:
    """One entry of "splits", checked."""
    if not isinstance(split, dict) or not all(isinstance(split.get(part, []), list) for part in PARTS):
        raise UserError(f"{path}: split {number} is something else; expected {_FOLDS}.")
    if unknown := [name for name in split if name not in PARTS]:
        raise UserError(f"{path}: split {number} has {unknown[0]!r}; expected {', '.join(PARTS)}.")
    _check_ids(path, {f"{part} of split {number}": split.get(part, []) for part in PARTS})
    for part in ("train", "test"):
        if not split.get(part):
            raise UserError(f"{path}: split {number} has no parcel in {part!r}; name some.")
    return {part: split.get(part, []) for part in PARTS}


def _check_ids(path: str | Path, parts: dict[str, list]) -> None:
    """Raises a UserError unless the parts hold ids, each of them once."""
    part_of: dict[int, str] = {}
    for name, part in parts.items():
        for parcel in part:
            if not isinstance(parcel, int) or isinstance(parcel, bool) or parcel < 0:
                raise UserError(
                    f"{path}: {name} contains {parcel!r}; expected parcel ids, whole numbers from 0."
                )
            if parcel in part_of:
                raise UserError(
                    f"{path}: parcel {parcel} is in {part_of[parcel]} and again in {name}; leave it in one."
                )
            part_of[parcel] = name


def choose_splits(
    dataset: Parcels, path: str | None, kfold: int, seed: int, train_on_validation: float = 0.0
) -> list[Split]:
    """Indices of training, validation and test parcels: of the folds of a file if given, else of random ones.

    Args:
        dataset: has the parcels.
        path: of a file of folds, see `read_folds`; None for `kfold` random ones.
        kfold: number of random folds.
        seed: of what is drawn.
        train_on_validation: share of each validation part, below 1, that is drawn at random and moved to training.
    """
    if path is not None:
        splits = read_folds(path, dataset.pid, dataset.store.ids.tolist(), seed)
    else:
        splits = fold_splits(len(dataset), kfold, seed)
    if not train_on_validation:
        return splits
    found = []
    for fold, (train, val, test) in enumerate(splits, start=1):
        draw = np.random.default_rng(stream_key("train_on_validation", seed, fold) % 2**63)
        moved = set(draw.permutation(val)[: int(train_on_validation * len(val))].tolist())
        found.append(([*train, *filter(moved.__contains__, val)], [i for i in val if i not in moved], test))
    return found


def read_folds(
    path: str | Path, ids: Sequence[str | int], known: Iterable[str | int] | None = None, seed: int = 1
) -> list[Split]:
    """Train, validation and test indices of every fold of a folds file; see `read_splits`.

    Args:
        path: the file.
        ids: ids of the dataset's parcels, in its order. Each must be in a part of a file of parts.
        known: ids that the file may name beside these, such as parcels of classes left out; none if not given.
        seed: of the fifth of a training part that is taken where no validation part is given.

    Returns:
        Per fold three lists of positions in `ids`, in increasing order.

    Raises:
        UserError: if a parcel that must be there is in no part, a part names an unknown parcel or is left empty.
    """
    splits = read_splits(path)
    position = {int(parcel): i for i, parcel in enumerate(ids)}
    named = {parcel for split in splits for part in split.values() for parcel in part}
    missing = [parcel for parcel in position if parcel not in named]
    if missing and "splits" not in read_json(Path(path)):
        raise UserError(
            f"{path} puts parcel {missing[0]} of the dataset in no part ({len(missing)} missing in all); "
            "make the file again with python -m preprocessing.split."
        )
    named.difference_update(position, map(int, known or ()))
    if named:
        unknown = sorted(named)
        raise UserError(
            f"{path} names parcel {unknown[0]}, which the dataset does not have ({len(unknown)} unknown in all); "
            "give the folds of this dataset."
        )
    found = []
    for number, split in enumerate(splits, start=1):
        parts = {
            part: sorted(position[parcel] for parcel in split[part] if parcel in position) for part in PARTS
        }
        if not split["validation"]:
            order = np.random.default_rng((seed, number)).permutation(parts["train"])
            n = max(1, len(order) // 5)
            parts["train"], parts["validation"] = sorted(order[n:].tolist()), sorted(order[:n].tolist())
        for part, indices in parts.items():
            if len(indices) < (least := 2 if part == "train" else 1):
                raise UserError(
                    f"{path}: fold {number} has {len(indices)} {part} parcel(s) of the classes to tell apart, where at "
                    f"least {least} are needed; use fewer folds or smaller blocks."
                )
        found.append(tuple(parts[part] for part in PARTS))
    return found


def describe_splits(splits: Sequence[Split], targets: np.ndarray, names: Sequence[str]) -> list[str]:
    """What the parts of the folds cannot teach or tell, in words: one line per fold that lacks something.

    Args:
        splits: indices of the parts of every fold.
        targets: class index of every parcel.
        names: of the classes.
    """
    lines = []
    for fold, (train, val, test) in enumerate(splits, start=1):
        if left_out := len(targets) - len(train) - len(val) - len(test):
            lines.append(f"Fold {fold}: {left_out:,} parcel(s) in no part of it")
        trained, validated = set(targets[train].tolist()), set(targets[val].tolist())
        absent = [names[k] for k in range(len(names)) if k not in trained]
        if absent:
            shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
            lines.append(f"Fold {fold}: no training parcel of {shown}, so no such class can be predicted")
        if len(trained) == 1:
            lines.append(f"Fold {fold}: all training parcels are of one class; nothing can be learned")
        if len(validated) == 1:
            lines.append(
                f"Fold {fold}: all validation parcels are of one class, so its scores choose the epoch badly"
            )
    return lines


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
    order = order.astype(object)  # so that folds share their numbers, of which each takes memory
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
