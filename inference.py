"""Predicts the class of every parcel of a dataset with trained weights, of one fold or of all together."""

import learning  # isort: skip  # noqa: F401  # before torch, see there

import argparse
import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset import (
    UNKNOWN,
    BatchSampler,
    PixelSetData,
    PixelSetData_preloaded,
    batch_loader,
    find_norm,
)
from learning.errors import UserError, as_user_error, run_cli
from learning.files import write_bytes
from learning.metrics import accuracy, confusion_matrix, mean_iou
from learning.options import (
    ARCHITECTURE,
    CLASSES_20,
    EXTRA_FEATURE,
    LABELS,
    NPIXEL,
    Parser,
    add_architecture_options,
    add_data_options,
    check_typed,
    classifier_name,
    hyperparameters,
    read_preset,
    resolve_architecture,
    typed_architecture,
)
from learning.progress import progress_bar
from learning.results import (
    CONFIG,
    NORMALISATION,
    load_normalisation,
    prepare_output,
    read_config,
    to_npy,
)
from learning.runtime import (
    choose_device,
    count_workers,
    describe_device,
    keep_freed_memory,
    recursive_todevice,
)
from models import stclassifier
from models.stclassifier import Ensemble
from models.weights import choose_folds
from preprocessing.metadata import check_norm, read_nomenclatures
from preprocessing.simulate import embedded_dataset

PREDICTIONS, TABLE = "Predictions_id_ytrue_y_pred.npy", "predictions.csv"


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
    group.add_argument("--fold", default="all", help="number of one fold, from 1, or all for the mean of all")
    group.add_argument("--output_dir", default="./output", help="where to write the predictions")
    add_data_options(parser)
    add_architecture_options(parser)
    return parser.parse_args()


def main() -> None:
    """Loads weights and data, predicts, and writes the predictions."""
    args = parse_args()
    keep_freed_memory()
    device = choose_device(args.device)
    with as_user_error(FileNotFoundError, ValueError, prefix="--weight_dir: "):
        choose_folds(args.weight_dir, args.fold)  # before the data are read, which can take long
    output = prepare_output(args.output_dir)
    run = read_run(Path(args.weight_dir))
    if args.sub_classes and len(set(args.sub_classes)) < len(args.sub_classes):
        raise UserError("--sub_classes names a label twice; name as many labels as the model tells apart.")
    classes = args.sub_classes or run.get("sub_classes") or list(CLASSES_20)
    dataset = open_dataset(args, run, classes)
    config = read_architecture(args, run, dataset, len(classes))
    ensemble = load_ensemble(args, config, dataset, device)
    print(
        f"Device: {describe_device(device)}\n"
        f"Model: {classifier_name(config)}, {len(ensemble.members)} fold(s) of {args.weight_dir}, {len(classes)} classes\n"
        f"Data: {len(dataset)} parcels of {dataset.folder}"
    )
    predicted = predict(ensemble, dataset, classes, args, device, output)
    write_bytes(
        output / PREDICTIONS,
        to_npy(np.stack([np.array(dataset.pid, np.int64), dataset.target, predicted], 1)),
    )
    report(dataset, predicted, len(classes), output)


def read_run(weight_dir: Path) -> dict[str, Any]:
    """The configuration of a training run; empty for bare weights, such as the published ones."""
    if (weight_dir / CONFIG).exists():
        return read_config(weight_dir)
    print(f"Configuration: {weight_dir} has no {CONFIG}, so published defaults and flags")
    return {}


def open_dataset(args: argparse.Namespace, run: dict[str, Any], classes: list[int]) -> PixelSetData:
    """The dataset to predict, prepared as the training data were; labels and classes are optional there."""
    folder = args.dataset_folder
    if folder is None:
        folder = embedded_dataset()
        print(f"Dataset: the embedded simulated one, in {folder}; --dataset_folder chooses another")
    folder = Path(folder)
    labels = getattr(args, "labels", None)
    if labels is None and (folder / "META" / "labels.json").exists():
        usual = run.get("labels", LABELS)
        labels = usual if usual in read_nomenclatures(folder) else None
    has_extra = (folder / "META" / f"{EXTRA_FEATURE}.json").exists()
    wants_extra = run.get("n_extra", 0) > 0 if run else has_extra
    extra = EXTRA_FEATURE if args.geomfeat or (args.geomfeat is None and wants_extra) else None
    weight_dir = Path(args.weight_dir)
    norm, extra_stats = load_normalisation(weight_dir)
    expected = 2 * [(run["n_extra"],)] if run and run["n_extra"] else []
    if run and norm is not None and [values.shape for values in extra_stats or ()] != expected:
        raise UserError(
            f"{weight_dir / NORMALISATION} does not hold the statistics of {run['n_extra']} extra features; "
            "copy it again from the training."
        )
    kind = PixelSetData_preloaded if args.preload else PixelSetData
    dataset = kind(
        folder,
        labels,
        getattr(args, "npixel", run.get("npixel", NPIXEL)),
        classes if labels else None,
        extra_feature=extra,
        cache_dir=args.cache_dir,
        keep_all=True,
        extra_stats=extra_stats,
    ).evaluation(run.get("rdm_seed", 1))
    if run:
        trained = {"channels": run["input_dim"], "dates": run["lms"], "extra features": run["n_extra"]}
        found = (dataset.n_channels, dataset.n_dates, dataset.n_extra)
        for (what, expected), number in zip(trained.items(), found):
            if number != expected:
                raise UserError(f"the model was trained on {expected} {what} but {folder} has {number}.")
        if dataset.date_positions != run.get("date_positions", dataset.date_positions):
            print(
                "Dates: not those of the training; the model takes each for the training's date of the same rank"
            )
    if norm is not None and args.norm is None:
        dataset.set_norm(check_norm(norm, (dataset.n_dates, dataset.n_channels), weight_dir / NORMALISATION))
    else:
        norm, source = find_norm(dataset, args.norm)
        dataset.set_norm(norm)
        print(f"Normalisation: {source}")
    return dataset


def read_architecture(
    args: argparse.Namespace, run: dict[str, Any], dataset: PixelSetData, n_classes: int
) -> dict[str, Any]:
    """The architecture of the run, where flags override it; of published defaults and flags for bare weights."""
    typed = typed_architecture(args)
    if run and args.preset is None:
        config = {name: run[name] for name in ARCHITECTURE} | typed
        check_typed(typed, config, dataset.n_channels, dataset.n_dates, n_classes)
        if n_classes != config["mlp4"][-1]:
            raise UserError(
                f"--sub_classes names {n_classes} labels but the model tells {config['mlp4'][-1]} apart; leave it out "
                "or name as many."
            )
        return config
    return resolve_architecture(
        typed, read_preset(args.preset), dataset.n_channels, dataset.n_dates, dataset.n_extra, n_classes
    )


def load_ensemble(
    args: argparse.Namespace, config: dict[str, Any], dataset: PixelSetData, device: torch.device
) -> Ensemble:
    """The trained classifiers of the folds asked for."""
    load = getattr(stclassifier, f"{classifier_name(config)}_pretrained")
    with as_user_error(FileNotFoundError, ValueError, TypeError, prefix="--weight_dir: "):
        return load(
            args.weight_dir,
            hyperparameters(config, dataset.n_extra, dataset.date_positions),
            device,
            args.fold,
        )


def predict(
    ensemble: Ensemble,
    dataset: PixelSetData,
    classes: list[int],
    args: argparse.Namespace,
    device: torch.device,
    output: Path,
) -> np.ndarray:
    """Writes the table of predictions batch by batch; returns the predicted class indices, (N,)."""
    sampler = BatchSampler(range(len(dataset)), args.batch_size)
    loader = batch_loader(dataset, sampler, count_workers(args.num_workers), device.type == "cuda")
    predicted: list[np.ndarray] = []
    done = 0
    unfinished = output / f".{TABLE}"
    with open(unfinished, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        header = ["id", "true_label", "predicted_label", "confidence", "agreement"]
        table.writerow(header + [f"probability_{code}" for code in classes])
        for x, y in progress_bar(loader, "predicting", "batches"):
            members = ensemble.member_log_probabilities(recursive_todevice(x, device))  # (members, B, K)
            probabilities = members.mean(0).softmax(1)
            confidence, best = probabilities.max(1)
            agreement = (members.argmax(2) == best).float().mean(0)
            ids = dataset.pid[done : done + len(y)]
            columns = (values.tolist() for values in (y, best, confidence, agreement, probabilities))
            for parcel, true, k, sure, agreed, each in zip(ids, *columns):
                label = "" if true == UNKNOWN else classes[true]
                numbers = (f"{number:.6g}" for number in (sure, agreed, *each))
                table.writerow([parcel, label, classes[k], *numbers])
            predicted.append(best.cpu().numpy())
            done += len(y)
    os.replace(unfinished, output / TABLE)
    return np.concatenate(predicted)


def report(dataset: PixelSetData, predicted: np.ndarray, n_classes: int, output: Path) -> None:
    """Says where the predictions are and, where labels are known, how good they are."""
    known = dataset.target != UNKNOWN
    if known.any():
        mat = confusion_matrix(dataset.target[known], predicted[known], labels=range(n_classes))
        print(
            f"Accuracy {100 * accuracy(mat):.1f}%, mIoU {mean_iou(mat):.3f} on the {known.sum()} parcels with a known "
            "class; parcels that the model was trained on flatter it"
        )
    print(f"Predictions: {output / TABLE}, {output / PREDICTIONS}")


if __name__ == "__main__":
    run_cli(main)
