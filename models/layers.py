"""Pieces that several encoders share: the positional table, stacks of linear layers, attention over dates."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PositionalTable(nn.Module):
    """Sinusoid positional encoding, one row per position (L-TAE paper, eq. 4).

    angle(p, i) = p / T^(2 (i // 2) / width), sine at even i and cosine at odd i. The table is computed, never
    trained; it is part of the `state_dict` because published weights contain it.

    Args:
        positions: one position per date, in days since the first date; row t then belongs to date t. None numbers
            the dates: the table has rows 0..len_max_seq and date t (from 0) reads row t + 1.
        width: number of channels of one table.
        T: period of the slowest sinusoid is 2 pi T.
        len_max_seq: longest sequence that can be encoded, used if `positions` is None.
        repeat: the table is repeated this many times side by side, (rows, repeat * width).
    """

    def __init__(
        self, positions: Sequence[float] | None, width: int, T: float, len_max_seq: int = 24, repeat: int = 1
    ) -> None:
        super().__init__()
        self.first_row = 1 if positions is None else 0
        rows = range(len_max_seq + 1) if positions is None else list(positions)
        self.register_buffer("weight", sinusoid_table(rows, width, T).repeat(1, repeat))

    def forward(self, x: Tensor) -> Tensor:
        """Adds to the dates of x, (B, L, E), their rows of the table."""
        rows = self.weight[self.first_row : self.first_row + x.shape[1]]
        if len(rows) < x.shape[1]:
            raise ValueError(f"the series has {x.shape[1]} dates but the model was made for {len(rows)}.")
        return x + rows


def sinusoid_table(positions: Sequence[float], width: int, T: float) -> Tensor:
    """The table of `PositionalTable` as (len(positions), width), computed in float64 and returned in float32."""
    p = torch.tensor(list(positions), dtype=torch.float64)
    i = torch.arange(width)
    angle = p[:, None] / T ** (2 * (i // 2).double() / width)
    return torch.where(i % 2 == 0, angle.sin(), angle.cos()).float()


def mlp(widths: Sequence[int], last: str = "relu") -> nn.Sequential:
    """Linear, BatchNorm and ReLU per layer.

    Args:
        widths: input width followed by the output width of each layer.
        last: how the last layer ends: "relu" like the others, "norm" without ReLU, "linear" without BatchNorm either.
    """
    layers: list[nn.Module] = []
    for n_in, n_out in zip(widths[:-1], widths[1:]):
        layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ReLU()]
    return nn.Sequential(*layers[: len(layers) - {"relu": 0, "norm": 1, "linear": 2}[last]])


class DateProjection(nn.Sequential):
    """`inconv`: every date's channels are projected, then normalised over channels and dates together.

    The layers are those of published weights (a convolution of width 1 and a LayerNorm over (d_model, L)); they are
    applied to dates as rows, (B, L, C) -> (B, L, d_model), which needs no transposed copy of the activations.
    """

    def __init__(self, in_channels: int, d_model: int, n_dates: int) -> None:
        super().__init__(nn.Conv1d(in_channels, d_model, 1), nn.LayerNorm((d_model, n_dates)))

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self
        x = nn.functional.linear(x, conv.weight.squeeze(2), conv.bias)  # (B, L, d_model)
        return nn.functional.layer_norm(x, x.shape[1:], norm.weight.t(), norm.bias.t(), norm.eps)


def attention_weights(scores: Tensor, d_k: int, dropout: nn.Module) -> Tensor:
    """Scaled softmax over the dates of scores, (B, L, H), followed by dropout."""
    return dropout(torch.softmax(scores / d_k**0.5, dim=1))


def trainable_parameters(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def check_dates(name: str, len_max_seq: int, positions: Sequence[float] | None) -> None:
    """Raises ValueError where the LayerNorm of the projection cannot fit the dates that `positions` lists."""
    if positions is not None and len(positions) != len_max_seq:
        raise ValueError(
            f"{name}: positions lists {len(positions)} dates but len_max_seq is {len_max_seq}; with d_model given the "
            f"two must agree, so set len_max_seq={len(positions)}."
        )
