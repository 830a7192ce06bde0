"""Predictions for every parcel of a dataset, and the files they are written to."""

import csv
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset import UNKNOWN, BatchSampler, PixelSetData, batch_loader
from learning.distributed import RankBatches, gather_rows, is_main
from learning.errors import as_user_error
from learning.files import write_bytes
from learning.metrics import accuracy, confusion_matrix, mean_iou
from learning.progress import progress_bar
from learning.results import to_npy
from learning.runtime import count_workers, recursive_todevice
from models.ranks import n_ranks
from models.stclassifier import Ensemble

PREDICTIONS, TABLE = "Predictions_id_ytrue_y_pred.npy", "predictions.csv"


def predict(
    ensemble: Ensemble,
    dataset: PixelSetData,
    classes: Sequence[int | str],
    batch_size: int,
    num_workers: int,
    device: torch.device,
    output: Path,
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
        for rows in score_batches(ensemble, dataset, len(classes), batch_size, num_workers, device):
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
) -> Iterator[Tensor]:
    """Tables of batches in their order, (B, 4 + K) float64: target, predicted class, confidence, agreement, probabilities.

    Of several processes each computes some of the batches, and the first one alone gets tables.
    """
    sampler = BatchSampler(range(len(dataset)), batch_size)
    loader = batch_loader(
        dataset, RankBatches(sampler, divide=False), count_workers(num_workers), device.type == "cuda"
    )
    batches = iter(loader)
    rounds = range(-(-len(sampler) // n_ranks()))
    for _ in progress_bar(rounds, "predicting", "batches", shown=is_main()):
        rows = torch.empty(0, 4 + n_classes, dtype=torch.float64)
        for x, y in itertools.islice(batches, 1):  # none in the last round of some processes
            x, y = recursive_todevice((x, y), device)
            members = ensemble.member_log_probabilities(x)  # (members, B, K)
            probabilities = members.mean(0).softmax(1)
            confidence, best = probabilities.max(1)
            best[confidence.isnan()] = UNKNOWN  # a parcel without any observation
            agreement = (members.argmax(2) == best).float().mean(0)
            columns = (y, best, confidence, agreement)
            rows = torch.cat([torch.stack([v.double() for v in columns], 1), probabilities.double()], 1).cpu()
        yield from gather_rows(rows, batch_size)


def report(dataset: PixelSetData, predicted: np.ndarray, n_classes: int, output: Path) -> None:
    """Says where the predictions are and, where labels are known, how good they are."""
    undefined = predicted == UNKNOWN
    if undefined.any():
        print(f"Undefined: {undefined.sum()} parcels without any observation, left empty (class -1)")
    known = (dataset.target != UNKNOWN) & ~undefined
    if known.any():
        mat = confusion_matrix(dataset.target[known], predicted[known], labels=range(n_classes))
        print(
            f"Accuracy {100 * accuracy(mat):.1f}%, mIoU {mean_iou(mat):.3f} on the {known.sum()} parcels with a known "
            "class; parcels that the model was trained on flatter it"
        )
    print(f"Predictions: {output / TABLE}, {output / PREDICTIONS}")
