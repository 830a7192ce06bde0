"""Pixel-Set Encoder (Garnot et al., CVPR 2020, section 3.1): one vector per parcel and date from its pixels."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import send
from models.fast.moments import mean_std
from models.fast.pooling import pool_mean_std
from models.layers import mlp

PixelSet = tuple[Tensor, Tensor] | tuple[tuple[Tensor, Tensor], Tensor]


class linlayer(nn.Module):
    """Linear, BatchNorm over all rows, ReLU: (rows, in_dim) -> (rows, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.lin = nn.Linear(in_dim, out_dim)  # names fixed by published weights
        self.bn = nn.BatchNorm1d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.lin(x)))


class PixelSetEncoder(nn.Module):
    """Encodes the set of pixels of each parcel at each date.

    mlp1 is shared by all pixels, its output is pooled over the pixels of a parcel, extra features of the parcel are
    appended to the pooled statistics, and mlp2 maps the result to the embedding of that date.

    Args:
        input_dim: number of channels C of a pixel.
        mlp1: widths of the first MLP, from input_dim on.
        pooling: statistics over pixels, "mean", "std", "max" and "min", joined by "_"; concatenated in that order.
        mlp2: widths of the second MLP, from (number of statistics) * mlp1[-1] (+ extra_size with extra features) on.
        with_extra: whether the input has extra features.
        extra_size: their number F.

    Raises:
        ValueError: if the widths do not fit together or a statistic is unknown.
    """

    def __init__(
        self,
        input_dim: int,
        mlp1: Sequence[int] = (10, 32, 64),
        pooling: str = "mean_std",
        mlp2: Sequence[int] = (64, 128),
        with_extra: bool = True,
        extra_size: int = 4,
    ) -> None:
        super().__init__()
        self.statistics = pooling.split("_")
        unknown = [name for name in self.statistics if name not in POOLING]
        if unknown:
            raise ValueError(
                f"PSE: pooling {pooling!r} contains {unknown[0]!r}; join any of {', '.join(POOLING)} by '_'."
            )
        for name, widths in (("mlp1", mlp1), ("mlp2", mlp2)):
            if len(widths) < 2:
                raise ValueError(f"PSE: {name} is {list(widths)}; expected at least two widths, in and out.")
        if mlp1[0] != input_dim:
            raise ValueError(
                f"PSE: mlp1[0] is {mlp1[0]} but a pixel has input_dim={input_dim} channels; they must agree."
            )
        pooled = len(self.statistics) * mlp1[-1] + (extra_size if with_extra else 0)
        if mlp2[0] != pooled:
            extra = f" + {extra_size} extra features" if with_extra else ""
            raise ValueError(
                f"PSE: mlp2[0] is {mlp2[0]} but pooling gives {len(self.statistics)} x {mlp1[-1]}{extra} = {pooled} "
                f"numbers; start mlp2 with {pooled}."
            )
        self.input_dim, self.with_extra, self.extra_size = input_dim, with_extra, extra_size
        self.output_dim = mlp2[-1]
        self.mlp1 = nn.ModuleList(linlayer(n_in, n_out) for n_in, n_out in zip(mlp1[:-1], mlp1[1:]))
        self.mlp2 = mlp(mlp2, last="norm")

    def forward(self, input: PixelSet, n_dates: Sequence[int] | None = None) -> Tensor:
        """Encodes a batch.

        Args:
            input: ((pixels, mask), extra), or (pixels, mask) without extra features. pixels (B, L, C, S); mask
                (B, L, S), 1 for a pixel of the parcel and 0 for one that fills the set up; extra (B, L, F).
                Fastest if pixels is a view of pixel-major memory (B, S, L, C), as `dataset.py` loads them.
            n_dates: how many dates each parcel has, B numbers, its first ones; None if all. The others enter nothing.

        Returns:
            (B, L, mlp2[-1]); 0 for a date that a parcel does not have.

        Raises:
            ValueError: if the input is of another form, shape or type, or on another device than the weights.
        """
        (pixels, mask), extra = split_input(input)
        if not torch.compiler.is_compiling():
            self._check(pixels, mask, extra)
        B, L, _, _ = pixels.shape
        rows = None  # the dates that are there; computed by the host, which thereby knows how many there are
        if n_dates is not None:
            rows = send(np.flatnonzero(np.arange(L) < np.asarray(n_dates)[:, None]), pixels.device)
        needs_gradient = pixels.requires_grad and torch.is_grad_enabled()
        # Not where the pixels need a gradient (saliency maps), nor while the model is traced (export).
        fast = self.statistics == ["mean", "std"] and not needs_gradient and not torch.compiler.is_compiling()
        if fast and pixels.device.type == "cpu":
            sets = pool_mean_std(pixels, mask, self.mlp1, n_dates)
            features = [
                x.flatten(0, 1) if rows is None else x.flatten(0, 1).index_select(0, rows) for x in sets
            ]
        elif rows is None:
            features = [x.flatten(0, 1) for x in self._pool(pixels, mask, fast)]
        else:  # every date that is there as a parcel of one date
            parcel, date = rows // L, rows % L
            sets = self._pool(pixels[parcel, date].unsqueeze(1), mask[parcel, date].unsqueeze(1), fast)
            features = [x.flatten(0, 1) for x in sets]
        if self.with_extra:
            extra = extra.to(pixels.dtype).flatten(0, 1)
            features.append(extra if rows is None else extra.index_select(0, rows))
        encoded = self.mlp2(torch.cat(features, dim=1))
        if rows is None:
            return encoded.view(B, L, -1)
        return encoded.new_zeros(B * L, encoded.shape[1]).index_copy(0, rows, encoded).view(B, L, -1)

    def _check(self, pixels: Tensor, mask: Tensor, extra: Tensor | None) -> None:
        """Raises a ValueError that says what was expected and found, unless the tensors fit the model."""
        if self.with_extra and extra is None:
            raise ValueError("PSE: the model uses extra features; give ((pixels, mask), extra).")
        B, L, _, S = pixels.shape if pixels.dim() == 4 else ("parcels", "dates", 0, "pixels")
        expected = {"pixels": (pixels, (B, L, self.input_dim, S)), "mask": (mask, (B, L, S))}
        if self.with_extra:
            expected["extra"] = extra, (B, L, self.extra_size)
        weight = self.mlp1[0].lin.weight
        for name, (values, shape) in expected.items():
            if tuple(values.shape) != shape:
                raise ValueError(
                    f"PSE: expected {name} of shape ({', '.join(map(str, shape))}), found {tuple(values.shape)}."
                )
            if values.device != weight.device:
                raise ValueError(
                    f"PSE: {name} lie on {values.device} but the weights on {weight.device}; move one of them."
                )
        if pixels.dtype != weight.dtype:
            raise ValueError(
                f"PSE: pixels are {pixels.dtype} but the weights {weight.dtype}; convert them, normalised, by .to({weight.dtype})."
            )

    def _pool(self, pixels: Tensor, mask: Tensor, fast: bool = False) -> Sequence[Tensor]:
        """mlp1 and pooling in their plain form, or with `mean_std`: (B, L, E) for each statistic."""
        B, L, C, S = pixels.shape
        # Rows in the order (parcel, pixel, date): a linear layer is then one matrix product, pooling one reduction.
        h = pixels.permute(0, 3, 1, 2).reshape(B * S * L, C)
        for layer in self.mlp1:
            h = layer(h)
        h = h.view(B, S, L, -1)
        mask = mask[:, :1] if mask.stride(1) == 0 else mask  # one for all dates, as the loader gives it
        weight = mask.to(h.dtype).transpose(1, 2).unsqueeze(3)  # (B, S, L or 1, 1)
        if fast:
            return mean_std(h, weight)
        return [POOLING[name](h, weight) for name in self.statistics]


def split_input(input: PixelSet) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """Tells ((pixels, mask), extra) from (pixels, mask) by type: lengths would mislead for two parcels.

    Raises:
        ValueError: if it is neither.
    """
    sets = input[0] if isinstance(input, tuple | list) and len(input) == 2 else None
    if not isinstance(sets, Tensor | tuple | list) or (not isinstance(sets, Tensor) and len(sets) != 2):
        raise ValueError(
            f"expected ((pixels, mask), extra) or (pixels, mask), or a data.batch.Batch; found a {type(input).__name__}."
        )
    return tuple(input) if isinstance(input[0], (tuple, list)) else (tuple(input), None)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the pixels of x (B, S, L, E) where mask (B, S, L or 1, 1) is 1: (B, L, E)."""
    return (x * mask).sum(1) / mask.sum(1)


def masked_std(x: Tensor, mask: Tensor) -> Tensor:
    """Sample standard deviation over the pixels where mask is 1; sqrt(1e-31) for a single pixel."""
    deviation = (x - masked_mean(x, mask).unsqueeze(1)) * mask
    variance = deviation.square().sum(1) / (mask.sum(1) - 1).clamp(min=1)
    return (variance + 1e-31).sqrt()  # the constant keeps the gradient of a constant set finite


def maximum(x: Tensor, mask: Tensor) -> Tensor:
    """Maximum over all S pixels; those that fill a set up are copies, which change nothing."""
    return x.amax(1)


def minimum(x: Tensor, mask: Tensor) -> Tensor:
    """Minimum over all S pixels."""
    return x.amin(1)


POOLING = {"mean": masked_mean, "std": masked_std, "max": maximum, "min": minimum}
