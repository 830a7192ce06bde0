"""What dates of their own cost: milliseconds per 1,000 (parcel, date) pairs, beside dates that all parcels share."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.cases import CPU, DEFAULT, JITTER, N_CHANNELS, N_CLASSES, N_EXTRA, Sides, draw_sizes
from benchmarks.measure import Worker, measure
from data.batch import Series
from data.samplers import BatchSampler
from data.settings import CLASSES_20, EXTRA_FEATURE, LABELS, NPIXEL
from dataset import PixelSetData, batch_loader, find_norm
from learning.engine import evaluation, train_epoch
from learning.focal_loss import FocalLoss
from learning.weight_init import weight_init
from models.architecture import read_preset
from models.layers import DAYS
from models.pse import PixelSet
from models.stclassifier import PseLTae
from preprocessing.simulate import simulate


class Dates(NamedTuple):
    """A column: fewest and most dates of a parcel, whether all share them, and whether pixels are missing."""

    fewest: int
    most: int
    shared: bool
    gaps: bool = False


COLUMNS = {
    "24 dates": Dates(24, 24, shared=True),
    "72 dates": Dates(72, 72, shared=True),
    "43 to 96": Dates(43, 96, shared=False),
    "43 to 96, gaps": Dates(43, 96, shared=False, gaps=True),
}
MISSING = 0.1  # share of the pixels that are missing from a drawn batch with gaps
HEADER = f"| | {' | '.join(COLUMNS)} | 43 to 96 over 24 | over 72 | gaps over 24 |"


def print_dates_table(worker: Worker, folder: Path, parcels: int, batch_size: int, rounds: int) -> None:
    """Simulates folders, measures, prints.

    Args:
        worker: keeps freed memory.
        folder: where to write.
        parcels: number in a folder.
        batch_size: parcels per batch.
        rounds: how often everything is timed.
    """
    paths = {name: write_folder(folder / name.replace(" ", "-"), parcels, name) for name in COLUMNS}
    print(
        f"\nMilliseconds per 1,000 (parcel, date) pairs that are present, batches of {batch_size}: dates that all parcels "
        f"share; 43 to 96 for each parcel; and these with pixels missing. Then throughput over that of shared dates.\n\n"
        f"{HEADER}\n|---|{7 * '---:|'}"
    )
    in_batch = {name: count_pairs(draw(name, batch_size)[0]) for name in COLUMNS}
    in_folder = {name: count_pairs_of_folder(Path(path)) for name, path in paths.items()}
    rows: dict[str, tuple[Callable[..., Sides], dict[str, int], dict[str, Any]]] = {
        "loader, with jitter": (load, in_folder, {"paths": paths}),
        "training step": (step, in_batch, {}),
        "inference": (infer, in_batch, {}),
        "training epoch, end to end": (train, in_folder, {"paths": paths}),
        "evaluation epoch, end to end": (evaluate, in_folder, {"paths": paths}),
    }
    for row, (case, pairs, arguments) in rows.items():
        cells = [(True, name) for name in COLUMNS]
        seconds = measure({True: worker}, case, rounds, cells, batch_size=batch_size, **arguments)
        a, b, c, d = (1e6 * seconds[True, name] / pairs[name] for name in COLUMNS)
        print(
            f"| {row} | {a:.2f} | {b:.2f} | {c:.2f} | {d:.2f} | {a / c:.2f} | {b / c:.2f} | {a / d:.2f} |",
            flush=True,
        )


def write_folder(path: Path, parcels: int, name: str) -> str:
    """A simulated dataset for a column."""
    dates = COLUMNS[name]
    simulate(path, parcels, 1, max_pixels=2 * NPIXEL, irregular=(dates.fewest, dates.most), gaps=dates.gaps)
    if dates.shared:  # those of the first parcel for all: what the pixels show does not matter here
        file = path / "META" / "dates.json"
        file.write_text(json.dumps(dict(enumerate(json.loads(file.read_text())["1"]))))
    return str(path)


def count_pairs_of_folder(path: Path) -> int:
    """(parcel, date) pairs of a folder with a pixel that is present, above 0."""
    return sum(int(np.load(file)[:, 0].any(1).sum()) for file in (path / "DATA").glob("*.npy"))


def count_pairs(data: PixelSet | Series) -> int:
    """(parcel, date) pairs of a batch with a pixel that is present."""
    mask = data.mask if isinstance(data, Series) else data[0][1]
    return int((mask != 0).any(2).sum())


def draw(name: str, batch_size: int) -> tuple[PixelSet | Series, Tensor]:
    """A random batch in the layout of the loader, parcels as large as Sentinel-Agri's, and its classes."""
    dates, r = COLUMNS[name], np.random.default_rng(0)
    n_dates, sizes = r.integers(dates.fewest, dates.most + 1, batch_size), draw_sizes(batch_size, r)
    L = int(n_dates.max())
    pixels = torch.from_numpy(r.standard_normal((batch_size, NPIXEL, L, N_CHANNELS), dtype=np.float32))
    pixels = pixels.permute(0, 2, 3, 1)
    extra = torch.from_numpy(r.standard_normal((batch_size, 1, N_EXTRA), dtype=np.float32)).expand(-1, L, -1)
    target = torch.from_numpy(r.integers(0, N_CLASSES, batch_size))
    mask = torch.from_numpy((np.arange(NPIXEL) < sizes[:, None]).astype(np.float32)).unsqueeze(1)
    if dates.shared:
        return ((pixels, mask.expand(-1, L, -1)), extra), target
    days = np.sort(r.permuted(np.tile(np.arange(365), (batch_size, 1)), axis=1)[:, :L], axis=1)
    there = torch.from_numpy(np.arange(L) < n_dates[:, None])
    mask = mask * there.unsqueeze(2)
    if dates.gaps:
        mask = mask * torch.from_numpy(r.random(mask.shape) >= MISSING)
        mask[:, :, 0] = there  # as the loader gives it: dates that are absent come last
    return Series(pixels, mask, extra, torch.from_numpy(days).float() * there), target


def build_model(name: str) -> PseLTae:
    """An L-TAE of Figure 2 for the dates of a column."""
    dates = COLUMNS[name]
    torch.manual_seed(0)
    options = {"len_max_seq": dates.most} if dates.shared else {"len_max_seq": None, "positions": DAYS}
    return PseLTae(**options, **read_preset(DEFAULT)).apply(weight_init)


def build_optimizer(model: PseLTae) -> torch.optim.Optimizer:
    """Adam in its fused form."""
    return torch.optim.Adam(model.parameters(), fused=True)


def step(batch_size: int) -> Sides:
    """A training step of one batch: forward, focal loss, backward, Adam."""

    def prepare(name: str) -> Callable[[], None]:
        model, (data, target) = build_model(name), draw(name, batch_size)
        optimizer, criterion = build_optimizer(model), FocalLoss(1)

        def run() -> None:
            optimizer.zero_grad()
            criterion(model(data), target).backward()
            optimizer.step()

        return run

    return {name: prepare(name) for name in COLUMNS}


def infer(batch_size: int) -> Sides:
    """Logits of one batch in evaluation mode."""

    def prepare(name: str) -> Callable[[], Tensor]:
        model, (data, _) = build_model(name).eval(), draw(name, batch_size)
        return torch.no_grad()(lambda: model(data))

    return {name: prepare(name) for name in COLUMNS}


def load(paths: dict[str, str], batch_size: int) -> Sides:
    """A pass over each folder, as train.py loads it; nothing is done with the batches."""

    def prepare(path: str) -> Callable[[], None]:
        epochs = Epochs(path, batch_size)

        def run() -> None:
            for _ in epochs.following():
                pass

        return run

    return {name: prepare(path) for name, path in paths.items()}


def train(paths: dict[str, str], batch_size: int) -> Sides:
    """An epoch of training over each folder, end to end."""

    def prepare(name: str) -> Callable[[], object]:
        epochs, model = Epochs(paths[name], batch_size), build_model(name)
        optimizer, criterion = build_optimizer(model), FocalLoss(1)
        return lambda: train_epoch(model, optimizer, criterion, epochs.following(), CPU, N_CLASSES)

    return {name: prepare(name) for name in COLUMNS}


def evaluate(paths: dict[str, str], batch_size: int) -> Sides:
    """A pass over each folder in evaluation mode, end to end."""

    def prepare(name: str) -> Callable[[], object]:
        loader, model = Epochs(paths[name], batch_size).fixed(), build_model(name)
        return lambda: evaluation(model, FocalLoss(1), loader, CPU, N_CLASSES)

    return {name: prepare(name) for name in COLUMNS}


class Epochs:
    """The batches of a folder, without worker processes."""

    def __init__(self, path: str, batch_size: int) -> None:
        self.dataset = PixelSetData(path, LABELS, NPIXEL, CLASSES_20, None, EXTRA_FEATURE, JITTER)
        self.dataset.set_norm(find_norm(self.dataset)[0])
        self.batch_size, self._epochs = batch_size, itertools.count()

    def following(self) -> DataLoader:
        """The next epoch."""
        epoch = next(self._epochs)
        sampler = BatchSampler(range(len(self.dataset)), self.batch_size, epoch)
        return batch_loader(self.dataset.epoch_draws(epoch), sampler, num_workers=0)

    def fixed(self) -> DataLoader:
        """Every parcel once, without jitter, the same draws each time."""
        sampler = BatchSampler(range(len(self.dataset)), self.batch_size)
        return batch_loader(self.dataset.evaluation(seed=1), sampler, num_workers=0)
