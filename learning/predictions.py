"""Predictions for every parcel of a dataset, and the files they are written to."""

import csv
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import as_user_error
from common.files import write_bytes
from common.machine import count_workers, recursive_todevice
from common.processes import gather_rows, is_main, n_ranks, rank
from common.progress import progress_bar
from data.folds import fold_splits
from data.samplers import BatchSampler, RankBatches
from dataset import UNKNOWN, PixelSetData, batch_loader
from learning.metrics import accuracy, confusion_matrix, mean_iou
from learning.results import to_npy
from models.ensemble import Ensemble

PREDICTIONS, TABLE = "Predictions_id_ytrue_y_pred.npy", "predictions.csv"


def predict(
    ensemble: Ensemble,
    dataset: PixelSetData,
    classes: Sequence[int | str],
    batch_size: int,
    num_workers: int,
    device: torch.device,
    output: Path,
    voters: np.ndarray | None = None,
) -> np.ndarray:
    """Writes `TABLE` batch by batch, then `PREDICTIONS`.

    Args:
        ensemble: trained classifiers.
        dataset: the parcels, drawn as for evaluation.
        classes: label of each class.
        batch_size: parcels per batch.
        num_workers: most loading processes.
        device: where the ensemble is.
        output: folder to write to.
        voters: see `score_batches`.

    Returns:
        Predicted class indices, (N,); UNKNOWN for a parcel without any observation.
    """
    predicted: list[np.ndarray] = []
    done = 0
    unfinished = output / f".{TABLE}"
    with (
        as_user_error(OSError, prefix=f"{output / TABLE} cannot be written: "),
        open(unfinished, "w", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file)
        header = ["id", "true_label", "predicted_label", "confidence", "agreement"]
        table.writerow(header + [f"probability_{code}" for code in classes])
        for rows in score_batches(ensemble, dataset, len(classes), batch_size, num_workers, device, voters):
            target, best = rows[:, :2].long().unbind(1)
            ids = dataset.pid[done : done + len(rows)]
            for parcel, true, k, numbers in zip(ids, target.tolist(), best.tolist(), rows[:, 2:].tolist()):
                label = "" if true == UNKNOWN else classes[true]
                told = [""] * (1 + len(numbers))
                if k != UNKNOWN:
                    told = [classes[k], *(f"{number:.6g}" for number in numbers)]
                table.writerow([parcel, label, *told])
            predicted.append(best.numpy())
            done += len(rows)
    os.replace(unfinished, output / TABLE)
    classes_found = np.concatenate(predicted)
    columns = [np.array(dataset.pid, np.int64), dataset.target, classes_found]
    write_bytes(output / PREDICTIONS, to_npy(np.stack(columns, 1)))
    return classes_found


def score_batches(
    ensemble: Ensemble,
    dataset: PixelSetData,
    n_classes: int,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    voters: np.ndarray | None = None,
) -> Iterator[Tensor]:
    """Tables of batches in their order, (B, 4 + K) float64: target, predicted class, confidence, agreement, probabilities.

    Of several processes each computes some of the batches, and the first one alone gets tables.

    Args:
        ensemble, dataset, n_classes, batch_size, num_workers, device: as for `predict`.
        voters: the member that predicts each parcel by itself, (N,), -1 for all of them together; None for -1.
    """
    sampler = BatchSampler(range(len(dataset)), batch_size)
    loader = batch_loader(
        dataset, RankBatches(sampler, divide=False), count_workers(num_workers), device.type == "cuda"
    )
    batches = iter(loader)
    rounds = range(-(-len(sampler) // n_ranks()))
    for i in progress_bar(rounds, "predicting", "batches", shown=is_main()):
        rows = torch.empty(0, 4 + n_classes, dtype=torch.float64)
        for x, y in itertools.islice(batches, 1):  # none in the last round of some processes
            x, y = recursive_todevice((x, y), device)
            members = ensemble.member_log_probabilities(x)  # (members, B, K)
            probabilities = members.mean(0).softmax(1)
            agree = members.argmax(2)
            if voters is not None:
                start = (i * n_ranks() + rank()) * batch_size
                member = torch.as_tensor(voters[start : start + len(y)], device=device)
                own = members[member.clamp(min=0), torch.arange(len(y), device=device)]  # (B, K)
                by_one = (member >= 0).unsqueeze(1)
                probabilities = torch.where(by_one, own.exp(), probabilities)
                agree = torch.where(by_one.T, own.argmax(1), agree)
            confidence, best = probabilities.max(1)
            best[confidence.isnan()] = UNKNOWN  # a parcel without any observation
            agreement = (agree == best).float().mean(0)
            columns = (y, best, confidence, agreement)
            rows = torch.cat([torch.stack([v.double() for v in columns], 1), probabilities.double()], 1).cpu()
        yield from gather_rows(rows, batch_size)


def restore_folds(dataset: PixelSetData, kfold: int, seed: int) -> np.ndarray:
    """The fold, from 1, that each parcel was a test parcel of when the published code trained on it, (N,); 0 for none.

    That code trains on the parcels of the chosen classes alone.
    """
    known = np.flatnonzero(dataset.target != UNKNOWN)
    held_out = np.zeros(len(dataset), np.int64)
    for fold, (_, _, test) in enumerate(fold_splits(len(known), kfold, seed), start=1):
        held_out[known[test]] = fold
    return held_out


def place_of_fold(held_out: np.ndarray, folds: Sequence[int]) -> np.ndarray:
    """The place among `folds` of each parcel's fold, (N,); -1 where it is none of them."""
    return np.array([folds.index(fold) if fold in folds else -1 for fold in held_out.tolist()], np.int64)


def report(
    dataset: PixelSetData,
    predicted: np.ndarray,
    n_classes: int,
    output: Path,
    held_out: np.ndarray | None = None,
    folds: Sequence[int] = (),
) -> None:
    """Says where the predictions are and, where labels are known, how good they are.

    Args:
        dataset: the parcels.
        predicted: class of each, (N,).
        n_classes: K.
        output: folder of the predictions.
        held_out: the fold that did not learn from each parcel, and predicted it, (N,); None if all folds voted.
        folds: those that predicted.
    """
    undefined = predicted == UNKNOWN
    if undefined.any():
        print(f"Undefined: {undefined.sum()} parcels without any observation, left empty (class -1)")
    known = (dataset.target != UNKNOWN) & ~undefined

    def score(parcels: np.ndarray) -> str:
        mat = confusion_matrix(dataset.target[parcels], predicted[parcels], labels=range(n_classes))
        return f"accuracy {100 * accuracy(mat):.1f}%, mIoU {mean_iou(mat):.3f} on"

    if held_out is not None:
        for fold in folds:
            test = known & (held_out == fold)
            if test.any():
                print(f"Fold {fold}: {score(test)} its {test.sum()} test parcels")
        known &= np.isin(held_out, folds)
    if known.any():
        remark = (
            "parcels that the model was trained on flatter it"
            if held_out is None
            else "each by the fold that did not learn from it"
        )
        print(f"All: {score(known)} the {known.sum()} parcels with a known class; {remark}")
    print(f"Predictions: {output / TABLE}, {output / PREDICTIONS}")
