"""Measures this code against its textbook form, and dates that vary against shared ones, in one table.

python -m benchmarks            some ten minutes on two cores
python -m benchmarks --quick    to see that it runs; its figures mean little
"""

import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks import measure
from benchmarks.cases import LARGEST, Setting, write_folder
from common.errors import run_cli
from common.flags import Parser, positive
from data.settings import NPIXEL, DataSettings
from preprocessing.simulation.crops import C


class Sizes(NamedTuple):
    """How much is measured, how often, and for how many seconds at least."""

    parcels: int
    batch_size: int
    npixel: int
    rounds: int
    least: float


NORMAL, QUICK = Sizes(512, 128, NPIXEL, 5, 0.25), Sizes(100, 8, 8, 1, 0)
# Fewest and most dates of a parcel, None for the published ones, and whether pixels are missing.
DATASETS = ((None, False), ((72, 72), False), ((43, 96), False), ((43, 96), True))
NAMES = ("loader", "training step", "inference", "training epoch", "evaluation epoch")
CASES = dict(zip(("load", "step", "infer", "train", "evaluate"), NAMES))
Row = tuple[str, str, list[Setting]]  # name, case of `Cases`, this code and what it is compared with


def main() -> None:
    """Simulates, measures, prints."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes and a single round")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of PyTorch")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print_table(Path(temporary), QUICK if args.quick else NORMAL, args.threads)


def list_rows(folder: Path, sizes: Sizes) -> list[Row]:
    """Simulates datasets and lists the rows."""
    n, B, S = sizes.parcels, sizes.batch_size, sizes.npixel
    paths = [write_folder(folder / str(i), n, S, *kind) for i, kind in enumerate(DATASETS)]
    published, more, own, gaps = (Setting(path, DataSettings(npixel=S), batch_size=B) for path in paths)

    def against_textbook(name: str, case: str, **changes: object) -> Row:
        ours = published._replace(**changes)
        plain = ours._replace(textbook=True)
        return name, case, [ours, plain._replace(keeps_memory=False), plain]

    rows = [against_textbook(name, case, jitter=case != "evaluate") for case, name in CASES.items()]
    rows.insert(1, against_textbook("loader, without jitter", "load", jitter=False))
    rows.insert(3, against_textbook("training step, L-TAE 3840k", "step", preset=LARGEST))
    for case, name in CASES.items():
        rows.append((f"{name}, 43 to 96 dates", case, [own, published, more]))
        rows.append((f"{name}, 43 to 96 dates, gaps", case, [gaps, published, more]))
    return rows


def print_table(folder: Path, sizes: Sizes, threads: int) -> None:
    """Measures all rows, and prints each as soon as it is measured."""
    rows = list_rows(folder, sizes)
    processes = {keeps: measure.start_process(keeps, threads) for keeps in (True, False)}
    product, copy = processes[True].submit(measure.machine_rates, sizes.least).result()
    print(
        f"{os.cpu_count()} cores, {threads} threads, {platform.system()}, PyTorch {torch.__version__}; matrix product "
        f"(float32) {product / 1e9:.0f} GFLOP/s, copy {copy / 1e9:.0f} GB/s.\n\n"
        f"Milliseconds per 1,000 (parcel, date) pairs, in batches of {sizes.batch_size} parcels. Compared with the "
        "textbook form, in a process with the system's allocator setting / with that of train.py; where dates vary, "
        "with 24 / 72 dates that all parcels share.\n\n"
        "| | this code | compared with | ratio | floor |\n|---|---:|---:|---:|---:|"
    )
    for name, case, settings in rows:
        times: dict[Setting, list[float]] = {setting: [] for setting in settings}
        for _ in range(sizes.rounds):  # in turns, so that all see the same machine
            for setting in settings:
                process = processes[setting.keeps_memory]
                times[setting].append(process.submit(measure.run_time, setting, case, sizes.least).result())
        pairs = [setting.count_pairs(case) for setting in settings]
        floor = ""
        if settings[-1].textbook:
            flops = 0 if case == "load" else process.submit(measure.count_flops, settings[-1], case).result()
            written = 0 if case in ("step", "infer") else 4 * pairs[0] * sizes.npixel * C  # float32 pixels
            floor = f"{1e6 * (flops / product + written / copy) / pairs[0]:.2f}"
        print_row(name, [1e6 * median(times[x]) / n for x, n in zip(settings, pairs)], floor)
    for process in processes.values():
        process.shutdown()
    weights = []
    for setting in next(settings for _, case, settings in rows if case == "step"):
        with measure.start_process(setting.keeps_memory, threads) as process:
            weights.append(process.submit(measure.peak_memory, setting, "step").result() / 1e6)
    print_row("peak memory of a training step, MB", weights)
    if hasattr(os, "getloadavg"):
        print(f"\nLoad average {os.getloadavg()[0]:.1f}; more than the cores mean a busy machine.")


def print_row(name: str, values: Sequence[float], floor: str = "") -> None:
    """Prints the value of this code, those of the others, and the ratios."""
    ours, *others = values
    compared = " / ".join(f"{value:.2f}" for value in others)
    ratios = " / ".join(f"{value / ours:.2f}" if ours else "unknown" for value in others)
    print(f"| {name} | {ours:.2f} | {compared} | {ratios} | {floor} |", flush=True)


if __name__ == "__main__":
    run_cli(main)
