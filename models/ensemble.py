"""Trained classifiers that predict together, and how they are read from the weights of a cross-validation."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import Batch
from models.pse import PixelSet, split_input
from models.weights import choose_folds, load_weights, read_checkpoint


class Ensemble(nn.Module):
    """Trained classifiers, one per fold, that predict together; always in evaluation mode.

    Args:
        members: classifiers with the same input and classes.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self._is_first_batch = True
        self.eval()

    def train(self, mode: bool = True) -> "Ensemble":
        """Stays in evaluation mode, whatever is asked: batch statistics and dropout would change predictions."""
        return super().train(False)

    @torch.no_grad()
    def member_log_probabilities(self, input: PixelSet | Batch) -> Tensor:
        """Every member's log-softmax, (members, B, K)."""
        if self._is_first_batch:
            self._is_first_batch = False
            warn_unless_normalised(input)
        outputs = (member(input) for member in self.members)
        logits = [output[0] if isinstance(output, tuple) else output for output in outputs]
        return torch.log_softmax(torch.stack(logits), dim=2)

    def forward(self, input: PixelSet | Batch) -> Tensor:
        """Mean over the members of their log-softmax, (B, K)."""
        return self.member_log_probabilities(input).mean(0)

    def predict_class(self, input: PixelSet | Batch) -> Tensor:
        """Index of the most likely class of each parcel, (B,)."""
        return self(input).argmax(1)

    @torch.no_grad()
    def embed(self, input: PixelSet | Batch) -> Tensor:
        """Every member's `embed`, (members, B, mlp4[0]); each member has a space of its own."""
        return torch.stack([member.embed(input) for member in self.members])

    @torch.no_grad()
    def attention(self, input: PixelSet | Batch) -> Tensor:
        """Every member's `attention`, (members, H, B, L); head h of one has nothing to do with head h of another."""
        return torch.stack([member.attention(input) for member in self.members])


@dataclass(frozen=True)
class Jury:
    """Who predicts which parcel.

    Attributes:
        ensemble: a classifier per fold.
        folds: their numbers, from 1.
        temperatures: that calibrated predictions divide the logits of each by.
        held_out: number of the fold that predicts each parcel by itself, (N,); 0 where all do together.
        seen: whether folds learned from a parcel and none held it out, (N,).
        is_known: whether anything tells what the folds learned from.
    """

    ensemble: Ensemble
    folds: Sequence[int]
    temperatures: Sequence[float]
    held_out: np.ndarray
    seen: np.ndarray
    is_known: bool = True

    def probabilities(self, members: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor]:
        """Calibrated probabilities (B, K), and each member's vote as far as it counts, (members, B).

        Where all folds vote, the mean of their log-probabilities is divided by the mean of their temperatures.

        Args:
            members: log-probabilities of each, (members, B, K).
            held_out: as above, of the batch, (B,).
        """
        temperatures = members.new_tensor(self.temperatures)
        log_p, votes = members.mean(0) / temperatures.mean(), members.argmax(2)
        for fold, own, temperature in zip(self.folds, members, temperatures):
            alone = (held_out == fold).unsqueeze(1)
            log_p = torch.where(alone, own / temperature, log_p)
            votes = torch.where(alone.T, own.argmax(1), votes)
        return log_p.softmax(1), votes


def warn_unless_normalised(input: PixelSet | Batch) -> None:
    """Warns of pixels that are plainly not normalised: large numbers, or many of which none is below 0."""
    pixels = input.pixels if isinstance(input, Batch) else split_input(input)[0][0]
    if pixels.abs().median() > 10 or (len(pixels) >= 8 and pixels.min() >= 0):
        warnings.warn(
            f"the pixels are not normalised, they are from {pixels.min():g} to {pixels.max():g}, so the predictions mean "
            "nothing; learning.run.open_run(folder).predict(dataset_folder) reads and normalises them as in training.",
            stacklevel=4,
        )


def load_members(
    classifier: type[nn.Module],
    weight_folder: str | Path,
    hyperparameters: dict[str, Any],
    device: str | torch.device | None = None,
    fold: int | str = "all",
) -> list[nn.Module]:
    """The trained classifiers of the folds of a cross-validation.

    Args:
        classifier: their class.
        weight_folder: folder of `Fold_k/model.pth.tar`.
        hyperparameters: keyword arguments of the class.
        device: where to load them; without it CUDA if there is a GPU, else the CPU.
        fold: "all", or the number, from 1, of one fold.

    Raises:
        FileNotFoundError: if the folder or the fold is missing.
        ValueError: if a checkpoint is damaged, unsafe, or of another architecture, or the device is missing.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r} but PyTorch finds no GPU; pass device='cpu'.")
    members = []
    for path in choose_folds(weight_folder, fold).values():
        member = classifier(**hyperparameters)
        load_weights(member, read_checkpoint(path)["state_dict"], source=path)
        members.append(member.to(device))
    return members
