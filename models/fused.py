"""mlp1 and the pooling of mean and standard deviation, fused: what `pse.py` writes plainly, fast on a CPU.

The plain form writes the activations of every layer for every row, one row per pixel and date, and reads them
several times: memory is its limit, not arithmetic. Here the parcels pass a few at a time, in buffers that
stay in cache and are used again for the next ones, every thread with its own. Nothing is kept for the backward pass,
which computes the activations once more. What is summed over the batch is summed for every few parcels first, then over
these in order, so that no result depends on the threads.

Notation: a row h of k numbers is followed by a 1, so that an affine map is one matrix A (k + 1, m), with
the bias as its last row.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.ranks import count_over_ranks, sum_over_ranks, update_running_statistics
from models.threads import share

_PART_ROWS = 6144  # rows at a time: few enough for a core's cache, enough to make up for the calls
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
        mean and std, (B, L, E) each; 0 for a date that is left out.
    """
    batch = _Batch(pixels, mask, n_dates)
    maps: list[Tensor] = []
    for layer in layers:
        moments = batch_moments(batch, maps, layer.lin.weight) if layer.bn.training else None
        maps.append(fold(layer, moments))
    mean, std = _Pooling.apply(batch, *maps)
    return mean.index_select(0, batch.place), std.index_select(0, batch.place)


class _Part(NamedTuple):
    """A few parcels of a batch, of equally many dates L.

    Attributes:
        parcels: their places in the batch's order.
        rows: of [x, 1] for the pixels x, (p, S, L, C + 1).
        weight: 1 for a valid pixel, else 0, (p, S, L or 1, 1).
        size: pixels up to the last valid one; the others count in the batch statistics alone.
    """

    parcels: slice
    rows: Tensor
    weight: Tensor
    size: int

    def flat_rows(self) -> Tensor:
        """All rows, (r, C + 1)."""
        return self.rows.flatten(0, 2)

    def pooled_rows(self) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
        """The rows that are pooled, (r, C + 1), their weight (p, size, L or 1, 1), and (p, size, L)."""
        rows = self.rows[:, : self.size]
        return rows.reshape(-1, rows.shape[3]), self.weight[:, : self.size], tuple(rows.shape[:3])


class _Batch:
    """A batch, cut into parts that stay in cache. See `pool_mean_std` for the arguments.

    Parcels with equally many dates go together and, among these, parcels of similar size: most of what only fills
    sets up can then be left out of the pooling.

    Attributes:
        parts: of the parcels in the batch's order.
        place: where each parcel is in that order, (B,).
        n_rows: number of rows.
        shape: (B, L).
        dtype: of the pixels.
    """

    def __init__(self, pixels: Tensor, mask: Tensor, n_dates: Sequence[int] | None) -> None:
        B, L, C, S = pixels.shape
        if mask.stride(1) == 0:
            mask = mask[:, :1]  # one mask for all dates, as the loader gives it
        weight = mask.to(pixels.dtype).transpose(1, 2).unsqueeze(3)  # (B, S, L or 1, 1)
        slots = torch.arange(1, S + 1)
        sizes = ((mask != 0).any(1) * slots).amax(1).clamp(min=1).tolist()
        dates = [L] * B if n_dates is None else n_dates
        order = sorted(range(B), key=lambda parcel: (dates[parcel], sizes[parcel]))
        self.place = torch.tensor(order).argsort()
        self.shape, self.dtype = (B, L), pixels.dtype
        self.n_rows = S * sum(dates)
        rows, weight = pixels.new_empty(self.n_rows, C + 1), weight[torch.tensor(order)]
        self.parts: list[_Part] = []
        start = first_row = 0
        for n, group in itertools.groupby(dates[parcel] for parcel in order):
            end = start + len(list(group))
            step = max(1, _PART_ROWS // (S * max(n, 1)))
            for i in range(start if n else end, end, step):
                parcels = slice(i, min(i + step, end))
                last_row = first_row + (parcels.stop - i) * S * n
                part_rows = rows[first_row:last_row].view(-1, S, n, C + 1)
                size = max(sizes[parcel] for parcel in order[parcels])
                part_weight = weight[parcels][:, :, :n]
                if (part_weight == part_weight[:, :, :1]).all():
                    part_weight = part_weight[
                        :, :, :1
                    ]  # with one mask for all dates, sums are matrix products
                self.parts.append(_Part(parcels, part_rows, part_weight, size))
                first_row = last_row
            start = end

        pixels = pixels.permute(0, 3, 1, 2)

        def make_task() -> Callable[[int], None]:
            def fill(i: int) -> None:
                part = self.parts[i]
                part.rows[..., C] = 1
                for row, parcel in zip(part.rows, order[part.parcels]):
                    row[..., :C] = pixels[parcel, :, : row.shape[1]]

            return fill

        share(len(self.parts), make_task)

    def like_pooled(self, n_features: int) -> Tensor:
        """Zeros for every date of every parcel, (B, L, n_features)."""
        return torch.zeros(*self.shape, n_features, dtype=self.dtype)

    @property
    def most_rows(self) -> int:
        """Rows of the largest part."""
        return max((part.rows[..., 0].numel() for part in self.parts), default=0)


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
    n = count_over_ranks(batch.n_rows)
    sum_type = batch.dtype if maps else torch.float64
    moments = Moments(n, sum_over_ranks(_Moments.apply(batch, sum_type, None, *maps)), None)
    with torch.no_grad():
        W = W.double()
        _, v = moments.of_output(W)
        second = moments.sums[:-1] / n
        summands = (W.abs() @ second.diagonal().sqrt()).square()  # no less than those whose sum v is
        error, accepted = (
            torch.finfo(sum_type).eps * summands,
            _LOST_DIGITS * torch.finfo(batch.dtype).eps * v,
        )
        if not (error > accepted).any():
            return moments
        V = torch.linalg.eigh(second).eigenvectors
    return Moments(n, sum_over_ranks(_Moments.apply(batch, torch.float64, V, *maps)), V)


class _Layers:
    """Folded layers, h_l = relu([h_{l-1}, 1] A_l), of one chunk of rows at a time, forwards and backwards."""

    def __init__(
        self, maps: Sequence[Tensor], batch: _Batch, ends_with_one: bool, backward: bool = False
    ) -> None:
        self.maps = maps
        self.widths = [A.shape[1] for A in maps]
        ones = [True] * (len(maps) - 1) + [ends_with_one]
        self._h = [
            torch.ones(batch.most_rows, m + one, dtype=batch.dtype) for m, one in zip(self.widths, ones)
        ]
        self._g = [torch.zeros_like(buffer) for buffer in self._h] if backward else []

    def forward(self, rows: Tensor) -> list[Tensor]:
        """h_0 = rows, (r, C + 1), to h_n, the last with or without the 1; good until the next call."""
        h = [rows] + [buffer[: len(rows)] for buffer in self._h]
        for A, m, before, after in zip(self.maps, self.widths, h, h[1:]):
            torch.mm(before, A, out=after[:, :m])
            after.relu_()  # leaves the 1 as it is
        return h

    def like_output(self) -> Tensor:
        """A buffer as large as that of h_n."""
        return torch.empty_like(self._h[-1])

    def output_gradient(self, n_rows: int) -> Tensor:
        """Where the gradient of h_n, (n_rows, m), has to be written before `backward`."""
        return self._g[-1][:n_rows, : self.widths[-1]]

    def backward(self, h: list[Tensor], n_parcels: int, gradients: list[Tensor]) -> None:
        """Writes a chunk's gradients of the maps: of g, that of h_l, relu leaves g [h_l > 0]; A_l gets [h_{l-1}, 1]^T g and
        h_{l-1} gets g A_l^T, without the bias.
        """
        g = [buffer[: len(h[0])] for buffer in self._g]
        for i in reversed(range(len(self.maps))):
            torch.ops.aten.threshold_backward.grad_input(g[i], h[i + 1], 0, grad_input=g[i])
            g_i = g[i][:, : self.widths[i]]
            torch.sum(_products(h[i], g_i, n_parcels), dim=0, out=gradients[i])
            if i > 0:
                torch.mm(g_i, self.maps[i][:-1].t(), out=g[i - 1][:, : self.widths[i - 1]])


class _Moments(torch.autograd.Function):
    """The `sums` of `Moments` over all rows h that leave the folded layers.

    Args of apply: the batch, the type in which a part's products are summed, V, the maps.
    """

    @staticmethod
    def forward(ctx, batch: _Batch, sum_type: torch.dtype, V: Tensor | None, *maps: Tensor) -> Tensor:
        k = maps[-1].shape[1] if maps else batch.parts[0].rows.shape[3] - 1
        sums = torch.empty(len(batch.parts), k + 1, k, dtype=torch.float64)

        def make_task() -> Callable[[int], None]:
            layers = _Layers(maps, batch, ends_with_one=True) if maps else None

            def add(i: int) -> None:
                part = batch.parts[i]
                h = part.flat_rows()
                h = (layers.forward(h)[-1] if layers else h).to(sum_type)
                g = h if V is None else torch.cat([h[:, :k] @ V, h[:, k:]], dim=1)
                sums[i] = _products(g, g[:, :k], len(part.rows)).sum(0)

            return add

        share(len(batch.parts), make_task)
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
        gradients = [A.new_empty(len(batch.parts), *A.shape) for A in maps]
        D, d = d_sums[:-1], d_sums[-1:]
        P = D + D.t()
        P = torch.cat([P, d] if V is None else [V @ P @ V.t(), d @ V.t()]).to(batch.dtype)

        def make_task() -> Callable[[int], None]:
            layers = _Layers(maps, batch, ends_with_one=True, backward=True)

            def add(i: int) -> None:
                part = batch.parts[i]
                h = layers.forward(part.flat_rows())
                torch.mm(h[-1], P, out=layers.output_gradient(len(h[-1])))
                layers.backward(h, len(part.rows), [gradient[i] for gradient in gradients])

            return add

        share(len(batch.parts), make_task)
        return None, None, None, *(gradient.sum(0) for gradient in gradients)


class _Pooling(torch.autograd.Function):
    """Masked mean and standard deviation over the pixels of what leaves the folded layers, (B, L, E) each.

    Args of apply: the batch, the maps.
    """

    @staticmethod
    def forward(ctx, batch: _Batch, *maps: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (batch.like_pooled(maps[-1].shape[1]) for _ in range(2))

        def make_task() -> Callable[[int], None]:
            layers = _Layers(maps, batch, ends_with_one=False)
            buffer = layers.like_output()

            def pool(i: int) -> None:
                rows, w, shape = batch.parts[i].pooled_rows()
                n = w.sum(1)
                z = layers.forward(rows)[-1]
                deviation, z = (x.view(*shape, -1) for x in (buffer[: len(z)], z))
                m = _weighted_sum(w, z).div_(n)
                torch.sub(z, m.unsqueeze(1), out=deviation).square_()
                v = _weighted_sum(w, deviation).div_((n - 1).clamp(min=1))
                here = batch.parts[i].parcels, slice(0, shape[2])
                mean[here], std[here] = m, v.add_(1e-31).sqrt_()

            return pool

        share(len(batch.parts), make_task)
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
        gradients = [A.new_empty(len(batch.parts), *A.shape) for A in maps]

        def make_task() -> Callable[[int], None]:
            layers = _Layers(maps, batch, ends_with_one=False, backward=True)

            def add(i: int) -> None:
                rows, w, shape = batch.parts[i].pooled_rows()
                n = w.sum(1)
                here = batch.parts[i].parcels, slice(0, shape[2])
                slope = torch.where(std[here] > 1e-15, d_std[here] / ((n - 1).clamp(min=1) * std[here]), 0)
                offset = d_mean[here] / n - slope * mean[here]
                activations = layers.forward(rows)
                z = activations[-1].view(*shape, -1)
                g = layers.output_gradient(len(activations[-1])).view_as(z)
                torch.addcmul(offset.unsqueeze(1), z, slope.unsqueeze(1), out=g).mul_(w)
                layers.backward(activations, shape[0], [gradient[i] for gradient in gradients])

            return add

        share(len(batch.parts), make_task)
        return None, *(gradient.sum(0) for gradient in gradients)


def _products(a: Tensor, b: Tensor, n_parcels: int) -> Tensor:
    """a^T b of every parcel: their sum rounds less than one long product."""
    a, b = (x.unflatten(0, (n_parcels, -1)) for x in (a, b))
    return torch.bmm(a.transpose(1, 2), b)


def _weighted_sum(w: Tensor, x: Tensor) -> Tensor:
    """Sum over the pixels of x (p, S, L, E), weighted by w (p, S, L or 1, 1): (p, L, E). May write 0 to x where w is 0."""
    if w.shape[2] == 1:  # one product per parcel
        return torch.bmm(w.view(len(w), 1, -1), x.flatten(2)).view(len(x), *x.shape[2:])
    absent = (w.flatten() == 0).nonzero().squeeze(1)  # few rows, where a product with w would pass over all
    x.view(-1, x.shape[3]).index_fill_(0, absent, 0)
    return x.sum(1)
