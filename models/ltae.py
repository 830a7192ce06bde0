"""Lightweight Temporal Attention Encoder (Garnot & Landrieu 2020, section 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.architecture import Size
from models.layers import DateProjection, PositionalTable, Positions, attention_weights, check_dates, mlp

SIZES = {
    "n_head": Size(16, "attention heads"),
    "d_k": Size(8, "size of keys and queries"),
    "mlp3": Size([256, 128], "widths of the MLP after the attention, or of TempCNN's linear layers"),
    "T": Size(1000, "period of the positional encoding"),
    "dropout": Size(0.2, "dropout after mlp3"),
    "d_model": Size(256, "channels the attention works on, null for those of the PSE", optional=True),
}


class LTAE(nn.Module):
    """Turns a sequence of embeddings into one vector: every head attends to its own group of channels.

    Args:
        in_channels: channels of the input embeddings.
        n_head: number of heads H.
        d_k: size of keys and queries.
        n_neurons: widths of the MLP after the attention, from d_model on.
        dropout: dropout after that MLP (the attention's own dropout is 0.1, as published).
        d_model: channels to project the input to; None for no projection.
        T: period of the positional encoding.
        len_max_seq: number of dates, or the most there can be if `positions` and `d_model` are None. None for dates
            that vary: the projection is then normalised date by date.
        positions: days of the dates since the first one; None numbers the dates; "days" keeps no table, all positions
            are computed from the days of each batch.
        return_att: whether forward returns the attention too.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    def __init__(
        self,
        in_channels: int = 128,
        n_head: int = 16,
        d_k: int = 8,
        n_neurons: Sequence[int] = (256, 128),
        dropout: float = 0.2,
        d_model: int | None = 256,
        T: int = 1000,
        len_max_seq: int | None = 24,
        positions: Positions = None,
        return_att: bool = False,
    ) -> None:
        super().__init__()
        width = in_channels if d_model is None else d_model
        if width % n_head:
            what = f"in_channels={width} (d_model is None)" if d_model is None else f"d_model={width}"
            raise ValueError(
                f"L-TAE: {what} cannot be shared out among n_head={n_head} heads; choose a multiple."
            )
        if n_neurons[0] != width:
            raise ValueError(
                f"L-TAE: n_neurons[0] is {n_neurons[0]} but the heads together give {width} channels; "
                f"start mlp3 (n_neurons) with {width} or pass d_model={n_neurons[0]}."
            )
        self.return_att = return_att
        self.output_dim = n_neurons[-1]
        # Names fixed by published weights.
        self.inlayernorm = nn.LayerNorm(in_channels)
        self.inconv = None
        if d_model is not None:
            check_dates("L-TAE", len_max_seq, positions)
            self.inconv = DateProjection(in_channels, d_model, len_max_seq)
        self.position_enc = PositionalTable(positions, width // n_head, T, len_max_seq, repeat=n_head)
        self.attention_heads = MultiHeadAttention(n_head, d_k, width)
        self.mlp = mlp(n_neurons)
        self.dropout = nn.Dropout(dropout)
        self.outlayernorm = nn.LayerNorm(n_neurons[-1])

    def forward(
        self,
        x: Tensor,
        days: Tensor | None = None,
        present: Tensor | None = None,
        n_dates: Sequence[int] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Encodes a series.

        Args:
            x: (B, L, in_channels).
            days: of each date, (B, L); None for those the encoder was made for.
            present: whether each date is there, (B, L); None if all are.
            n_dates: how many of each parcel are, B numbers, if the host knows them.

        Returns:
            (B, n_neurons[-1]); with return_att also the attention (H, B, L).
        """
        x = self.inlayernorm(x)
        if self.inconv is not None:
            x = self.inconv(x, present, n_dates)
        x = self.position_enc(x, days)
        x, attention = self.attention_heads(x, present)
        x = self.outlayernorm(self.dropout(self.mlp(x)))
        return (x, attention.permute(2, 0, 1)) if self.return_att else x


class MultiHeadAttention(nn.Module):
    """H heads with one learned query each; head h averages its own slice of the channels (eqs. 5 to 7).

    Keys are never computed: with key k = W x + b, the score k . q = x . (W^T q) + b . q, and the constant b . q
    cancels in the softmax over dates. `fc1_k.bias` is kept for published weights and has no influence.
    """

    def __init__(self, n_head: int, d_k: int, d_in: int) -> None:
        super().__init__()
        self.n_head, self.d_k = n_head, d_k
        self.Q = nn.Parameter(torch.empty(n_head, d_k))
        self.fc1_k = nn.Linear(d_in, n_head * d_k)
        for weight in (self.Q, self.fc1_k.weight):
            nn.init.normal_(weight, std=(2 / d_k) ** 0.5)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, L, E), present (B, L) or None -> concatenated heads (B, E), attention (B, L, H)."""
        B, L, E = x.shape
        W = self.fc1_k.weight.view(self.n_head, self.d_k, E)
        master = torch.einsum("hke,hk->he", W, self.Q)  # W_h^T q_h, one vector per head
        attention = attention_weights(x @ master.t(), self.d_k, self.dropout, present)  # (B, L, H)
        slices = x.view(B, L, self.n_head, E // self.n_head)
        # A product and a sum, where einsum would first copy x head by head.
        return (attention.unsqueeze(3) * slices).sum(1).view(B, E), attention
