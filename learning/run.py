"""A training as its results folder tells it: settings with which inference, reports and notebooks do as it did."""

import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dataset import UNKNOWN, PixelSetData, PixelSetData_preloaded, find_norm
from learning.errors import UserError, as_user_error
from learning.files import read_json
from learning.options import ARCHITECTURE, TRAINING, classifier_name, hyperparameters, resolve_architecture
from learning.results import CONFIG, NORMALISATION, load_normalisation
from models import stclassifier
from models.stclassifier import Ensemble
from preprocessing.settings import CLASSES_20, DataSettings

# The dates of Sentinel2-Agri, as days since the first, and what else its published weights were trained on.
PUBLISHED_DAYS = (
    [0, 10, 40, 70, 90, 110, 130, 150, 160, 170, 180, 185]
    + [190, 195, 200, 215, 230, 235, 245, 250, 260, 275, 280, 285]
)  # fmt: skip
PUBLISHED_CHANNELS, PUBLISHED_EXTRA = 10, 4
_DATA = {  # what conf.json says of the data, and what a file that does not say it means
    **DataSettings().to_config(),
    "date_positions": None,
    "grid": None,
    "dataset_folder": None,
    "class_names": None,
    "simulated": False,
}
_FLAGS = {"PseLTae": {}, "PseTae": {"tae": True}, "PseGru": {"gru": True}, "PseTempCNN": {"tcnn": True}}
DEFAULTS = ARCHITECTURE | TRAINING | _DATA


@dataclass(frozen=True)
class Run:
    """What is known of a training.

    Attributes:
        folder: results folder of train.py, or one with published weights alone.
        config: conf.json, with defaults for what an older one lacks; for weights alone, what it would say of the
            published default model.
        data: how it read its dataset.
        is_bare: whether there are weights alone, which nothing describes.
    """

    folder: Path
    config: dict[str, Any]
    data: DataSettings
    is_bare: bool = False

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

    @property
    def dataset_folder(self) -> Path:
        """The dataset that the run was trained on.

        Raises:
            UserError: if it is not known, or no longer there.
        """
        named = self.config["dataset_folder"]
        if named is None:
            raise UserError(
                f"nothing in {self.folder} says which dataset it was trained on; name one (--dataset_folder)."
            )
        if not Path(named).is_dir():
            raise UserError(
                f"the dataset that {self.folder} was trained on, {named}, is not there; name one (--dataset_folder)."
            )
        return Path(named)

    def load(
        self,
        fold: int | str = "all",
        device: str | torch.device | None = None,
        config: dict[str, Any] | None = None,
    ) -> Ensemble:
        """The trained classifiers.

        Args:
            fold: "all", or the number, from 1, of one fold.
            device: where to load them; without it CUDA if there is a GPU, else the CPU.
            config: settings in place of the run's own.

        Raises:
            FileNotFoundError, ValueError, TypeError: if weights are missing, damaged, or of another architecture.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        config = self.config if config is None else config
        kind = getattr(stclassifier, f"{classifier_name(config)}_pretrained")
        return kind(
            self.folder, hyperparameters(config, config["n_extra"], config["date_positions"]), device, fold
        )

    def predict(
        self,
        dataset_folder: str | Path | None = None,
        fold: int | str = "all",
        device: str | torch.device | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
    ) -> "Predictions":
        """Classes of all parcels of a dataset, whose pixels are read and normalised as the run did.

        Args:
            dataset_folder: the dataset; the run's own if not given. Labels are optional there.
            fold: "all" for the mean of all folds, or the number, from 1, of one.
            device: where to compute; without it on a GPU if there is one.
            batch_size: parcels at a time.
            num_workers: most loading processes.

        Raises:
            UserError: saying which file is not as expected.
        """
        from learning.predictions import score_batches

        with as_user_error(FileNotFoundError, ValueError, TypeError):
            ensemble = self.load(fold, device)
        dataset = self.open_dataset(dataset_folder)
        classes, device = list(self.data.classes), next(ensemble.parameters()).device
        if dataset.fits_on(device):
            dataset = dataset.to(device)
        rows = torch.cat(
            list(score_batches(ensemble, dataset, len(classes), batch_size, num_workers, device))
        )
        target, best = rows[:, :2].long().T.tolist()
        return Predictions(
            dataset.pid,
            [None if k == UNKNOWN else classes[k] for k in target],
            [None if k == UNKNOWN else classes[k] for k in best],
            rows[:, 4:].numpy(),
            classes,
        )


class Predictions(NamedTuple):
    """Predictions for N parcels.

    Attributes:
        ids: of the parcels.
        true_labels: None where unknown.
        labels: predicted; None for a parcel without any observation.
        probabilities: (N, K), of the classes in their order; NaN without any observation.
        classes: label of each of the K classes.
    """

    ids: list[str]
    true_labels: list[int | str | None]
    labels: list[int | str | None]
    probabilities: np.ndarray
    classes: list[int | str]


def open_run(folder: str | Path, classifier: str | None = None) -> Run:
    """A results folder of train.py, finished or not, or a folder of published weights.

    Args:
        folder: the folder. Weights that no conf.json describes are taken for those of the published default model,
            trained on Sentinel2-Agri.
        classifier: name of the class in `models.stclassifier` that it must hold; None for any, and for L-TAE where
            nothing tells.

    Raises:
        UserError: if there is no such folder, it is of another classifier, or conf.json or normalisation.npz is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected a results folder of train.py.")
    if not (folder / CONFIG).exists():
        return published_run(folder, _FLAGS[classifier or "PseLTae"])
    config = read_config(folder)
    found = classifier_name(config)
    if classifier not in (None, found):
        raise UserError(
            f"{folder} holds a {found}, not a {classifier}; load it with {found}_pretrained.from_run."
        )
    norm, extra_stats = load_normalisation(folder)
    expected = 2 * [(config["n_extra"],)] if config["n_extra"] else []
    if norm is not None and [values.shape for values in extra_stats or ()] != expected:
        raise UserError(
            f"{folder / NORMALISATION} does not hold the statistics of {config['n_extra']} extra features; copy it again "
            "from the training."
        )
    data = DataSettings.from_config(config, norm, extra_stats)
    return Run(folder, config, data)


def published_run(
    folder: Path, typed: dict[str, Any] | None = None, preset: dict[str, Any] | None = None
) -> Run:
    """Weights that no conf.json describes: published ones, with these architecture settings and else the default ones."""
    norm, extra_stats = load_normalisation(folder)
    data = DataSettings(norm=norm, extra_stats=extra_stats)
    return Run(folder, published_config(typed or {}, preset), data, is_bare=True)


def published_config(typed: dict[str, Any], preset: dict[str, Any] | None = None) -> dict[str, Any]:
    """What conf.json would say of a model trained on Sentinel2-Agri with these settings and else the published ones."""
    architecture = resolve_architecture(
        typed, preset or {}, PUBLISHED_CHANNELS, len(PUBLISHED_DAYS), PUBLISHED_EXTRA, len(CLASSES_20)
    )
    return DEFAULTS | architecture | {"date_positions": PUBLISHED_DAYS}


def read_config(res_dir: Path) -> dict[str, Any]:
    """conf.json of a results folder; what it lacks, since it is of an older version, has its default.

    Raises:
        UserError: if the file is damaged or not the one that train.py wrote.
    """
    path = res_dir / CONFIG
    found = read_json(path, "the file that train.py wrote")
    if not isinstance(found, dict) or not found.keys() & _DATA.keys():
        raise UserError(f"{path} is something else; expected the file that train.py wrote.")
    config = DEFAULTS | found
    for name, is_valid in _ENTRIES.items():
        if not is_valid(config[name]):
            raise UserError(
                f"{path} is damaged: {name!r} is {reprlib.repr(config[name])}; expected the file that train.py wrote."
            )
    return config


def _is_whole(value: Any, least: int = 1) -> bool:
    """Whether a value of a JSON file is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_list(value: Any, least: float = 1) -> bool:
    """Whether a value of a JSON file is a list of such numbers, not empty."""
    return isinstance(value, list) and bool(value) and all(_is_whole(item, least) for item in value)


def _is_names(value: Any) -> bool:
    """Whether a value of a JSON file is a list of texts, not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


# What is read from conf.json, and what is expected there.
_ENTRIES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("input_dim", "n_head", "d_k", "T", "num_classes", "hidden_dim", "npixel", "grid_days"), _is_whole
    ),
    **dict.fromkeys(("mlp1", "mlp2", "mlp3", "mlp4", "nker"), _is_list),
    **dict.fromkeys(("tae", "gru", "tcnn", "nodata_declared"), lambda value: isinstance(value, bool)),
    **dict.fromkeys(("n_extra", "rdm_seed"), lambda value: _is_whole(value, 0)),
    "sub_classes": lambda value: _is_list(value, -math.inf) or _is_names(value),
    **dict.fromkeys(("date_positions", "grid"), lambda value: value is None or _is_list(value, -math.inf)),
    "lms": lambda value: value is None or _is_whole(value),
    "season_start": lambda value: value is None or (_is_list(value) and len(value) == 2),
    "d_model": lambda value: value is None or _is_whole(value),
    "nodata": lambda value: value is None or _is_number(value) or value in ("inf", "-inf"),
    "dropout": lambda value: isinstance(value, float) and 0 <= value < 1,
    "pooling": lambda value: isinstance(value, str),
    "positions": lambda value: value in ("bespoke", "order"),
    "labels": lambda value: isinstance(value, str),
    "dataset_folder": lambda value: value is None or isinstance(value, str),
}
