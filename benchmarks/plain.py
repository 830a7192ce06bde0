"""The textbook side of the benchmark: L-TAE and its data as one would first write them in PyTorch and NumPy.

Everything is vectorised and nothing is slowed down, but it is written step by step. Pixels keep the published layout,
(parcels, dates, channels, pixels), and every module sees the layout that it documents: nn.Linear the channels last,
nn.BatchNorm1d the channels second. Keys are computed for every date and head. Parcels are read, drawn, filled up,
normalised and jittered one at a time, and stacked by PyTorch's collation.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from data.features import read_extra_features
from data.settings import EXTRA_FEATURE
from dataset import PixelSetData
from models.stclassifier import PseLTae


class PlainClassifier(nn.Module):
    """A `PseLTae` with pooling mean_std and extra features, computed the textbook way.

    Args:
        model: gives its parameters and BatchNorm statistics, which both then share.
    """

    def __init__(self, model: PseLTae) -> None:
        super().__init__()
        self.pse, self.ltae, self.decoder = model.spatial_encoder, model.temporal_encoder, model.decoder

    def forward(self, input: tuple[tuple[Tensor, Tensor], Tensor]) -> Tensor:
        """Logits (B, N) of ((pixels (B, L, C, S), mask (B, L, S)), extra (B, L, F))."""
        (pixels, mask), extra = input
        return self.decoder(self.encode_dates(self.encode_pixels(pixels, mask, extra)))

    def encode_pixels(self, pixels: Tensor, mask: Tensor, extra: Tensor) -> Tensor:
        """mlp1 on (B L, C, S), masked mean and standard deviation over S, extra features, mlp2; (B, L, E)."""
        B, L = pixels.shape[:2]
        x, mask, extra = (tensor.reshape(B * L, *tensor.shape[2:]) for tensor in (pixels, mask, extra))
        for layer in self.pse.mlp1:
            x = layer.lin(x.permute(0, 2, 1)).permute(0, 2, 1)
            x = F.relu(layer.bn(x))  # (B L, E, S)
        mask = mask.unsqueeze(1)
        n = mask.sum(2)
        mean = (x * mask).sum(2) / n
        deviation = (x - mean.unsqueeze(2)) * mask
        std = torch.sqrt((deviation**2).sum(2) / (n - 1).clamp(min=1) + 1e-31)
        return self.pse.mlp2(torch.cat([mean, std, extra], dim=1)).view(B, L, -1)

    def encode_dates(self, x: Tensor) -> Tensor:
        """LayerNorm, projection, positions, attention, mlp3; (B, E)."""
        ltae, table = self.ltae, self.ltae.position_enc
        x = ltae.inlayernorm(x)
        if ltae.inconv is not None:
            conv, norm = ltae.inconv
            x = norm(conv(x.permute(0, 2, 1))).permute(0, 2, 1)
        x = x + table.weight[table.first_row :][: x.shape[1]]
        return ltae.outlayernorm(ltae.dropout(ltae.mlp(self.attend(x))))

    def attend(self, x: Tensor) -> Tensor:
        """One learned query per head, keys of every date, each head's slice of the channels as its values; (B, E)."""
        heads = self.ltae.attention_heads
        (B, L, E), H, K = x.shape, heads.n_head, heads.d_k
        q = heads.Q.unsqueeze(1).expand(H, B, K).reshape(H * B, 1, K)
        k = heads.fc1_k(x).view(B, L, H, K).permute(2, 0, 1, 3).reshape(H * B, L, K)
        v = x.view(B, L, H, E // H).permute(2, 0, 1, 3).reshape(H * B, L, E // H)
        attention = heads.dropout(torch.softmax(torch.bmm(q, k.transpose(1, 2)) / K**0.5, dim=2))
        return torch.bmm(attention, v).view(H, B, E // H).permute(1, 0, 2).reshape(B, E)


class PlainPixelSets(Dataset):
    """The parcels of a dataset, one file after the other.

    Args:
        dataset: tells which parcels these are, how many pixels to draw, how to normalise and jitter them.
    """

    def __init__(self, dataset: PixelSetData) -> None:
        self.folder, self.pid, self.target = dataset.folder, dataset.pid, dataset.target
        self.npixel, self.jitter, shape = dataset.npixel, dataset.jitter, dataset.norm_shape
        self.mean, self.std = (np.broadcast_to(x, shape).astype(np.float32)[:, :, None] for x in dataset.norm)
        ids = np.array(self.pid, np.int64)
        self.extra = read_extra_features(self.folder, EXTRA_FEATURE, ids)[0].astype(np.float32)
        self.random = np.random.default_rng()

    def __len__(self) -> int:
        return len(self.pid)

    def __getitem__(self, item: int) -> tuple[tuple[tuple[Tensor, Tensor], Tensor], Tensor]:
        pixels = np.load(self.folder / "DATA" / f"{self.pid[item]}.npy")  # (L, C, pixels of the parcel)
        L, _, size = pixels.shape
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
        mask, extra = np.tile(mask, (L, 1)), np.tile(self.extra[item], (L, 1))
        data = (torch.from_numpy(x), torch.from_numpy(mask)), torch.from_numpy(extra)
        return data, torch.tensor(self.target[item])
