"""The recurrent and the convolutional temporal encoder that the paper compares with (section 4.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence

from data.batch import send
from models.architecture import Size
from models.layers import PositionalTable, Positions, check_all_dates, count_dates, mlp
from models.ltae import SIZES

GRU_SIZES = {"hidden_dim": Size(156, "size of the GRU's hidden state")}
TEMPCNN_SIZES = {
    "nker": Size([32, 32, 128], "kernels of TempCNN's convolutions"),
    "mlp3": SIZES["mlp3"],
    "grid_days": Size(
        10, "days between the dates that TempCNN interpolates varying dates to", is_argument=False
    ),
}
T = 1000  # period of the positional encoding, fixed as published


def positional_table(positions: Positions, width: int) -> PositionalTable | None:
    """Table with one row per date, or None without positions: these two encoders know the order of the dates."""
    return None if positions is None else PositionalTable(positions, width, T)


class GRU(nn.Module):
    """Gated recurrent unit; its last output stands for the series.

    Args:
        in_channels: channels of the input embeddings.
        hidden_dim: size of the hidden state.
        positions: as in `LTAE`, but None adds no positional encoding.
    """

    def __init__(self, in_channels: int = 128, hidden_dim: int = 128, positions: Positions = None) -> None:
        super().__init__()
        self.output_dim = hidden_dim
        self.position_enc = positional_table(positions, in_channels)
        self.gru_cell = nn.GRU(in_channels, hidden_dim, batch_first=True)  # name fixed by published weights

    def forward(
        self,
        x: Tensor,
        days: Tensor | None = None,
        present: Tensor | None = None,
        n_dates: Sequence[int] | None = None,
    ) -> Tensor:
        """Encodes x (B, L, in_channels) as (B, hidden_dim); days, present and n_dates as in `LTAE.forward`.

        The dates are read in the order given, those present first.
        """
        if self.position_enc is not None:
            x = self.position_enc(x, days)
        if present is None:
            return self.gru_cell(x)[0][:, -1]
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():  # exported
            return self._by_dates(x, present)
        lengths = torch.tensor(count_dates(present, n_dates)).clamp(min=1)
        # Sorted here, or else the host would wait for a GPU.
        lengths, order = lengths.sort(descending=True, stable=True)
        there, back = (send(index, x.device) for index in (order, order.argsort()))
        packed = pack_padded_sequence(x.index_select(0, there), lengths, batch_first=True)
        return self.gru_cell(packed)[1][0].index_select(0, back)  # the state after each parcel's last date

    def _by_dates(self, x: Tensor, present: Tensor) -> Tensor:
        """The same date by date, in a form whose export takes any number of them: absent ones leave the state as it is."""
        cell, n_dates = self.gru_cell, x.shape[1]
        inputs = linear(x, cell.weight_ih_l0, cell.bias_ih_l0)  # of all dates and gates, (B, L, 3 hidden_dim)

        def is_left(date: Tensor, state: Tensor) -> Tensor:
            return date < n_dates

        def step(date: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            here = inputs.index_select(1, date.view(1)).squeeze(1)
            r_x, z_x, n_x = here.chunk(3, dim=1)
            r_h, z_h, n_h = linear(state, cell.weight_hh_l0, cell.bias_hh_l0).chunk(3, dim=1)
            z = torch.sigmoid(z_x + z_h)
            new = (1 - z) * torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h) + z * state
            return date + 1, torch.where(present.index_select(1, date.view(1)), new, state)

        first = torch.zeros((), dtype=torch.int64, device=x.device)
        return torch.while_loop(is_left, step, (first, x.new_zeros(x.shape[0], self.output_dim)))[1]


class TempConv(nn.Module):
    """Temporal convolutions (TempCNN, Pelletier et al. 2019) followed by linear layers.

    Args:
        input_size: channels of the input embeddings.
        nker: number of kernels of each convolution over 3 dates.
        seq_len: number of dates.
        nfc: widths of the linear layers.
        positions: days of the dates since the first one; None adds no positional encoding.
        grid: seq_len days in increasing order, for dates that vary: embeddings are interpolated linearly to these
            days, from the nearest date alone beyond the first and the last.

    Raises:
        ValueError: if grid or positions do not list seq_len days.
    """

    def __init__(
        self,
        input_size: int,
        nker: Sequence[int],
        seq_len: int,
        nfc: Sequence[int],
        positions: Sequence[float] | None = None,
        *,
        grid: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if grid is not None and len(grid) != seq_len:
            raise ValueError(
                f"TempCNN: grid lists {len(grid)} days but seq_len is {seq_len}; they must agree."
            )
        self.seq_len = seq_len
        days = None if grid is None else torch.tensor(grid, dtype=torch.float32)
        self.register_buffer("grid", days, persistent=False)
        self.output_dim = nfc[-1]
        self.position_enc = positional_table(positions, input_size)
        layers: list[nn.Module] = []
        for n_in, n_out in zip([input_size, *nker[:-1]], nker):
            layers += [nn.Conv1d(n_in, n_out, kernel_size=3, padding=1), nn.BatchNorm1d(n_out), nn.ReLU()]
        self.conv1d = nn.Sequential(*layers)  # names fixed by published weights
        self.linear = mlp([nker[-1] * seq_len, *nfc])

    def forward(
        self,
        x: Tensor,
        days: Tensor | None = None,
        present: Tensor | None = None,
        n_dates: Sequence[int] | None = None,
    ) -> Tensor:
        """Encodes x (B, L, input_size) as (B, nfc[-1]); days, present and n_dates as in `LTAE.forward`.

        Without a grid, L must be seq_len and every date present; with one, days are needed.
        """
        if self.grid is not None:
            if days is None:
                raise ValueError("this TempCNN interpolates to a grid of days; give it a data.batch.Batch.")
            x, days, present = interpolate(x, days, present, self.grid), None, None
        check_all_dates(x, self.seq_len, present, n_dates)
        if self.position_enc is not None:
            x = self.position_enc(x, days)
        return self.linear(self.conv1d(x.transpose(1, 2)).flatten(1))


def interpolate(x: Tensor, days: Tensor, present: Tensor | None, grid: Tensor) -> Tensor:
    """Linear interpolation in time of x (B, L, E), at days (B, L) in any order, to the days of grid (G,): (B, G, E).

    Before the first and after the last date that is present, its own value; 0 for a parcel without dates.
    """
    days = days.to(grid.dtype)
    if present is None:
        present = torch.ones_like(days, dtype=torch.bool)
    day, present, at = days.unsqueeze(1), present.unsqueeze(1), grid.unsqueeze(1)  # (B, 1, L), (G, 1)
    earlier = (day < at) & present
    later = (day >= at) & present
    left = torch.where(earlier, day, -torch.inf).argmax(2)  # (B, G)
    right = torch.where(later, day, torch.inf).argmin(2)
    left, right = torch.where(earlier.any(2), left, right), torch.where(later.any(2), right, left)
    before, after = days.gather(1, left), days.gather(1, right)
    share = torch.where(after > before, (grid - before) / (after - before), 0)  # of the right one
    values = (x.gather(1, i.unsqueeze(2).expand(-1, -1, x.shape[2])) for i in (left, right))
    return torch.lerp(*values, share.unsqueeze(2))
