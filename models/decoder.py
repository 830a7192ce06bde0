"""The classifier's last part."""

from collections.abc import Sequence

from torch import nn

from models.layers import mlp


def get_decoder(n_neurons: Sequence[int]) -> nn.Sequential:
    """MLP from the temporal encoder's output, n_neurons[0], to the class logits, n_neurons[-1]."""
    return mlp(n_neurons, last="linear")
