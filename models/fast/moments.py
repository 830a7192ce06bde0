"""Masked mean and standard deviation with a backward pass written by hand: fewer passes over memory, on any device.

PyTorch's own backward pass of `masked_mean` and `masked_std` in `models/pse.py` goes through the same values a dozen times,
kernel by kernel; here it is one product and one sum.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def mean_std(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sample standard deviation over the pixels whose weight is 1; sqrt(1e-31) for a single one.

    Args:
        x: (B, S, L, E).
        weight: (B, S, L or 1, 1), 1 or 0; 1 of the third axis where it is the same on all dates.

    Returns:
        (B, L, E) each. Gradients reach x alone, and cannot be differentiated once more.
    """
    return _MeanStd.apply(x, weight)


class _MeanStd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        n = weight.sum(1)  # (B, L or 1, 1)
        mean = _sum(x, weight).div_(n)
        square = torch.sub(x, mean.unsqueeze(1)).square_()
        freedom = (n - 1).clamp_(min=1)
        std = _sum(square, weight).div_(freedom).add_(1e-31).sqrt_()
        ctx.save_for_backward(x, weight, n, freedom, mean, std)
        return mean, std

    @staticmethod
    @once_differentiable
    def backward(ctx, d_mean: Tensor, d_std: Tensor) -> tuple[Tensor, None]:
        """A valid pixel x gets d_mean / n + d_std (x - mean) / (freedom std); see `_Pooling.backward` of `pooling.py`."""
        x, weight, n, freedom, mean, std = ctx.saved_tensors
        slope = (d_std / (freedom * std)).masked_fill_(std < 1e-15, 0)
        offset = torch.addcmul(d_mean / n, slope, mean, value=-1)
        return torch.addcmul(offset.unsqueeze(1), slope.unsqueeze(1), x).mul_(weight), None


def _sum(x: Tensor, weight: Tensor) -> Tensor:
    """Sum over the pixels of weight x: (B, L, E); a product per parcel where the weight is the same on all dates."""
    B, S, L, E = x.shape
    if weight.shape[2] == 1:
        return torch.bmm(weight.view(B, 1, S), x.reshape(B, S, L * E)).view(B, L, E)
    return (x * weight).sum(1)
