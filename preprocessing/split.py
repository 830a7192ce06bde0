"""Folds whose test parcels are unlike those trained on: other squares of land, regions, farms or years.

    python -m preprocessing.split DIR --blocks 10
    python -m preprocessing.split DIR --groups farms.csv farm --buffer 200

Parcels side by side share soil, weather, farmer and image artefacts; random folds therefore promise more than a model
keeps in a new place. Here whole squares of the ground, or whole groups of parcels, are dealt to the parts of the
cross-validation, such that every part has about as many parcels of each class. `train.py --folds` uses the result.
"""

from __future__ import annotations

import warnings
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from common.errors import UserError, run_cli
from common.files import write_json_line
from common.flags import Parser, non_negative, positive
from common.flags import seed as parse_seed
from data.folds import split_parts
from data.metadata import read_nomenclatures
from data.outlines import OUTLINES, ground_crs, read_own_ids
from data.packing import check_folder, list_parcels
from data.settings import LABELS
from preprocessing.groups import GROUPS, is_file, read_groups
from preprocessing.parcels import read_outlines
from reports.cartography import MOST_OUTLINES
from reports.folds import plot_parts
from reports.plots import save_figure

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

FOLDS, PICTURE = "folds.json", "folds.png"  # in META


def block_numbers(points: np.ndarray, size: float) -> np.ndarray:
    """Number of the square, of side `size`, that each point (N, 2) lies in; (N,), from 0."""
    cells = np.floor((points - points.min(0)) / size).astype(np.int64)
    return np.unique(cells, axis=0, return_inverse=True)[1].reshape(-1)


def deal(groups: np.ndarray, labels: np.ndarray, kfold: int, seed: int, what: str = "block") -> np.ndarray:
    """Deals whole groups to parts that are as alike as they can be in classes and numbers of parcels.

    Args:
        groups: group of each parcel, (N,).
        labels: class of each parcel, (N,).
        kfold: number of parts.
        seed: of the order in which equal groups are dealt.
        what: "block" or "group".

    Returns:
        Part of each parcel, (N,), from 0 to kfold - 1; each has a group at least.

    Raises:
        UserError: if there are fewer groups than parts.
    """
    groups, sizes = np.unique(groups, return_inverse=True, return_counts=True)[1:]
    if len(sizes) < kfold:
        smaller = "smaller --blocks" if what == "block" else "finer --groups"
        raise UserError(
            f"the parcels lie in {len(sizes)} {what}(s), too few for {kfold} parts; give {smaller} or --kfold."
        )
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    classes = np.where(counts[classes] < kfold, -1, classes)  # too rare to balance one by one
    splitter = StratifiedGroupKFold(kfold, shuffle=True, random_state=seed)
    part = np.empty(len(groups), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the rare classes together are rare
        for k, (_, chosen) in enumerate(splitter.split(groups, classes, groups)):
            part[chosen] = k
    return part


def near_test(outlines: np.ndarray, part: np.ndarray, distance: float) -> np.ndarray:
    """Which parcels lie nearer than a distance to a parcel of each part that are not in it, (parts, N).

    Args:
        outlines: shapely geometries, in metres, (N,).
        part: of each parcel, (N,), from 0.
        distance: in metres, between the outlines; above 0.
    """
    import shapely

    near = np.zeros((part.max() + 1, len(part)), bool)
    for k in range(len(near)):
        others = np.flatnonzero(part != k)
        (found, _), apart = shapely.STRtree(outlines[part == k]).query_nearest(
            outlines[others], max_distance=distance, return_distance=True, all_matches=False
        )
        near[k, others[found[apart < distance]]] = True
    return near


def split(
    folder: str | Path,
    blocks_km: float | None = None,
    kfold: int = 5,
    seed: int = 1,
    parcels: str | Path | None = None,
    id_column: str = "id",
    labels: str | None = None,
    groups: Sequence[str] = (),
    buffer: float = 0.0,
) -> None:
    """Writes META/folds.json of a dataset folder and, where there are outlines, META/folds.png, a picture of it.

    Args:
        folder: dataset folder.
        blocks_km: side of the blocks, in kilometres on the ground; None for groups.
        kfold: number of parts, at least 3.
        seed: of the order in which blocks or groups that are alike are dealt.
        parcels: outlines of the parcels; META/parcels.gpkg of the folder if not given.
        id_column: column there, or in the table of groups, with the dataset's ids or the parcels' own.
        labels: nomenclature of META/labels.json to balance.
        groups: what names the groups, see `read_groups`.
        buffer: metres; parcels nearer to a test parcel are left out of its fold.

    Raises:
        UserError: if a parcel has no outline that needs one, or no group, or there are too few of these.
    """
    folder = Path(folder)
    meta, source = folder / "META", Path(parcels or folder / "META" / OUTLINES)
    check_folder(folder)
    ids = np.array(list_parcels(folder), np.int64)
    classes = _read_classes(folder, ids, labels)
    in_file = bool(groups) and is_file(groups[0])
    # Column id of META/parcels.gpkg has the dataset's ids; a million own ones take as much memory as all else.
    own_ids = read_own_ids(folder) if in_file or parcels is not None or id_column != "id" else {}
    try:
        column = "id" if in_file and parcels is None else id_column
        outlines = _read_ground(
            source, ids, column, own_ids, () if in_file else groups, not (buffer or groups)
        )
    except UserError as error:
        if groups and not in_file and parcels is None:
            hint = "Outlines with other columns can be given: --parcels FILE --id_column COLUMN."
            raise UserError(f"{error} {hint}") from error
        if blocks_km is not None or buffer or parcels is not None or not in_file:
            raise
        print(f"No picture of the folds: {error}")
        outlines = None
    grid = None
    if blocks_km is None:
        what, title = "group", f"{kfold} parts of groups"
        names = read_groups(groups, ids, id_column, own_ids, outlines)
    else:
        what, title = "block", f"{kfold} parts of blocks of {blocks_km:g} km"
        centres = outlines.geometry.centroid.get_coordinates().to_numpy()
        names, grid = block_numbers(centres, 1000 * blocks_km), (centres.min(0), 1000 * blocks_km)
    part = deal(names, classes, kfold, seed, what)
    parts = [ids[part == k].tolist() for k in range(kfold)]
    near = np.zeros((kfold, len(ids)), bool)
    content: dict[str, Any] = {"folds": parts}
    if buffer:
        title += f", {buffer:g} m apart"
        near = near_test(outlines.geometry.to_numpy(), part, buffer)
        content = {"splits": _keep_apart(parts, [set(ids[row].tolist()) for row in near], buffer)}
    content |= {"blocks_km": blocks_km} if what == "block" else {"groups": list(groups)}
    content |= ({"buffer_m": buffer} if buffer else {}) | {"seed": seed}
    try:
        write_json_line(meta / FOLDS, content)
        if outlines is not None:
            figure = plot_parts(outlines.geometry, part, title, names if what == "group" else None, grid)
            save_figure(meta / PICTURE, figure)
    except OSError as error:
        raise UserError(f"{meta} cannot be written ({error.strerror}); make room or allow it.") from error
    for line in describe(names, classes, part, what, near):
        print(line)
    print(
        f"Folds: {meta / FOLDS} for train.py --folds"
        + ("" if outlines is None else f"; picture: {meta / PICTURE}")
    )


def _read_ground(
    source: Path,
    ids: np.ndarray,
    id_column: str,
    own_ids: Mapping[str, str],
    group_columns: Sequence[str],
    centres: bool,
) -> GeoDataFrame:
    """The outlines of these parcels, in their order, in metres; of very many the centres, if these are enough."""
    outlines = read_outlines(source, id_column, own_ids, group_columns).set_index("id")
    from geopandas import GeoDataFrame, GeoSeries  # without which the line above says what to install

    crs = ground_crs(outlines)
    missing = ids[~np.isin(ids, outlines.index)]
    if len(missing):
        raise UserError(
            f"{source} has no outline of parcel {missing[0]} ({len(missing)} missing in all); add it, or give "
            "outlines of all with --parcels."
        )
    outlines = outlines.loc[ids]
    shapes, source, others = np.array(outlines.geometry), outlines.crs, outlines.drop(columns="geometry")
    del outlines  # what is projected below is then gone: of many parcels it takes much memory
    centres = centres and len(shapes) > MOST_OUTLINES
    for start in range(0, len(shapes), MOST_OUTLINES):
        part = GeoSeries(shapes[start : start + MOST_OUTLINES], crs=source).to_crs(crs)
        shapes[start : start + MOST_OUTLINES] = part.centroid if centres else part
    return GeoDataFrame(others, geometry=shapes, crs=crs)


def _keep_apart(parts: list[list[int]], near: list[set[int]], buffer: float) -> list[dict[str, list[int]]]:
    """The folds of the parts, without the parcels that lie near those tested."""
    splits = split_parts(parts)
    for k, (split, left_out) in enumerate(zip(splits, near), start=1):
        for name in ("train", "validation"):
            split[name] = [parcel for parcel in split[name] if parcel not in left_out]
            if not split[name]:
                raise UserError(
                    f"--buffer {buffer:g} leaves no {name} parcel in fold {k}; give a smaller one, or another --seed."
                )
    return splits


def _read_classes(folder: Path, ids: np.ndarray, name: str | None) -> np.ndarray:
    """Label of each parcel as text, empty without one; all empty if the dataset has no labels."""
    if name is None and not (folder / "META" / "labels.json").exists():
        return np.full(len(ids), "")
    nomenclatures = read_nomenclatures(folder)
    if name is None:
        name = LABELS if LABELS in nomenclatures else next(iter(nomenclatures), "")
    if name not in nomenclatures:
        raise UserError(
            f"{folder / 'META' / 'labels.json'} has no nomenclature {name!r}; it has {', '.join(nomenclatures)}."
        )
    labels = [nomenclatures[name].get(str(parcel), "") for parcel in ids.tolist()]
    words = {label: str(label) for label in set(labels)}
    return np.array([words[label] for label in labels])


def describe(
    groups: np.ndarray,
    labels: np.ndarray,
    part: np.ndarray,
    what: str = "block",
    near: np.ndarray | None = None,
) -> list[str]:
    """A line per part, one on classes that not every part has, and one on a group that holds most parcels."""
    n_parts, lines = part.max() + 1, []
    for k in range(n_parts):
        here = part == k
        lines.append(
            f"Part {k + 1}: {here.sum():,} parcels ({100 * np.mean(here):.1f}%) in {len(np.unique(groups[here]))} {what}s, "
            f"{len(np.unique(labels[here]))} classes"
        )
        if near is not None and near[k].any():
            lines[-1] += f"; {near[k].sum():,} parcels too near are left out of the fold that tests it"
    local = [label for label in np.unique(labels) if len(np.unique(part[labels == label])) < n_parts]
    if local:
        more = f" and {len(local) - 10} more" if len(local) > 10 else ""
        lines.append(
            f"Not in every part: {len(local)} of {len(np.unique(labels))} classes ({', '.join(local[:10])}{more})"
        )
    (largest, count), *_ = Counter(groups.tolist()).most_common(1)
    if 2 * count > len(groups):
        where = f"part {part[groups == largest][0] + 1}"
        name = f"{what} {largest!r}" if what == "group" else f"one {what}"
        lines.append(
            f"Uneven: {name} holds {count:,} of {len(groups):,} parcels, so {where} is as large, and the fold that tests it "
            "trains on few"
        )
    return lines


def _length(text: str) -> float:
    """Reads a length above 0."""
    if not non_negative(text):
        raise ArgumentTypeError(f"{text!r} is not a length above 0")
    return float(text)


def main() -> None:
    """Command line: python -m preprocessing.split DIR --blocks KM."""
    parser = Parser(description="Deals blocks of land, or groups of parcels, to the folds of a training.")
    add = parser.add_argument
    add("folder", metavar="DIR", help="dataset folder")
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--blocks", type=_length, metavar="KM", help="side of a block in kilometres")
    ways.add_argument(
        "--groups",
        nargs="+",
        metavar="GROUPS",
        help="parcels of one group stay together: a column of the outlines; FILE.csv and a column of it; or FILE.json of "
        f"{{id: group}}, such as META/{GROUPS}. Of several columns, and where an entry is a list, the combination is the group",
    )
    add(
        "--buffer",
        type=_length,
        default=0.0,
        metavar="METRES",
        help="parcels nearer than this to a test parcel are left out of its fold",
    )
    add("--kfold", type=positive, default=5, help="number of parts, at least 3")
    add("--seed", type=parse_seed, default=1, help="seed of the order in which blocks or groups are dealt")
    add("--parcels", help=f"outlines of the parcels; without it META/{OUTLINES} of the dataset")
    add(
        "--id_column",
        default="id",
        help="column with the dataset's ids, or the parcels' own, there or in FILE.csv",
    )
    add("--labels", help=f"nomenclature to balance (default: {LABELS}, or the first there is)")
    args = parser.parse_args()
    if args.kfold < 3:
        raise UserError(
            f"--kfold is {args.kfold}; at least 3 are needed, one part each for training, validation and test."
        )
    split(
        args.folder,
        args.blocks,
        args.kfold,
        args.seed,
        args.parcels,
        args.id_column,
        args.labels,
        args.groups or (),
        args.buffer,
    )


if __name__ == "__main__":
    run_cli(main)
