"""A random forest on per-date means, tested on the very folds of train.py: the score that a network has to beat.

python -m benchmarks.random_forest --dataset_folder D
"""

import argparse

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import confusion_matrix

from common.errors import run_cli
from common.flags import Parser, natural, parse_list, positive
from common.progress import progress_bar
from data.folds import fold_splits
from data.settings import LABELS
from dataset import PixelSetData
from learning.metrics import accuracy, mean_iou
from learning.options import choose_classes
from preprocessing.simulate import embedded_dataset


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_folder", help="dataset folder; without it the embedded simulated dataset")
    parser.add_argument("--labels", default=LABELS, help="nomenclature of META/labels.json")
    parser.add_argument("--sub_classes", type=parse_list, help="labels to tell apart, as in train.py")
    parser.add_argument("--cache_dir", help="where to keep the packed copy of the pixels")
    parser.add_argument("--kfold", type=positive, default=5, help="number of folds")
    parser.add_argument("--rdm_seed", type=natural, default=1, help="seed of the folds and of the forest")
    parser.add_argument("--trees", type=positive, default=500, help="trees of the forest")
    return parser.parse_args()


def main() -> None:
    """Trains on training and validation parcels of each fold, tests on its test parcels, prints the scores."""
    args = parse_args()
    folder = args.dataset_folder or embedded_dataset()
    every_label = PixelSetData(folder, args.labels, 1, cache_dir=args.cache_dir)
    classes = choose_classes(every_label.target.tolist(), args.sub_classes)
    dataset = PixelSetData(folder, args.labels, 1, classes, cache_dir=args.cache_dir)
    features = np.stack([dataset.mean_series(i).ravel() for i in range(len(dataset))])
    total = np.zeros((len(classes), len(classes)), dtype=np.int64)
    folds = []
    for train, val, test in progress_bar(
        fold_splits(len(dataset), args.kfold, args.rdm_seed), "training forests", "folds"
    ):
        forest = RandomForestClassifier(args.trees, n_jobs=-1, random_state=args.rdm_seed)
        forest.fit(features[train + val], dataset.target[train + val])
        mat = confusion_matrix(
            dataset.target[test], forest.predict(features[test]), labels=range(len(classes))
        )
        folds.append((100 * accuracy(mat), mean_iou(mat)))
        total += mat
    mean, deviation = np.mean(folds, axis=0), np.std(folds, axis=0)
    print(
        f"Random forest, {args.kfold} folds together: accuracy {100 * accuracy(total):.1f}%, mIoU {mean_iou(total):.3f} "
        f"(mean and deviation over folds: accuracy {mean[0]:.1f} +- {deviation[0]:.1f}, "
        f"mIoU {mean[1]:.3f} +- {deviation[1]:.3f})"
    )


if __name__ == "__main__":
    run_cli(main)
