"""What is measured. Every case is a function that prepares and returns two sides, "fast" and "textbook"."""

import copy
import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.plain import PlainClassifier, PlainPixelSets
from data.samplers import BatchSampler
from data.settings import CLASSES_20, EXTRA_FEATURE, LABELS, NPIXEL
from dataset import PixelSetData, batch_loader, find_norm
from learning.engine import evaluation, train_epoch
from learning.focal_loss import FocalLoss
from learning.weight_init import weight_init
from models.architecture import read_preset
from models.stclassifier import PseLTae
from preprocessing.simulation.fields import QUANTILES, SIZES

Sides = dict[str, Callable[[], object]]
SIDES = ("fast", "textbook")
DEFAULT, LARGEST = "LTAE/112k", "LTAE/3840k"
N_CHANNELS, N_EXTRA, N_CLASSES = 10, 4, len(CLASSES_20)
JITTER = (0.01, 0.05)
CPU = torch.device("cpu")


class Folder:
    """A dataset folder as both sides read it, without worker processes.

    Args:
        path: the folder.
        batch_size: parcels per batch.
        jitter: whether pixels get noise.
    """

    def __init__(self, path: str, batch_size: int, jitter: bool = True) -> None:
        noise = JITTER if jitter else None
        self.fast = PixelSetData(path, LABELS, NPIXEL, CLASSES_20, None, EXTRA_FEATURE, noise)
        norm, _ = find_norm(self.fast)
        self.fast.set_norm(norm)
        self.textbook = PlainPixelSets(path, LABELS, list(CLASSES_20), NPIXEL, norm, noise)
        self.batch_size, self._epochs = batch_size, itertools.count()

    def batches(self, side: str) -> DataLoader:
        """The next epoch: of ours as train.py loads it, of the other as a script around it would."""
        if side == "textbook":
            return DataLoader(self.textbook, self.batch_size, shuffle=True)
        epoch = next(self._epochs)
        sampler = BatchSampler(range(len(self.fast)), self.batch_size, epoch)
        return batch_loader(self.fast.epoch_draws(epoch), sampler, num_workers=0)


def load(path: str, batch_size: int, jitter: bool) -> Sides:
    """A pass over a folder; nothing is done with the batches."""
    folder = Folder(path, batch_size, jitter)

    def run(side: str) -> None:
        for _ in folder.batches(side):
            pass

    return for_both(run)


def step(preset: str, batch_size: int, n_dates: int = 24, npixel: int = NPIXEL) -> Sides:
    """A training step of one batch: forward, focal loss, backward, Adam."""
    models, criterion = build_models(preset, n_dates), FocalLoss(1)
    optimizers = build_optimizers(models)
    inputs, target = draw_batch(batch_size, n_dates, npixel)

    def run(side: str) -> None:
        optimizers[side].zero_grad()
        criterion(models[side](inputs[side]), target).backward()
        optimizers[side].step()

    return for_both(run)


def infer(preset: str, batch_size: int, n_dates: int = 24, npixel: int = NPIXEL) -> Sides:
    """Logits of one batch in evaluation mode."""
    models = build_models(preset, n_dates)
    inputs, _ = draw_batch(batch_size, n_dates, npixel)

    @torch.no_grad()
    def run(side: str) -> None:
        models[side].eval()(inputs[side])

    return for_both(run)


def train(path: str, batch_size: int) -> Sides:
    """An epoch of training over a folder, end to end."""
    folder, criterion = Folder(path, batch_size), FocalLoss(1)
    models = build_models(DEFAULT, folder.fast.n_dates)
    optimizers = build_optimizers(models)

    def run(side: str) -> None:
        train_epoch(models[side], optimizers[side], criterion, folder.batches(side), CPU, N_CLASSES)

    return for_both(run)


def evaluate(path: str, batch_size: int) -> Sides:
    """A pass over a folder in evaluation mode, end to end; the draws of ours are fixed, as in train.py."""
    folder, criterion = Folder(path, batch_size, jitter=False), FocalLoss(1)
    models = build_models(DEFAULT, folder.fast.n_dates)
    sampler = BatchSampler(range(len(folder.fast)), batch_size)
    fixed = batch_loader(folder.fast.evaluation(seed=1), sampler, num_workers=0)

    def run(side: str) -> None:
        batches = fixed if side == "fast" else folder.batches(side)
        evaluation(models[side], criterion, batches, CPU, N_CLASSES)

    return for_both(run)


def for_both(run: Callable[[str], object]) -> Sides:
    """The two sides of a function that takes the name of one."""
    return {side: lambda side=side: run(side) for side in SIDES}


def build_models(preset: str, n_dates: int) -> dict[str, nn.Module]:
    """An L-TAE of Figure 2, and a copy of it that is computed the textbook way."""
    torch.manual_seed(0)
    model = PseLTae(len_max_seq=n_dates, **read_preset(preset)).apply(weight_init)
    return {"fast": model, "textbook": PlainClassifier(copy.deepcopy(model))}


def build_optimizers(models: dict[str, nn.Module]) -> dict[str, torch.optim.Optimizer]:
    """Adam for either side, ours in its fused form."""
    return {side: torch.optim.Adam(models[side].parameters(), fused=side == "fast") for side in SIDES}


def draw_batch(batch_size: int, n_dates: int, npixel: int) -> tuple[dict[str, object], Tensor]:
    """A random batch in the layout of either side, parcels as large as Sentinel-Agri's, and its classes."""
    r = np.random.default_rng(0)
    values = r.standard_normal((batch_size, npixel, n_dates, N_CHANNELS), dtype=np.float32)
    pixels = torch.from_numpy(values).permute(0, 2, 3, 1)
    sizes = draw_sizes(batch_size, r)
    mask = torch.from_numpy((np.arange(npixel) < sizes[:, None]).astype(np.float32))
    extra = torch.from_numpy(r.standard_normal((batch_size, N_EXTRA), dtype=np.float32))
    mask, extra = (tensor.unsqueeze(1).expand(-1, n_dates, -1) for tensor in (mask, extra))
    plain = (pixels.contiguous(), mask.contiguous()), extra.contiguous()
    target = torch.from_numpy(r.integers(0, N_CLASSES, batch_size))
    return {"fast": ((pixels, mask), extra), "textbook": plain}, target


def draw_sizes(n_parcels: int, rng: np.random.Generator) -> np.ndarray:
    """Pixels of parcels as large as Sentinel-Agri's, (n_parcels,)."""
    return np.rint(np.exp(np.interp(rng.random(n_parcels), QUANTILES, np.log(SIZES))))
