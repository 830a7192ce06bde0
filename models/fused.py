"""mlp1 and the pooling of mean and standard deviation, fused: what `pse.py` writes plainly, fast on a CPU.

The plain form writes the activations of every layer for every row, one row per pixel and date, and reads them
several times: memory is its limit, not arithmetic. Here the parcels pass a few at a time, in buffers that
stay in cache and are used again for the next ones. Nothing is kept for the backward pass, which computes the
activations once more.

Notation: a row h of k numbers is followed by a 1, so that an affine map is one matrix A (k + 1, m), with
the bias as its last row.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CHUNK_ROWS = 12288  # rows at a time: enough to keep two cores busy, few enough for the cache
_LOST_DIGITS = 1000  # error accepted in a batch variance, in rounding errors of a single activation


def pool_mean_std(pixels: Tensor, mask: Tensor, layers: nn.ModuleList) -> tuple[Tensor, Tensor]:
    """Masked mean and sample standard deviation over the pixels of mlp1's output.

    BatchNorm uses and updates its statistics as its own `training` says. Gradients reach the parameters, but
    not the pixels.

    Args:
        pixels: (B, L, C, S).
        mask: (B, L, S), 1 for a pixel of the parcel and 0 for one that fills the set up.
        layers: the `linlayer`s of mlp1.

    Returns:
        mean and std, (B, L, E) each.
    """
    B, L, C, S = pixels.shape
    if mask.stride(1) == 0:
        mask = mask[:, :1]  # one mask for all dates, as the loader gives it
    mask = mask.to(pixels.dtype).transpose(1, 2).unsqueeze(3)  # (B, S, L or 1, 1)
    # Pixels after a parcel's last valid one count in the batch statistics alone. Parcels of similar size go
    # together, so that pooling can leave most of these pixels out.
    slots = torch.arange(1, S + 1, device=mask.device)
    sizes, order = ((mask != 0).any(2).squeeze(2) * slots).amax(1).clamp(min=1).sort()
    rows = pixels.new_ones(B, S, L, C + 1)
    rows[..., :C] = pixels.permute(0, 3, 1, 2).index_select(0, order)
    maps: list[Tensor] = []
    for layer in layers:
        moments = batch_moments(rows, maps, layer.lin.weight) if layer.bn.training else None
        maps.append(fold(layer, moments))
    mean, std = _Pooling.apply(rows, mask.index_select(0, order), sizes.tolist(), *maps)
    place = order.argsort()
    return mean.index_select(0, place), std.index_select(0, place)


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
        _update_running_statistics(bn, centre + b, v * (moments.n / (moments.n - 1)))
    a = bn.weight / torch.sqrt(v + bn.eps)
    A = torch.cat([(a.unsqueeze(1) * W).t(), (bn.bias - a * centre).unsqueeze(0)])
    return A.to(layer.lin.weight.dtype)


@torch.no_grad()
def _update_running_statistics(bn: nn.BatchNorm1d, mean: Tensor, variance: Tensor) -> None:
    """What BatchNorm does in training mode; `variance` is the unbiased one."""
    bn.num_batches_tracked += 1
    share = 1 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    bn.running_mean.mul_(1 - share).add_(share * mean)
    bn.running_var.mul_(1 - share).add_(share * variance)


def batch_moments(rows: Tensor, maps: Sequence[Tensor], W: Tensor) -> Moments:
    """Moments of the rows h that leave the layers folded so far and enter the one of weight W.

    Products of bands, which are often nearly collinear, are summed in float64; products of activations, in a
    chunk, in their own type, which is four times as fast. Should W combine the h so that a variance is
    little more than the rounding errors of these sums, they are taken again, in float64 and along the
    eigenvectors of that matrix: directions of large and of small variance then no longer mix.
    """
    n = rows[..., 0].numel()
    sum_type = rows.dtype if maps else torch.float64
    moments = Moments(n, _Moments.apply(rows, sum_type, None, *maps), None)
    with torch.no_grad():
        W = W.double()
        _, v = moments.of_output(W)
        second = moments.sums[:-1] / n
        summands = (W.abs() @ second.diagonal().sqrt()).square()  # no less than those whose sum v is
        error, accepted = torch.finfo(sum_type).eps * summands, _LOST_DIGITS * torch.finfo(rows.dtype).eps * v
        if not (error > accepted).any():
            return moments
        V = torch.linalg.eigh(second).eigenvectors
    return Moments(n, _Moments.apply(rows, torch.float64, V, *maps), V)


class _Layers:
    """Folded layers, h_l = relu([h_{l-1}, 1] A_l), of one chunk of rows at a time, forwards and backwards."""

    def __init__(self, maps: Sequence[Tensor], rows: Tensor, ends_with_one: bool) -> None:
        self.maps = maps
        self.widths = [A.shape[1] for A in maps]
        n_rows = min(len(rows), _chunk_parcels(rows)) * rows.shape[1] * rows.shape[2]
        ones = [True] * (len(maps) - 1) + [ends_with_one]
        self._h = [rows.new_ones(n_rows, m + one) for m, one in zip(self.widths, ones)]

    def forward(self, rows: Tensor) -> list[Tensor]:
        """h_0 = rows, (r, C + 1), to h_n, the last with or without the 1; good until the next call."""
        h = [rows] + [buffer[: len(rows)] for buffer in self._h]
        for A, m, before, after in zip(self.maps, self.widths, h, h[1:]):
            torch.mm(before, A, out=after[:, :m])
            after.relu_()  # leaves the 1 as it is
        return h

    def prepare_backward(self) -> None:
        """Makes gradients of the maps, summed over the chunks, and buffers for those of the activations."""
        self.gradients = [torch.zeros_like(A) for A in self.maps]
        self._g = [torch.zeros_like(buffer) for buffer in self._h]

    def like_output(self) -> Tensor:
        """A buffer as large as that of h_n."""
        return torch.empty_like(self._h[-1])

    def output_gradient(self, n_rows: int) -> Tensor:
        """Where the gradient of h_n, (n_rows, m), has to be written before `backward`."""
        return self._g[-1][:n_rows, : self.widths[-1]]

    def backward(self, h: list[Tensor], n_parcels: int) -> None:
        """Adds a chunk's gradients: of g, that of h_l, relu leaves g [h_l > 0]; A_l gets [h_{l-1}, 1]^T g and
        h_{l-1} gets g A_l^T, without the bias.
        """
        g = [buffer[: len(h[0])] for buffer in self._g]
        for i in reversed(range(len(self.maps))):
            torch.ops.aten.threshold_backward.grad_input(g[i], h[i + 1], 0, grad_input=g[i])
            g_i = g[i][:, : self.widths[i]]
            self.gradients[i] += _sum_products(h[i], g_i, n_parcels)
            if i > 0:
                torch.mm(g_i, self.maps[i][:-1].t(), out=g[i - 1][:, : self.widths[i - 1]])


class _Moments(torch.autograd.Function):
    """The `sums` of `Moments` over all rows h that leave the folded layers.

    Args of apply: rows (B, S, L, C + 1), the type in which a chunk's products are summed, V, the maps.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, sum_type: torch.dtype, V: Tensor | None, *maps: Tensor) -> Tensor:
        layers = _Layers(maps, rows, ends_with_one=True) if maps else None
        k = (maps[-1] if maps else rows[0, 0, :, 1:]).shape[1]
        sums = rows.new_zeros(k + 1, k, dtype=torch.float64)
        for chunk in rows.split(_chunk_parcels(rows)):
            h = chunk.flatten(0, 2)
            h = (layers.forward(h)[-1] if layers else h).to(sum_type)
            g = h if V is None else torch.cat([h[:, :k] @ V, h[:, k:]], dim=1)
            sums += _sum_products(g, g[:, :k], len(chunk))
        ctx.save_for_backward(rows, V, *maps)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, d_sums: Tensor) -> tuple[Tensor | None, ...]:
        """With D the gradient of the sum of g g^T, and d that of the sum of g: g gets (D + D^T) g + d, and h
        gets V times that.
        """
        rows, V, *maps = ctx.saved_tensors
        layers = _Layers(maps, rows, ends_with_one=True)
        layers.prepare_backward()
        D, d = d_sums[:-1], d_sums[-1:]
        P = D + D.t()
        P = torch.cat([P, d] if V is None else [V @ P @ V.t(), d @ V.t()]).to(rows.dtype)
        for chunk in rows.split(_chunk_parcels(rows)):
            h = layers.forward(chunk.flatten(0, 2))
            torch.mm(h[-1], P, out=layers.output_gradient(len(h[-1])))
            layers.backward(h, len(chunk))
        return None, None, None, *layers.gradients


class _Pooling(torch.autograd.Function):
    """Masked mean and standard deviation over the pixels of what leaves the folded layers, (B, L, E) each.

    Args of apply: rows (B, S, L, C + 1); mask (B, S, L or 1, 1); for each parcel, in increasing order, the
    number of pixels up to the last valid one; the maps.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, mask: Tensor, sizes: list[int], *maps: Tensor) -> tuple[Tensor, Tensor]:
        layers = _Layers(maps, rows, ends_with_one=False)
        B, _, L, _ = rows.shape
        mean, std = (rows.new_empty(B, L, maps[-1].shape[1]) for _ in range(2))
        n = mask.sum(1)  # (B, L or 1, 1)
        buffer = layers.like_output()
        for part, h, w in _chunks(rows, mask, sizes):
            z = layers.forward(h.reshape(-1, h.shape[3]))[-1]
            deviation, z = (x.view(*h.shape[:3], -1) for x in (buffer[: len(z)], z))
            _weighted_sum(w, z, out=mean[part]).div_(n[part])
            torch.sub(z, mean[part].unsqueeze(1), out=deviation).square_()
            _weighted_sum(w, deviation, out=std[part])
        std.div_((n - 1).clamp(min=1)).add_(1e-31).sqrt_()
        ctx.save_for_backward(rows, mask, n, mean, std, *maps)
        ctx.sizes = sizes
        return mean, std

    @staticmethod
    @once_differentiable
    def backward(ctx, d_mean: Tensor, d_std: Tensor) -> tuple[Tensor | None, ...]:
        """A valid pixel z gets d_mean / n + d_std (z - mean) / (max(n - 1, 1) std) = offset + slope z.

        That the mean moves with z changes no std, since the deviations sum to 0. A constant set, of one pixel
        say, has std 3e-16 from the constant under the root; its deviations are 0, and so is its gradient.
        """
        rows, mask, n, mean, std, *maps = ctx.saved_tensors
        layers = _Layers(maps, rows, ends_with_one=False)
        layers.prepare_backward()
        slope = torch.where(std > 1e-15, d_std / ((n - 1).clamp(min=1) * std), 0)
        offset = d_mean / n - slope * mean
        for part, h, w in _chunks(rows, mask, ctx.sizes):
            activations = layers.forward(h.reshape(-1, h.shape[3]))
            z = activations[-1].view(*h.shape[:3], -1)
            g = layers.output_gradient(len(activations[-1])).view_as(z)
            torch.addcmul(offset[part].unsqueeze(1), z, slope[part].unsqueeze(1), out=g).mul_(w)
            layers.backward(activations, len(h))
        return None, None, None, *layers.gradients


def _sum_products(a: Tensor, b: Tensor, n_parcels: int) -> Tensor:
    """a^T b, parcel by parcel: equal parts for the threads, and sums that round less than one long one."""
    a, b = (x.unflatten(0, (n_parcels, -1)) for x in (a, b))
    return torch.bmm(a.transpose(1, 2), b).sum(0)


def _weighted_sum(w: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Sum over the pixels of x (p, S, L, E), weighted by w (p, S, L or 1, 1), written to out (p, L, E)."""
    if w.shape[2] == 1:  # one product per parcel
        torch.bmm(w.view(len(w), 1, -1), x.flatten(2), out=out.view(len(out), 1, -1))
        return out
    return torch.sum(w * x, dim=1, out=out)


def _chunk_parcels(rows: Tensor) -> int:
    """Parcels in a chunk of rows (B, S, L, C + 1)."""
    _, S, L, _ = rows.shape
    return max(1, _CHUNK_ROWS // (S * L))


def _chunks(rows: Tensor, mask: Tensor, sizes: list[int]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few parcels at a time: their slice, and rows and mask up to the last valid pixel of the largest."""
    step = _chunk_parcels(rows)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        size = max(sizes[part])
        yield part, rows[part, :size], mask[part, :size]
