"""Cross-validation: every fold is trained, its best epoch or a mean of the last ones kept, calibrated and tested."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from common.errors import UserError
from common.files import write_bytes, write_json
from common.machine import count_workers, set_seeds
from common.processes import is_main, n_ranks, rank
from common.progress import Clock, format_scores
from data.draws import stream_key
from data.folds import Split
from data.loader import Loader
from data.samplers import BatchSampler, RankBatches, evaluation_batch
from dataset import PixelSetData, batch_loader
from learning.calibration import CALIBRATION, SCORES, Calibration, Logits, fit_temperature, validation_scores
from learning.checkpoints import FoldProgress, Log, finished_folds
from learning.engine import OPTIMIZERS, SCHEDULES, ReplayedSteps, evaluation, train_epoch
from learning.focal_loss import LOSSES
from learning.results import fold_folder, save_test, to_npy
from learning.run import Run
from learning.weight_init import freeze_idle_biases, weight_init
from models.batchnorm import share_statistics


class Machine(NamedTuple):
    """What a training uses that has no influence on its results.

    Attributes:
        device: where it computes.
        num_workers: most loading processes.
        display_step: batches between two looks at the loss.
        cuda_graph: whether a GPU shall repeat training steps by itself, where it can.
    """

    device: torch.device
    num_workers: int = 0
    display_step: int = 50
    cuda_graph: bool = False

    @property
    def workers(self) -> int:
        """Loading processes to use."""
        return count_workers(self.num_workers)

    def graph_obstacle(self, dataset: PixelSetData) -> str | None:
        """Why training steps cannot be replayed; None if they can."""
        if self.device.type != "cuda":
            return "there is no GPU"
        if n_ranks() > 1:
            return "several processes train together"
        if dataset.device.type != "cuda":
            return "dates vary, or the GPU has no room for the pixels"
        if dataset.augment:
            return "nothing tells whether an augmentation of one's own can be captured"
        return None


def train_folds(
    dataset: PixelSetData,
    splits: Sequence[Split],
    run: Run,
    machine: Machine,
    after_fold: Callable[[dict[int, Log]], None] = lambda logs: None,
) -> tuple[list[dict[str, float]], Clock]:
    """Trains on the folds that are not finished.

    Args:
        dataset: normalised.
        splits: indices of training, validation and test parcels of every fold.
        run: settings, and the folder for the results.
        machine: device and the like.
        after_fold: called in the first process with the logs so far, by fold, whenever one is done.

    Returns:
        The test metrics of every fold, and the clock of the training.

    Raises:
        UserError: if there are more processes than parcels in a batch, or the loss is no longer finite.
    """
    if dataset.fits_on(machine.device):
        dataset = dataset.to(machine.device)
    if machine.cuda_graph and (obstacle := machine.graph_obstacle(dataset)):
        print(f"--cuda_graph: {obstacle}, so steps are taken one by one")
        machine = machine._replace(cuda_graph=False)
    finished = finished_folds(run.folder, len(splits))
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
        test, logs[fold] = train_fold(dataset, split, fold, run, machine, clock)
        tests.append(test)
        if is_main():
            after_fold(logs)
    if is_main() and len(finished) == len(splits):  # what finished the last one may have been killed
        after_fold(logs)
    return tests, clock


def train_fold(
    dataset: PixelSetData, split: Split, fold: int, run: Run, machine: Machine, clock: Clock
) -> tuple[dict[str, float], Log]:
    """Trains on one fold, keeps the best epoch or a mean of the last ones, calibrates it on validation and tests it.

    Goes on after the last finished epoch, if there is one in the fold's folder.

    Returns:
        The test metrics, and the log of the epochs.
    """
    training, n_classes, device = run.training, run.architecture.n_classes, machine.device
    folder = fold_folder(run.folder, fold)
    model = new_model(run, fold, device)
    optimizer = OPTIMIZERS[training.optimizer](model.parameters(), training.lr)
    criterion = LOSSES[training.loss](training.gamma)
    train, val, _ = split
    val_loader, test_loader = held_out_batches(dataset, split, run, machine)
    draws = dataset.epoch_draws(run.data.seed, fold, 0)  # those of the epochs come into its memory
    replayed = None
    if machine.cuda_graph and not all("capturable" in group for group in optimizer.param_groups):
        print(
            f"--cuda_graph: {type(optimizer).__name__} is not known to be capturable, so steps are taken one by one"
        )
    elif machine.cuda_graph:
        replayed = ReplayedSteps(optimizer, training.batch_size, n_classes, device)
    progress = FoldProgress(folder, model, optimizer, training.averaged_epochs)
    if progress.epoch:
        clock.skip(progress.epoch)
        print(f"Resuming: fold {fold} after epoch {progress.epoch}")
    for epoch in range(progress.epoch + 1, training.epochs + 1):
        dataset.store.check_unchanged()
        name = f"Fold {fold}/{training.kfold}  epoch {epoch}/{training.epochs}"
        loader = begin_epoch(draws, optimizer, train, run, fold, epoch, machine)
        scores = train_epoch(
            model, optimizer, criterion, loader, device, n_classes, machine.display_step, name, replayed
        )
        scores |= evaluation(model, criterion, val_loader, device, n_classes, "val", f"{name}  validation")[0]
        star = " *best" if progress.finish_epoch(scores) else ""
        print(f"{name}  {format_scores(scores)}{star} | {clock.lap(len(train) + len(val))}", flush=True)
    kept = progress.finish()
    validation = Logits()
    evaluation(model, criterion, val_loader, device, n_classes, "val", "calibration", validation.add)
    temperature = fit_temperature(validation)
    scores = validation_scores(validation, temperature, len(val))
    calibration = Calibration(temperature, device)
    metrics, confusion = evaluation(
        model, criterion, test_loader, device, n_classes, "test", "test", calibration.add
    )
    summary = calibration.summary()
    if is_main():
        write_json(folder / CALIBRATION, summary)
        write_bytes(folder / SCORES, to_npy(scores))
        save_test(folder, metrics, confusion)
    progress.close()
    print(
        f"Fold {fold}/{training.kfold}  test of {kept}: accuracy {metrics['test_accuracy']:.1f}%, "
        f"mIoU {metrics['test_IoU']:.3f}, loss {metrics['test_loss']:.3f}",
        flush=True,
    )
    return metrics, progress.log


def held_out_batches(dataset: PixelSetData, split: Split, run: Run, machine: Machine) -> list[Loader]:
    """The batches of a fold's validation and of its test parcels, which are drawn once for all epochs."""
    fixed, n = dataset.evaluation(run.data.seed), evaluation_batch(dataset.device, run.training.batch_size)
    orders = (RankBatches(BatchSampler(part, n), divide=False) for part in split[1:])
    return [batch_loader(fixed, order, machine.workers, machine.device) for order in orders]


def begin_epoch(
    draws: PixelSetData,
    optimizer: torch.optim.Optimizer,
    train: Sequence[int],
    run: Run,
    fold: int,
    epoch: int,
    machine: Machine,
) -> Loader:
    """Sets seed and learning rate of an epoch, and gives the batches of its training parcels, drawn anew in `draws`."""
    training, words = run.training, (run.data.seed, fold, epoch)
    set_seeds(stream_key("dropout", *words, rank()) % 2**63)
    for group in optimizer.param_groups:
        group["lr"] = training.lr * SCHEDULES[training.schedule](epoch, training.epochs)
    order = BatchSampler(train, training.batch_size, stream_key("order", *words), drop_single=True)
    draws.redraw(*words)
    return batch_loader(draws, RankBatches(order, divide=True), machine.workers, machine.device)


def new_model(run: Run, fold: int, device: torch.device) -> nn.Module:
    """A fold's classifier with its initial weights, which are drawn on the CPU and the same on any device."""
    set_seeds(stream_key("weights", run.data.seed, fold) % 2**63)
    model = run.architecture.build().apply(weight_init).to(device)
    freeze_idle_biases(model)
    if n_ranks() > 1:
        share_statistics(model)
    return model
