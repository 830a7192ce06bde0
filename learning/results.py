"""The files of a results folder."""

import io
import math
import pickle
import reprlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.arrays import load_arrays
from common.errors import UserError, as_user_error
from common.files import write_bytes, write_json
from common.flags import is_until
from learning.metrics import confusion_matrix_analysis
from models.architecture import flags, known_encoders
from models.weights import folds_with

CONFIG, NORMALISATION, OVERALL, PER_CLASS = "conf.json", "normalisation.npz", "overall.json", "per_class.json"
TRAINLOG, TEST_METRICS, CONFUSION = "trainlog.json", "test_metrics.json", "conf_mat.pkl"


def prepare_folder(res_dir: str | Path, overwrite: bool, resume: bool = False) -> Path:
    """Makes the results folder, or makes sure that it can be written and holds no earlier results.

    Raises:
        UserError: if it cannot be written, or holds results and neither `overwrite` nor `resume` is set; or if there is
            nothing that says which run to resume.
    """
    folder = prepare_output(res_dir)
    has_folds = any(folder.glob("Fold_*"))
    if ((folder / CONFIG).exists() or has_folds) and not (overwrite or resume):
        raise UserError(
            f"{folder} holds the results of an earlier run; add --resume to go on with it, --overwrite to replace it, "
            "or choose another --res_dir."
        )
    if resume and has_folds and not (folder / CONFIG).exists():
        raise UserError(
            f"--resume: {folder} has folds but no {CONFIG}; give --overwrite or another --res_dir."
        )
    return folder


def remove_results(res_dir: Path) -> None:
    """Removes the results of an earlier run; of more folds than this one makes, inference would use the rest too."""
    for name in (
        CONFIG,
        OVERALL,
        PER_CLASS,
    ):  # the configuration first: what is left then is not taken for a run
        (res_dir / name).unlink(missing_ok=True)
    for path in res_dir.glob("Fold_*"):
        shutil.rmtree(path)


def prepare_output(path: str | Path) -> Path:
    """Makes a folder, or makes sure that it can be written.

    Raises:
        UserError: if it cannot.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").write_bytes(b"")
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another folder.") from error
    return folder


def fold_folder(res_dir: Path, fold: int) -> Path:
    """Fold_k of a results folder, made if it is not there; folds count from 1."""
    folder = res_dir / f"Fold_{fold}"
    folder.mkdir(exist_ok=True)
    return folder


def save_test(folder: Path, metrics: dict[str, float], confusion: np.ndarray) -> None:
    """Writes a fold's test metrics and confusion matrix."""
    write_json(folder / TEST_METRICS, metrics)
    write_bytes(folder / CONFUSION, pickle.dumps(confusion))


def save_normalisation(res_dir: Path, norm: tuple, extra_stats: tuple | None) -> None:
    """Keeps what the pixels and extra features were normalised with, for inference."""
    arrays = dict(zip(("mean", "std"), norm))
    if extra_stats is not None:
        arrays |= dict(zip(("extra_mean", "extra_std"), extra_stats))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(res_dir / NORMALISATION, buffer.getvalue())


def load_normalisation(res_dir: Path) -> tuple[tuple | None, tuple | None]:
    """What `save_normalisation` kept: (mean, std) of pixels, and of extra features or None; None twice without a file."""
    path = res_dir / NORMALISATION
    if not path.exists():
        return None, None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            norm = arrays["mean"], arrays["std"]
            extra = (arrays["extra_mean"], arrays["extra_std"]) if "extra_mean" in arrays else None
        for mean, std in (norm, *([extra] if extra else [])):
            if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
                raise ValueError("a value is not finite, or a standard deviation not above 0")
    except Exception as error:  # damaged bytes can fail in any way
        raise UserError(
            f"{path} is damaged ({error}); copy it again or remove it and give --norm."
        ) from error
    return norm, extra


def read_confusion(path: Path) -> np.ndarray:
    """A confusion matrix that `save_test` wrote, (K, K).

    Raises:
        UserError: if the file is missing or damaged.
    """
    with as_user_error(OSError, ValueError):
        mat = load_arrays(path)
    if (
        not isinstance(mat, np.ndarray)
        or mat.dtype.kind not in "iu"
        or mat.ndim != 2
        or len(set(mat.shape)) > 1
    ):
        raise UserError(f"{path} holds no confusion matrix; copy it again or train the fold again.")
    return mat


def read_confusions(res_dir: Path, n_classes: int) -> dict[int, np.ndarray]:
    """The confusion matrix (K, K) of each fold that is tested, by its number.

    Raises:
        UserError: if one is damaged or of another number of classes.
    """
    matrices = {fold: read_confusion(path) for fold, path in folds_with(res_dir, CONFUSION).items()}
    for fold, mat in matrices.items():
        if len(mat) != n_classes:
            raise UserError(
                f"Fold_{fold} of {res_dir} holds a confusion matrix of {len(mat)} classes, but the run tells {n_classes} "
                "apart; copy it again or train the fold again."
            )
    return matrices


def save_overall(res_dir: Path, n_folds: int) -> tuple[np.ndarray, dict[str, float]]:
    """Sums the folds' confusion matrices and writes the scores of the sum; returns both."""
    matrices = [read_confusion(res_dir / f"Fold_{fold}" / CONFUSION) for fold in range(1, n_folds + 1)]
    if len({mat.shape for mat in matrices}) > 1:
        raise UserError(f"the folds of {res_dir} have confusion matrices of unequal size; train them again.")
    total = sum(matrices)
    per_class, overall = confusion_matrix_analysis(total)
    write_json(res_dir / PER_CLASS, per_class)
    write_json(res_dir / OVERALL, overall)
    return total, overall


def to_npy(array: np.ndarray) -> bytes:
    """The content of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _is_whole(value: Any, least: float = 1) -> bool:
    """Whether a value of a JSON file is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, least: float = 0) -> bool:
    """Whether a value of a JSON file is a number of at least `least`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= least


def _is_list(value: Any, least: float = 1) -> bool:
    """Whether a value of a JSON file is a list of such numbers, not empty."""
    return isinstance(value, list) and bool(value) and all(_is_whole(item, least) for item in value)


def _is_classes(value: Any) -> bool:
    """Whether a value of a JSON file is a list of labels, all of them whole numbers or all text."""
    return _is_list(value, -math.inf) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
    )


def _or_none(is_valid: Callable[..., bool], *args: Any) -> Callable[[Any], bool]:
    """Also accepts null."""
    return lambda value: value is None or is_valid(value, *args)


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raises a UserError unless what is read from conf.json is as expected."""
    for name, is_valid in _entries().items():
        if name in config and not is_valid(config[name]):
            raise UserError(
                f"{path} is damaged: {name!r} is {reprlib.repr(config[name])}; expected the file that train.py wrote."
            )


def _entries() -> dict[str, Callable[[Any], bool]]:
    """What is read from conf.json, and what is expected there."""

    def is_text(value: Any) -> bool:
        return isinstance(value, str)

    def is_flag(value: Any) -> bool:
        return isinstance(value, bool)

    entries: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(("labels", "dataset_folder"), _or_none(is_text)),
        "labels_table": _or_none(lambda x: isinstance(x, list) and len(x) == 3 and all(map(is_text, x))),
        "sub_classes": _is_classes,
        "npixel": _is_whole,
        "nodata": lambda value: value in (None, "inf", "-inf") or _is_number(value, -math.inf),
        "units": _or_none(_is_number),
        "season_start": _or_none(lambda value: _is_list(value) and len(value) == 2),
        "until": _or_none(is_until),
        "class_names": _or_none(lambda value: isinstance(value, dict)),
        "pooling": is_text,
        "positions": lambda value: value in ("bespoke", "order"),
        **dict.fromkeys(("loss", "optimizer", "schedule"), is_text),
        "lms": _or_none(_is_whole),
        **dict.fromkeys(("date_positions", "grid"), _or_none(_is_list, -math.inf)),
        **dict.fromkeys(("n_extra", "rdm_seed", "temporal_shift"), lambda value: _is_whole(value, 0)),
        **dict.fromkeys(("kfold", "epochs", "batch_size", "input_dim", "num_classes"), _is_whole),
        **dict.fromkeys(("lr", "gamma", "temporal_dropout", "temporal_truncation"), _is_number),
        **dict.fromkeys(("average_weights", "train_on_validation"), _is_number),
        "notes": lambda value: isinstance(value, list) and all(map(is_text, value)),
        **dict.fromkeys(("mlp1", "mlp2", "mlp4"), _is_list),
        **dict.fromkeys((*flags(), "nodata_declared"), is_flag),
    }
    for kind in known_encoders().values():
        for name, size in kind.sizes.items():
            is_valid = _is_list if isinstance(size.default, list) else _is_whole
            if isinstance(size.default, float):
                is_valid = lambda value: _is_number(value) and isinstance(value, float) and value < 1  # noqa: E731
            entries[name] = _or_none(is_valid) if size.optional else is_valid
    return entries
