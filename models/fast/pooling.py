"""mlp1 and the pooling of mean and standard deviation, fused: what `pse.py` writes plainly, fast on a CPU.

The plain form writes the activations of every layer for every row, one row per pixel and date, and reads them
several times: memory is its limit, not arithmetic. Here the parcels pass a few at a time, whose activations stay in
cache. Nothing is kept for the backward pass, which computes the activations once more. What is summed over the batch
is summed for every few parcels first, then over these in order, so that no result depends on the threads. What
they do is written with as few calls as possible, since Python makes one call at a time, whichever thread it is from.

Notation: an affine map of rows h of k numbers is one matrix A (k + 1, m), with the bias as its last row.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.processes import sum_over_ranks
from common.threads import share
from models.batchnorm import update_running_statistics

_PART_ROWS = 9216  # rows at a time: few enough for a core's cache, enough to make up for the calls
_LOST_DIGITS = 1000  # error accepted in a batch variance, in rounding errors of a single activation


def pool_mean_std(
    pixels: Tensor, mask: Tensor, layers: nn.ModuleList, n_dates: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Masked mean and sample standard deviation over the pixels of mlp1's output.

    BatchNorm uses and updates its statistics as its own `training` says. Gradients reach the parameters, but
    not the pixels.

    Args:
        pixels: (B, L, C, S).
        mask: (B, L, S), 1 for a pixel of the parcel and 0 for one that fills the set up.
        layers: the `linlayer`s of mlp1.
        n_dates: how many dates of each parcel there are, the first ones; all that come after them are left out.

    Returns:
        mean and std, (B, L, E) each; without meaning for a date that is left out.
    """
    batch = _Batch(pixels, mask, n_dates)
    maps: list[Tensor] = []
    for layer in layers:
        moments = batch_moments(batch, maps, layer.lin.weight) if layer.bn.training else None
        maps.append(fold(layer, moments))
    return _Pooling.apply(batch, *maps)


@dataclass
class _Part:
    """A few parcels of a batch, with equally many dates and of similar size.

    Attributes:
        parcels: their indices, (p,).
        n_dates: how many dates L they have.
        pixels: of the whole batch on so many dates, (B, S, L, C).
        pooled: of these, pixels up to the last valid one of any of the parcels, (B, size, L, C); the others count in
            the batch statistics alone.
        weight: 1 for a valid pixel, else 0, (p, L, size); (p, 1, size) if it is the same for all dates.
        n: how many are valid, (p, L or 1, 1).
    """

    parcels: Tensor
    n_dates: int
    pixels: Tensor
    pooled: Tensor
    weight: Tensor
    n: Tensor

    def all_rows(self) -> Tensor:
        """(p S L, C)."""
        return self.pixels.index_select(0, self.parcels).view(-1, self.pixels.shape[3])

    def pooled_rows(self) -> Tensor:
        """(p size L, C)."""
        return self.pooled.index_select(0, self.parcels).view(-1, self.pooled.shape[3])

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the valid pixels of x, (p size L, E): (p, 1, L E). May write 0 to x where they are not valid."""
        p, n_weights, size = self.weight.shape
        if n_weights == 1:  # one product per parcel
            return torch.bmm(self.weight, x.view(p, size, -1))
        return self.leave_out(x).view(p, size, -1).sum(1, keepdim=True)

    def leave_out(self, x: Tensor) -> Tensor:
        """Writes 0 to the rows x, (p size L, E), that are not valid."""
        return x.index_fill_(0, self._absent, 0) if len(self._absent) else x

    @cached_property
    def _absent(self) -> Tensor:
        """Which rows are not valid: few, where a product with the weight would pass over all."""
        absent = (self.weight == 0).transpose(1, 2).expand(-1, -1, self.n_dates)
        return absent.flatten().nonzero().squeeze(1)


class _Batch:
    """A batch, cut into parts that stay in cache. See `pool_mean_std` for the arguments.

    Attributes:
        parts: all parcels that have dates.
        n: valid pixels, (B, L or 1, 1).
        n_rows: pixels of all dates that there are, those included that only fill sets up.
        shape: (B, L, C).
        dtype: of the pixels.
    """

    def __init__(self, pixels: Tensor, mask: Tensor, n_dates: Sequence[int] | None) -> None:
        B, L, C, S = pixels.shape
        pixels = pixels.permute(0, 3, 1, 2).contiguous()  # (B, S, L, C), as the loader gives them
        dates = [L] * B if n_dates is None else n_dates
        mask = mask[:, :1] if mask.stride(1) == 0 else mask  # one for all dates, as the loader gives it
        is_left_out = torch.arange(L) >= torch.tensor(dates).unsqueeze(1)
        is_same = ((mask == mask[:, :1]).all(2) | is_left_out).all(1).tolist()
        sizes = ((mask != 0).any(1) * torch.arange(1, S + 1)).amax(1).clamp(min=1).tolist()
        weight = mask.to(pixels.dtype)
        self.n = weight.sum(2, keepdim=True)
        self.n_rows = S * sum(dates)
        self.shape, self.dtype = (B, L, C), pixels.dtype
        self.parts: list[_Part] = []
        kinds = list(zip(dates, is_same))
        order = sorted((i for i in range(B) if dates[i]), key=lambda i: (kinds[i], sizes[i]))
        parcels = torch.tensor(order, dtype=torch.int64)
        weight, n = (x.index_select(0, parcels) for x in (weight, self.n))
        start = 0
        for (L, same), group in itertools.groupby(order, key=kinds.__getitem__):
            end = start + len(list(group))
            step = max(1, _PART_ROWS // (S * L))
            on_dates, masks = pixels[:, :, :L], slice(0, 1 if same else L)
            for i in range(start, end, step):
                here = slice(i, min(i + step, end))
                size = sizes[order[here.stop - 1]]
                w = weight[here, masks, :size]
                self.parts.append(_Part(parcels[here], L, on_dates, on_dates[:, :size], w, n[here, masks]))
            start = end


class Moments(NamedTuple):
    """Sums over the rows h of a batch, in coordinates g = V^T h.

    Attributes:
        n: number of rows.
        sums: of [g, 1] g^T, (k + 1, k) float64.
        V: orthonormal basis (k, k) float64; None for g = h.
    """

    n: int
    sums: Tensor
    V: Tensor | None

    def of_output(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Mean W m and variance diag(W C W^T) of W h, (m,) each, from mean m and covariance C of h."""
        W = W if self.V is None else W @ self.V
        m = self.sums[-1] / self.n
        C = self.sums[:-1] / self.n - torch.outer(m, m)
        return W @ m, ((W @ C) * W).sum(1)


def fold(layer: nn.Module, moments: Moments | None) -> Tensor:
    """Linear and BatchNorm as one matrix A (k + 1, m).

    With the mean mu and variance v of y = W h + b, BatchNorm gives gamma (y - mu) / sqrt(v + eps) + beta,
    which is a W h + (beta - a (mu - b)) with a = gamma / sqrt(v + eps). In training, mu - b and v follow from
    the moments of the batch's h, before any y is computed; in evaluation they are the running statistics.

    Args:
        layer: a `linlayer`.
        moments: of the rows h that enter the layer, for training; None for evaluation.
    """
    W, b, bn = layer.lin.weight.double(), layer.lin.bias.double(), layer.bn
    if moments is None:
        centre, v = bn.running_mean - b, bn.running_var.double()
    else:
        centre, v = moments.of_output(W)
        update_running_statistics(bn, centre + b, v * (moments.n / (moments.n - 1)))
    a = bn.weight / torch.sqrt(v + bn.eps)
    A = torch.cat([(a.unsqueeze(1) * W).t(), (bn.bias - a * centre).unsqueeze(0)])
    return A.to(layer.lin.weight.dtype)


def batch_moments(batch: _Batch, maps: Sequence[Tensor], W: Tensor) -> Moments:
    """Moments of the rows h that leave the layers folded so far and enter the one of weight W.

    Products of bands, which are often nearly collinear, are summed in float64; products of activations, in a
    chunk, in their own type, which is four times as fast. Should W combine the h so that a variance is
    little more than the rounding errors of these sums, they are taken again, in float64 and along the
    eigenvectors of that matrix: directions of large and of small variance then no longer mix.

    Of processes that train together, each sums over its part of the batch.
    """
    n = int(sum_over_ranks(torch.tensor(batch.n_rows)))
    sum_type = batch.dtype if maps else torch.float64
    moments = Moments(n, sum_over_ranks(_Moments.apply(batch, sum_type, None, *maps)), None)
    with torch.no_grad():
        W = W.double()
        _, v = moments.of_output(W)
        second = moments.sums[:-1] / n
        summands = (W.abs() @ second.diagonal().sqrt()).square()  # no less than those whose sum v is
        error = torch.finfo(sum_type).eps * summands
        if not (error > _LOST_DIGITS * torch.finfo(batch.dtype).eps * v).any():
            return moments
        V = torch.linalg.eigh(second).eigenvectors
    return Moments(n, sum_over_ranks(_Moments.apply(batch, torch.float64, V, *maps)), V)


def _forward(rows: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    """h_0 = rows, (r, C), to h_n = relu([h_{n-1}, 1] A_n)."""
    h = [rows]
    for A in maps:
        h.append(torch.addmm(A[-1], h[-1], A[:-1]).clamp_min_(0))
    return h


def _backward(h: list[Tensor], g: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the maps from that of h_n, which is overwritten.

    Of g, the gradient of h_l, relu leaves g [h_l > 0]; A_l gets [h_{l-1}, 1]^T g and h_{l-1} gets g A_l^T,
    without the bias.
    """
    gradients = []
    for i in reversed(range(len(maps))):
        torch.ops.aten.threshold_backward.grad_input(g, h[i + 1], 0, grad_input=g)
        gradients.append(torch.cat([h[i].t() @ g, g.sum(0, keepdim=True)]))
        if i > 0:
            g = g @ maps[i][:-1].t()
    return gradients[::-1]


def _sum_gradients(parts: Sequence[Sequence[Tensor]], maps: Sequence[Tensor]) -> list[Tensor]:
    """Sums of the gradients of all maps over the parts, in their order."""
    of_maps = zip(*parts) if parts else [()] * len(maps)
    return [torch.stack([torch.zeros_like(A), *gradients]).sum(0) for A, gradients in zip(maps, of_maps)]


class _Moments(torch.autograd.Function):
    """The `sums` of `Moments` over all rows h that leave the folded layers.

    Args of apply: the batch, the type in which a part's products are summed, V, the maps.
    """

    @staticmethod
    def forward(ctx, batch: _Batch, sum_type: torch.dtype, V: Tensor | None, *maps: Tensor) -> Tensor:
        k = maps[-1].shape[1] if maps else batch.shape[2]
        sums = torch.empty(len(batch.parts), k + 1, k, dtype=torch.float64)

        def add(i: int) -> None:
            h = _forward(batch.parts[i].all_rows(), maps)[-1].to(sum_type)
            g = h if V is None else h @ V
            sums[i, :k], sums[i, k] = g.t() @ g, g.sum(0)

        share(len(batch.parts), add)
        ctx.save_for_backward(V, *maps)
        ctx.batch = batch
        return sums.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_sums: Tensor) -> tuple[Tensor | None, ...]:
        """With D the gradient of the sum of g g^T, and d that of the sum of g: g gets (D + D^T) g + d, and h
        gets V times that.
        """
        batch, (V, *maps) = ctx.batch, ctx.saved_tensors
        P, d = d_sums[:-1] + d_sums[:-1].t(), d_sums[-1]
        if V is not None:
            P, d = V @ P @ V.t(), V @ d
        P, d = P.to(batch.dtype), d.to(batch.dtype)
        gradients: list[Sequence[Tensor]] = [()] * len(batch.parts)

        def add(i: int) -> None:
            h = _forward(batch.parts[i].all_rows(), maps)
            gradients[i] = _backward(h, torch.addmm(d, h[-1], P), maps)

        share(len(batch.parts), add)
        return None, None, None, *_sum_gradients(gradients, maps)


class _Pooling(torch.autograd.Function):
    """Masked mean and standard deviation over the pixels of what leaves the folded layers, (B, L, E) each.

    Args of apply: the batch, the maps.
    """

    @staticmethod
    def forward(ctx, batch: _Batch, *maps: Tensor) -> tuple[Tensor, Tensor]:
        B, L, _ = batch.shape
        E = maps[-1].shape[1]
        mean, variance = torch.zeros(2, B, 1, L * E, dtype=batch.dtype)

        def pool(i: int) -> None:
            part = batch.parts[i]
            z = _forward(part.pooled_rows(), maps)[-1]
            m = part.sum(z)
            m.view(len(m), part.n_dates, E).div_(part.n)
            deviation = z.view(len(m), -1, part.n_dates * E).sub_(m).square_().view_as(z)
            for sums, x in ((mean, m), (variance, part.sum(deviation))):
                sums[:, :, : part.n_dates * E].index_copy_(0, part.parcels, x)

        share(len(batch.parts), pool)
        mean, variance = mean.view(B, L, E), variance.view(B, L, E)
        std = variance.div_((batch.n - 1).clamp(min=1)).add_(1e-31).sqrt_()
        ctx.save_for_backward(mean, std, *maps)
        ctx.batch = batch
        return mean, std

    @staticmethod
    @once_differentiable
    def backward(ctx, d_mean: Tensor, d_std: Tensor) -> tuple[Tensor | None, ...]:
        """A valid pixel z gets d_mean / n + d_std (z - mean) / (max(n - 1, 1) std) = offset + slope z.

        That the mean moves with z changes no std, since the deviations sum to 0. A constant set, of one pixel
        say, has std 3e-16 from the constant under the root; its deviations are 0, and so is its gradient.
        """
        batch, (mean, std, *maps) = ctx.batch, ctx.saved_tensors
        slope = torch.where(std > 1e-15, d_std / ((batch.n - 1).clamp(min=1) * std), 0)
        offset = d_mean / batch.n - slope * mean
        slope, offset = slope.unsqueeze(1), offset.unsqueeze(1)
        gradients: list[Sequence[Tensor]] = [()] * len(batch.parts)

        def add(i: int) -> None:
            part = batch.parts[i]
            h = _forward(part.pooled_rows(), maps)
            a, b = (x[:, :, : part.n_dates].index_select(0, part.parcels) for x in (slope, offset))
            z = h[-1].view(len(a), -1, part.n_dates, a.shape[3])
            g = part.leave_out(torch.addcmul(b, a, z).view_as(h[-1]))
            gradients[i] = _backward(h, g, maps)

        share(len(batch.parts), add)
        return None, *_sum_gradients(gradients, maps)
