"""The textbook side of the benchmark: L-TAE and its data as one would first write them in PyTorch and NumPy.

Everything is vectorised and nothing is slowed down, but it is written module by module. Pixels keep the
published layout, (parcels, dates, channels, pixels), and every module sees the layout that it documents:
nn.Linear the channels last, nn.BatchNorm1d the channels second. Keys are computed for every date and head.
Parcels are read, drawn, filled up, normalised and jittered one at a time, and stacked by PyTorch's collation.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from models.ltae import LTAE, MultiHeadAttention
from models.pse import PixelSetEncoder
from models.stclassifier import PseLTae

Item = tuple[tuple[tuple[Tensor, Tensor], Tensor], Tensor]


class PlainClassifier(nn.Module):
    """A `PseLTae` with pooling mean_std and extra features, computed the textbook way.

    Args:
        model: gives its parameters and BatchNorm statistics, which both then share.
    """

    def __init__(self, model: PseLTae) -> None:
        super().__init__()
        self.spatial_encoder = PlainPixelSetEncoder(model.spatial_encoder)
        self.temporal_encoder = PlainLTAE(model.temporal_encoder)
        self.decoder = model.decoder

    def forward(self, input: tuple[tuple[Tensor, Tensor], Tensor]) -> Tensor:
        """Logits (B, K) of ((pixels (B, L, C, S), mask (B, L, S)), extra (B, L, F))."""
        return self.decoder(self.temporal_encoder(self.spatial_encoder(input)))


class PlainPixelSetEncoder(nn.Module):
    """mlp1 on (B L, C, S), masked mean and standard deviation over S, extra features, mlp2."""

    def __init__(self, encoder: PixelSetEncoder) -> None:
        super().__init__()
        self.mlp1, self.mlp2 = encoder.mlp1, encoder.mlp2

    def forward(self, input: tuple[tuple[Tensor, Tensor], Tensor]) -> Tensor:
        (pixels, mask), extra = input
        B, L = pixels.shape[:2]
        x, mask, extra = (tensor.reshape(B * L, *tensor.shape[2:]) for tensor in (pixels, mask, extra))
        for layer in self.mlp1:
            x = layer.lin(x.permute(0, 2, 1)).permute(0, 2, 1)
            x = F.relu(layer.bn(x))  # (B L, E, S)
        mask = mask.unsqueeze(1)
        n = mask.sum(2)
        mean = (x * mask).sum(2) / n
        deviation = (x - mean.unsqueeze(2)) * mask
        std = torch.sqrt((deviation**2).sum(2) / (n - 1).clamp(min=1) + 1e-31)
        return self.mlp2(torch.cat([mean, std, extra], dim=1)).view(B, L, -1)


class PlainLTAE(nn.Module):
    """LayerNorm, projection, positions, attention, mlp3."""

    def __init__(self, encoder: LTAE) -> None:
        super().__init__()
        self.inlayernorm, self.inconv, self.mlp = encoder.inlayernorm, encoder.inconv, encoder.mlp
        self.dropout, self.outlayernorm = encoder.dropout, encoder.outlayernorm
        self.attention_heads = PlainAttention(encoder.attention_heads)
        table = encoder.position_enc
        self.register_buffer("positions", table.weight[table.first_row :])

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlayernorm(x)
        if self.inconv is not None:
            conv, norm = self.inconv
            x = norm(conv(x.permute(0, 2, 1))).permute(0, 2, 1)
        x = x + self.positions[: x.shape[1]]
        return self.outlayernorm(self.dropout(self.mlp(self.attention_heads(x))))


class PlainAttention(nn.Module):
    """One learned query per head, keys of every date, each head's slice of the channels as its values."""

    def __init__(self, heads: MultiHeadAttention) -> None:
        super().__init__()
        self.n_head, self.d_k, self.Q = heads.n_head, heads.d_k, heads.Q
        self.fc1_k, self.dropout = heads.fc1_k, heads.dropout

    def forward(self, x: Tensor) -> Tensor:
        B, L, E = x.shape
        H, K = self.n_head, self.d_k
        q = self.Q.unsqueeze(1).expand(H, B, K).reshape(H * B, 1, K)
        k = self.fc1_k(x).view(B, L, H, K).permute(2, 0, 1, 3).reshape(H * B, L, K)
        v = x.view(B, L, H, E // H).permute(2, 0, 1, 3).reshape(H * B, L, E // H)
        attention = self.dropout(torch.softmax(torch.bmm(q, k.transpose(1, 2)) / K**0.5, dim=2))
        heads = torch.bmm(attention, v).view(H, B, E // H)
        return heads.permute(1, 0, 2).reshape(B, E)


class PlainPixelSets(Dataset):
    """The parcels of a dataset folder, one file after the other.

    Args:
        folder: dataset folder in the published format, with extra features geomfeat.
        labels: nomenclature of META/labels.json.
        classes: labels to keep, mapped to 0, 1, ... in this order.
        npixel: pixels of a set.
        norm: mean and standard deviation, (T, C) each.
        jitter: sigma and clip of the noise, or None.
    """

    def __init__(
        self,
        folder: str | Path,
        labels: str,
        classes: list[int],
        npixel: int,
        norm: tuple[np.ndarray, np.ndarray],
        jitter: tuple[float, float] | None,
    ) -> None:
        self.folder, self.npixel, self.jitter = Path(folder), npixel, jitter
        self.mean, self.std = (values.astype(np.float32)[:, :, None] for values in norm)
        label_of = json.loads((self.folder / "META" / "labels.json").read_text())[labels]
        self.target = {pid: classes.index(label) for pid, label in label_of.items() if label in classes}
        self.pid = sorted(self.target, key=int)
        features = json.loads((self.folder / "META" / "geomfeat.json").read_text())
        values = np.array(list(features.values()))
        standardised = (values - values.mean(0)) / values.std(0, ddof=1)
        self.extra = dict(zip(features, standardised.astype(np.float32)))
        self.random = np.random.default_rng()

    def __len__(self) -> int:
        return len(self.pid)

    def __getitem__(self, item: int) -> Item:
        pid = self.pid[item]
        pixels = np.load(self.folder / "DATA" / f"{pid}.npy")  # (T, C, S)
        T, _, size = pixels.shape
        mask = np.ones(self.npixel, np.float32)
        if size > self.npixel:
            pixels = pixels[:, :, self.random.choice(size, self.npixel, replace=False)]
        elif size < self.npixel:
            first = np.repeat(pixels[:, :, :1], self.npixel - size, axis=2)
            pixels = np.concatenate([pixels, first], axis=2)
            mask[size:] = 0
        x = (pixels.astype(np.float32) - self.mean) / self.std
        if self.jitter is not None:
            sigma, clip = self.jitter
            x += np.clip(sigma * self.random.standard_normal(x.shape, dtype=np.float32), -clip, clip)
        mask = np.tile(mask, (T, 1))
        extra = np.tile(self.extra[pid], (T, 1))
        data = (torch.from_numpy(x), torch.from_numpy(mask)), torch.from_numpy(extra)
        return data, torch.tensor(self.target[pid])
