"""The one batch type: sets of pixels by date, of parcels that share their dates or have dates of their own."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """Parcels by date. Where all share the dates, people and models also know it as the tuple of `published`.

    Attributes:
        pixels: (B, L, C, S), with L dates for the parcel that has most. Finite everywhere; a pixel that is absent
            on a date best holds a copy of one that is present, since batch statistics include it. Best a view of
            pixel-major memory (B, S, L, C), the order in which the store keeps and the models use them.
        mask: (B, L, S), 1 for a pixel that is present on that date, else 0. A date without a present pixel is
            absent for that parcel, wherever it stands.
        extra: (B, L, F), or None without extra features.
        days: day of each date, (B, L), counted as for the training data.
        present: which dates are present, (B, L) of truth values in the host's memory wherever the tensors are, so that
            nobody waits for a device to tell; None to ask the mask. Whoever changes the mask of whole dates sets it anew.
    """

    pixels: Tensor
    mask: Tensor
    extra: Tensor | None
    days: Tensor
    present: np.ndarray | None = None

    def published(self) -> tuple[Any, ...]:
        """((pixels, mask), extra), or (pixels, mask) without extra features."""
        sets = self.pixels, self.mask
        return sets if self.extra is None else (sets, self.extra)


Series = Batch  # its name since it came with dates that vary


def memory(pixels: Tensor) -> Tensor:
    """Pixels (B, L, C, S) in the order in which they lie in memory, (B, S, L, C); copied if they lie otherwise."""
    return pixels.permute(0, 3, 1, 2).contiguous()


def send(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Moves values from the host's memory to a device, without waiting for all that a GPU has still to do."""
    values = torch.as_tensor(values)
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def present_first(batch: Batch) -> tuple[Batch, Tensor]:
    """Moves each parcel's dates that are present, in their order, before the absent ones.

    Returns:
        The batch, cut to the most dates that any parcel has (one at least), with `present`; and the place that each of
        its dates had, (B, L').
    """
    present, device = batch.present, batch.mask.device
    if present is None:
        present = (batch.mask != 0).any(2).cpu().numpy()
    n = present.sum(1)
    most = max(1, int(n.max()))
    first = np.arange(present.shape[1]) < n[:, None]
    if (first == present).all():
        place = torch.arange(most, device=device).expand(len(n), -1)
        fields = [None if x is None else x[:, :most] for x in batch[:4]]
    else:
        place = send(np.argsort(~present, axis=1, kind="stable")[:, :most], device)
        parcel = torch.arange(len(n), device=device).unsqueeze(1)
        fields = [None if x is None else x[parcel, place] for x in batch[:4]]
    return Batch(*fields, first[:, :most]), place
