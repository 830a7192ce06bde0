"""The recurrent and the convolutional temporal encoder that the paper compares with (section 4.2)."""

from collections.abc import Sequence

from torch import Tensor, nn

from models.layers import PositionalTable, mlp

T = 1000  # period of the positional encoding, fixed as published


def positional_table(positions: Sequence[float] | None, width: int) -> PositionalTable | None:
    """Table with one row per date, or None without positions: these two encoders know the order of the dates."""
    return None if positions is None else PositionalTable(positions, width, T)


class GRU(nn.Module):
    """Gated recurrent unit; its last output stands for the series.

    Args:
        in_channels: channels of the input embeddings.
        hidden_dim: size of the hidden state.
        positions: days of the dates since the first one; None adds no positional encoding.
    """

    def __init__(
        self, in_channels: int = 128, hidden_dim: int = 128, positions: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.output_dim = hidden_dim
        self.position_enc = positional_table(positions, in_channels)
        self.gru_cell = nn.GRU(in_channels, hidden_dim, batch_first=True)  # name fixed by published weights

    def forward(self, x: Tensor) -> Tensor:
        """Encodes x (B, L, in_channels) as (B, hidden_dim)."""
        if self.position_enc is not None:
            x = self.position_enc(x)
        return self.gru_cell(x)[0][:, -1]


class TempConv(nn.Module):
    """Temporal convolutions (TempCNN, Pelletier et al. 2019) followed by linear layers.

    Args:
        input_size: channels of the input embeddings.
        nker: number of kernels of each convolution over 3 dates.
        seq_len: number of dates.
        nfc: widths of the linear layers.
        positions: days of the dates since the first one; None adds no positional encoding.
    """

    def __init__(
        self,
        input_size: int,
        nker: Sequence[int],
        seq_len: int,
        nfc: Sequence[int],
        positions: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.output_dim = nfc[-1]
        self.position_enc = positional_table(positions, input_size)
        layers: list[nn.Module] = []
        for n_in, n_out in zip([input_size, *nker[:-1]], nker):
            layers += [nn.Conv1d(n_in, n_out, kernel_size=3, padding=1), nn.BatchNorm1d(n_out), nn.ReLU()]
        self.conv1d = nn.Sequential(*layers)  # names fixed by published weights
        self.linear = mlp([nker[-1] * seq_len, *nfc])

    def forward(self, x: Tensor) -> Tensor:
        """Encodes x (B, L, input_size) as (B, nfc[-1]); L must be seq_len."""
        if self.position_enc is not None:
            x = self.position_enc(x)
        return self.linear(self.conv1d(x.transpose(1, 2)).flatten(1))
