"""Trains a classifier by k-fold cross-validation and writes metrics, confusion matrices and weights per fold."""

import common  # isort: skip  # noqa: F401  # before torch, see there

import argparse
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, run_cli
from common.flags import Parser, fraction, natural, non_negative, parse_month_day, positive, seed
from common.machine import describe_device, keep_freed_memory
from common.processes import is_main, join_ranks, n_ranks, together
from common.progress import Clock, format_time
from data.classes import read_class_names
from data.folds import choose_splits, describe_splits, read_splits
from data.loader import check_batch
from data.metadata import read_info
from data.parts import Parts, data_key, fingerprints
from data.prepare import AUGMENTATIONS
from dataset import PixelSetData
from learning.checkpoints import Log, begin_run, check_typed_settings, resumable
from learning.crossvalidation import Machine, train_folds
from learning.engine import OPTIMIZERS, SCHEDULES
from learning.focal_loss import LOSSES
from learning.options import (
    add_architecture_options,
    add_data_options,
    check_sizes,
    resolve_architecture,
    resolve_data,
    typed_architecture,
)
from learning.results import CONFIG, prepare_folder, save_overall
from learning.run import Run, Training
from models.architecture import DataShape, read_preset
from preprocessing.simulate import embedded_dataset
from reports.plots import plot_confusion, plot_training, save_figure
from reports.report import write_report

CURVES, MATRIX = "training_curves.png", "confusion_matrix.png"


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(description=__doc__)
    add_data_options(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--res_dir", default="./results", help="results folder")
    earlier = group.add_mutually_exclusive_group()
    earlier.add_argument(
        "--overwrite", action="store_true", help="replace the results of an earlier run in res_dir"
    )
    earlier.add_argument(
        "--resume",
        action="store_true",
        help="go on after the last finished epoch of a run in res_dir, if there is one",
    )
    group.add_argument("--kfold", type=positive, help="number of folds, at least 3")
    group.add_argument(
        "--folds",
        help="file of folds, as preprocessing.split writes it, instead of random ones; wins over --kfold",
    )
    group.add_argument("--epochs", type=positive, help="epochs per fold")
    group.add_argument("--lr", type=non_negative, help="learning rate of Adam")
    group.add_argument("--gamma", type=non_negative, help="gamma of the focal loss; 0 is cross-entropy")
    for name, table in (("loss", LOSSES), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        group.add_argument(f"--{name}", choices=list(table), help="see docs/extending.md for others")
    group.add_argument(
        "--varying_dates",
        action="store_true",
        help="a model for any dates, even if all parcels share theirs; used anyway where parcels have dates of their own "
        "or observations are missing",
    )
    group.add_argument(
        "--season_start",
        type=parse_month_day,
        help="count days from this day of the year, as 10-01, which makes years comparable; without it from the first "
        "date of the dataset. Implies --varying_dates, as do the next three",
    )
    group.add_argument(
        "--temporal_dropout",
        type=fraction,
        help="share of the dates left out at random in training",
    )
    group.add_argument(
        "--temporal_truncation",
        type=fraction,
        help="share of the parcels, drawn anew in every epoch, whose series ends at one of its dates at random in training: for "
        "predictions from the beginning of a season on",
    )
    group.add_argument(
        "--temporal_shift",
        type=natural,
        help="days, at most, by which a parcel's calendar is moved at random in training",
    )
    group.add_argument("--rdm_seed", type=seed, default=1, help="seed of the folds and of every random draw")
    group.add_argument(
        "--display_step", type=positive, default=50, help="batches between two looks at the loss"
    )
    group.add_argument(
        "--cuda_graph",
        action="store_true",
        help="let a GPU that holds the pixels repeat training steps by itself; no influence on results",
    )
    group = parser.add_argument_group(
        "beyond the paper", "off without the flag; see docs/results.md for what it gains"
    )
    group.add_argument(
        "--average_weights",
        type=fraction,
        help="share of the epochs, the last ones, whose mean weights are kept instead of those of the best epoch; 0.25 was tried",
    )
    group.add_argument(
        "--train_on_validation",
        type=fraction,
        help="share of the validation parcels of each fold, drawn at random, that are trained on too; the others still choose "
        "the epoch and the temperature; 0.8 was tried",
    )
    add_architecture_options(parser)
    parser.set_defaults(npixel=None, **asdict(Training()))
    args = parser.parse_args()
    if args.folds:
        args.kfold = len(read_splits(args.folds))
    if not args.folds and args.kfold < 3:
        raise UserError(
            f"--kfold is {args.kfold}; at least 3 are needed, one part each for training, validation and test."
        )
    check_sizes(typed_architecture(args), read_preset(args.preset))
    if args.batch_size < 2:
        raise UserError(
            "--batch_size is 1; training needs at least 2 parcels per batch for its batch statistics."
        )
    return args


def main() -> None:
    """Prepares data and model, trains every fold, and sums up."""
    args = parse_args()
    device = join_ranks(args.device, args.tf32)
    preset = read_preset(args.preset)
    res_dir = Path(args.res_dir)
    if is_main():
        prepare_folder(res_dir, args.overwrite, args.resume)
        if args.resume and (res_dir / CONFIG).exists():
            check_typed_settings(res_dir, args)
    processes = f", {n_ranks()} processes" if n_ranks() > 1 else ""
    print(f"Device: {describe_device(device)}{processes}")
    dataset, settings, source = resolve_data(args, find_folder(args.dataset_folder))
    check_batch(dataset, args.batch_size)
    print(
        f"Data: {len(dataset)} parcels, {describe_dates(dataset)}, {dataset.n_channels} channels, "
        f"{dataset.n_extra} extra features, {len(settings.classes)} classes\nNormalisation: {source}"
    )
    others = len(dataset.store.ids) - len(dataset) - dataset.n_unlabelled - dataset.n_unobserved
    for number, what in ((dataset.n_unlabelled, "without a label"), (others, "of other classes")):
        if number:
            print(f"Left out: {number} parcels {what}, which inference predicts")
    if dataset.n_unobserved:
        print(f"Left out: {dataset.n_unobserved} parcels without any observation")
    splits = choose_splits(dataset, args.folds, args.kfold, args.rdm_seed, args.train_on_validation)
    class_names = read_class_names(dataset.folder, settings.labels)
    names = [class_names.get(str(label), str(label)) for label in settings.classes]
    notes = describe_splits(splits, dataset.target, names)
    for line in notes:
        print(line)
    data = DataShape.of(dataset, len(settings.classes))
    architecture = resolve_architecture(typed_architecture(args), preset, data)
    about = vars(args) | {
        "dataset_folder": str(dataset.folder.resolve()),
        "geomfeat": int(dataset.n_extra > 0),
        "varying_dates": dataset.varying,
        "augmentations": [function.__name__ for function in AUGMENTATIONS],
        "N_params": architecture.build().param_ratio(),
        "data_key": data_key(dataset.pid, dataset.target, splits),
        "class_names": class_names,
        "notes": notes,
        "simulated": bool(read_info(dataset.folder).get("simulated")),
        "command": shlex.join(["python", "train.py", *sys.argv[1:]]),
        "device": str(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
    run = Run(res_dir, settings, architecture, Training.from_config(vars(args)), about)
    with resumable(res_dir):
        if is_main():
            season = settings.season_start, settings.until
            marks = fingerprints(dataset.folder, dataset.pid, dataset.store, *season)
            begin_run(run, Parts.of(marks, splits), args.resume)
        keep_freed_memory()  # not before: reading a dataset frees much that training would not need again
        machine = Machine(device, args.num_workers, args.display_step, args.cuda_graph)
        tests, clock = train_folds(dataset, splits, run, machine, draw_curves(res_dir))
        if is_main():
            summarise(run, tests, clock)


def find_folder(named: str | None) -> Path:
    """The dataset folder that is named, else the embedded simulated one."""
    if named is not None:
        return Path(named)
    folder = embedded_dataset()
    print(f"Dataset: the embedded simulated one, in {folder}; --dataset_folder chooses another")
    return folder


def draw_curves(res_dir: Path) -> Callable[[dict[int, Log]], None]:
    """What draws the curves of the folds so far."""
    return lambda logs: save_figure(res_dir / CURVES, plot_training(logs))


def describe_dates(dataset: PixelSetData) -> str:
    """The number of dates in words."""
    least = int(dataset.store.dates.min())
    number = str(dataset.n_dates) if least == dataset.n_dates else f"{least} to {dataset.n_dates}"
    until = f" of which those until {dataset.until} are used" if dataset.until else ""
    return f"{number} {'varying ' if dataset.varying else ''}dates{until}"


def summarise(run: Run, tests: list[dict[str, float]], clock: Clock) -> None:
    """Writes the scores of all folds together and says where everything is."""
    res_dir = run.folder
    confusion, overall = save_overall(res_dir, len(tests))
    scores = f"accuracy {100 * overall['Accuracy']:.1f}%, mIoU {overall['MACRO_IoU']:.3f}"
    save_figure(
        res_dir / MATRIX,
        plot_confusion(
            confusion, run.data.classes, f"All {len(tests)} test folds: {scores}", run.class_names
        ),
    )
    spread = "; ".join(
        f"{name} {np.mean(values):.{digits}f} +- {np.std(values):.{digits}f}"
        for name, key, digits in (("accuracy", "test_accuracy", 1), ("mIoU", "test_IoU", 3))
        for values in [[test[key] for test in tests]]
    )
    print(
        f"All folds together: {scores} (mean and deviation over folds: {spread}), after {format_time(clock.elapsed())}\n"
        f"Results: {res_dir} (overall.json, per_class.json, Fold_k/)\n"
        f"Pictures: {res_dir / CURVES}, {res_dir / MATRIX}"
    )
    print(f"Report: {write_report(res_dir)}")


if __name__ == "__main__":
    run_cli(together(main))
