"""Trains a classifier by k-fold cross-validation and writes metrics, confusion matrices and weights per fold."""

import common  # isort: skip  # noqa: F401  # before torch, see there

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, run_cli
from common.files import remove_unfinished, write_json
from common.flags import Parser, fraction, natural, non_negative, parse_month_day, positive, seed
from common.machine import count_workers, describe_device, keep_freed_memory, set_seeds
from common.processes import is_main, main_first, n_ranks, rank
from common.progress import Clock, format_scores, format_time
from data.classes import read_class_names
from data.draws import stream_key
from data.folds import fold_splits, read_folds, read_parts
from data.metadata import choose_nomenclature, read_info, read_units
from data.samplers import BatchSampler
from data.settings import EXTRA_FEATURE, LABELS, NPIXEL, DataSettings
from data.store import check_folder
from dataset import PixelSetData, PixelSetData_preloaded, batch_loader, find_norm
from learning.calibration import CALIBRATION, Calibration
from learning.checkpoints import (
    FoldProgress,
    Log,
    check_same_settings,
    check_typed_settings,
    data_key,
    finished_folds,
    resumable,
)
from learning.distributed import RankBatches, join_ranks, together
from learning.engine import evaluation, train_epoch
from learning.focal_loss import FocalLoss
from learning.options import (
    DataShape,
    add_architecture_options,
    add_data_options,
    choose_classes,
    resolve_architecture,
    typed_architecture,
)
from learning.results import (
    CONFIG,
    fold_folder,
    prepare_folder,
    remove_results,
    save_normalisation,
    save_overall,
    save_test,
)
from learning.run import Run, Training
from learning.weight_init import freeze_idle_biases, weight_init
from models.architecture import read_preset
from models.batchnorm import share_statistics
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
        "date of the dataset. Implies --varying_dates, as do the next two",
    )
    group.add_argument(
        "--temporal_dropout",
        type=fraction,
        help="share of the dates left out at random in training",
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
    add_architecture_options(parser)
    parser.set_defaults(npixel=None, **asdict(Training()))
    args = parser.parse_args()
    if args.folds:
        args.kfold = len(read_parts(args.folds))
    if args.batch_size < 2:
        raise UserError(
            "--batch_size is 1; training needs at least 2 parcels per batch for its batch statistics."
        )
    return args


def main() -> None:
    """Prepares data and model, trains every fold, and sums up."""
    args = parse_args()
    keep_freed_memory()
    device = join_ranks(args.device)
    preset = read_preset(args.preset)
    res_dir = Path(args.res_dir)
    if is_main():
        prepare_folder(res_dir, args.overwrite, args.resume)
        if args.resume and (res_dir / CONFIG).exists():
            check_typed_settings(res_dir, args)
    processes = f", {n_ranks()} processes" if n_ranks() > 1 else ""
    print(f"Device: {describe_device(device)}{processes}")
    with main_first():
        dataset, settings = open_dataset(args)
    if args.folds:
        splits = read_folds(args.folds, dataset.pid, dataset.store.ids.tolist())
    else:
        splits = fold_splits(len(dataset), args.kfold, args.rdm_seed)
    data = DataShape.of(dataset, len(settings.classes))
    architecture = resolve_architecture(typed_architecture(args), preset, data)
    about = vars(args) | {
        "dataset_folder": str(dataset.folder.resolve()),
        "geomfeat": int(dataset.n_extra > 0),
        "varying_dates": dataset.varying,
        "N_params": architecture.build().param_ratio(),
        "data_key": data_key(dataset, splits),
        "class_names": read_class_names(dataset.folder, settings.labels),
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
            begin_run(run, args.resume)
        train_folds(dataset, splits, run, device)


def begin_run(run: Run, resume: bool) -> None:
    """Makes the results folder ready for a new run, or for an earlier one to go on if that is the same."""
    remove_unfinished(run.folder)
    if resume and (run.folder / CONFIG).exists():
        check_same_settings(run)
        return
    remove_results(run.folder)
    save_normalisation(run.folder, run.data.norm, run.data.extra_stats)
    write_json(run.folder / CONFIG, run.to_config())


def train_folds(
    dataset: PixelSetData,
    splits: Sequence[tuple[list[int], list[int], list[int]]],
    run: Run,
    device: torch.device,
) -> None:
    """Trains on the folds that are not finished, and sums up all of them."""
    res_dir = run.folder
    if dataset.fits_on(device):
        dataset = dataset.to(device)
    finished = finished_folds(res_dir, len(splits))
    fewest = min(run.training.batch_size, *(len(train) for train, _, _ in splits))
    if fewest < n_ranks():
        raise UserError(
            f"there are {n_ranks()} processes for batches of {fewest} parcels; start fewer processes."
        )
    clock = Clock((len(splits) - len(finished)) * run.training.epochs)
    if finished:
        print(f"Resuming: {len(finished)} of {len(splits)} folds are finished")
    tests = [test for test, _ in finished]
    logs: dict[int, Log] = {fold: log for fold, (_, log) in enumerate(finished, start=1)}
    for fold, split in list(enumerate(splits, start=1))[len(finished) :]:
        test, logs[fold] = train_fold(dataset, split, fold, run, device, clock)
        tests.append(test)
        if is_main():
            save_figure(res_dir / CURVES, plot_training(logs))
    if is_main():
        if len(finished) == len(splits):  # the process that finished the last one may have been killed before
            save_figure(res_dir / CURVES, plot_training(logs))
        summarise(res_dir, tests, run.data.classes, clock)


def open_dataset(args: argparse.Namespace) -> tuple[PixelSetData, DataSettings]:
    """The dataset that the flags ask for, checked and normalised, and how it is read."""
    folder = args.dataset_folder
    if folder is None:
        folder = embedded_dataset()
        print(f"Dataset: the embedded simulated one, in {folder}; --dataset_folder chooses another")
    folder = Path(folder)
    check_folder(folder)
    labels = choose_nomenclature(folder, args.labels, LABELS)
    asked = DataSettings(
        labels=labels,
        n_extra=0,
        nodata=args.nodata,
        season_start=args.season_start,
        varying=bool(args.varying_dates or args.season_start or args.temporal_dropout or args.temporal_shift),
        seed=args.rdm_seed,
    )
    every_label = PixelSetData(
        folder,
        labels,
        NPIXEL,
        cache_dir=args.cache_dir,
        nodata=asked.nodata_in(folder),
        season_start=args.season_start,
    )
    names = every_label.classes
    present = [names[i] for i in every_label.target] if names else every_label.target.tolist()
    has_extra = (folder / "META" / f"{EXTRA_FEATURE}.json").exists()
    settings = replace(
        asked,
        classes=tuple(choose_classes(present, args.sub_classes)),
        npixel=args.npixel or min(NPIXEL, int(every_label.store.sizes.max())),
        n_extra=int(args.geomfeat or (args.geomfeat is None and has_extra)),
    )
    dataset = (PixelSetData_preloaded if args.preload else PixelSetData).for_run(
        folder,
        settings,
        cache_dir=args.cache_dir,
        temporal_dropout=args.temporal_dropout,
        temporal_shift=args.temporal_shift,
    )
    norm, source = find_norm(dataset, args.norm)
    dataset.set_norm(norm)
    print(
        f"Data: {len(dataset)} parcels, {describe_dates(dataset)}, {dataset.n_channels} channels, "
        f"{dataset.n_extra} extra features, {len(settings.classes)} classes\nNormalisation: {source}"
    )
    if dataset.n_unobserved:
        print(f"Left out: {dataset.n_unobserved} parcels without any observation")
    return dataset, replace(
        settings,
        n_extra=dataset.n_extra,
        nodata=dataset.store.nodata,
        nodata_declared=args.nodata is None and dataset.store.nodata is not None,
        units=read_units(dataset.folder),
        varying=dataset.varying,
        norm=dataset.norm,
        extra_stats=dataset.extra_stats,
    )


def describe_dates(dataset: PixelSetData) -> str:
    """The number of dates in words."""
    least = int(dataset.store.dates.min())
    number = str(dataset.n_dates) if least == dataset.n_dates else f"{least} to {dataset.n_dates}"
    return f"{number} {'varying ' if dataset.varying else ''}dates"


def train_fold(
    dataset: PixelSetData,
    split: tuple[list[int], list[int], list[int]],
    fold: int,
    run: Run,
    device: torch.device,
    clock: Clock,
) -> tuple[dict[str, float], Log]:
    """Trains on one fold, keeps the epoch with the best validation mIoU, and tests that one.

    Goes on after the last finished epoch, if there is one in the fold's folder.

    Returns:
        The test metrics, and the log of the epochs.
    """
    training, seed, n_classes = run.training, run.data.seed, run.architecture.n_classes
    folder, batch_size = fold_folder(run.folder, fold), training.batch_size
    workers, pinned = count_workers(run.about["num_workers"]), device.type == "cuda"
    set_seeds(stream_key("weights", seed, fold) % 2**63)
    model = run.architecture.build().apply(weight_init).to(device)
    freeze_idle_biases(model)
    if n_ranks() > 1:
        share_statistics(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=training.lr, fused=True)
    criterion = FocalLoss(training.gamma)
    train, val, test = split
    fixed = dataset.evaluation(seed)
    val_loader, test_loader = (
        batch_loader(fixed, RankBatches(BatchSampler(part, batch_size), divide=False), workers, pinned)
        for part in (val, test)
    )
    progress = FoldProgress(folder, model, optimizer)
    if progress.epoch:
        clock.skip(progress.epoch)
        print(f"Resuming: fold {fold} after epoch {progress.epoch}")
    for epoch in range(progress.epoch + 1, training.epochs + 1):
        dataset.store.check_unchanged()
        set_seeds(stream_key("dropout", seed, fold, epoch, rank()) % 2**63)
        name = f"Fold {fold}/{training.kfold}  epoch {epoch}/{training.epochs}"
        order = BatchSampler(train, batch_size, stream_key("order", seed, fold, epoch), drop_single=True)
        loader = batch_loader(
            dataset.epoch_draws(seed, fold, epoch), RankBatches(order, divide=True), workers, pinned
        )
        scores = train_epoch(
            model, optimizer, criterion, loader, device, n_classes, run.about["display_step"], name
        )
        scores |= evaluation(model, criterion, val_loader, device, n_classes, "val", f"{name}  validation")[0]
        star = " *best" if progress.finish_epoch(scores) else ""
        print(f"{name}  {format_scores(scores)}{star} | {clock.lap(len(train) + len(val))}", flush=True)
    progress.load_best()
    calibration = Calibration(device)
    metrics, confusion = evaluation(
        model, criterion, test_loader, device, n_classes, "test", "test", calibration
    )
    if is_main():
        save_test(folder, metrics, confusion)
        write_json(folder / CALIBRATION, calibration.summary())
    progress.close()
    print(
        f"Fold {fold}/{training.kfold}  test of epoch {progress.best_epoch}: accuracy {metrics['test_accuracy']:.1f}%, "
        f"mIoU {metrics['test_IoU']:.3f}, loss {metrics['test_loss']:.3f}",
        flush=True,
    )
    return metrics, progress.log


def summarise(
    res_dir: Path, tests: list[dict[str, float]], classes: Sequence[int | str], clock: Clock
) -> None:
    """Writes the scores of all folds together and says where everything is."""
    confusion, overall = save_overall(res_dir, len(tests))
    scores = f"accuracy {100 * overall['Accuracy']:.1f}%, mIoU {overall['MACRO_IoU']:.3f}"
    save_figure(
        res_dir / MATRIX,
        plot_confusion(confusion, classes, f"All {len(tests)} test folds: {scores}"),
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
