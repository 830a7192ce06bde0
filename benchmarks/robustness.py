"""What training for other dates gains: simulated 2017 to train on, other simulated parcels of 2017 and other years to test.

python -m benchmarks.robustness            some ten minutes on two cores
python -m benchmarks.robustness --quick    to see that it runs; its figures mean little

Nothing here was measured from space. Another simulated year has other dates and clouds, its crops grow 5 to 12 days
earlier or later, and stronger or weaker. Each line is the mean over seeds, and over years where there are several.
"""

import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from common.errors import run_cli
from common.flags import Parser, positive
from common.machine import keep_freed_memory, set_seeds
from common.progress import progress_bar
from data.draws import stream_key
from data.metadata import Arrays
from data.samplers import BatchSampler
from data.settings import CLASSES_20, EXTRA_FEATURE, LABELS
from dataset import PixelSetData, batch_loader, find_norm
from learning.engine import evaluation, train_epoch
from learning.focal_loss import FocalLoss
from learning.metrics import accuracy, mean_iou
from learning.options import DataShape, resolve_architecture
from learning.weight_init import freeze_idle_biases, weight_init
from models.architecture import read_preset
from preprocessing.simulate import simulate
from preprocessing.simulation.seasons import PUBLISHED_YEAR

CPU = torch.device("cpu")
MAX_PIXELS, BATCH_SIZE, LEARNING_RATE = 40, 32, 0.001
IRREGULAR = (15, 40)  # dates of a parcel of the irregular sets

# The flags of train.py for each line of the table; the first line is the published model, of one table of dates.
JANUARY = {"varying": True, "season_start": (1, 1)}
LEFT_OUT, MOVED = {"temporal_dropout": 0.2}, {"temporal_shift": 10}
VARIANTS: dict[str, dict[str, Any]] = {
    "fixed dates": {},
    "--varying_dates": {"varying": True},
    "--season_start 01-01": JANUARY,
    "... --temporal_dropout 0.2": JANUARY | LEFT_OUT,
    "... --temporal_shift 10": JANUARY | MOVED,
    "... both": JANUARY | LEFT_OUT | MOVED,
}


class Sizes(NamedTuple):
    """How much is trained and tested."""

    training_parcels: int
    test_parcels: int
    years: tuple[int, ...]
    epochs: int


NORMAL = Sizes(1000, 400, (2018, 2019, 2020), 20)
QUICK = Sizes(100, 100, (2018,), 1)
Scores = tuple[float, float]  # accuracy in percent, mIoU in 0..1


def main() -> None:
    """Simulates, trains, tests, prints."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few parcels, one epoch")
    parser.add_argument("--preset", default="LTAE/112k", help="configuration of config_fig2.json")
    parser.add_argument("--seeds", type=positive, default=2, help="trainings per line")
    args = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        print_table(args, Path(temporary), QUICK if args.quick else NORMAL)


def print_table(args: Namespace, folder: Path, sizes: Sizes) -> None:
    """Trains and tests every variant, and prints a line for each."""
    training, tests = write_datasets(folder, sizes)
    print(
        f"{args.preset} trained on {sizes.training_parcels:,} simulated parcels of {PUBLISHED_YEAR}, {sizes.epochs} epochs, "
        f"batches of {BATCH_SIZE}, {args.seeds} seed(s); accuracy in percent / mIoU on {sizes.test_parcels:,} other simulated "
        f"parcels of each year (irregular: {IRREGULAR[0]} to {IRREGULAR[1]} dates for each parcel).\n\n"
        f"| | {' | '.join(tests)} |\n|---|{'---:|' * len(tests)}"
    )
    start = time.perf_counter()
    for name, options in VARIANTS.items():
        runs = [
            train_and_test(training, tests, args.preset, options, sizes.epochs, seed, f"{name}, seed {seed}")
            for seed in range(1, args.seeds + 1)
        ]
        cells = (np.mean([run[test] for run in runs], axis=0) if runs[0][test] else None for test in tests)
        columns = ["not possible" if cell is None else f"{cell[0]:.1f} / {cell[1]:.3f}" for cell in cells]
        print(f"| {name} | {' | '.join(columns)} |", flush=True)
    print(f"\n{(time.perf_counter() - start) / 60:.0f} minutes, {os.cpu_count()} cores.")


def write_datasets(folder: Path, sizes: Sizes) -> tuple[Path, dict[str, list[Path]]]:
    """Simulates the training set, and the test sets by the column they belong to."""
    tests: dict[str, list[Path]] = {}
    years = ", ".join(map(str, sizes.years))
    for kind, options in (("", {}), (", irregular with gaps", {"irregular": IRREGULAR, "gaps": True})):
        for column, group in ((str(PUBLISHED_YEAR), (PUBLISHED_YEAR,)), (years, sizes.years)):
            paths = [folder / f"{year}{'-irregular' if options else ''}" for year in group]
            for path, year in zip(paths, group):
                simulate(path, sizes.test_parcels, 2, max_pixels=MAX_PIXELS, year=year, **options)
            tests[column + kind] = paths
    training = folder / "training"
    simulate(training, sizes.training_parcels, 1, max_pixels=MAX_PIXELS)
    return training, tests


def train_and_test(
    training: Path,
    tests: Mapping[str, Sequence[Path]],
    preset: str,
    options: Mapping[str, Any],
    epochs: int,
    seed: int,
    name: str,
) -> dict[str, Scores | None]:
    """Trains one model, and tests it on every set that it can take: mean scores over the sets of a column, else None."""
    dataset = open_dataset(training, options)
    dataset.set_norm(find_norm(dataset)[0])
    model = train(dataset, preset, epochs, seed, name)
    fair = {key: options[key] for key in ("varying", "season_start") if key in options}
    scores: dict[str, Scores | None] = {}
    for column, paths in tests.items():
        found = []
        for path in paths:
            test = open_dataset(path, fair, dataset.extra_stats)
            if dataset.varying or (not test.varying and test.date_positions == dataset.date_positions):
                test.set_norm(dataset.norm)
                found.append(score(model, test))
        scores[column] = tuple(np.mean(found, axis=0)) if found else None
    return scores


def open_dataset(path: Path, options: Mapping[str, Any], extra_stats: Arrays | None = None) -> PixelSetData:
    """A dataset, its pixels not normalised yet, for a test with the statistics of the extra features trained on."""
    classes = list(CLASSES_20)
    return PixelSetData(
        path, LABELS, MAX_PIXELS, classes, extra_feature=EXTRA_FEATURE, extra_stats=extra_stats, **options
    )


def train(dataset: PixelSetData, preset: str, epochs: int, seed: int, name: str) -> nn.Module:
    """The model after the last epoch, trained as train.py does."""
    n_classes = len(CLASSES_20)
    architecture = resolve_architecture({}, read_preset(preset), DataShape.of(dataset, n_classes))
    set_seeds(stream_key("weights", seed) % 2**63)
    model = architecture.build().apply(weight_init)
    freeze_idle_biases(model)
    optimizer, criterion = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE), FocalLoss(1)
    for epoch in progress_bar(range(epochs), name, "epochs"):
        sampler = BatchSampler(
            range(len(dataset)), BATCH_SIZE, stream_key("order", seed, epoch), drop_single=True
        )
        loader = batch_loader(dataset.epoch_draws(seed, epoch), sampler, num_workers=0)
        train_epoch(model, optimizer, criterion, loader, CPU, n_classes)
    return model


def score(model: nn.Module, dataset: PixelSetData) -> Scores:
    """Accuracy in percent and mIoU."""
    loader = batch_loader(
        dataset.evaluation(seed=1), BatchSampler(range(len(dataset)), BATCH_SIZE), num_workers=0
    )
    _, confusion = evaluation(model, FocalLoss(1), loader, CPU, len(CLASSES_20))
    return 100 * accuracy(confusion), mean_iou(confusion)


if __name__ == "__main__":
    run_cli(main)
