"""What changes of the paper's recipe gain: L-TAE, first fold, paired seeds, chosen on validation, reported on test.

python -m benchmarks.what_helps --dataset_folder D --epochs 40 --res_file gains.json

For each seed every recipe gets the same folds, first weights and order of parcels. The table has its gain over the
paper's recipe, as mean and standard error over seeds. The same command goes on where it was stopped. Flags on data are
those of train.py. What has no flag there is put in its tables here, as docs/extending.md shows.
"""

import common  # isort: skip  # noqa: F401  # before torch, see there

import argparse
import copy
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from torch.optim.swa_utils import AveragedModel, update_bn

from benchmarks.baselines import fold_parser, open_data
from common.errors import UserError, run_cli
from common.files import read_json, write_json
from common.flags import positive
from common.machine import keep_freed_memory
from common.progress import progress_bar
from data.folds import Split, choose_splits
from data.parts import data_key
from dataset import PixelSetData
from learning.crossvalidation import Machine, begin_epoch, held_out_batches, new_model
from learning.engine import OPTIMIZERS, SCHEDULES, evaluation, train_epoch
from learning.focal_loss import LOSSES, FocalLoss
from learning.options import resolve_architecture
from learning.run import Run, Training
from models.architecture import DataShape

# By name, what differs from the paper's recipe: flags of train.py, and the share of the pixel-set encoder's output that is
# dropped.
TRAININGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "decay": {"optimizer": "adamw"},
    "cosine": {"schedule": "cosine"},
    "smoothing": {"loss": "smoothed"},
    "class weights": {"loss": "weighted"},
    "dropout": {"dropout": 0.1},
    "mean": {"pooling": "mean"},
    "augmentation": {"temporal_dropout": 0.2, "temporal_shift": 10},
    "validation": {"train_on_validation": 0.8},
}
# Lines of the table: a training, and which of its weights are tested.
ROWS = {
    "the paper's recipe": ("paper", "best"),
    "last instead of best epoch": ("paper", "last"),
    "mean of the weights of the last quarter of the epochs": ("paper", "averaged"),
    "weight decay (AdamW, 0.1)": ("decay", "best"),
    "cosine schedule": ("cosine", "best"),
    "cosine schedule, last epoch": ("cosine", "last"),
    "label smoothing 0.1": ("smoothing", "best"),
    "class weights, one over root of frequency": ("class weights", "best"),
    "dropout 0.1 after the pixel-set encoder": ("dropout", "best"),
    "--pooling mean": ("mean", "best"),
    "--temporal_dropout 0.2 --temporal_shift 10": ("augmentation", "best"),
    "--train_on_validation 0.8": ("validation", "best"),
    "the same, and the mean of the weights as above": ("validation", "averaged"),
}
PAPER = next(iter(ROWS))
CPU = torch.device("cpu")

Scores = dict[str, tuple[float, float]]  # accuracy in percent and mIoU in 0..1, by which weights are tested


class SmoothedFocalLoss(FocalLoss):
    """The focal loss against 0.9 for the true class and 0.1 shared out among all."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """As that of `FocalLoss`, of logits (B, K)."""
        p = (-cross_entropy(input.detach(), target, reduction="none")).exp()
        smoothed = cross_entropy(input, target, reduction="none", label_smoothing=0.1)
        return ((1 - p) ** self.gamma * smoothed).mean()


def class_weights(targets: np.ndarray, n_classes: int) -> Tensor:
    """One over the root of the number of parcels of each class, (K,), scaled to a mean of 1 over the parcels."""
    counts = np.bincount(targets, minlength=n_classes)
    weights = 1 / np.sqrt(np.maximum(counts, 1))
    return torch.from_numpy(weights * counts.sum() / (weights * counts).sum()).float()


def register(targets: np.ndarray, n_classes: int) -> None:
    """Puts what `TRAININGS` names in the tables; `targets` are the classes of the training parcels, (N,)."""
    weights = class_weights(targets, n_classes)
    LOSSES["smoothed"] = SmoothedFocalLoss
    LOSSES["weighted"] = lambda gamma: FocalLoss(gamma, weights)
    OPTIMIZERS["adamw"] = partial(torch.optim.AdamW, weight_decay=0.1, fused=True)
    SCHEDULES["cosine"] = lambda epoch, epochs: (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


def drop_in_pse(model: nn.Module, share: float) -> None:
    """Drops a share of what the pixel-set encoder gives, in training."""
    model.spatial_encoder.register_forward_hook(
        lambda module, _, output: dropout(output, share, module.training)
    )


def train_first_fold(
    dataset: PixelSetData, split: Split, run: Run, dropped: float, machine: Machine, name: str
) -> Scores:
    """Trains as `learning.crossvalidation.train_fold` does, and tests the best, the last and the averaged weights.

    Args:
        dataset: normalised.
        split: indices of training, validation and test parcels.
        run: settings.
        dropped: see `drop_in_pse`.
        machine: the CPU, and most loading processes.
        name: what the progress bar says.
    """
    training, n_classes = run.training, run.architecture.n_classes
    model = new_model(run, 1, CPU)
    if dropped:
        drop_in_pse(model, dropped)
    optimizer = OPTIMIZERS[training.optimizer](model.parameters(), training.lr)
    criterion, averaged, best = LOSSES[training.loss](training.gamma), AveragedModel(model), (-1.0, {})
    val, test = held_out_batches(dataset, split, run, machine)
    draws = dataset.epoch_draws(run.data.seed, 1, 0)
    for epoch in progress_bar(range(1, training.epochs + 1), name, "epochs"):
        loader = begin_epoch(draws, optimizer, split[0], run, 1, epoch, machine)
        train_epoch(model, optimizer, criterion, loader, CPU, n_classes, name="")
        score = evaluation(model, criterion, val, CPU, n_classes, name="")[0]["val_IoU"]
        if score >= best[0]:
            best = score, copy.deepcopy(model.state_dict())
        if epoch > 0.75 * training.epochs:
            averaged.update_parameters(model)

    def tested(model: nn.Module) -> tuple[float, float]:
        found = evaluation(model, criterion, test, CPU, n_classes, "test", name="")[0]
        return found["test_accuracy"], found["test_IoU"]

    last = tested(model)
    update_bn(loader, averaged)
    model.load_state_dict(best[1])
    return {"best": tested(model), "last": last, "averaged": tested(averaged)}


def make_run(args: argparse.Namespace, seed: int, changes: dict[str, Any]) -> tuple[PixelSetData, Run]:
    """The dataset and the settings of a training that differs in some of `TRAININGS`."""
    args = argparse.Namespace(**vars(args) | changes | {"rdm_seed": seed})
    dataset, settings = open_data(args)
    sizes = {name: value for name, value in changes.items() if name == "pooling"}
    architecture = resolve_architecture(sizes, {}, DataShape.of(dataset, len(settings.classes)))
    return dataset, Run(Path(), settings, architecture, Training.from_config(vars(args)))


def describe_task(args: argparse.Namespace, dataset: PixelSetData, run: Run) -> dict[str, Any]:
    """What the scores of a file must have in common."""
    splits = choose_splits(dataset, args.folds, args.kfold, 1)
    words = {name: value for name, value in run.to_config().items() if name not in ("rdm_seed", "N_params")}
    return json.loads(
        json.dumps({"parcels and folds": data_key(dataset.pid, dataset.target, splits)} | words)
    )


def take_up(file: Path, task: dict[str, Any]) -> dict[str, Any]:
    """The scores so far, {"task": ..., "scores": {seed: {training: ...}}}.

    Raises:
        UserError: if the file is of another task, or something else.
    """
    if not file.exists():
        return {"task": task, "scores": {}}
    results = read_json(file, "scores that this command wrote")
    if not isinstance(results, dict) or results.keys() != {"task", "scores"}:
        raise UserError(f"{file} is something else; expected scores that this command wrote.")
    for name, value in task.items():
        if (earlier := results["task"].get(name)) != value:
            raise UserError(
                f"{file} has scores of another task, where {name} was {earlier}, not {value}; choose another --res_file."
            )
    return results


def format_table(results: dict[str, dict[str, Scores]]) -> str:
    """The table of the scores by seed and training, in Markdown; a line has the seeds that its training has."""
    lines = ["| | seeds | accuracy | mIoU |", "|---|---:|---:|---:|"]
    for row, (name, weights) in ROWS.items():
        seeds = [seed for seed, found in results.items() if {name, "paper"} <= found.keys()]
        scores = np.array([results[seed][name][weights] for seed in seeds]).reshape(-1, 2)
        if row != PAPER:
            scores = scores - np.array([results[seed]["paper"]["best"] for seed in seeds]).reshape(-1, 2)
        if not seeds:
            continue
        sign = "" if row == PAPER else "+"
        cells = [f"{mean:{sign}.{digits}f}" for mean, digits in zip(scores.mean(0), (2, 4))]
        if len(seeds) > 1:
            errors = scores.std(0, ddof=1) / math.sqrt(len(seeds))
            cells = [f"{cell} +- {e:.{digits}f}" for cell, e, digits in zip(cells, errors, (2, 4))]
        lines.append(f"| {row} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Trains what the file of results lacks, then prints the table."""
    parser = fold_parser(__doc__.splitlines()[0], seeds=5)
    parser.add_argument("--res_file", default="what_helps.json", help="file of the scores, which is taken up")
    parser.add_argument("--epochs", type=positive, default=Training.epochs, help="of a training")
    parser.add_argument("--only", nargs="+", choices=list(TRAININGS), default=list(TRAININGS), metavar="NAME",
                        help=f"trainings, of {', '.join(TRAININGS)}")  # fmt: skip
    parser.set_defaults(batch_size=Training.batch_size)
    args = parser.parse_args(words)
    keep_freed_memory()
    machine, file = Machine(CPU, args.num_workers), Path(args.res_file)
    dataset, run = make_run(args, args.rdm_seed, {})
    results = take_up(file, describe_task(args, dataset, run))
    for seed in range(args.rdm_seed, args.rdm_seed + args.seeds):
        found = results["scores"].setdefault(str(seed), {})
        for name in (name for name in dict.fromkeys(["paper", *args.only]) if name not in found):
            dataset, run = make_run(args, seed, TRAININGS[name])
            moved = run.training.train_on_validation
            split = choose_splits(dataset, args.folds, args.kfold, seed, moved)[0]
            register(dataset.target[split[0]], run.architecture.n_classes)
            dropped = TRAININGS[name].get("dropout", 0.0)
            found[name] = train_first_fold(dataset, split, run, dropped, machine, f"{name}, seed {seed}")
            write_json(file, results)
    print(format_table(results["scores"]))


if __name__ == "__main__":
    run_cli(main)
