"""Temporal Attention Encoder (Garnot et al., CVPR 2020, section 3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models import ltae
from models.layers import DateProjection, PositionalTable, Positions, attention_weights, check_dates, mlp

# The published defaults of L-TAE do not fit TAE, which has those of its own class.
SIZES = ltae.SIZES | {
    name: ltae.SIZES[name]._replace(default=default)
    for name, default in (("n_head", 4), ("d_k", 32), ("mlp3", [512, 128, 128]), ("d_model", None))
}


class TemporalAttentionEncoder(nn.Module):
    """Turns a sequence of embeddings into one vector: every head attends with a query made from the mean date.

    Args:
        in_channels: channels of the input embeddings.
        n_head: number of heads H.
        d_k: size of keys and queries.
        d_model: channels to project the input to; None for no projection.
        n_neurons: widths of the MLP after the attention, from n_head * d_model on.
        dropout: dropout after that MLP (the attention's own dropout is 0.1, as published).
        T, len_max_seq, positions, return_att: as in `LTAE`.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    def __init__(
        self,
        in_channels: int = 128,
        n_head: int = 4,
        d_k: int = 32,
        d_model: int | None = None,
        n_neurons: Sequence[int] = (512, 128, 128),
        dropout: float = 0.2,
        T: int = 1000,
        len_max_seq: int | None = 24,
        positions: Positions = None,
        return_att: bool = False,
    ) -> None:
        super().__init__()
        width = in_channels if d_model is None else d_model
        if n_neurons[0] != n_head * width:
            raise ValueError(
                f"TAE: n_neurons[0] is {n_neurons[0]} but n_head={n_head} heads of {width} channels give "
                f"{n_head * width}; start mlp3 (n_neurons) with {n_head * width} or change n_head or d_model."
            )
        self.return_att = return_att
        self.output_dim = n_neurons[-1]
        # Names fixed by published weights.
        self.inlayernorm = nn.LayerNorm(in_channels)
        self.position_enc = PositionalTable(positions, in_channels, T, len_max_seq)
        self.inconv = None
        if d_model is not None:
            check_dates("TAE", len_max_seq, positions)
            self.inconv = DateProjection(in_channels, d_model, len_max_seq)
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
        """Encodes x (B, L, in_channels) as (B, n_neurons[-1]); all else as in `LTAE.forward`."""
        x = self.position_enc(self.inlayernorm(x), days)  # before the projection, unlike L-TAE
        if self.inconv is not None:
            x = self.inconv(x, present, n_dates)
        x, attention = self.attention_heads(x, present)
        x = self.outlayernorm(self.dropout(self.mlp(x)))
        return (x, attention.permute(2, 0, 1)) if self.return_att else x


class MultiHeadAttention(nn.Module):
    """H heads whose queries come from the mean over dates; every head averages all channels.

    The mean of the dates' queries is the query of the mean date, since `fc1_q` is linear. As in L-TAE the keys
    W x + b are never computed: k . q = x . (W^T q) + b . q, whose last term cancels in the softmax.
    """

    def __init__(self, n_head: int, d_k: int, d_in: int) -> None:
        super().__init__()
        self.n_head, self.d_k = n_head, d_k
        self.fc1_q = nn.Linear(d_in, n_head * d_k)
        self.fc1_k = nn.Linear(d_in, n_head * d_k)
        for layer in (self.fc1_q, self.fc1_k):
            nn.init.normal_(layer.weight, std=(2 / d_k) ** 0.5)
        self.fc2 = nn.Sequential(nn.BatchNorm1d(n_head * d_k), nn.Linear(n_head * d_k, n_head * d_k))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, L, E), present (B, L) or None -> concatenated heads (B, H * E), attention (B, L, H)."""
        B, L, E = x.shape
        q = self.fc2(self.fc1_q(mean_date(x, present))).view(B, self.n_head, self.d_k)
        W = self.fc1_k.weight.view(self.n_head, self.d_k, E)
        master = torch.einsum("hke,bhk->bhe", W, q)  # W_h^T q_h, one vector per parcel and head
        scores = x @ master.transpose(1, 2)  # (B, L, H)
        attention = attention_weights(scores, self.d_k, self.dropout, present)
        return (attention.transpose(1, 2) @ x).reshape(B, -1), attention


def mean_date(x: Tensor, present: Tensor | None) -> Tensor:
    """Mean over the dates of x (B, L, E) that are present, (B, E)."""
    if present is None:
        return x.mean(1)
    weight = present.unsqueeze(2).to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)
