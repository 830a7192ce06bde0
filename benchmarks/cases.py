"""What is measured: the work of `train.py` and `inference.py`, by this code or in its textbook form."""

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.plain import PlainClassifier, PlainPixelSets
from common.machine import set_seeds
from data.draws import stream_key
from data.samplers import BatchSampler
from data.settings import CLASSES_20, DataSettings
from dataset import PixelSetData, batch_loader, find_norm
from learning.engine import evaluation, train_epoch
from learning.focal_loss import FocalLoss
from learning.options import resolve_architecture
from learning.weight_init import freeze_idle_biases, weight_init
from models.architecture import DataShape, read_preset
from preprocessing.simulate import simulate

DEFAULT, LARGEST = "LTAE/112k", "LTAE/3840k"
N_CLASSES = len(CLASSES_20)
JITTER = (0.01, 0.05)  # sigma and clip
CPU = torch.device("cpu")


class Setting(NamedTuple):
    """What is measured, and how."""

    folder: str
    data: DataSettings = DataSettings()  # how it is read
    textbook: bool = False  # whether in the textbook form, for which dates must be shared
    keeps_memory: bool = True  # whether by a process that keeps freed memory, as train.py does
    batch_size: int = 128
    jitter: bool = True  # this and the next two: what training does to its data
    temporal_dropout: float = 0.0
    temporal_shift: int = 0
    preset: str = DEFAULT
    seed: int = 1  # of all draws

    def count_pairs(self, case: str) -> int:
        """The (parcel, date) pairs that a case goes through; simulated pixels are 0 where missing."""
        files = sorted((Path(self.folder) / "DATA").glob("*.npy"), key=lambda path: int(path.stem))
        files = files[: self.batch_size] if case in ("step", "infer") else files
        return sum(int(np.load(file)[:, 0].any(1).sum()) for file in files)


class Cases:
    """A training, and each part of it that is measured. Both forms begin with the same weights."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        options = {name: getattr(setting, name) for name in ("temporal_dropout", "temporal_shift")}
        options["jitter"] = JITTER if setting.jitter else None
        self.dataset = PixelSetData.for_run(setting.folder, setting.data, **options)
        self.dataset.set_norm(find_norm(self.dataset)[0])
        self.plain = PlainPixelSets(self.dataset) if setting.textbook else None
        self.batch, self.target = next(iter(self.in_order(self.dataset)))
        data = DataShape.of(self.dataset, N_CLASSES)
        set_seeds(stream_key("weights", setting.seed) % 2**63)
        model = resolve_architecture({}, read_preset(setting.preset), data).build().apply(weight_init)
        freeze_idle_biases(model)
        self.model = PlainClassifier(model) if setting.textbook else model
        self.optimizer = torch.optim.Adam(model.parameters(), fused=not setting.textbook)
        self.criterion, self._epochs = FocalLoss(1), itertools.count()

    def in_order(self, dataset: PixelSetData) -> DataLoader:
        """Batches of all parcels in order; of this code those of an evaluation, without jitter and always the same."""
        if self.plain:
            return DataLoader(self.plain, self.setting.batch_size)
        order = BatchSampler(range(len(dataset)), self.setting.batch_size)
        return batch_loader(dataset.evaluation(seed=1), order, num_workers=0)

    def epoch(self) -> DataLoader:
        """Batches of the next epoch of a training."""
        if self.plain:
            return DataLoader(self.plain, self.setting.batch_size, shuffle=True)
        words = self.setting.seed, next(self._epochs)
        everything, key = range(len(self.dataset)), stream_key("order", *words)
        order = BatchSampler(everything, self.setting.batch_size, key, drop_single=True)
        return batch_loader(self.dataset.epoch_draws(*words), order, num_workers=0)

    def load(self) -> None:
        """An epoch whose batches nothing is done with."""
        for _ in self.epoch():
            pass

    def step(self) -> None:
        """A training step on the first batch, which is there: forward, focal loss, backward, Adam."""
        self.optimizer.zero_grad()
        self.criterion(self.model.train()(self.batch), self.target).backward()
        self.optimizer.step()

    @torch.no_grad()
    def infer(self) -> Tensor:
        """Logits of that batch in evaluation mode, (B, N)."""
        return self.model.eval()(self.batch)

    def train(self) -> None:
        """An epoch of training, end to end."""
        train_epoch(self.model, self.optimizer, self.criterion, self.epoch(), CPU, N_CLASSES)

    def evaluate(self, dataset: PixelSetData | None = None) -> dict[str, Any]:
        """A pass over the dataset, or another one, in evaluation mode; what `evaluation` finds."""
        loader = self.in_order(dataset or self.dataset)
        return evaluation(self.model, self.criterion, loader, CPU, N_CLASSES)[0]


def write_folder(folder: Path, parcels: int, npixel: int, dates: tuple[int, int] | None, gaps: bool) -> str:
    """Simulates a dataset of parcels of up to 2 npixel pixels, of which some can be missing; returns its path.

    Parcels have from dates[0] to dates[1] dates, and all the same where these are equal; None for the published 24.
    """
    simulate(folder, parcels, 1, max_pixels=2 * npixel, irregular=dates, gaps=gaps)
    if dates and dates[0] == dates[1]:  # those of the first parcel; what the pixels show does not matter here
        file = folder / "META" / "dates.json"
        file.write_text(json.dumps(dict(enumerate(json.loads(file.read_text())["1"]))))
    return str(folder)
