"""Focal loss (Lin et al. 2017), as the L-TAE paper trains with (section 4.1)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class FocalLoss(nn.Module):
    """-(1 - p)^gamma log p of the true class; the factor (1 - p)^gamma is a constant to the gradient, as published.

    Args:
        gamma: how much well classified samples count less; 0 is cross-entropy.
        alpha: weight of each class; a number a means [a, 1 - a].
        size_average: mean over the samples, otherwise their sum.
    """

    def __init__(
        self,
        gamma: float = 0,
        alpha: float | Sequence[float] | Tensor | None = None,
        size_average: bool = True,
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.size_average = size_average
        if isinstance(alpha, (int, float)):
            alpha = [alpha, 1 - alpha]
        self.register_buffer("alpha", None if alpha is None else torch.as_tensor(alpha, dtype=torch.float32))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of logits (B, K) or (B, K, ...) for the true classes (B,) or (B, ...), as a scalar."""
        if input.dim() > 2:  # every position is a sample
            input = input.flatten(2).transpose(1, 2).flatten(0, 1)
        target = target.reshape(-1)
        nll = cross_entropy(input, target, reduction="none")  # unlike `gather`, a few kernels on a GPU
        loss = (1 - (-nll.detach()).exp()) ** self.gamma * nll
        if self.alpha is not None:
            loss = loss * self.alpha.to(loss)[target]
        return loss.mean() if self.size_average else loss.sum()


# By name, what makes a loss from --gamma. What a script adds here, --loss can choose.
LOSSES: dict[str, Callable[[float], nn.Module]] = {"focal": FocalLoss}
