"""Predicts the class of every parcel of a dataset with trained weights, of one fold or of all together."""

import common  # isort: skip  # noqa: F401  # before torch, see there

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.errors import UserError, as_user_error, run_cli
from common.flags import Parser, fraction, positive, seed
from common.machine import count_workers, describe_device, keep_freed_memory
from common.processes import is_main, join_ranks, together
from data.metadata import LabelsTable, read_info, read_nomenclature
from data.outlines import OUTLINES, read_own_ids
from data.samplers import BatchSampler, evaluation_batch
from data.settings import EXTRA_FEATURE
from dataset import UNKNOWN, PixelSetData, batch_loader, find_norm
from learning.calibration import read_threshold
from learning.options import (
    add_architecture_options,
    add_data_options,
    check_typed,
    resolve_architecture,
    typed_architecture,
)
from learning.predictions import (
    OUTPUTS,
    TABLE,
    describe_jury,
    describe_scores,
    mean_of_runs,
    predict,
    write_predictions,
)
from learning.results import CONFIG, prepare_output, read_confusions
from learning.run import Run, open_others, open_run, published_run
from models.architecture import Architecture, DataShape, flags, read_preset
from models.ensemble import Ensemble
from models.weights import choose_folds
from preprocessing.parcels import read_outlines
from preprocessing.simulate import embedded_dataset
from reports.areas import write_areas
from reports.attention import PICTURES, choose_bands, mean_attention, write_attention
from reports.export import export_run
from reports.maps import check_picture, describe_dataset, match_outlines, write_map
from reports.suspects import write_suspects

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

NO_SUSPECTS = "none listed, since the folds may have learned from the labels that they would have to doubt"


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(
        description=__doc__,
        epilog="Architecture, classes and normalisation are those of the run in weight_dir (conf.json); flags override.",
    )
    group = parser.add_argument_group("inference")
    group.add_argument(
        "--weight_dir", required=True, help="results folder of train.py, with Fold_k/model.pth.tar"
    )
    group.add_argument(
        "--with_runs",
        nargs="+",
        default=[],
        metavar="DIR",
        help="results folders of further trainings with the same classes, by other seeds or encoders, that predict together "
        "with that of weight_dir: better, and as much slower",
    )
    group.add_argument(
        "--fold",
        help="as published: the number of one fold, from 1, or all for the mean of all, for every parcel. Without it a parcel "
        "of the training is predicted by the fold that held it out, any other by all",
    )
    group.add_argument(
        "--kfold",
        type=positive,
        help="for published weights, which come without a configuration: restores this number of published folds, with "
        "--rdm_seed, and has each parcel predicted by the fold that it was a test parcel of",
    )
    group.add_argument("--rdm_seed", type=seed, default=1, help="seed of the folds that --kfold restores")
    group.add_argument("--output_dir", default="./output", help="where to write the predictions")
    group.add_argument(
        "--doubt",
        type=fraction,
        default=0.5,
        help="predictions with a lower confidence are marked in the column doubt",
    )
    group.add_argument(
        "--sets",
        type=fraction,
        metavar="SHARE",
        help="also give each parcel the smallest set of classes that holds the true one for at least this share of "
        "parcels, such as 0.9",
    )
    group.add_argument(
        "--parcels",
        help="vector file with the parcels' outlines: also writes predictions.gpkg and predictions.parquet",
    )
    group.add_argument(
        "--map", help="picture to draw a map in; without --parcels, the dataset's META/parcels.gpkg is used"
    )
    group.add_argument(
        "--attention",
        action="store_true",
        help="also write each class's mean attention by head and date: attention.npz and a picture per class",
    )
    group.add_argument(
        "--ndvi_bands",
        nargs=2,
        metavar=("RED", "NIR"),
        help="channels of the NDVI in those pictures: names of META/info.json or numbers, counted from 0 (default: red and "
        "near infrared by those names, such as B04 and B08, else 2 6 of the published 10 channels)",
    )
    group.add_argument(
        "--export",
        metavar="FILE",
        help="only write the model, in one file that other programs run: FILE.onnx or FILE.pt2",
    )
    add_data_options(parser, "that of the training; of published weights the embedded simulated one")
    add_architecture_options(parser)
    return parser.parse_args()


def main() -> None:
    """Loads weights and data, predicts, and writes the predictions."""
    args = parse_args()
    device = join_ranks(args.device, args.tf32)
    with as_user_error(FileNotFoundError, ValueError, prefix="--weight_dir: "):
        folds = list(
            choose_folds(args.weight_dir, args.fold or "all")
        )  # before data are read: that takes long
    if args.export:
        if is_main():
            typed, preset = typed_architecture(args), read_preset(args.preset)
            print(export_run(Path(args.export), Path(args.weight_dir), args.fold or "all", typed, preset))
        return
    output = prepare_output(args.output_dir) if is_main() else Path(args.output_dir)
    thresholds = {}
    if args.sets is not None:
        if args.with_runs:
            raise UserError("--sets needs one run, whose validation tells their size; leave --with_runs out.")
        thresholds = {k: read_threshold(Path(args.weight_dir) / f"Fold_{k}", args.sets) for k in folds}
    run = choose_run(args)
    others = open_others(args.with_runs, run, args.until)
    classes = list(run.data.classes)
    outlines = open_outlines(args, run)
    if args.attention and not run.architecture.kind.has_attention:
        raise UserError(f"--attention: {run.architecture.kind.title} has no attention; L-TAE and TAE do.")
    dataset = open_dataset(args, run)
    if outlines is not None:
        outlines = match_outlines(outlines, dataset.pid)
    run = replace(run, architecture=choose_architecture(args, run, dataset))
    telling = run.telling(dataset, args.doubt, thresholds)
    if args.attention:
        channels = read_info(dataset.folder).get("bands") or []
        bands = choose_bands(args.ndvi_bands, channels, dataset.n_channels)
    with as_user_error(FileNotFoundError, ValueError, TypeError, prefix="--weight_dir: "):
        ensemble = run.load(args.fold or "all", device)
    jury = run.jury(dataset, ensemble, args.fold, args.kfold)
    if dataset.fits_on(device):
        dataset = dataset.to(device)
    print(
        f"Device: {describe_device(device)}\n"
        f"Model: {run.architecture.kind.classifier.__name__}, {len(jury.folds)} fold(s) of {args.weight_dir}, "
        f"{len(classes)} classes\n"
        + "".join(f"Together with: {each.folder}, {each.architecture.kind.title}\n" for each in others)
        + f"Data: {len(dataset)} parcels of {dataset.folder}"
        + (f", until {dataset.until}" if dataset.until else "")
        + f"\n{describe_jury(jury, args.fold)}"
    )
    runs = [(jury, dataset), *(other.ready(dataset.folder, args.fold, device) for other in others)]
    keep_freed_memory()  # not before: reading a dataset frees much that predicting would not need again
    batch_size = args.batch_size or min(evaluation_batch(own.device) for _, own in runs)
    how = classes, batch_size, args.num_workers, device, telling
    batches = (
        predict(*runs[0], *how) if len(runs) == 1 else mean_of_runs([predict(*each, *how) for each in runs])
    )
    if not is_main():
        for _ in batches:
            pass
        return
    predictions = write_predictions(batches, output)
    predicted = predictions.predicted
    print(
        "\n".join(
            [
                *describe_scores(predictions),
                f"Predictions: {', '.join(str(output / name) for name in OUTPUTS)}",
                f"Areas: {write_areas(predictions, outlines, output)}",
            ]
        )
    )
    if (predictions.targets != UNKNOWN).any():
        print(f"Suspects: {write_suspects(output / TABLE, output) if jury.is_known else NO_SUSPECTS}")
    if args.attention:
        show_attention(ensemble, dataset, predicted, classes, telling.names, bands, args, device, output)
    if outlines is not None:
        picture, heading = args.map and Path(args.map), describe_dataset(dataset)
        tested = [] if run.is_bare else list(read_confusions(run.folder, len(classes)).values())
        confusion = sum(tested) if tested else None
        written = write_map(outlines, output / TABLE, output, picture, heading, confusion)
        print(f"Map: {', '.join(map(str, written))}")


def open_outlines(args: argparse.Namespace, run: Run) -> "GeoDataFrame | None":
    """The outlines that the flags ask for, checked; None if they ask for none."""
    if args.map:
        check_picture(args.map)
    if not args.map and not args.parcels:
        return None
    folder = args.dataset_folder
    if folder is None:
        folder = embedded_dataset() if run.is_bare else run.dataset_folder
    own = Path(folder) / "META" / OUTLINES
    if not args.parcels and not own.exists():
        raise UserError(f"--map needs outlines, and {own} does not exist; give a file of them in --parcels.")
    return read_outlines(args.parcels or own, args.id_column, read_own_ids(Path(folder)))


def choose_run(args: argparse.Namespace) -> Run:
    """The run in weight_dir, with the settings that the flags override."""
    run = open_run(args.weight_dir)
    typed, preset = typed_architecture(args), read_preset(args.preset)
    asked = [name for name in flags() if typed.get(name)]
    if run.is_bare:
        print(f"Configuration: {args.weight_dir} has no {CONFIG}, so published defaults and flags")
        run = published_run(run.folder, typed, preset)
        run = replace(run, data=replace(run.data, seed=args.rdm_seed))
    elif len(asked) == 1 and asked[0] != run.architecture.encoder:
        title = run.architecture.kind.title
        raise UserError(f"--{asked[0]}: {args.weight_dir} holds {title}; leave the flag out.")
    elif args.kfold:
        raise UserError(
            f"--kfold restores the folds of weights alone, but {args.weight_dir} has a {CONFIG}; leave it out."
        )
    if args.sub_classes and len(set(args.sub_classes)) < len(args.sub_classes):
        raise UserError("--sub_classes names a label twice; name as many labels as the model tells apart.")
    data = run.data
    if args.labels is not None:
        data = replace(data, labels=args.labels, labels_table=None)
    if args.labels_table is not None:
        data = replace(data, labels_table=LabelsTable(args.labels_table, args.id_column, args.label_column))
    if args.sub_classes:
        data = replace(data, classes=tuple(args.sub_classes))
    if hasattr(args, "npixel"):
        data = replace(data, npixel=args.npixel)
    if args.nodata is not None:
        data = replace(data, nodata=args.nodata, nodata_declared=False)
    if args.geomfeat is not None:
        if not run.is_bare and bool(args.geomfeat) != bool(data.n_extra):
            raise UserError(f"the model was trained on {data.n_extra} extra features; leave --geomfeat out.")
        data = replace(data, n_extra=args.geomfeat and max(1, data.n_extra))
    if args.norm is not None:
        data = replace(data, norm=None)
    if args.until is not None:
        data = replace(data, until=args.until)
    if data.until is not None and run.architecture.n_dates is not None:
        raise UserError(
            f"--until leaves dates out, but the model needs all {run.architecture.n_dates} of them; train one with "
            "--varying_dates."
        )
    if not run.is_bare and (preset or typed):
        run = replace(run, architecture=Architecture.from_dict(run.architecture.to_dict() | preset | typed))
    return replace(run, data=data)


def open_dataset(args: argparse.Namespace, run: Run) -> PixelSetData:
    """The dataset to predict, read as the run read its own; labels and classes are optional there."""
    folder = args.dataset_folder
    if folder is None and run.is_bare:
        folder = embedded_dataset()
        print(f"Dataset: the embedded simulated one, in {folder}; --dataset_folder chooses another")
    elif folder is None:
        folder = run.dataset_folder
        print(f"Dataset: the one that the run was trained on, {folder}; --dataset_folder chooses another")
    if (
        run.is_bare
        and args.geomfeat is None
        and not (Path(folder) / "META" / f"{EXTRA_FEATURE}.json").exists()
    ):
        run = replace(run, data=replace(run.data, n_extra=0))
    if args.labels_table is not None:
        run.data.labels_in(Path(folder))  # says if they are not there
    elif args.labels is not None:
        read_nomenclature(Path(folder), args.labels)
    dataset = run.open_dataset(folder, args.cache_dir, args.preload)
    days = run.architecture.date_positions
    if not run.is_bare and days is not None and dataset.date_positions != days:
        print(
            "Dates: not those of the training; the model takes each for the training's date of the same rank"
        )
    if run.data.norm is None:
        norm, source = find_norm(dataset, args.norm)
        dataset.set_norm(norm)
        print(f"Normalisation: {source}")
    return dataset


def choose_architecture(args: argparse.Namespace, run: Run, dataset: PixelSetData) -> Architecture:
    """The architecture of the run, where flags override it; of published defaults and flags for bare weights."""
    typed, data = typed_architecture(args), DataShape.of(dataset, len(run.data.classes))
    if run.is_bare or args.preset is not None:
        return resolve_architecture(typed, read_preset(args.preset), data)
    check_typed(typed, run.architecture.positions, data)
    if data.n_classes != run.architecture.n_classes:
        raise UserError(
            f"--sub_classes names {data.n_classes} labels but the model tells {run.architecture.n_classes} apart; leave it "
            "out or name as many."
        )
    return run.architecture


def show_attention(
    ensemble: Ensemble,
    dataset: PixelSetData,
    predicted: np.ndarray,
    classes: list[int | str],
    names: Mapping[str, str],
    bands: tuple[int, int] | None,
    args: argparse.Namespace,
    device: torch.device,
    output: Path,
) -> None:
    """Writes the mean attention of each true class or, where no label is known, of each predicted one."""
    known = (dataset.target != UNKNOWN).any()
    sampler = BatchSampler(range(len(dataset)), args.batch_size or evaluation_batch(dataset.device))
    loader = batch_loader(dataset, sampler, count_workers(args.num_workers), device)
    groups = dataset.target if known else predicted
    attention = mean_attention(ensemble, dataset, loader, groups, len(classes), bands, device)
    folds = list(choose_folds(args.weight_dir, args.fold or "all"))
    written = write_attention(output, attention, dataset, classes, names, folds)
    print(
        f"Attention by {'true' if known else 'predicted'} class: {written[0]}, {len(written) - 1} pictures in "
        f"{output / PICTURES}"
        + ("" if bands else "; no NDVI, since nothing tells its bands: give --ndvi_bands")
    )


if __name__ == "__main__":
    run_cli(together(main))
