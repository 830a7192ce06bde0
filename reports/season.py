"""How early in the season a model knows the crops: its scores out of fold against the last date that it is shown.

    python -m reports.season RUN [--dataset_folder D]

writes season.csv and season.png to the results folder RUN, of a model for varying dates. Nothing is trained.
"""

import common  # isort: skip  # noqa: F401  # before torch, see there

from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from common.errors import UserError, as_user_error, run_cli
from common.files import write_csv
from common.flags import Parser, natural, positive
from data.days import find_used, read_days
from dataset import UNKNOWN
from learning.metrics import accuracy, confusion_matrix, mean_iou
from learning.predictions import join, predict
from learning.run import Run, open_run
from reports.plots import TRAIN_COLOUR, VAL_COLOUR, save_figure, show_dates

SEASON, PICTURE = "season.csv", "season.png"
_STEP = 10  # days between two last dates where parcels have dates of their own


class Stage(NamedTuple):
    """What is known at a point of the season.

    Attributes:
        until: last day that pixels are used of.
        parcels: number of parcels with a known class that were seen by then, and that a fold held out.
        accuracy, miou: of these parcels, 0 to 1.
    """

    until: date
    parcels: int
    accuracy: float
    miou: float


def last_days(run: Run, folder: Path, ids: Sequence[str]) -> list[date]:
    """The days to end with: all dates that parcels share; else one every ten days, and the last."""
    days = read_days(folder, [int(parcel) for parcel in ids])
    every = days.values
    if run.data.until is not None:
        every = every[find_used(days, run.data.season_start, run.data.until).values]
    if days.counts is None:
        numbers = np.unique(every)
    else:
        numbers = np.unique([*range(int(every.min()), int(every.max()), _STEP), int(every.max())])
    return [date.fromordinal(int(number)) for number in numbers]


def follow_season(
    run: Run,
    dataset_folder: Path | None = None,
    device: str | None = None,
    batch_size: int = 128,
    num_workers: int = 0,
) -> list[Stage]:
    """Scores out of fold for ever later last days.

    Args:
        run: of a model for varying dates.
        dataset_folder: a dataset with labels; the run's own if not given.
        device: where to compute; without it on a GPU if there is one.
        batch_size: parcels at a time.
        num_workers: most loading processes.

    Raises:
        UserError: if the model needs all dates, or no parcel can be scored.
    """
    with as_user_error(FileNotFoundError, ValueError, TypeError):
        ensemble = run.load("all", device)
    if run.architecture.n_dates is not None:
        raise UserError(
            f"the model of {run.folder} needs all {run.architecture.n_dates} dates; train one with --varying_dates."
        )
    dataset, device = run.open_dataset(dataset_folder), next(ensemble.parameters()).device
    jury = run.jury(dataset, ensemble)
    if not jury.is_known or not ((dataset.target != UNKNOWN) & ~jury.seen).any():
        raise UserError(
            f"no parcel of {dataset.folder} has a label that the folds of {run.folder} are known not to have learned from."
        )
    stages = []
    for day in last_days(run, dataset.folder, dataset.pid):
        until = replace(run, data=replace(run.data, until=f"{day:%Y%m%d}"))
        view = until.open_dataset(dataset.folder)
        found = join(list(predict(jury, view, run.data.classes, batch_size, num_workers, device)))
        fair = (found.targets != UNKNOWN) & (found.predicted != UNKNOWN) & ~found.seen
        true, predicted = found.targets[fair], found.predicted[fair]
        mat = confusion_matrix(true, predicted, labels=range(len(run.data.classes)))
        stage = Stage(day, int(fair.sum()), accuracy(mat), mean_iou(mat))
        stages.append(stage)
        print(
            f"until {day}: accuracy {100 * stage.accuracy:.1f}%, mIoU {stage.miou:.3f} on {stage.parcels} parcels"
        )
    return stages


def plot_season(stages: Sequence[Stage]) -> Figure:
    """Accuracy and mIoU against the last day."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axis = figure.subplots()
    days = [stage.until for stage in stages]
    axis.plot(days, [stage.accuracy for stage in stages], "o-", ms=4, color=TRAIN_COLOUR, label="accuracy")
    axis.plot(days, [stage.miou for stage in stages], "o-", ms=4, color=VAL_COLOUR, label="mIoU")
    axis.set(ylim=(0, 1), xlabel="last date that is used", title="Out of fold, all dates up to a day")
    show_dates(axis)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def main() -> None:
    """Command line: python -m reports.season RUN."""
    parser = Parser(
        description="Scores of a model against the last date that is used: season.csv and season.png."
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="results folder of train.py, of a model for varying dates")
    add("--dataset_folder", help="dataset with labels; without it that of the training")
    add("--batch_size", type=positive, default=128, help="parcels per batch")
    add("--num_workers", type=natural, default=8, help="most loading processes")
    add("--device", help="cpu, cuda or cuda:N; without it CUDA if there is a GPU, else the CPU")
    args = parser.parse_args()
    run = open_run(args.run)
    folder = args.dataset_folder and Path(args.dataset_folder)
    stages = follow_season(run, folder, args.device, args.batch_size, args.num_workers)
    rows = ([f"{s.until:%Y%m%d}", s.parcels, f"{s.accuracy:.6g}", f"{s.miou:.6g}"] for s in stages)
    write_csv(run.folder / SEASON, [("until", "parcels", "accuracy", "mIoU"), *rows])
    save_figure(run.folder / PICTURE, plot_season(stages))
    print(f"Season: {run.folder / SEASON}, {run.folder / PICTURE}")


if __name__ == "__main__":
    run_cli(main)
