"""Predictions for every parcel of a dataset, each by classifiers that did not learn from it, and the files they are written to."""

import contextlib
import csv
import io
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from scipy.special import softmax

from common.errors import as_user_error
from common.machine import count_workers, recursive_todevice
from common.processes import gather_rows, is_main, n_ranks, rank
from common.progress import progress_bar
from data.loader import check_batch
from data.samplers import BatchSampler, RankBatches, evaluation_batch
from dataset import UNKNOWN, PixelSetData, batch_loader
from learning.metrics import accuracy, confusion_matrix, mean_iou
from models.ensemble import Jury

PREDICTIONS, TABLE = "Predictions_id_ytrue_y_pred.npy", "predictions.csv"


@dataclass(frozen=True)
class Telling:
    """How predictions are told to people.

    Attributes:
        own_ids: ids of the parcels in the file that they come from, by id; empty where those are the ids.
        names: of the classes by label as text; empty where there are none.
        doubt: predictions with a lower confidence are doubtful.
        thresholds: by fold, see `learning.calibration.set_threshold`; empty for no sets of classes.
    """

    own_ids: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    doubt: float = 0.5
    thresholds: Mapping[int, float] = field(default_factory=dict)


class Predictions(NamedTuple):
    """Predictions for N parcels.

    Attributes:
        ids: of the parcels, as text.
        targets: index of each true class, (N,); -1 where unknown.
        predicted: index of each predicted class, (N,); -1 for a parcel without any observation.
        confidence: calibrated probability of the predicted class, (N,).
        agreement: share of the folds asked that predict that class, (N,).
        probabilities: calibrated, of all classes, (N, K); NaN without any observation.
        held_out: number of the fold that predicted by itself, since it did not learn from the parcel, (N,); else 0.
        seen: whether folds learned from the parcel and none held it out, (N,).
        classes: label of each of the K classes.
        telling: how they are told.
    """

    ids: list[str]
    targets: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    agreement: np.ndarray
    probabilities: np.ndarray
    held_out: np.ndarray
    seen: np.ndarray
    classes: Sequence[int | str]
    telling: Telling = Telling()

    @property
    def labels(self) -> list[int | str | None]:
        """Predicted labels; None for a parcel without any observation."""
        return [None if k == UNKNOWN else self.classes[k] for k in self.predicted.tolist()]

    @property
    def true_labels(self) -> list[int | str | None]:
        """True labels; None where unknown."""
        return [None if k == UNKNOWN else self.classes[k] for k in self.targets.tolist()]

    @property
    def predicted_by(self) -> list[str]:
        """Who predicted each parcel: the fold that held it out, all folds, or folds that have seen it."""
        return [
            "seen" if seen else str(fold or "all") for fold, seen in zip(self.held_out, self.seen.tolist())
        ]

    @property
    def told(self) -> dict[str, list[str | int | None]]:
        """More columns of the table by name, as `telling` has it; None where something is not known of a parcel."""
        names, labels, columns = self.telling.names, self.labels, {}
        if self.telling.own_ids:
            columns["parcel"] = [self.telling.own_ids.get(parcel) for parcel in self.ids]
        if names:
            for column, of in (("true_name", self.true_labels), ("predicted_name", labels)):
                columns[column] = [None if label is None else names.get(str(label), label) for label in of]
        doubtful = (self.confidence < self.telling.doubt).tolist()
        columns["doubt"] = [None if label is None else int(doubt) for label, doubt in zip(labels, doubtful)]
        if self.telling.thresholds:
            sets = self.sets
            columns["set"] = [
                None if label is None else "|".join(map(str, own)) for label, own in zip(labels, sets)
            ]
        return columns

    @property
    def sets(self) -> list[list[int | str]]:
        """The smallest set of labels that `telling.thresholds` allow for each parcel, the most probable first.

        A fold that predicts by itself has its own threshold; where several do, the largest of theirs holds.
        """
        thresholds = self.telling.thresholds
        largest = max(thresholds.values())
        limits = [thresholds[fold] if fold else largest for fold in self.held_out.tolist()]
        order = np.argsort(-self.probabilities, axis=1, kind="stable")
        n = (1 - self.probabilities <= np.array(limits)[:, None]).sum(1).clip(min=1)  # never an empty one
        return [[self.classes[k] for k in ranked[:size]] for ranked, size in zip(order.tolist(), n.tolist())]


class Output(Protocol):
    """What writes a file of predictions, batch by batch."""

    def __init__(self, file: BinaryIO, classes: Sequence[int | str]) -> None: ...

    def add(self, batch: Predictions) -> None:
        """Takes the next parcels."""

    def close(self) -> None:
        """Writes what is left; the file is closed afterwards."""


class TableOutput:
    """predictions.csv: a line per parcel."""

    def __init__(self, file: BinaryIO, classes: Sequence[int | str]) -> None:
        self.text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        self.table = csv.writer(self.text)
        self.is_begun = False

    def add(self, batch: Predictions) -> None:
        """Takes the next parcels; what is not known of one stays empty."""
        told = batch.told
        if not self.is_begun:
            header = ["id", "true_label", "predicted_label", "confidence", "agreement", "predicted_by", *told]
            self.table.writerow(header + [f"probability_{code}" for code in batch.classes])
            self.is_begun = True
        numbers = np.column_stack([batch.confidence, batch.agreement, batch.probabilities]).tolist()
        columns = batch.ids, batch.true_labels, batch.labels, batch.predicted_by, numbers, zip(*told.values())
        for parcel, true, label, by, values, more in zip(*columns):
            values = [None if label is None else f"{number:.6g}" for number in values]
            self.table.writerow([parcel, true, label, *values[:2], by, *more, *values[2:]])

    def close(self) -> None:
        """Hands over what is buffered."""
        self.text.flush()
        self.text.detach()


def read_rows(table: Path) -> Iterator[dict[str, str]]:
    """The lines of predictions.csv by column, as text."""
    with open(table, newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


class IndexOutput:
    """Predictions_id_ytrue_y_pred.npy, as published: id and indices of the true and the predicted class, (N, 3)."""

    def __init__(self, file: BinaryIO, classes: Sequence[int | str]) -> None:
        self.file, self.rows = file, [np.empty((0, 3), np.int64)]

    def add(self, batch: Predictions) -> None:
        """Takes the next parcels."""
        ids = np.array(batch.ids, np.int64)
        self.rows.append(np.stack([ids, batch.targets, batch.predicted], 1))

    def close(self) -> None:
        """Writes the array."""
        np.save(self.file, np.concatenate(self.rows))


# By file name, what inference.py writes to its output folder. What a script adds here is written too.
OUTPUTS: dict[str, Callable[[BinaryIO, Sequence[int | str]], Output]] = {
    TABLE: TableOutput,
    PREDICTIONS: IndexOutput,
}


def predict(
    jury: Jury,
    dataset: PixelSetData,
    classes: Sequence[int | str],
    batch_size: int | None,
    num_workers: int,
    device: torch.device,
    telling: Telling = Telling(),
) -> Iterator[Predictions]:
    """Predictions batch by batch, in the order of the dataset.

    Of several processes each computes some of the batches, and the first one alone gets them.

    Args:
        jury: trained classifiers.
        dataset: the parcels, drawn as for evaluation.
        classes: label of each class.
        batch_size: parcels per batch; None for that of `evaluation_batch`.
        num_workers: most loading processes.
        device: where the classifiers are.
        telling: how they are told.
    """
    batch_size = batch_size or evaluation_batch(dataset.device)
    check_batch(dataset, batch_size)
    sampler = BatchSampler(range(len(dataset)), batch_size)
    loader = batch_loader(dataset, RankBatches(sampler, divide=False), count_workers(num_workers), device)
    batches = iter(loader)
    done = 0
    for i in progress_bar(range(-(-len(sampler) // n_ranks())), "predicting", "batches", shown=is_main()):
        rows = torch.empty(0, 3 + len(classes), dtype=torch.float64)
        for x, y in itertools.islice(batches, 1):  # none in the last round of some processes
            start = (i * n_ranks() + rank()) * batch_size
            held_out = torch.from_numpy(jury.held_out[start : start + len(y)])
            x, y, held_out = recursive_todevice((x, y, held_out), device)
            probabilities, votes = jury.probabilities(jury.ensemble.member_log_probabilities(x), held_out)
            confidence, best = probabilities.max(1)
            best[confidence.isnan()] = UNKNOWN  # a parcel without any observation
            columns = (y, best, (votes == best).float().mean(0))
            rows = torch.cat([torch.stack([v.double() for v in columns], 1), probabilities.double()], 1).cpu()
        for table in gather_rows(rows, batch_size):
            here = slice(done, done + len(table))
            done = here.stop
            target, best = table[:, :2].long().unbind(1)
            yield Predictions(
                dataset.pid[here],
                target.numpy(),
                best.numpy(),
                table[:, 3:].amax(1).numpy(),
                table[:, 2].numpy(),
                table[:, 3:].numpy(),
                jury.held_out[here],
                jury.seen[here],
                classes,
                telling,
            )


def mean_of_runs(runs: Sequence[Iterator[Predictions]]) -> Iterator[Predictions]:
    """Predictions of several runs for the same parcels as one, batch by batch.

    Probabilities are those of the mean of the runs' calibrated log-probabilities. The agreement is the share of the runs
    that predict the same class; a parcel that any of them has seen is seen, and the first one's fold stands for each
    run's own where all runs held the parcel out.
    """
    for batches in zip(*runs, strict=True):
        # Each class that one run rules out may be one that another is sure of: none has the logarithm of 0.
        least = np.finfo(np.float32).tiny
        log_p = np.mean([np.log(np.maximum(batch.probabilities, least)) for batch in batches], axis=0)
        probabilities = softmax(log_p, axis=1)
        predicted = np.where(np.isnan(log_p).any(1), UNKNOWN, log_p.argmax(1))
        held_out = np.all([batch.held_out > 0 for batch in batches], axis=0)
        yield batches[0]._replace(
            predicted=predicted,
            confidence=probabilities.max(1),
            agreement=np.mean([batch.predicted == predicted for batch in batches], axis=0),
            probabilities=probabilities,
            held_out=np.where(held_out, batches[0].held_out, 0),
            seen=np.any([batch.seen for batch in batches], axis=0),
        )


def join(batches: Sequence[Predictions]) -> Predictions:
    """Predictions of several batches as one."""
    columns = zip(*(batch[1:-2] for batch in batches))
    ids = list(itertools.chain(*(batch.ids for batch in batches)))
    return Predictions(ids, *map(np.concatenate, columns), batches[0].classes, batches[0].telling)


def write_predictions(batches: Iterator[Predictions], output: Path) -> Predictions:
    """Writes all `OUTPUTS` batch by batch, each whole or not at all; returns the predictions, without probabilities."""
    kept: list[Predictions] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_user_error(OSError, prefix=f"{output} cannot be written: "))
        writers: dict[str, Any] = {}
        for batch in batches:
            if not writers:
                for name, kind in OUTPUTS.items():
                    file = stack.enter_context(open(output / f".{name}", "wb"))
                    writers[name] = kind(file, batch.classes), file
            for writer, _ in writers.values():
                writer.add(batch)
            kept.append(batch._replace(probabilities=batch.probabilities[:, :0]))
        for name, (writer, file) in writers.items():
            writer.close()
            file.close()
            os.replace(output / f".{name}", output / name)
    return join(kept)


def describe_jury(jury: Jury, fold: str | None) -> str:
    """Who predicts which parcels, in words."""
    if fold is not None:
        return "Folds: as published, also for parcels that they learned from, which flatters the scores"
    if not jury.is_known:
        return (
            "Folds: all of them for every parcel, since nothing tells what they learned from, which flatters the scores of "
            "those parcels; --kfold 5 --rdm_seed 1 restores the published folds of published weights"
        )
    alone, seen = (jury.held_out > 0).sum(), jury.seen.sum()
    return (
        f"Folds: {alone} parcels each by the fold that held it out, {len(jury.seen) - alone - seen} new ones by all folds"
        + (f", {seen} that folds learned from by all of them" if seen else "")
    )


def describe_scores(predictions: Predictions) -> list[str]:
    """How good predictions are where labels are known, in words; parcels that were learned from are left out."""
    undefined = predictions.predicted == UNKNOWN
    known = (predictions.targets != UNKNOWN) & ~undefined
    fair, lines = known & ~predictions.seen, []

    def score(parcels: np.ndarray) -> str:
        true, found = predictions.targets[parcels], predictions.predicted[parcels]
        mat = confusion_matrix(true, found, labels=range(len(predictions.classes)))
        return f"accuracy {100 * accuracy(mat):.1f}%, mIoU {mean_iou(mat):.3f}"

    if undefined.any():
        lines.append(f"Undefined: {undefined.sum()} parcels without any observation, left empty (class -1)")
    for fold in np.unique(predictions.held_out[fair & (predictions.held_out > 0)]):
        test = fair & (predictions.held_out == fold)
        lines.append(f"Fold {fold}: {score(test)} on {test.sum()} parcels that it did not learn from")
    if (known & predictions.seen).any():
        lines.append(
            f"Left out of the scores: {(known & predictions.seen).sum()} parcels that folds learned from and none held out"
        )
    if fair.any():
        lines.append(f"All: {score(fair)} on {fair.sum()} parcels with a known class")
    return lines
