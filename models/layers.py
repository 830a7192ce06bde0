"""Pieces that several encoders share: the positional table, stacks of linear layers, attention over dates."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Positions = Sequence[float] | str | None  # days of the dates; DAYS; or None to number the dates
DAYS = "days"  # positions are computed from the days that come with every batch


class PositionalTable(nn.Module):
    """Sinusoid positional encoding, one row per position (L-TAE paper, eq. 4).

    angle(p, i) = p / T^(2 (i // 2) / width), sine at even i and cosine at odd i. The table is computed, never
    trained; it is part of the `state_dict` because published weights contain it.

    Args:
        positions: one position per date, in days since the first date; row t then belongs to date t. None numbers
            the dates: the table has rows 0..len_max_seq and date t (from 0) reads row t + 1. "days" keeps no table.
        width: number of channels of one table.
        T: period of the slowest sinusoid is 2 pi T.
        len_max_seq: longest sequence that can be encoded, used if `positions` is None.
        repeat: the table is repeated this many times side by side, (rows, repeat * width).
    """

    def __init__(
        self, positions: Positions, width: int, T: float, len_max_seq: int | None = 24, repeat: int = 1
    ) -> None:
        super().__init__()
        if isinstance(positions, str) and positions != DAYS:
            raise ValueError(f"positions is {positions!r}; give a list of days, None, or {DAYS!r}.")
        if positions is None and len_max_seq is None:
            raise ValueError(
                f"numbered dates need len_max_seq, their largest number; or pass positions={DAYS!r}."
            )
        self.width, self.T, self.repeat = width, T, repeat
        self.first_row = 1 if positions is None else 0
        table = None
        if positions != DAYS:
            rows = range(len_max_seq + 1) if positions is None else list(positions)
            table = self.encode(torch.tensor(rows))
        self.register_buffer("weight", table)

    def encode(self, positions: Tensor) -> Tensor:
        """Rows (n, repeat * width) for positions (n,), computed in float64 and returned in float32."""
        i = torch.arange(self.width, device=positions.device)
        angle = positions.double()[:, None] / self.T ** (2 * (i // 2).double() / self.width)
        return torch.where(i % 2 == 0, angle.sin(), angle.cos()).float().repeat(1, self.repeat)

    def forward(self, x: Tensor, days: Tensor | None = None) -> Tensor:
        """Adds to the dates of x, (B, L, E), their rows of the table, or those computed from their days (B, L)."""
        if days is not None:
            # How many days differ is not known when a model is exported, nor to the host of a GPU without waiting for it.
            if torch.compiler.is_compiling() or days.device.type != "cpu":
                return x + self.encode(days.flatten()).to(x.dtype).view(*days.shape, -1)
            different, index = torch.unique(days, return_inverse=True)  # many parcels share a day
            return x + self.encode(different).to(x.dtype).index_select(0, index.flatten()).view_as(x)
        if self.weight is None:
            raise ValueError("this model computes positions from days; give it a data.batch.Batch.")
        rows = self.weight[self.first_row : self.first_row + x.shape[1]]
        if len(rows) < x.shape[1]:
            raise ValueError(f"the series has {x.shape[1]} dates but the model was made for {len(rows)}.")
        return x + rows


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
    With n_dates None, for dates that vary, each date is normalised alone, over d_model.
    """

    def __init__(self, in_channels: int, d_model: int, n_dates: int | None) -> None:
        shape = (d_model,) if n_dates is None else (d_model, n_dates)
        super().__init__(nn.Conv1d(in_channels, d_model, 1), nn.LayerNorm(shape))
        self.n_dates = n_dates

    def forward(
        self, x: Tensor, present: Tensor | None = None, n_dates: Sequence[int] | None = None
    ) -> Tensor:
        conv, norm = self
        x = nn.functional.linear(x, conv.weight.squeeze(2), conv.bias)  # (B, L, d_model)
        if self.n_dates is None:
            return norm(x)
        check_all_dates(x, self.n_dates, present, n_dates)
        return nn.functional.layer_norm(x, x.shape[1:], norm.weight.t(), norm.bias.t(), norm.eps)


def attention_weights(scores: Tensor, d_k: int, dropout: nn.Module, present: Tensor | None = None) -> Tensor:
    """Scaled softmax over the dates of scores, (B, L, H), followed by dropout.

    Dates that are absent, where present (B, L) is False, get no weight.
    """
    if present is not None:
        # Not minus infinity: of a parcel without any date the softmax shall not be NaN.
        scores = scores.masked_fill(~present.unsqueeze(2), torch.finfo(scores.dtype).min)
    return dropout(torch.softmax(scores / d_k**0.5, dim=1))


def agree_attention(sizes: dict[str, Any], typed: dict[str, Any], share_channels: bool) -> None:
    """Makes d_model and mlp3[0] agree.

    Args:
        sizes: all sizes; changed where they were not typed.
        typed: those that were.
        share_channels: whether the heads share d_model channels, as in L-TAE, or each gives all of them, as in TAE.

    Raises:
        ValueError: if mlp3[0] cannot be shared out among the heads.
    """
    in_channels, n_head = sizes["mlp2"][-1], sizes["n_head"]
    copies = 1 if share_channels else n_head
    if "mlp3" not in typed:
        sizes["mlp3"] = [copies * (sizes["d_model"] or in_channels), *sizes["mlp3"][1:]]
    elif typed.get("d_model") is None:
        if sizes["mlp3"][0] % n_head:
            raise ValueError(
                f"--mlp3 starts with {sizes['mlp3'][0]}, which --n_head {n_head} does not divide; start it with a multiple, "
                "an equal part for every head."
            )
        d_model = sizes["mlp3"][0] // copies
        sizes["d_model"] = None if d_model == in_channels else d_model


def trainable_parameters(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def count_dates(present: Tensor, n_dates: Sequence[int] | None) -> Sequence[int]:
    """How many dates of each parcel are there, B numbers: as told, else counted, for which the host of a GPU waits."""
    return present.sum(1).tolist() if n_dates is None else n_dates


def check_all_dates(x: Tensor, expected: int, present: Tensor | None, n_dates: Sequence[int] | None) -> None:
    """Raises ValueError unless all of x (B, expected, E) is there: for encoders that know no other number of dates."""
    if x.shape[1] != expected or (present is not None and min(count_dates(present, n_dates)) < expected):
        raise ValueError(
            f"this model was made for series of exactly {expected} dates, all present; train one for varying dates."
        )


def check_dates(name: str, len_max_seq: int | None, positions: Positions) -> None:
    """Raises ValueError where the LayerNorm of the projection cannot fit the dates that `positions` lists."""
    if isinstance(positions, (str, type(None))) or len_max_seq is None:
        return
    if len(positions) != len_max_seq:
        raise ValueError(
            f"{name}: positions lists {len(positions)} dates but len_max_seq is {len_max_seq}; with d_model given the "
            f"two must agree, so set len_max_seq={len(positions)}."
        )
