"""Initial weights of every layer of a classifier, as published."""

from torch import nn


def weight_init(module: nn.Module) -> None:
    """Initialises one layer; meant for `model.apply(weight_init)`. Bare parameters (L-TAE's Q) keep their own.

    Linear and Conv2d/3d weights are Xavier normal; Conv1d weights, all biases and BatchNorm weights standard normal;
    BatchNorm biases 0; recurrent matrices orthogonal, recurrent biases standard normal. LayerNorm is left at 1 and 0.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
        nn.init.xavier_normal_(module.weight)
        _normal(module.bias)
    elif isinstance(module, nn.Conv1d):
        nn.init.normal_(module.weight)
        _normal(module.bias)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        nn.init.normal_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.RNNBase):
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                nn.init.orthogonal_(parameter)
            else:
                nn.init.normal_(parameter)


def _normal(bias: nn.Parameter | None) -> None:
    if bias is not None:
        nn.init.normal_(bias)
