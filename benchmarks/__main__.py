"""Measures the code against its textbook form and prints one table, with the machine's own limits beside it.

python -m benchmarks            some minutes on two cores
python -m benchmarks --quick    to see that it runs; its figures mean little
python -m benchmarks --full     folders of up to 200,000 parcels too
"""

import os
import platform
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.cases import DEFAULT, LARGEST, N_CHANNELS, Sides, evaluate, infer, load, step, train
from benchmarks.dates import print_dates_table
from benchmarks.measure import CELLS, Cell, Worker, copy_rate, count_flops, gemm_rate, measure, peak_memory
from common.errors import run_cli
from common.flags import Parser, positive
from data.settings import NPIXEL
from preprocessing.simulate import simulate
from preprocessing.simulation.seasons import DATES

USUAL: tuple[Cell, ...] = ((True, "fast"), (False, "textbook"))  # each side as its scripts run it
MAX_PIXELS = 128  # of the simulated parcels, twice as many as are drawn
HEADER = "| | fast | textbook | ratio | setting on both | on neither | floor |"
ALIGNMENT = "|---|---:|---:|---:|---:|---:|---:|"


class Sizes(NamedTuple):
    """How much is measured."""

    cells: tuple[Cell, ...]
    parcels: int
    batch_size: int
    rounds: int
    few_rounds: int  # of what takes long
    small_batch_size: int  # where dates or pixels grow
    more_parcels: tuple[int, ...]
    dates: tuple[int, ...]
    pixels: tuple[int, ...]


NORMAL = Sizes(CELLS, 1024, 128, 7, 3, 32, (1000, 4000), (12, 24, 48, 96), (16, 64, 256))
FULL = NORMAL._replace(more_parcels=(1000, 4000, 20_000, 50_000, 200_000))
QUICK = Sizes(USUAL, 100, 16, 1, 1, 4, (100,), (12,), (16,))


def parse_args() -> Namespace:
    """Reads the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="tiny sizes and a single round")
    length.add_argument("--full", action="store_true", help="folders of up to 200,000 parcels too")
    parser.add_argument("--threads", type=positive, default=2, help="threads of PyTorch")
    return parser.parse_args()


def main() -> None:
    """Simulates folders, measures, prints."""
    args = parse_args()
    sizes = QUICK if args.quick else FULL if args.full else NORMAL
    with tempfile.TemporaryDirectory() as temporary:
        folders = {n: f"{temporary}/{n}" for n in {sizes.parcels, *sizes.more_parcels}}
        for n, folder in folders.items():
            simulate(folder, n, seed=1, max_pixels=MAX_PIXELS)
        table = Table(args.threads, sizes)
        fill(table, sizes, folders)
        print_dates_table(
            table.workers[True], Path(temporary), sizes.parcels, sizes.batch_size, sizes.few_rounds
        )
        table.close()


class Table:
    """The table, printed row by row.

    Args:
        threads: threads of PyTorch in the workers.
        sizes: how much is measured.
    """

    def __init__(self, threads: int, sizes: Sizes) -> None:
        self.threads, self.sizes = threads, sizes
        self.workers = {keep: Worker(keep, threads) for keep in (True, False)}
        self.gemm, self.copy = (self.workers[True].ask(rate) for rate in (gemm_rate, copy_rate))
        print(
            f"{os.cpu_count()} cores, {threads} threads, {platform.system()}, PyTorch {torch.__version__}; "
            "CUDA is not measured.\n"
            f"Matrix product (float32) {self.gemm / 1e9:.0f} GFLOP/s, copy {self.copy / 1e9:.0f} GB/s, "
            f"load average {load_average()}.\n\n"
            f"Milliseconds per batch, of {sizes.batch_size} parcels where no number is given. Fast with the "
            f"allocator setting, textbook without, unless a column says otherwise.\n\n{HEADER}\n{ALIGNMENT}"
        )

    def add(
        self,
        name: str,
        case: Callable[..., Sides],
        rounds: int,
        cells: Sequence[Cell],
        parcels: int | None = None,
        **arguments: Any,
    ) -> None:
        """Measures a case and prints its row.

        Args:
            name: of the row.
            case: from `benchmarks.cases`.
            rounds: how often every cell is timed.
            cells: what is timed.
            parcels: size of the folder that the case goes through; None for a single batch.
            arguments: of the case.
        """
        seconds = measure(self.workers, case, rounds, cells, **arguments)
        floor = self.workers[True].ask(count_flops) / self.gemm
        if parcels is not None:
            B = arguments["batch_size"]
            batches = -(-parcels // B)
            written = 4 * B * NPIXEL * len(DATES) * N_CHANNELS  # the pixels of a batch, in bytes
            floor = floor / batches + written / self.copy
            seconds = {cell: value / batches for cell, value in seconds.items()}
        self.print_row(name, {cell: 1000 * value for cell, value in seconds.items()}, f"{1000 * floor:.1f}")

    def add_memory(self) -> None:
        """Measures the memory a training step needs, each cell in a process of its own, and prints it."""
        peak = {}
        for keep, side in self.sizes.cells:
            worker = Worker(keep, self.threads)
            worker.prepare(step, preset=DEFAULT, batch_size=self.sizes.batch_size)
            peak[keep, side] = worker.ask(peak_memory, side) / 1e6
            worker.close()
        self.print_row("peak memory of a step, MB", peak, "")

    def print_row(self, name: str, values: dict[Cell, float], floor: str) -> None:
        """Prints the values of the cells, their ratios, and the floor."""

        def ratio(fast: Cell, textbook: Cell) -> str:
            return f"{values[textbook] / values[fast]:.1f}" if {fast, textbook} <= values.keys() else ""

        ratios = (
            ratio((one, "fast"), (other, "textbook"))
            for one, other in ((True, False), (True, True), (False, False))
        )
        columns = [name, *(f"{values[cell]:.1f}" for cell in USUAL), *ratios, floor]
        print(f"| {' | '.join(columns)} |", flush=True)

    def close(self) -> None:
        """Ends the workers and says how busy the machine was."""
        for worker in self.workers.values():
            worker.close()
        print(f"\nLoad average at the end {load_average()}; more than the cores mean a busy machine.")


def load_average() -> str:
    """Processes that wanted to run in the last 1, 5 and 15 minutes."""
    return ", ".join(f"{value:.1f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"


def fill(table: Table, sizes: Sizes, folders: dict[int, str]) -> None:
    """Adds all rows to the table."""
    n, B, b = sizes.parcels, sizes.batch_size, sizes.small_batch_size
    whole = {"cells": sizes.cells, "parcels": n, "path": folders[n], "batch_size": B}
    one = {"cells": sizes.cells, "preset": DEFAULT, "batch_size": B}
    table.add("loader, with jitter", load, sizes.rounds, jitter=True, **whole)
    table.add("loader, without jitter", load, sizes.rounds, jitter=False, **whole)
    table.add("training step", step, sizes.rounds, **one)
    table.add("training step, L-TAE 3840k", step, sizes.few_rounds, **one | {"preset": LARGEST})
    table.add("inference", infer, sizes.rounds, **one)
    table.add("training epoch, end to end", train, sizes.few_rounds, **whole)
    table.add("evaluation epoch, end to end", evaluate, sizes.few_rounds, **whole)
    table.add_memory()
    growing = {"rounds": sizes.few_rounds, "cells": USUAL}
    for n in sizes.more_parcels:
        path = folders[n]
        table.add(f"loader, {n:,} parcels", load, parcels=n, path=path, batch_size=B, jitter=True, **growing)
    small = {"preset": DEFAULT, "batch_size": b, **growing}
    for L in sizes.dates:
        table.add(f"training step, {b} parcels, {L} dates", step, n_dates=L, **small)
    for S in sizes.pixels:
        table.add(f"training step, {b} parcels, {S} pixels", step, npixel=S, **small)


if __name__ == "__main__":
    run_cli(main)
