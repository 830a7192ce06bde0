"""A random forest and a gradient boosting on per-date means, on the very folds of train.py: the scores to beat.

python -m benchmarks.baselines --dataset_folder D --seeds 3

Flags on data are those of train.py; those on batches and devices change nothing here. Missing values stay NaN, which both
take as scikit-learn does: at every split of a tree they go to the side where they help more.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.metrics import confusion_matrix

from common.errors import UserError, run_cli
from common.flags import Parser, natural, positive
from common.progress import progress_bar
from data.folds import Split, choose_splits
from data.settings import DataSettings
from dataset import PixelSetData
from learning.metrics import confusion_matrix_analysis
from learning.options import TEMPORAL, add_data_options, resolve_data
from learning.run import Training
from preprocessing.simulate import embedded_dataset

SCORES = "Accuracy", "MACRO_IoU", "MACRO_F1-score"
# By name, what makes a classifier of the number of trees and a seed.
MODELS: dict[str, Callable[[int, int], ClassifierMixin]] = {
    "forest": lambda trees, seed: RandomForestClassifier(trees, n_jobs=-1, random_state=seed),
    "boosting": lambda trees, seed: HistGradientBoostingClassifier(random_state=seed),
}


def mean_features(dataset: PixelSetData) -> np.ndarray:
    """Mean over the pixels of every parcel on every date, (N, L C); NaN where all are missing.

    Raises:
        UserError: if parcels have dates of their own.
    """
    if dataset.date_positions is None:
        raise UserError(
            f"dates of {dataset.folder} differ between parcels; trees need dates that they share."
        )
    return np.stack([dataset.mean_series(i).ravel() for i in range(len(dataset))])


def cross_validate(
    model: ClassifierMixin, features: np.ndarray, target: np.ndarray, splits: Sequence[Split], n_classes: int
) -> np.ndarray:
    """Scores, in the order of `SCORES`, of all folds together; trained on all but the test parcels of each.

    Args:
        model: is trained anew for every fold.
        features: of every parcel, (N, F).
        target: class of every parcel, (N,), from 0 to n_classes - 1.
        splits: indices of training, validation and test parcels of every fold.
        n_classes: K.

    Returns:
        The scores, (3,), in 0 to 1.
    """
    total = np.zeros((n_classes, n_classes), np.int64)
    for train, val, test in progress_bar(splits, f"training {type(model).__name__}", "folds"):
        known = sorted(train + val)  # what a forest draws depends on the order
        found = model.fit(features[known], target[known]).predict(features[test])
        total += confusion_matrix(target[test], found, labels=range(n_classes))
    overall = confusion_matrix_analysis(total)[1]
    return np.array([overall[name] for name in SCORES])


def fold_parser(description: str, seeds: int) -> Parser:
    """A parser of the flags on data, as those of train.py, and on folds and seeds.

    Dates are taken as the dataset has them, and nothing is done to them in training.
    """
    parser = Parser(description=description)
    add_data_options(parser)
    parser.add_argument("--kfold", type=positive, default=Training.kfold, help="number of random folds")
    parser.add_argument("--folds", help="file of folds instead, as in train.py")
    parser.add_argument("--rdm_seed", type=natural, default=1, help="first seed")
    parser.add_argument("--seeds", type=positive, default=seeds, help="number of seeds")
    parser.set_defaults(npixel=None, varying_dates=False, season_start=None, **dict.fromkeys(TEMPORAL, 0))
    return parser


def open_data(args: argparse.Namespace) -> tuple[PixelSetData, DataSettings]:
    """The dataset that flags of `fold_parser` name, the embedded one without, and how it is read."""
    return resolve_data(args, Path(args.dataset_folder or embedded_dataset()))[:2]


def describe(scores: np.ndarray) -> str:
    """Mean and, of several seeds, standard error of scores (seeds, 3) in words."""
    means, n = scores.mean(0), len(scores)
    errors = scores.std(0, ddof=1) / np.sqrt(n) if n > 1 else [None] * 3
    accuracy, iou, f1 = (
        f"{factor * mean:.{digits}f}" + ("" if error is None else f" +- {factor * error:.{digits}f}")
        for mean, error, factor, digits in zip(means, errors, (100, 1, 1), (1, 3, 3))
    )
    return f"accuracy {accuracy} %, mIoU {iou}, macro F1 {f1}"


def main() -> None:
    """Prints the scores of both, over all folds together, as mean and standard error over seeds."""
    parser = fold_parser(__doc__.splitlines()[0], seeds=1)
    parser.add_argument("--trees", type=positive, default=500, help="trees of the forest")
    parser.add_argument("--only", choices=list(MODELS), help="leave out the other")
    parser.add_argument(
        "--training_only",
        action="store_true",
        help="learn from training parcels alone, as networks do, which choose their epoch by those of validation",
    )
    args = parser.parse_args()
    dataset, settings = open_data(args)
    features, n_classes = mean_features(dataset), len(settings.classes)
    seeds = range(args.rdm_seed, args.rdm_seed + args.seeds)
    for name in [args.only] if args.only else MODELS:
        scores = []
        for seed in seeds:
            splits = choose_splits(dataset, args.folds, args.kfold, seed)
            if args.training_only:
                splits = [(train, [], test) for train, _, test in splits]
            model = MODELS[name](args.trees, seed)
            scores.append(cross_validate(model, features, dataset.target, splits, n_classes))
        how = f"{name}, {len(splits)} folds together, {len(seeds)} seed(s)"
        print(f"{how}: {describe(np.array(scores))}", flush=True)


if __name__ == "__main__":
    run_cli(main)
