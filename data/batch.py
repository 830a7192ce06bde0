"""Batches of time series that do not share their dates."""

from typing import NamedTuple

import torch
from torch import Tensor


class Series(NamedTuple):
    """What the classifiers take instead of the published tuple where dates differ or observations are missing.

    Attributes:
        pixels: (B, L, C, S), with L dates for the parcel that has most. Finite everywhere; a pixel that is absent
            on a date best holds a copy of one that is present, since batch statistics include it.
        mask: (B, L, S), 1 for a pixel that is present on that date, else 0. A date without a present pixel is
            absent for that parcel, wherever it stands.
        extra: (B, L, F), or None without extra features.
        days: day of each date, (B, L), counted as for the training data.
    """

    pixels: Tensor
    mask: Tensor
    extra: Tensor | None
    days: Tensor


def present_first(series: Series) -> tuple[Series, Tensor, Tensor]:
    """Moves each parcel's dates that are present, in their order, before the absent ones.

    Returns:
        The series, cut to the most dates that any parcel has (one at least); which of its dates are present, (B, L');
        and the place that each of them had, (B, L').
    """
    present = (series.mask != 0).any(2)
    n = present.sum(1)
    most = max(1, int(n.max()))
    prefix = torch.arange(present.shape[1], device=n.device) < n.unsqueeze(1)
    if torch.equal(prefix, present):
        place = torch.arange(most, device=n.device).expand(len(n), -1)
        return Series(*(None if x is None else x[:, :most] for x in series)), prefix[:, :most], place
    place = (~present).byte().argsort(dim=1, stable=True)[:, :most]
    parcel = torch.arange(len(n), device=n.device).unsqueeze(1)
    return Series(*(None if x is None else x[parcel, place] for x in series)), prefix[:, :most], place
