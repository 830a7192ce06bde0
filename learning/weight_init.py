"""Initial weights of every layer of a classifier, as published."""

from torch import nn

from models import tae
from models.stclassifier import PseClassifier


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


def freeze_idle_biases(model: PseClassifier) -> None:
    """Keeps every bias as it is that the batch statistics of a later layer take out again.

    Its gradient is rounding errors alone, which Adam would make steps of full size: other ones on every machine, and
    the running statistics of evaluation lag behind them.
    """
    for module in model.modules():
        layers = list(module.children())
        for layer, following in zip(layers, layers[1:]):
            if isinstance(layer, (nn.Linear, nn.Conv1d)) and isinstance(following, nn.BatchNorm1d):
                layer.bias.requires_grad_(False)
        if isinstance(module, tae.MultiHeadAttention):  # queries pass through the BatchNorm of fc2
            module.fc1_q.bias.requires_grad_(False)
    if len(model.decoder) > 1 and hasattr(model.temporal_encoder, "outlayernorm"):
        model.temporal_encoder.outlayernorm.bias.requires_grad_(False)
