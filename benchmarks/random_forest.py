"""A random forest on per-date means, tested on the very folds of train.py: the score that a network has to beat.

python -m benchmarks.random_forest --dataset_folder D

Flags on data are those of train.py; those on batches and devices change nothing here.
"""

from pathlib import Path

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import confusion_matrix

from common.errors import UserError, run_cli
from common.flags import Parser, natural, positive
from common.progress import progress_bar
from data.folds import fold_splits
from learning.metrics import accuracy, mean_iou
from learning.options import add_data_options, resolve_data
from preprocessing.simulate import embedded_dataset


def main() -> None:
    """Trains on training and validation parcels of each fold, tests on its test parcels, prints the scores."""
    parser = Parser(description=__doc__.splitlines()[0])
    add_data_options(parser)
    parser.add_argument("--kfold", type=positive, default=5, help="number of folds")
    parser.add_argument("--rdm_seed", type=natural, default=1, help="seed of the folds and of the forest")
    parser.add_argument("--trees", type=positive, default=500, help="trees of the forest")
    parser.set_defaults(
        npixel=1, varying_dates=False, season_start=None, temporal_dropout=0, temporal_shift=0
    )
    args = parser.parse_args()
    dataset, settings, _ = resolve_data(args, Path(args.dataset_folder or embedded_dataset()))
    if dataset.varying:
        raise UserError(
            f"dates of {dataset.folder} vary, or have gaps; the forest needs dates that parcels share."
        )
    features = np.stack([dataset.mean_series(i).ravel() for i in range(len(dataset))])
    confusions = []
    splits = fold_splits(len(dataset), args.kfold, args.rdm_seed)
    for train, val, test in progress_bar(splits, "training forests", "folds"):
        forest = RandomForestClassifier(args.trees, n_jobs=-1, random_state=args.rdm_seed)
        found = forest.fit(features[train + val], dataset.target[train + val]).predict(features[test])
        labels = range(len(settings.classes))
        confusions.append(confusion_matrix(dataset.target[test], found, labels=labels))
    total, folds = sum(confusions), np.array([(100 * accuracy(mat), mean_iou(mat)) for mat in confusions])
    spread = "accuracy {0:.1f} +- {2:.1f}, mIoU {1:.3f} +- {3:.3f}".format(*folds.mean(0), *folds.std(0))
    print(
        f"Random forest, {args.kfold} folds together: accuracy {100 * accuracy(total):.1f}%, "
        f"mIoU {mean_iou(total):.3f} (mean and deviation over folds: {spread})"
    )


if __name__ == "__main__":
    run_cli(main)
