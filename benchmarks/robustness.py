"""What training for other dates gains: trained on simulated 2017, tested on other parcels of 2017 and of other years.

python -m benchmarks.robustness            some ten minutes on two cores
python -m benchmarks.robustness --quick    to see that it runs; its figures mean little

Nothing here was measured from space. Another simulated year has other dates and clouds, its crops grow 5 to 12 days
earlier or later, and stronger or weaker. Each line is the mean over seeds, and over years where there are several.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.cases import DEFAULT, Cases, Setting
from common.errors import run_cli
from common.flags import Parser, positive
from common.machine import keep_freed_memory
from common.progress import progress_bar
from data.settings import DataSettings
from dataset import PixelSetData
from preprocessing.simulate import simulate
from preprocessing.simulation.seasons import PUBLISHED_YEAR

MAX_PIXELS, BATCH_SIZE = 40, 32
IRREGULAR = (15, 40)  # dates of a parcel of the irregular sets

# Lines of the table by flags of train.py; the first one is the published model, of one table of dates.
ANY_DATES = DataSettings(npixel=MAX_PIXELS, varying=True)
VARYING = Setting("", ANY_DATES, batch_size=BATCH_SIZE)
JANUARY = VARYING._replace(data=replace(ANY_DATES, season_start=(1, 1)))
VARIANTS = {
    "fixed dates": VARYING._replace(data=replace(ANY_DATES, varying=False)),
    "--varying_dates": VARYING,
    "--season_start 01-01": JANUARY,
    "... --temporal_dropout 0.2": JANUARY._replace(temporal_dropout=0.2),
    "... --temporal_shift 10": JANUARY._replace(temporal_shift=10),
    "... both": JANUARY._replace(temporal_dropout=0.2, temporal_shift=10),
}
# Parcels of the training set, of each test set, years of the test sets, and epochs.
NORMAL, QUICK = (1000, 400, (2018, 2019, 2020), 20), (100, 100, (2018,), 1)


def main() -> None:
    """Simulates, trains, tests, prints."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few parcels, one epoch")
    parser.add_argument("--preset", default=DEFAULT, help="configuration of config_fig2.json")
    parser.add_argument("--seeds", type=positive, default=2, help="trainings per line")
    args = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        print_table(Path(temporary), QUICK if args.quick else NORMAL, args.preset, args.seeds)


def print_table(folder: Path, sizes: tuple[int, int, tuple[int, ...], int], preset: str, seeds: int) -> None:
    """Simulates all sets, trains and tests every variant, and prints a line for each."""
    n_training, n_test, years, epochs = sizes
    training, tests = folder / "training", {}
    simulate(training, n_training, 1, max_pixels=MAX_PIXELS)
    for kind, options in (("", {}), (", irregular with gaps", {"irregular": IRREGULAR, "gaps": True})):
        for group in ((PUBLISHED_YEAR,), years):
            paths = {year: folder / f"{year}{kind}" for year in group}
            for year, path in paths.items():
                simulate(path, n_test, 2, max_pixels=MAX_PIXELS, year=year, **options)
            tests[", ".join(map(str, group)) + kind] = list(paths.values())
    print(
        f"{preset} trained on {n_training:,} simulated parcels of {PUBLISHED_YEAR}, {epochs} epochs, batches of "
        f"{BATCH_SIZE}, {seeds} seed(s); accuracy in percent / mIoU on {n_test:,} other simulated parcels of each year "
        f"(irregular: {IRREGULAR[0]} to {IRREGULAR[1]} dates for each parcel).\n\n"
        f"| | {' | '.join(tests)} |\n|---|{'---:|' * len(tests)}"
    )
    for name, variant in VARIANTS.items():
        runs = []
        for seed in range(1, seeds + 1):
            cases = Cases(variant._replace(folder=training, preset=preset, seed=seed))
            for _ in progress_bar(range(epochs), f"{name}, seed {seed}", "epochs"):
                cases.train()
            runs.append([test(cases, paths) for paths in tests.values()])
        means = [None if None in column else np.mean(column, axis=0) for column in zip(*runs)]
        cells = ["not possible" if mean is None else "{:.1f} / {:.3f}".format(*mean) for mean in means]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def test(cases: Cases, paths: Sequence[Path]) -> tuple[float, float] | None:
    """Mean accuracy in percent and mIoU in 0..1 over some sets; None where the model cannot take them."""
    trained_on, scores = cases.dataset, []
    settings = replace(cases.setting.data, extra_stats=trained_on.extra_stats)
    for path in paths:
        dataset = PixelSetData.for_run(path, settings)
        if not settings.varying and dataset.date_positions != trained_on.date_positions:
            return None
        dataset.set_norm(trained_on.norm)
        found = cases.evaluate(dataset)
        scores.append((found["val_accuracy"], found["val_IoU"]))
    return tuple(np.mean(scores, axis=0))


if __name__ == "__main__":
    run_cli(main)
