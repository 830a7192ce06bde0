"""Batch statistics over all processes of a run, of which each has a part of every batch."""

import torch
from torch import Tensor, nn

from common.processes import sum_over_ranks


def share_statistics(model: nn.Module) -> None:
    """Makes the BatchNorms of a model use the statistics of whole batches; their parameters and keys stay.

    `nn.SyncBatchNorm` does so on CUDA alone.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm1d:
                setattr(module, name, _SharedBatchNorm(child))


class _SharedBatchNorm(nn.BatchNorm1d):
    """BatchNorm of (rows, C) or (rows, C, L), whose rows are spread over processes. Takes over another's parameters."""

    def __init__(self, other: nn.BatchNorm1d) -> None:
        super().__init__(other.num_features, other.eps, other.momentum, device=other.weight.device)
        self.weight, self.bias = other.weight, other.bias
        self.load_state_dict(other.state_dict())
        self.train(other.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        rows = x.movedim(1, -1)
        mean, variance, n = _moments(rows.reshape(-1, self.num_features))
        update_running_statistics(self, mean, variance * (n / (n - 1)))
        scale = self.weight / torch.sqrt(variance + self.eps).to(x.dtype)
        return torch.addcmul(self.bias, rows - mean.to(x.dtype), scale).movedim(-1, 1)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and number, in float64, of the rows (r, C) of all processes."""
    variance, mean = (x.double() for x in torch.var_mean(rows, dim=0, correction=0))
    count = mean.new_tensor([len(rows)])
    sums = sum_over_ranks(torch.cat([count * mean, count * (variance + mean.square()), count]))
    mean, square = (sums[:-1] / sums[-1]).chunk(2)
    return mean, square - mean.square(), sums[-1]


@torch.no_grad()
def update_running_statistics(bn: nn.BatchNorm1d, mean: Tensor, variance: Tensor) -> None:
    """What BatchNorm does in training mode; `variance` is the unbiased one."""
    bn.num_batches_tracked += 1
    share = 1 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    bn.running_mean.mul_(1 - share).add_(share * mean)
    bn.running_var.mul_(1 - share).add_(share * variance)
