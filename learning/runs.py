"""From a results folder to the classifier that was trained there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from learning.errors import UserError
from learning.options import (
    CLASSES_20,
    LABELS,
    NPIXEL,
    classifier_name,
    hyperparameters,
    resolve_architecture,
)
from learning.results import CONFIG, read_config
from models import stclassifier
from models.stclassifier import Ensemble

# The dates of Sentinel2-Agri, as days since the first, and what else its published weights were trained on.
PUBLISHED_DAYS = (
    [0, 10, 40, 70, 90, 110, 130, 150, 160, 170, 180, 185]
    + [190, 195, 200, 215, 230, 235, 245, 250, 260, 275, 280, 285]
)  # fmt: skip
PUBLISHED_CHANNELS, PUBLISHED_EXTRA = 10, 4
_FLAGS = {"PseLTae": {}, "PseTae": {"tae": True}, "PseGru": {"gru": True}, "PseTempCNN": {"tcnn": True}}


def run_hyperparameters(folder: str | Path, classifier: str) -> dict[str, Any]:
    """Constructor arguments of a run's classifier; the published defaults where no conf.json is.

    Raises:
        UserError: if conf.json is damaged, or describes another classifier.
    """
    config = read_run(folder, classifier)
    found = classifier_name(config)
    if found != classifier:
        raise UserError(
            f"{folder} holds a {found}, not a {classifier}; load it with {found}_pretrained.from_run."
        )
    return hyperparameters(config, config["n_extra"], config["date_positions"])


def read_run(folder: str | Path, classifier: str = "PseLTae") -> dict[str, Any]:
    """The conf.json of a run; without one, as with published weights, what it would say of that classifier.

    Raises:
        UserError: if conf.json is damaged.
    """
    folder = Path(folder)
    return read_config(folder) if (folder / CONFIG).exists() else published_config(_FLAGS[classifier])


def published_config(typed: dict[str, Any], preset: dict[str, Any] | None = None) -> dict[str, Any]:
    """What conf.json would say of a model trained on Sentinel2-Agri with these settings and else the published ones."""
    architecture = resolve_architecture(
        typed, preset or {}, PUBLISHED_CHANNELS, len(PUBLISHED_DAYS), PUBLISHED_EXTRA, len(CLASSES_20)
    )
    data = {"n_extra": PUBLISHED_EXTRA, "date_positions": PUBLISHED_DAYS, "npixel": NPIXEL, "labels": LABELS}
    return architecture | data | {"sub_classes": list(CLASSES_20)}


def load_classifiers(
    weight_dir: str | Path,
    config: dict[str, Any],
    n_extra: int,
    date_positions: Sequence[int] | None,
    device: str | torch.device,
    fold: int | str = "all",
) -> Ensemble:
    """The trained classifiers that a configuration describes.

    Raises:
        FileNotFoundError, ValueError, TypeError: if weights are missing, damaged, or of another architecture.
    """
    load = getattr(stclassifier, f"{classifier_name(config)}_pretrained")
    return load(weight_dir, hyperparameters(config, n_extra, date_positions), device, fold)
