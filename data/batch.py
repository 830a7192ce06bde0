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

    def of(self, i: int) -> "Batch":
        """What one parcel has: (L', C, S), ..., on the dates that are present; they come first."""
        n = self.mask.shape[1] if self.present is None else int(self.present[i].sum())
        return Batch(*(None if x is None else x[i, :n] for x in self[:4]))


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


def take_dates(pixels: Tensor, place: Tensor) -> Tensor:
    """The dates at the places (B, L') of each parcel's pixels (B, L, C, S): (B, L', C, S), pixel-major in memory."""
    B, L, C, S = pixels.shape
    pixel = torch.arange(B * S, device=pixels.device).view(B, S, 1)
    rows = (pixel * L + place.unsqueeze(1)).flatten()
    return memory(pixels).flatten(0, 2).index_select(0, rows).view(B, S, -1, C).permute(0, 2, 3, 1)


def present_first(batch: Batch) -> tuple[Batch, Tensor]:
    """Moves each parcel's dates that are present, in their order, before the absent ones.

    Returns:
        The batch, cut to the most dates that any parcel has (one at least), with `present`; and the place that each of
        its dates had, (B, L').
    """
    present, device = batch.present, batch.mask.device
    if present is None:
        present = (batch.mask != 0).any(2)
    present = present.cpu().numpy() if isinstance(present, Tensor) else present
    n = present.sum(1)
    most = max(1, int(n.max()))
    first = np.arange(present.shape[1]) < n[:, None]
    if (first == present).all():
        place = torch.arange(most, device=device).expand(len(n), -1)
        fields = [None if x is None else x[:, :most] for x in batch[:4]]
    else:
        place = send(np.argsort(~present, axis=1, kind="stable")[:, :most], device)
        parcel = torch.arange(len(n), device=device).unsqueeze(1)
        others = [None if x is None else x[parcel, place] for x in batch[1:4]]
        fields = [take_dates(batch.pixels, place), *others]
    return Batch(*fields, first[:, :most]), place
