"""Folds of spatial blocks, so that neighbouring parcels do not stand on both sides of training and test.

    python -m preprocessing.split DIR --blocks 10

Parcels side by side share soil, weather, farmer and image artefacts; random folds therefore promise more than a model
keeps in a new place. Here the ground is cut into squares, and whole squares are dealt to the parts of the
cross-validation, such that every part has about as many parcels of each class. `train.py --folds` uses the result.
"""

from __future__ import annotations

import json
import warnings
from argparse import ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from sklearn.model_selection import StratifiedGroupKFold

from common.errors import UserError, run_cli
from common.files import write_bytes
from common.flags import Parser, non_negative, positive
from common.flags import seed as parse_seed
from data.metadata import read_nomenclatures
from data.outlines import OUTLINES, to_ground
from data.packing import check_folder, list_parcels
from data.settings import LABELS
from preprocessing.parcels import read_outlines
from reports.cartography import PALETTE, add_scale, fill, map_figure, outline_paths, points_per_metre
from reports.plots import save_figure

if TYPE_CHECKING:
    from geopandas import GeoSeries

FOLDS, PICTURE = "folds.json", "folds.png"


def block_numbers(points: np.ndarray, size: float) -> np.ndarray:
    """Number of the square, of side `size`, that each point (N, 2) lies in; (N,), from 0."""
    cells = np.floor((points - points.min(0)) / size).astype(np.int64)
    return np.unique(cells, axis=0, return_inverse=True)[1].reshape(-1)


def deal_blocks(blocks: np.ndarray, labels: np.ndarray, kfold: int, seed: int) -> np.ndarray:
    """Deals whole blocks to parts that are as alike as they can be in classes and numbers of parcels.

    Args:
        blocks: block of each parcel, (N,).
        labels: class of each parcel, (N,).
        kfold: number of parts.
        seed: of the order in which equal blocks are dealt.

    Returns:
        Part of each parcel, (N,), from 0 to kfold - 1.

    Raises:
        UserError: if there are not enough blocks for a part to have one.
    """
    n_blocks = len(np.unique(blocks))
    if n_blocks < kfold:
        raise UserError(
            f"the parcels lie in {n_blocks} block(s), too few for {kfold} parts; give smaller --blocks or --kfold."
        )
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    classes = np.where(counts[classes] < kfold, -1, classes)  # too rare to balance one by one
    splitter = StratifiedGroupKFold(kfold, shuffle=True, random_state=seed)
    part = np.empty(len(blocks), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the rare classes together are rare
        for k, (_, chosen) in enumerate(splitter.split(blocks, classes, blocks)):
            part[chosen] = k
    if len(np.unique(part)) < kfold:
        raise UserError(
            f"{n_blocks} blocks do not fill {kfold} parts evenly; give smaller --blocks or --kfold."
        )
    return part


def split(
    folder: str | Path,
    blocks_km: float,
    kfold: int = 5,
    seed: int = 1,
    parcels: str | Path | None = None,
    id_column: str = "id",
    labels: str | None = None,
) -> None:
    """Writes META/folds.json of a dataset folder, and META/folds.png, a picture of it.

    Args:
        folder: dataset folder.
        blocks_km: side of the blocks, in kilometres on the ground.
        kfold: number of parts, at least 3.
        seed: of the order in which blocks that are alike are dealt.
        parcels: outlines of the parcels; META/parcels.gpkg of the folder if not given.
        id_column: column with the dataset's ids there.
        labels: nomenclature of META/labels.json to balance.

    Raises:
        UserError: if a parcel has no outline, or there are too few blocks.
    """
    folder = Path(folder)
    meta, source = folder / "META", Path(parcels or folder / "META" / OUTLINES)
    check_folder(folder)
    ids = np.array(list_parcels(folder), np.int64)
    classes = _read_classes(folder, ids, labels)
    outlines = to_ground(read_outlines(source, id_column)).set_index("id")
    missing = ids[~np.isin(ids, outlines.index)]
    if len(missing):
        raise UserError(
            f"{source} has no outline of parcel {missing[0]} ({len(missing)} missing in all); add it, or remove the "
            "parcel's file from DATA."
        )
    outlines = outlines.loc[ids]
    centres = outlines.geometry.centroid.get_coordinates().to_numpy()
    blocks = block_numbers(centres, 1000 * blocks_km)
    part = deal_blocks(blocks, classes, kfold, seed)
    content = {"folds": [ids[part == k].tolist() for k in range(kfold)], "blocks_km": blocks_km, "seed": seed}
    title = f"{kfold} parts of blocks of {blocks_km:g} km"
    try:
        write_bytes(meta / FOLDS, (json.dumps(content) + "\n").encode())
        save_figure(
            meta / PICTURE, plot_parts(outlines.geometry, part, (centres.min(0), 1000 * blocks_km), title)
        )
    except OSError as error:
        raise UserError(f"{meta} cannot be written ({error.strerror}); make room or allow it.") from error
    for line in describe(blocks, classes, part):
        print(line)
    print(f"Folds: {meta / FOLDS} for train.py --folds; picture: {meta / PICTURE}")


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
    return np.array([str(nomenclatures[name].get(str(parcel), "")) for parcel in ids])


def describe(blocks: np.ndarray, labels: np.ndarray, part: np.ndarray) -> list[str]:
    """A line per part, and one on classes that not every part has."""
    n_parts = part.max() + 1
    lines = [
        f"Part {k + 1}: {(part == k).sum():,} parcels ({100 * np.mean(part == k):.1f}%) in "
        f"{len(np.unique(blocks[part == k]))} blocks, {len(np.unique(labels[part == k]))} classes"
        for k in range(n_parts)
    ]
    local = [label for label in np.unique(labels) if len(np.unique(part[labels == label])) < n_parts]
    if local:
        lines.append(
            f"Not in every part: {len(local)} of {len(np.unique(labels))} classes ({', '.join(local[:10])})"
        )
    return lines


def plot_parts(outlines: GeoSeries, part: np.ndarray, grid: tuple[np.ndarray, float], title: str) -> Figure:
    """Outlines, in metres, coloured by part, and the grid of the blocks: its south-west corner and their side."""
    bounds, (corner, side) = outlines.total_bounds, grid
    colours = [PALETTE[k % len(PALETTE)] for k in range(part.max() + 1)]
    handles = [
        Patch(facecolor=colour, label=f"part {k + 1} ({(part == k).sum():,} parcels)")
        for k, colour in enumerate(colours)
    ]
    figure, (panel,) = map_figure(bounds, [title], handles)
    fill(panel, outline_paths(outlines), [colours[k] for k in part])
    add_scale(panel, bounds)
    width = 0.1 * side * points_per_metre(panel)
    lines = {"colors": "black", "linewidths": min(1.2, width), "zorder": 3}
    panel.vlines(np.arange(corner[0], bounds[2], side), bounds[1], bounds[3], **lines)
    panel.hlines(np.arange(corner[1], bounds[3], side), bounds[0], bounds[2], **lines)
    return figure


def _kilometres(text: str) -> float:
    """Reads a length above 0."""
    if not non_negative(text):
        raise ArgumentTypeError(f"{text!r} is not a number of kilometres above 0")
    return float(text)


def main() -> None:
    """Command line: python -m preprocessing.split DIR --blocks KM."""
    parser = Parser(description="Cuts a dataset into spatial blocks and deals them to folds.")
    add = parser.add_argument
    add("folder", metavar="DIR", help="dataset folder")
    add("--blocks", type=_kilometres, required=True, metavar="KM", help="side of a block in kilometres")
    add("--kfold", type=positive, default=5, help="number of parts, at least 3")
    add("--seed", type=parse_seed, default=1, help="seed of the order in which blocks are dealt")
    add("--parcels", help=f"outlines of the parcels; without it META/{OUTLINES} of the dataset")
    add("--id_column", default="id", help="column with the dataset's ids in the outlines")
    add("--labels", help=f"nomenclature to balance (default: {LABELS}, or the first there is)")
    args = parser.parse_args()
    if args.kfold < 3:
        raise UserError(
            f"--kfold is {args.kfold}; at least 3 are needed, one part each for training, validation and test."
        )
    split(args.folder, args.blocks, args.kfold, args.seed, args.parcels, args.id_column, args.labels)


if __name__ == "__main__":
    run_cli(main)
