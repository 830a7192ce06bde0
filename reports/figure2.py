"""Figure 2 of the paper from the results folders of its configurations: a table and a picture of what is there."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from common.files import read_json, write_csv
from data.settings import CLASSES_20
from learning.metrics import accuracy, mean_iou
from learning.options import resolve_architecture
from learning.results import CONFIG, read_confusions
from learning.run import AGRI, PUBLISHED_DAYS, Run, read_run
from models.architecture import PRESETS, read_preset
from models.layers import trainable_parameters
from reports.plots import save_figure

TIME, TABLE, PICTURE = "training_time.json", "figure2.csv", "figure2.png"
PUBLISHED = Path(__file__).parent / "published_fig2.json"
# What tells Sentinel2-Agri: its classes, its dates, and its parcels, within what other selections may leave out.
AGRI_PARCELS, AGRI_TOLERANCE = 191_703, 0.01
TITLES = {"LTAE": "L-TAE", "TAE": "TAE", "GRU": "GRU", "TempCNN": "TempCNN"}
COLOURS = {"LTAE": "#0072b2", "TAE": "#d55e00", "GRU": "#009e73", "TempCNN": "#aa4499"}
MARKERS = {"LTAE": "o", "TAE": "s", "GRU": "^", "TempCNN": "D"}


class Row(NamedTuple):
    """A configuration's line of figure2.csv; scores of the summed confusion matrix of the folds tested so far."""

    configuration: str
    parameters_temporal: int
    parameters: int
    OA: float  # overall accuracy, 0 to 1
    OA_std: float  # over folds
    mIoU: float  # 0 to 1
    mIoU_mean: float  # over folds
    mIoU_std: float
    training_seconds: float | None  # of all folds, measured by figure2.py; None for a run of train.py alone
    flops_temporal: int | None  # see `measure_model`
    flops: int | None
    folds_tested: int
    folds: int
    epochs: int
    parcels: int  # tested so far


def draw(res_dir: Path) -> list[Row]:
    """Writes figure2.csv and figure2.png of the configurations that have a tested fold; returns the table.

    Without any, it writes nothing and the table is empty.

    Raises:
        UserError: if a file is damaged.
    """
    found = [line for name in all_configurations() if (line := read_line(res_dir, name)) is not None]
    if not found:
        return []
    rows, runs = map(list, zip(*found))
    cells = ([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)
    write_csv(res_dir / TABLE, [Row._fields, *cells], line_end="\n")
    on_paper_data = all(is_sentinel_agri(row, run) for row, run in zip(rows, runs))
    save_figure(res_dir / PICTURE, plot_comparison(rows, describe_runs(rows, runs), on_paper_data))
    return rows


def all_configurations() -> list[str]:
    """Names of the configurations of the figure, ARCHITECTURE/SIZE, in the order of their file."""
    return [f"{architecture}/{size}" for architecture, sizes in read_json(PRESETS).items() for size in sizes]


def read_line(res_dir: Path, name: str) -> tuple[Row, Run] | None:
    """A configuration's line and its run; None if no fold of it is tested yet."""
    folder = res_dir / name
    if not (folder / CONFIG).exists():
        return None
    run = read_run(folder)
    folds, epochs = run.training.kfold, run.training.epochs
    tested = read_confusions(folder, len(run.data.classes))
    matrices = [mat for fold, mat in tested.items() if fold <= folds]
    if not matrices:
        return None
    total = sum(matrices)
    by_fold = np.array([mean_iou(mat) for mat in matrices])
    parameters, flops = measure_model(run)
    scores = (accuracy(total), float(np.std([accuracy(mat) for mat in matrices])))
    scores += (mean_iou(total), float(by_fold.mean()), float(by_fold.std()))
    progress = len(matrices), folds, epochs, int(total.sum())
    return Row(name, *parameters, *scores, read_seconds(folder), *flops, *progress), run


def read_seconds(folder: Path) -> float | None:
    """What the training of a run took so far, as figure2.py kept it; None if it did not train it.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / TIME
    if not path.exists():
        return None
    content = read_json(path)
    seconds = content.get("seconds") if isinstance(content, dict) else None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise UserError(f"{path} is damaged; remove it, only the time is lost.")
    return float(seconds)


def measure_model(run: Run) -> tuple[tuple[int, int], tuple[int | None, int | None]]:
    """Trainable parameters, and floating-point operations per parcel: of the temporal encoder, and in all.

    Operations are those of matrix products and convolutions in prediction, an addition and a multiplication each, for
    one parcel with all of the run's dates and pixels; None where every parcel has dates of its own. Nothing is
    computed: the model has shapes but no numbers.
    """
    sizes = run.architecture
    dates, channels, pixels, extra = sizes.n_dates, sizes.input_dim, run.data.npixel, sizes.n_extra
    with torch.device("meta"):
        model = sizes.build().eval()
    parameters = trainable_parameters(model.temporal_encoder), trainable_parameters(model)
    if dates is None:
        return parameters, (None, None)
    with torch.device("meta"):
        sets = torch.empty(1, dates, channels, pixels), torch.empty(1, dates, pixels)
        x = (sets, torch.empty(1, dates, extra)) if extra else sets
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    temporal = counter.get_flop_counts()[f"{type(model).__name__}.temporal_encoder"]
    return parameters, (sum(temporal.values()), counter.get_total_flops())


def describe_runs(rows: Sequence[Row], runs: Sequence[Run]) -> str:
    """What the runs were made with: dataset, folds, epochs."""
    parcels = max(row.parcels for row in rows)
    if any(run.about.get("simulated") for run in runs):
        data = "simulated data, nothing measured"
    else:
        data = Path(str(runs[0].about.get("dataset_folder", ""))).name or "unknown data"
    settings = {(row.folds, row.epochs) for row in rows}
    folds, epochs = settings.pop()
    how = "various settings" if settings else f"{folds} folds, {epochs} epoch{'s' * (epochs > 1)}"
    return f"{data} ({parcels:,} parcels), {how}, {len(rows)} of {len(all_configurations())} configurations"


def published_curves() -> dict[str, tuple[list[int], list[float]]]:
    """The paper's figure, {architecture: (parameters of the temporal encoder, mIoU in percent)}."""
    curves = {}
    for architecture, scores in read_json(PUBLISHED)["mIoU"].items():
        counts = []
        for size in scores:
            with torch.device("meta"):
                model = resolve_architecture({}, read_preset(f"{architecture}/{size}"), AGRI).build()
            counts.append(trainable_parameters(model.temporal_encoder))
        curves[architecture] = counts, list(scores.values())
    return curves


def is_sentinel_agri(row: Row, run: Run) -> bool:
    """Whether a run is on Sentinel2-Agri, as far as its classes, its dates and the number of its parcels tell."""
    parcels = row.parcels * row.folds / row.folds_tested
    return (
        not run.about.get("simulated")
        and run.data.classes == CLASSES_20
        and run.architecture.date_positions == PUBLISHED_DAYS
        and abs(parcels / AGRI_PARCELS - 1) <= AGRI_TOLERANCE
    )


def plot_comparison(rows: Sequence[Row], about: str, with_published: bool) -> Figure:
    """mIoU against the temporal encoder's parameters, a line per architecture.

    Args:
        rows: the table; a marker is hollow while folds are missing.
        about: what the runs were made with.
        with_published: whether the paper's figure is drawn faintly behind.
    """
    figure = Figure(figsize=(9.4, 5.2), layout="constrained")
    axis = figure.subplots()
    for architecture, (x, y) in (published_curves() if with_published else {}).items():
        axis.plot(x, y, "--", color=COLOURS[architecture], alpha=0.4, linewidth=1.3)
    if with_published:
        axis.plot([], [], "--", color="grey", alpha=0.7, label="published")
    for architecture, name in TITLES.items():
        own = [row for row in rows if row.configuration.startswith(f"{architecture}/")]
        own.sort(key=lambda row: row.parameters_temporal)
        style = {"color": COLOURS[architecture], "marker": MARKERS[architecture]}
        x = np.array([row.parameters_temporal for row in own])
        scores = [[row.mIoU, row.mIoU_mean, row.mIoU_std] for row in own]
        y, mean, spread = 100 * np.array(scores).reshape(-1, 3).T
        if own:
            axis.plot(x, y, label=name, linewidth=1.8, **style)
        if len(own) == 1:  # of which there is no line, and so no band
            axis.errorbar(x, mean, spread, linestyle="", capsize=4, color=style["color"])
        else:
            axis.fill_between(x, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)
        unfinished = np.array([row.folds_tested < row.folds for row in own], dtype=bool)
        axis.plot(x[unfinished], y[unfinished], linestyle="", markerfacecolor="white", **style)
    if any(row.folds_tested < row.folds for row in rows):
        axis.plot([], [], "o", color="grey", markerfacecolor="white", label="folds missing")
    axis.set(xscale="log", xlabel="trainable parameters of the temporal encoder", ylabel="mIoU (%)")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_title("How well parcels are classified, by the size of the temporal encoder", pad=24)
    axis.text(0.5, 1.03, about, transform=axis.transAxes, ha="center", fontsize="small", parse_math=False)
    axis.grid(alpha=0.3)
    about_band = "band or bar: mean\n\u00b1 standard deviation\nof folds"
    figure.legend(loc="outside right upper", frameon=False, title=about_band, title_fontsize="small")
    return figure
