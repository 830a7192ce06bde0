"""A training as conf.json tells it: the settings with which inference, resuming, reports and notebooks do as it did."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError, as_user_error
from common.files import read_json
from common.machine import prepared_device
from common.processes import n_ranks
from data.classes import read_class_names
from data.folds import fold_splits
from data.outlines import read_own_ids
from data.parts import PARTS, Parts, data_key, fingerprints
from data.settings import CLASSES_20, DataSettings
from dataset import UNKNOWN, PixelSetData, PixelSetData_preloaded, find_norm
from learning.calibration import read_temperature
from learning.options import resolve_architecture
from learning.predictions import Predictions, Telling, join, predict
from learning.results import CONFIG, NORMALISATION, check_config, load_normalisation
from models.architecture import Architecture, DataShape, default_settings, flags, known_encoders
from models.ensemble import Ensemble, Jury, load_members
from models.stclassifier import PseClassifier
from models.weights import choose_folds

# The dates of Sentinel2-Agri, as days since the first, and what else its published weights were trained on.
PUBLISHED_DAYS = (
    [0, 10, 40, 70, 90, 110, 130, 150, 160, 170, 180, 185]
    + [190, 195, 200, 215, 230, 235, 245, 250, 260, 275, 280, 285]
)  # fmt: skip
AGRI = DataShape(10, len(PUBLISHED_DAYS), 4, len(CLASSES_20), PUBLISHED_DAYS)


@dataclass(frozen=True)
class Training:
    """How a run trains; the defaults are the published ones.

    Attributes:
        kfold: number of folds.
        epochs: per fold.
        batch_size: parcels per batch, over all processes.
        lr: learning rate.
        gamma: of the focal loss.
        loss, optimizer, schedule: names in `LOSSES`, `OPTIMIZERS` and `SCHEDULES`.
        temporal_dropout: share of dates left out at random.
        temporal_truncation: share of the parcels whose series ends at a date drawn at random.
        temporal_shift: days, at most, by which a parcel's calendar is moved at random.
        average_weights: share of the epochs, the last ones, whose mean weights are kept instead of those of the best epoch.
        train_on_validation: share of the validation parcels of each fold that are trained on too.
        preset: name of the configuration of config_fig2.json that was asked for.
    """

    kfold: int = 5
    epochs: int = 100
    batch_size: int = 128
    lr: float = 0.001
    gamma: float = 1.0
    loss: str = "focal"
    optimizer: str = "adam"
    schedule: str = "constant"
    temporal_dropout: float = 0.0
    temporal_truncation: float = 0.0
    temporal_shift: int = 0
    average_weights: float = 0.0
    train_on_validation: float = 0.0
    preset: str | None = None

    @property
    def averaged_epochs(self) -> range:
        """The epochs, from 1, whose weights are averaged."""
        return range(self.epochs + 1 - math.ceil(self.average_weights * self.epochs), self.epochs + 1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Training":
        """The settings among others by name; what is not there has its default."""
        return cls(**{each.name: config[each.name] for each in fields(cls) if each.name in config})


@dataclass(frozen=True)
class Run:
    """What is known of a training.

    Attributes:
        folder: results folder of train.py, or one with published weights alone.
        data: how it reads its dataset.
        architecture: of its classifiers.
        training: how it trains.
        about: what else conf.json holds, such as dataset_folder, class_names, simulated, N_params.
        is_bare: whether there are weights alone, which nothing describes.
    """

    folder: Path
    data: DataSettings
    architecture: Architecture
    training: Training = Training()
    about: Mapping[str, Any] = field(default_factory=dict)
    is_bare: bool = False

    def to_config(self) -> dict[str, Any]:
        """What conf.json holds."""
        return {**self.about, **asdict(self.training), **self.data.to_config(), **self.architecture.to_dict()}

    @property
    def class_names(self) -> dict[str, str]:
        """Names of classes by label as text, where they have one."""
        return self.about.get("class_names") or {}

    @property
    def dataset_folder(self) -> Path:
        """The dataset that the run was trained on.

        Raises:
            UserError: if it is not known, or no longer there.
        """
        named = self.about.get("dataset_folder")
        if named is None or not Path(named).is_dir():
            what = f"the dataset that {self.folder} was trained on, {named}, is not there"
            unknown = f"nothing in {self.folder} says which dataset it was trained on"
            raise UserError(f"{unknown if named is None else what}; name one (--dataset_folder).")
        return Path(named)

    def open_dataset(
        self,
        dataset_folder: str | Path | None = None,
        cache_dir: str | Path | None = None,
        preload: bool = False,
        keep_all: bool = True,
    ) -> PixelSetData:
        """A dataset read, normalised and drawn as the run evaluates.

        Args:
            dataset_folder: the dataset; the run's own if not given.
            cache_dir: where its packed copy is kept.
            preload: whether to read all pixels into memory.
            keep_all: whether to keep parcels of other labels and without a label, as target -1.

        Raises:
            UserError: if the folder is not as expected, or not what the classifiers were made for.
        """
        folder = self.dataset_folder if dataset_folder is None else Path(dataset_folder)
        kind = PixelSetData_preloaded if preload else PixelSetData
        dataset = kind.for_run(folder, self.data, cache_dir=cache_dir, keep_all=keep_all)
        if self.data.norm is None:
            dataset.set_norm(find_norm(dataset)[0])
        return dataset.evaluation(self.data.seed)

    def load(self, fold: int | str = "all", device: str | torch.device | None = None) -> Ensemble:
        """The trained classifiers.

        Args:
            fold: "all", or the number, from 1, of one fold.
            device: where to load them; without it CUDA if there is a GPU, else the CPU.

        Raises:
            FileNotFoundError, ValueError, TypeError: if weights are missing, damaged, or of another architecture.
        """
        kind, kwargs = self.architecture.kind.classifier, self.architecture.hyperparameters()
        return Ensemble(load_members(kind, self.folder, kwargs, device, fold))

    def jury(
        self,
        dataset: PixelSetData,
        ensemble: Ensemble,
        fold: int | str | None = None,
        kfold: int | None = None,
    ) -> Jury:
        """Who predicts which parcel of a dataset.

        Args:
            dataset: opened by this run.
            ensemble: the classifiers that `load` gave for this fold.
            fold: None for out of fold: a parcel that a fold held out is predicted by that fold, any other by all. Otherwise
                "all" or a number, as published: those predict every parcel, also what they learned from.
            kfold: number of folds that published weights, with which nothing lies, were trained with.
        """
        folds = list(choose_folds(self.folder, "all" if fold is None else fold))
        temperatures = [read_temperature(self.folder / f"Fold_{k}") for k in folds]
        held_out, seen, is_known = np.zeros(len(dataset), np.int64), np.zeros(len(dataset), bool), False
        if fold is None:
            season = self.data.season_start, self.about.get("until")
            marks = fingerprints(dataset.folder, dataset.pid, dataset.store, *season)
            parts = self._parts(dataset, marks, kfold)
            is_known = parts is not None
            if parts is not None:
                held_out, seen = parts.look_up(marks, folds)
        return Jury(ensemble, folds, temperatures, held_out, seen, is_known)

    def _parts(self, dataset: PixelSetData, marks: np.ndarray, kfold: int | None) -> Parts | None:
        """What each fold did with which parcel; None if nothing tells."""
        if (self.folder / PARTS).exists():
            return Parts.load(self.folder / PARTS)
        kfold = kfold or self.about.get("kfold")
        known = np.flatnonzero(dataset.target != UNKNOWN)
        ids = [dataset.pid[i] for i in known]
        if kfold is None or self.about.get("folds") or len(known) < kfold:
            return None
        splits = fold_splits(len(known), kfold, self.data.seed)  # as older runs and the published code did
        key = data_key(ids, dataset.target[known], splits)
        return Parts.of(marks[known], splits) if self.about.get("data_key", key) == key else None

    def telling(
        self, dataset: PixelSetData, doubt: float = 0.5, thresholds: Mapping[int, float] | None = None
    ) -> Telling:
        """How predictions for a dataset are told: ids as in the file it comes from, names of the classes.

        Args:
            dataset: opened by this run.
            doubt, thresholds: see `Telling`.
        """
        names = self.class_names or read_class_names(dataset.folder, self.data.labels)
        return Telling(read_own_ids(dataset.folder), names, doubt, thresholds or {})

    def ready(
        self,
        dataset_folder: str | Path | None,
        fold: int | str | None = None,
        device: str | torch.device | None = None,
    ) -> tuple[Jury, PixelSetData]:
        """The classifiers, and a dataset as this run reads it, on the device if its pixels fit; see `predict`."""
        with as_user_error(FileNotFoundError, ValueError, TypeError, prefix=f"{self.folder}: "):
            ensemble = self.load("all" if fold is None else fold, device)
        dataset, device = self.open_dataset(dataset_folder), next(ensemble.parameters()).device
        jury = self.jury(dataset, ensemble, fold)
        return jury, dataset.to(device) if dataset.fits_on(device) else dataset

    def predict(
        self,
        dataset_folder: str | Path | None = None,
        fold: int | str | None = None,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        num_workers: int = 0,
        tf32: bool = False,
    ) -> Predictions:
        """Classes of all parcels of a dataset, whose pixels are read and normalised as the run did.

        Args:
            dataset_folder: the dataset; the run's own if not given. Labels are optional there.
            fold: None for out of fold, "all" or a number as published; see `jury`.
            device: where to compute; without it on a GPU if there is one.
            batch_size: parcels at a time; without it 128, and 1,024 where a GPU holds the pixels.
            num_workers: most loading processes.
            tf32: whether a GPU may round factors of products to TF32, while this runs.

        Raises:
            UserError: saying which file is not as expected.
        """
        jury, dataset = self.ready(dataset_folder, fold, device)
        device = next(jury.ensemble.parameters()).device
        how = self.data.classes, batch_size, num_workers, device, self.telling(dataset)
        with prepared_device(device, tf32):
            return join(list(predict(jury, dataset, *how)))


def open_run(folder: str | Path, classifier: type[PseClassifier] | None = None) -> Run:
    """A results folder of train.py, finished or not, or a folder of published weights.

    Args:
        folder: the folder. Weights that no conf.json describes are taken for those of the published default model,
            trained on Sentinel2-Agri.
        classifier: class that it must hold; None for any, and for L-TAE where nothing tells.

    Raises:
        UserError: if there is no such folder, it is of another classifier, or conf.json or normalisation.npz is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected a results folder of train.py.")
    if not (folder / CONFIG).exists():
        names = [kind.name for kind in known_encoders().values() if kind.classifier is classifier]
        return published_run(folder, {name: True for name in names if name in flags()})
    run = read_run(folder)
    found = run.architecture.kind.classifier
    if classifier not in (None, found):
        name = found.__name__
        raise UserError(
            f"{folder} holds a {name}, not a {classifier.__name__}; load it with {name}_pretrained.from_run."
        )
    return run


def open_others(folders: Sequence[str | Path], run: Run, until: str | None = None) -> list[Run]:
    """The runs in further folders, which are to predict together with a run.

    Args:
        folders: their results folders.
        run: the first one.
        until: last day of the dates that they use; None for that of each one's training.

    Raises:
        UserError: if one has other classes or no conf.json, or several processes predict.
    """
    others = [open_run(folder) for folder in folders]
    for other in others:
        if other.is_bare or run.is_bare:
            bare = other.folder if other.is_bare else run.folder
            raise UserError(f"{bare} has no {CONFIG}; only runs of train.py can predict together.")
        if list(other.data.classes) != list(run.data.classes):
            raise UserError(
                f"{other.folder} tells other classes apart than {run.folder}; give runs of the same ones."
            )
    if others and n_ranks() > 1:
        raise UserError("several runs predict together in one process; start without torchrun.")
    return [replace(each, data=replace(each.data, until=until or each.data.until)) for each in others]


def published_run(
    folder: Path, typed: dict[str, Any] | None = None, preset: dict[str, Any] | None = None
) -> Run:
    """Weights that no conf.json describes: published ones, with these architecture settings and else the default ones."""
    norm, extra_stats = load_normalisation(folder)
    data = DataSettings(norm=norm, extra_stats=extra_stats)
    return Run(folder, data, resolve_architecture(typed or {}, preset or {}, AGRI), is_bare=True)


def read_run(folder: Path) -> Run:
    """The run that conf.json and normalisation.npz describe; an entry that an older one lacks has its default.

    Raises:
        UserError: if a file is damaged or not the one that train.py wrote.
    """
    path = folder / CONFIG
    found = read_json(path, "the file that train.py wrote")
    if not isinstance(found, dict) or not found.keys() & DataSettings().to_config().keys():
        raise UserError(f"{path} is something else; expected the file that train.py wrote.")
    config = default_settings() | asdict(Training()) | DataSettings().to_config() | found
    check_config(path, config)
    norm, extra_stats = load_normalisation(folder)
    expected = 2 * [(config["n_extra"],)] if config["n_extra"] else []
    if norm is not None and [values.shape for values in extra_stats or ()] != expected:
        raise UserError(
            f"{folder / NORMALISATION} does not hold the statistics of {config['n_extra']} extra features; copy it again "
            "from the training."
        )
    data = DataSettings.from_config(config, norm, extra_stats)
    return Run(folder, data, Architecture.from_dict(found), Training.from_config(config), found)
