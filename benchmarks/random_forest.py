"""A random forest on per-date means, tested on the very folds of train.py: the score that a network has to beat.

python -m benchmarks.random_forest --dataset_folder D
"""

from pathlib import Path

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import confusion_matrix

from common.errors import UserError, run_cli
from common.flags import Parser, natural, parse_labels, positive
from common.progress import progress_bar
from data.folds import fold_splits
from data.metadata import choose_nomenclature, read_nomenclature
from data.packing import check_folder, list_parcels
from data.settings import LABELS, DataSettings
from dataset import PixelSetData
from learning.metrics import accuracy, mean_iou
from learning.options import choose_classes
from preprocessing.simulate import embedded_dataset


def main() -> None:
    """Trains on training and validation parcels of each fold, tests on its test parcels, prints the scores."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_folder", help="dataset folder; without it the embedded simulated dataset")
    parser.add_argument("--labels", help="nomenclature of META/labels.json, as in train.py")
    parser.add_argument("--sub_classes", type=parse_labels, help="labels to tell apart, as in train.py")
    parser.add_argument("--cache_dir", help="where to keep the packed copy of the pixels")
    parser.add_argument("--kfold", type=positive, default=5, help="number of folds")
    parser.add_argument("--rdm_seed", type=natural, default=1, help="seed of the folds and of the forest")
    parser.add_argument("--trees", type=positive, default=500, help="trees of the forest")
    args = parser.parse_args()
    folder = Path(args.dataset_folder or embedded_dataset())
    check_folder(folder)
    labels = choose_nomenclature(folder, args.labels, LABELS)
    nomenclature = read_nomenclature(folder, labels)
    present = {nomenclature.get(str(parcel)) for parcel in list_parcels(folder)} - {None}
    classes = choose_classes(list(present), args.sub_classes)
    settings = DataSettings(labels=labels, classes=tuple(classes), npixel=1, n_extra=0)
    dataset = PixelSetData.for_run(folder, settings, cache_dir=args.cache_dir)
    if dataset.varying:
        raise UserError(f"dates of {folder} vary, or have gaps; the forest needs dates that parcels share.")
    features = np.stack([dataset.mean_series(i).ravel() for i in range(len(dataset))])
    confusions = []
    splits = fold_splits(len(dataset), args.kfold, args.rdm_seed)
    for train, val, test in progress_bar(splits, "training forests", "folds"):
        forest = RandomForestClassifier(args.trees, n_jobs=-1, random_state=args.rdm_seed)
        found = forest.fit(features[train + val], dataset.target[train + val]).predict(features[test])
        confusions.append(confusion_matrix(dataset.target[test], found, labels=range(len(classes))))
    total, folds = sum(confusions), np.array([(100 * accuracy(mat), mean_iou(mat)) for mat in confusions])
    spread = "accuracy {0:.1f} +- {2:.1f}, mIoU {1:.3f} +- {3:.3f}".format(*folds.mean(0), *folds.std(0))
    print(
        f"Random forest, {args.kfold} folds together: accuracy {100 * accuracy(total):.1f}%, "
        f"mIoU {mean_iou(total):.3f} (mean and deviation over folds: {spread})"
    )


if __name__ == "__main__":
    run_cli(main)
