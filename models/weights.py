"""Weight files of others, read as data: only tensors, arrays and plain values ever come out of one."""

import io
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

CHECKPOINT = "model.pth.tar"


def folds_with(folder: Path, name: str) -> dict[int, Path]:
    """The file of that name of each fold that has one, `Fold_k/<name>`, by the fold's number, in numerical order."""
    paths = {path.parent.name: path for path in folder.glob(f"Fold_*/{name}")}
    return dict(sorted((int(k[5:]), paths[k]) for k in paths if re.fullmatch("Fold_[1-9][0-9]*", k)))


def list_folds(weight_folder: str | Path) -> dict[int, Path]:
    """The checkpoints of a folder; see `folds_with`.

    Raises:
        FileNotFoundError: if the folder is missing or holds no checkpoint.
    """
    folder = Path(weight_folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; expected one with trained weights, Fold_1/{CHECKPOINT}."
        )
    folds = folds_with(folder, CHECKPOINT)
    if not folds:
        raise FileNotFoundError(
            f"{folder} holds no Fold_k/{CHECKPOINT}; give the results folder of a finished training."
        )
    return folds


def choose_folds(weight_folder: str | Path, fold: int | str) -> dict[int, Path]:
    """The checkpoints of `list_folds` that `fold` asks for: "all", or one number from 1.

    Raises:
        FileNotFoundError: as `list_folds`, or if that fold is not there.
        ValueError: if `fold` is neither.
    """
    folds = list_folds(weight_folder)
    if fold == "all":
        return folds
    if not re.fullmatch("[0-9]+", str(fold)):
        raise ValueError(f"fold is {fold!r}; expected 'all' or a number from 1.")
    if int(fold) not in folds:
        present = ", ".join(map(str, folds))
        raise FileNotFoundError(
            f"{weight_folder} holds no fold {fold}, only {present}; choose one of these or 'all'."
        )
    return {int(fold): folds[int(fold)]}


def read_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", data: bytes | None = None
) -> dict[str, Any]:
    """Reads a checkpoint {"epoch", "state_dict", "optimizer"} without executing anything in it.

    Args:
        path: the file.
        device: where to load the tensors.
        data: its content, if that is in memory already.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, is no checkpoint, holds more than tensors and plain values, or weights
            that are not finite.
    """
    try:
        source = path if data is None else io.BytesIO(data)
        checkpoint = torch.load(source, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist; expected a checkpoint written by train.py."
        ) from None
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged or holds more than tensors "
            "and plain values; train again or copy the file again."
        ) from error
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(_is_plain(value) for value in weights.values()):
        raise ValueError(
            f"{path} is not a checkpoint: expected a dictionary with tensors of real numbers under 'state_dict'."
        )
    broken = [key for key, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(
            f"{path} holds weights that are NaN or infinite ({broken[0]}); train again or copy the file again."
        )
    return checkpoint


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_quantized or value.is_complex())
    )


def load_weights(model: nn.Module, state_dict: dict[str, torch.Tensor], source: str | Path) -> None:
    """Copies weights into a model of exactly the same keys and shapes.

    Raises:
        ValueError: naming the first differences, if the weights are those of another architecture.
    """
    own = model.state_dict()
    problems = [f"{key} is missing" for key in own if key not in state_dict]
    problems += [f"{key} is unknown" for key in state_dict if key not in own]
    problems += [
        f"{key} is {tuple(state_dict[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state_dict and own[key].shape != state_dict[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        table = "temporal_encoder.position_enc.weight"
        hint = ""
        if any(problem.startswith(f"{table} is (") for problem in problems):
            hint = ", such as positions, the days of the dates since the first one"
        raise ValueError(
            f"{source} holds weights of another architecture ({'; '.join(problems[:3])}{more}); "
            f"give the hyperparameters it was trained with{hint}."
        )
    model.load_state_dict(state_dict)
