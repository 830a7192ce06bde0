"""Trains a classifier by k-fold cross-validation and writes metrics, confusion matrices and weights per fold."""

import learning  # isort: skip  # noqa: F401  # before torch, see there

import argparse
import copy
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset import BatchSampler, PixelSetData, PixelSetData_preloaded, batch_loader, find_norm, fold_splits
from learning.draws import stream_key
from learning.engine import evaluation, train_epoch
from learning.errors import UserError, run_cli
from learning.files import write_json
from learning.focal_loss import FocalLoss
from learning.options import (
    EXTRA_FEATURE,
    LABELS,
    NPIXEL,
    Parser,
    add_architecture_options,
    add_data_options,
    build_model,
    choose_classes,
    non_negative,
    positive,
    read_preset,
    resolve_architecture,
    seed,
    typed_architecture,
)
from learning.plots import plot_confusion, plot_training
from learning.results import (
    CONFIG,
    TRAINLOG,
    fold_folder,
    prepare_folder,
    remove_folds,
    save_checkpoint,
    save_figure,
    save_normalisation,
    save_overall,
    save_test,
)
from learning.runtime import choose_device, count_workers, describe_device, keep_freed_memory, set_seeds
from learning.weight_init import weight_init
from models.weights import CHECKPOINT
from preprocessing.simulate import embedded_dataset


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(description=__doc__)
    add_data_options(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--res_dir", default="./results", help="results folder")
    group.add_argument(
        "--overwrite", action="store_true", help="replace the results of an earlier run in res_dir"
    )
    group.add_argument("--kfold", type=positive, default=5, help="number of folds, at least 3")
    group.add_argument("--epochs", type=positive, default=100, help="epochs per fold")
    group.add_argument("--lr", type=non_negative, default=0.001, help="learning rate of Adam")
    group.add_argument(
        "--gamma", type=non_negative, default=1.0, help="gamma of the focal loss; 0 is cross-entropy"
    )
    group.add_argument("--rdm_seed", type=seed, default=1, help="seed of the folds and of every random draw")
    group.add_argument(
        "--display_step", type=positive, default=50, help="batches between two looks at the loss"
    )
    add_architecture_options(parser)
    parser.set_defaults(labels=LABELS, npixel=NPIXEL)
    args = parser.parse_args()
    if args.batch_size < 2:
        raise UserError(
            "--batch_size is 1; training needs at least 2 parcels per batch for its batch statistics."
        )
    return args


def main() -> None:
    """Prepares data and model, trains every fold, and sums up."""
    args = parse_args()
    keep_freed_memory()
    device = choose_device(args.device)
    preset = read_preset(args.preset)
    res_dir = prepare_folder(args.res_dir, args.overwrite)
    print(f"Device: {describe_device(device)}")
    dataset, classes = open_dataset(args)
    splits = fold_splits(len(dataset), args.kfold, args.rdm_seed)
    architecture = resolve_architecture(
        typed_architecture(args), preset, dataset.n_channels, dataset.n_dates, dataset.n_extra, len(classes)
    )
    config = vars(args) | architecture | describe_dataset(dataset, classes)
    config["N_params"] = build_model(config, dataset.n_extra, dataset.date_positions).param_ratio()
    config["device"] = str(device)
    config["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    remove_folds(res_dir)
    write_json(res_dir / CONFIG, config)
    save_normalisation(res_dir, dataset.norm, dataset.extra_stats)

    if dataset.fits_on(device):
        dataset = dataset.to(device)
    clock = Clock(args.kfold * args.epochs)
    logs, tests = {}, []
    for fold, split in enumerate(splits, start=1):
        test, logs[fold] = train_fold(dataset, split, fold, config, device, fold_folder(res_dir, fold), clock)
        tests.append(test)
        save_figure(res_dir / "training_curves.png", plot_training(logs))
    summarise(res_dir, tests, classes, clock)


def open_dataset(args: argparse.Namespace) -> tuple[PixelSetData, list[int]]:
    """The dataset that the flags ask for, checked and normalised, and its classes."""
    folder = args.dataset_folder
    if folder is None:
        folder = embedded_dataset()
        print(f"Dataset: the embedded simulated one, in {folder}; --dataset_folder chooses another")
    every_label = PixelSetData(folder, args.labels, args.npixel, cache_dir=args.cache_dir)
    classes = choose_classes(every_label.target.tolist(), args.sub_classes)
    has_extra = (every_label.folder / "META" / f"{EXTRA_FEATURE}.json").exists()
    extra = EXTRA_FEATURE if args.geomfeat or (args.geomfeat is None and has_extra) else None
    kind = PixelSetData_preloaded if args.preload else PixelSetData
    dataset = kind(folder, args.labels, args.npixel, classes, extra_feature=extra, cache_dir=args.cache_dir)
    norm, source = find_norm(dataset, args.norm)
    dataset.set_norm(norm)
    print(
        f"Data: {len(dataset)} parcels, {dataset.n_dates} dates, {dataset.n_channels} channels, "
        f"{dataset.n_extra} extra features, {len(classes)} classes\nNormalisation: {source}"
    )
    return dataset, classes


def describe_dataset(dataset: PixelSetData, classes: list[int]) -> dict[str, Any]:
    """What inference has to know about the data that a model was trained on."""
    return {
        "dataset_folder": str(dataset.folder.resolve()),
        "geomfeat": int(dataset.n_extra > 0),
        "n_extra": dataset.n_extra,
        "sub_classes": classes,
        "date_positions": dataset.date_positions,
    }


def train_fold(
    dataset: PixelSetData,
    split: tuple[list[int], list[int], list[int]],
    fold: int,
    config: dict[str, Any],
    device: torch.device,
    folder: Path,
    clock: "Clock",
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """Trains on one fold, keeps the epoch with the best validation mIoU, and tests that one.

    Returns:
        The test metrics, and the log of the epochs.
    """
    seed, batch_size, n_classes = config["rdm_seed"], config["batch_size"], config["num_classes"]
    workers, pinned = count_workers(config["num_workers"]), device.type == "cuda"
    set_seeds(stream_key("weights", seed, fold) % 2**63)
    model = build_model(config, dataset.n_extra, dataset.date_positions).apply(weight_init).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
    criterion = FocalLoss(config["gamma"])
    train, val, test = split
    fixed = dataset.evaluation(seed)
    val_loader, test_loader = (
        batch_loader(fixed, BatchSampler(part, batch_size), workers, pinned) for part in (val, test)
    )
    log: dict[int, dict[str, float]] = {}
    best_epoch, best_weights = 0, {}
    for epoch in range(1, config["epochs"] + 1):
        name = f"Fold {fold}/{config['kfold']}  epoch {epoch}/{config['epochs']}"
        order = BatchSampler(train, batch_size, stream_key("order", seed, fold, epoch), drop_single=True)
        loader = batch_loader(dataset.epoch_draws(seed, fold, epoch), order, workers, pinned)
        log[epoch] = train_epoch(
            model, optimizer, criterion, loader, device, n_classes, config["display_step"], name
        )
        scores, _ = evaluation(model, criterion, val_loader, device, n_classes, "val", f"{name}  validation")
        log[epoch] |= scores
        write_json(folder / TRAINLOG, log)
        if best_epoch == 0 or scores["val_IoU"] >= log[best_epoch]["val_IoU"]:
            best_epoch, best_weights = epoch, copy.deepcopy(model.state_dict())
            save_checkpoint(folder / CHECKPOINT, epoch, best_weights, optimizer.state_dict())
        star = " *best" if best_epoch == epoch else ""
        print(f"{name}  {format_scores(log[epoch])}{star} | {clock.lap(len(train) + len(val))}", flush=True)
    model.load_state_dict(best_weights)
    metrics, confusion = evaluation(model, criterion, test_loader, device, n_classes, "test", "test")
    save_test(folder, metrics, confusion)
    print(
        f"Fold {fold}/{config['kfold']}  test of epoch {best_epoch}: accuracy {metrics['test_accuracy']:.1f}%, "
        f"mIoU {metrics['test_IoU']:.3f}, loss {metrics['test_loss']:.3f}",
        flush=True,
    )
    return metrics, log


def format_scores(scores: dict[str, float]) -> str:
    """Training and validation scores of an epoch in one line."""
    parts = (("train", "train"), ("val", "val"))
    return " | ".join(
        f"{name} loss {scores[f'{key}_loss']:.3f} acc {scores[f'{key}_accuracy']:.1f}% mIoU {scores[f'{key}_IoU']:.3f}"
        for key, name in parts
    )


def summarise(res_dir: Path, tests: list[dict[str, float]], classes: list[int], clock: "Clock") -> None:
    """Writes the scores of all folds together and says where everything is."""
    confusion, overall = save_overall(res_dir, len(tests))
    scores = f"accuracy {100 * overall['Accuracy']:.1f}%, mIoU {overall['MACRO_IoU']:.3f}"
    save_figure(
        res_dir / "confusion_matrix.png",
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
        f"Pictures: {res_dir / 'training_curves.png'}, {res_dir / 'confusion_matrix.png'}"
    )


class Clock:
    """Tells rate and time left of a run of n_epochs, over all folds."""

    def __init__(self, n_epochs: int) -> None:
        self.n_epochs, self.done = n_epochs, 0
        self.start = self.last = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def lap(self, n_parcels: int) -> str:
        """Counts an epoch over n_parcels and puts its duration, its rate and the time left into words."""
        now = time.monotonic()
        seconds, self.last, self.done = now - self.last, now, self.done + 1
        left = (now - self.start) / self.done * (self.n_epochs - self.done)
        return f"{format_time(seconds)}, {n_parcels / seconds:,.0f} parcels/s, {format_time(left)} left"


def format_time(seconds: float) -> str:
    """A duration in the unit that suits it."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    run_cli(main)
