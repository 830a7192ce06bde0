"""The method once more, written as plainly as the papers state it: the second opinion of the tests.

Every form is a function of a `state` (a `state_dict`: names to tensors) and of the data. Nothing is fused,
cached or left out: keys are computed for every date, heads are visited one after another, BatchNorm and
LayerNorm are spelled out. All of it is differentiable and keeps the dtype of its input, so that it can be
trusted to 1e-10 in float64.

Channels are always the last axis. Letters as in the paper: B parcels, T dates, C channels, S pixels, H heads,
K key size, E embedding width.

With `training=True` BatchNorm normalises by the batch and replaces the running statistics in `state`. Dropout
is never applied.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]

EPSILON = 1e-5  # of BatchNorm and LayerNorm
MOMENTUM = 0.1  # share of the newest batch in the running statistics


# ------------------------------------------------------------------------------------------ building blocks


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """y = W x + b for every vector along the last axis."""
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def batch_norm(state: State, name: str, x: Tensor, training: bool) -> Tensor:
    """Standardise each channel over all leading axes (training) or by the running statistics."""
    if training:
        rows = x.flatten(0, -2)
        mean = rows.mean(0)
        variance = ((rows - mean) ** 2).mean(0)
        unbiased = variance * len(rows) / (len(rows) - 1)
        for key, value in (("running_mean", mean), ("running_var", unbiased)):
            old = state[f"{name}.{key}"]
            state[f"{name}.{key}"] = (1 - MOMENTUM) * old + MOMENTUM * value.detach()
    else:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return (x - mean) / torch.sqrt(variance + EPSILON) * state[f"{name}.weight"] + state[f"{name}.bias"]


def layer_norm(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Standardise over as many trailing axes as the weight has."""
    axes = tuple(range(-weight.dim(), 0))
    mean = x.mean(axes, keepdim=True)
    variance = ((x - mean) ** 2).mean(axes, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPSILON) * weight + bias


def perceptron(state: State, name: str, x: Tensor, training: bool, last: str = "relu") -> Tensor:
    """Layers `name.0`, `name.3`, ...: Linear, BatchNorm, ReLU; the last one ends as `last` says.

    Args:
        state: weights by name; no layer at all is the identity.
        name: prefix of the keys.
        x: (..., C).
        training: see the module's docstring.
        last: 'relu' (complete), 'norm' (without its ReLU) or 'linear' (without BatchNorm and ReLU).
    """
    layer = 0
    while f"{name}.{layer}.weight" in state:
        is_last = f"{name}.{layer + 3}.weight" not in state
        x = linear(state, f"{name}.{layer}", x)
        if not is_last or last != "linear":
            x = batch_norm(state, f"{name}.{layer + 1}", x, training)
        if not is_last or last == "relu":
            x = torch.relu(x)
        layer += 3
    return x


def positional_angle(position: float, channel: int, width: int, period: float) -> float:
    """sin(p / period^(2 floor(i/2) / width)) at even channels i, the cosine at odd ones."""
    angle = position / period ** (2 * (channel // 2) / width)
    return math.sin(angle) if channel % 2 == 0 else math.cos(angle)


def positional_table(positions: Sequence[float], width: int, period: float = 1000, repeat: int = 1) -> Tensor:
    """One row per position, in float64: (len(positions), width * repeat)."""
    rows = [[positional_angle(p, i, width, period) for i in range(width)] * repeat for p in positions]
    return torch.tensor(rows, dtype=torch.float64)


def date_rows(state: State, name: str, dates: int, positions: Sequence[float] | None) -> Tensor:
    """The stored table's row of each date: row t if `positions` are given, else row t + 1."""
    first = 0 if positions is not None else 1
    return state[f"{name}.position_enc.weight"][first : first + dates]


# ---------------------------------------------------------------------- pixel-set encoder (CVPR 2020 paper)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the real pixels: x (..., S, C), mask (..., S) -> (..., C)."""
    m = mask.unsqueeze(-1)
    return (x * m).sum(-2) / m.sum(-2)


def masked_std(x: Tensor, mask: Tensor) -> Tensor:
    """Sample standard deviation of the real pixels; one pixel alone gives (almost) zero."""
    m = mask.unsqueeze(-1)
    deviation = (x - masked_mean(x, mask).unsqueeze(-2)) * m
    degrees = (m.sum(-2) - 1).clamp(min=1)
    return torch.sqrt((deviation**2).sum(-2) / degrees + 1e-31)


# Maximum and minimum run over all S: copies of a real pixel, which fill up small parcels, change neither.
POOLING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": masked_mean,
    "std": masked_std,
    "max": lambda x, mask: x.max(-2).values,
    "min": lambda x, mask: x.min(-2).values,
}


def pixel_set_encoder(
    state: State,
    name: str,
    pixels: Tensor,
    mask: Tensor,
    extra: Tensor | None = None,
    pooling: str = "mean_std",
    training: bool = False,
) -> Tensor:
    """MLP1 on every pixel, pooling over the pixels of a date, extra features, MLP2.

    Args:
        state: weights by name.
        name: prefix of the encoder's keys.
        pixels: (B, T, C, S).
        mask: (B, T, S), 1 for real pixels.
        extra: (B, T, F), or None.
        pooling: names of POOLING joined by '_'.
        training: see the module's docstring.

    Returns:
        (B, T, E).
    """
    x = pixels.transpose(2, 3)  # B,T,S,C
    mask = mask.to(x.dtype)
    layer = 0
    while f"{name}.mlp1.{layer}.lin.weight" in state:
        x = linear(state, f"{name}.mlp1.{layer}.lin", x)
        x = torch.relu(batch_norm(state, f"{name}.mlp1.{layer}.bn", x, training))
        layer += 1
    pooled = [POOLING[how](x, mask) for how in pooling.split("_")]
    features = torch.cat(pooled + ([extra] if extra is not None else []), dim=-1)
    return perceptron(state, f"{name}.mlp2", features, training, last="norm")


# ---------------------------------------------------------------------------------------- temporal encoders


def project(state: State, name: str, x: Tensor) -> Tensor:
    """The optional 1x1 convolution to d_model channels, normalised over channels and dates together."""
    if f"{name}.inconv.0.weight" not in state:
        return x
    kernel = state[f"{name}.inconv.0.weight"][:, :, 0]  # d_model,C
    x = x @ kernel.T + state[f"{name}.inconv.0.bias"]
    # The stored scale and shift are (d_model, T).
    return layer_norm(state[f"{name}.inconv.1.weight"].T, state[f"{name}.inconv.1.bias"].T, x)


def attend(query: Tensor, keys: Tensor) -> Tensor:
    """a = softmax over the dates of q . k_t / sqrt(K): query (K,) or (B, K), keys (B, T, K) -> (B, T)."""
    query = query.expand(len(keys), -1).unsqueeze(1)
    scores = (query * keys).sum(-1) / math.sqrt(keys.shape[-1])
    return torch.softmax(scores, dim=-1)


def encode_dates(state: State, name: str, heads: list[Tensor], training: bool) -> Tensor:
    """Concatenate the heads' averages, then MLP3 and the last LayerNorm."""
    x = perceptron(state, f"{name}.mlp", torch.cat(heads, dim=-1), training)
    return layer_norm(state[f"{name}.outlayernorm.weight"], state[f"{name}.outlayernorm.bias"], x)


def ltae(
    state: State,
    name: str,
    x: Tensor,
    n_head: int,
    positions: Sequence[float] | None = None,
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """Lightweight temporal attention: one learned query per head, each head averages its own channels.

    Args:
        state: weights by name.
        name: prefix of the encoder's keys.
        x: (B, T, C).
        n_head: H.
        positions: as given to the constructor; only whether they are given matters here.
        training: see the module's docstring.

    Returns:
        The embedding (B, E) and the attention (H, B, T).
    """
    x = layer_norm(state[f"{name}.inlayernorm.weight"], state[f"{name}.inlayernorm.bias"], x)
    x = project(state, name, x)
    x = x + date_rows(state, name, x.shape[1], positions)

    keys = linear(state, f"{name}.attention_heads.fc1_k", x).chunk(n_head, dim=-1)  # H times B,T,K
    values = x.chunk(n_head, dim=-1)  # H times B,T,d_model/H
    queries = state[f"{name}.attention_heads.Q"]  # H,K
    attention, heads = [], []
    for h in range(n_head):
        a = attend(queries[h], keys[h])  # B,T
        attention.append(a)
        heads.append((a.unsqueeze(-1) * values[h]).sum(1))  # B,d_model/H
    return encode_dates(state, name, heads, training), torch.stack(attention)


def tae(
    state: State,
    name: str,
    x: Tensor,
    n_head: int,
    positions: Sequence[float] | None = None,
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """Temporal attention with a master query, the mean over the dates; each head averages all channels.

    Arguments and results are those of `ltae`.
    """
    x = layer_norm(state[f"{name}.inlayernorm.weight"], state[f"{name}.inlayernorm.bias"], x)
    x = x + date_rows(state, name, x.shape[1], positions)
    x = project(state, name, x)

    heads_name = f"{name}.attention_heads"
    query = linear(state, f"{heads_name}.fc1_q", x).mean(1)  # B,H*K
    query = linear(state, f"{heads_name}.fc2.1", batch_norm(state, f"{heads_name}.fc2.0", query, training))
    queries = query.chunk(n_head, dim=-1)
    keys = linear(state, f"{heads_name}.fc1_k", x).chunk(n_head, dim=-1)
    attention, heads = [], []
    for h in range(n_head):
        a = attend(queries[h], keys[h])  # B,T
        attention.append(a)
        heads.append((a.unsqueeze(-1) * x).sum(1))  # B,d_model
    return encode_dates(state, name, heads, training), torch.stack(attention)


def gru(state: State, name: str, x: Tensor, positions: Sequence[float] | None = None) -> Tensor:
    """Gated recurrent unit, its last output: (B, T, C) -> (B, hidden_dim)."""
    if positions is not None:
        x = x + date_rows(state, name, x.shape[1], positions)
    weight_x, weight_h, bias_x, bias_h = (
        state[f"{name}.gru_cell.{key}_l0"] for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    hidden = x.new_zeros(len(x), weight_h.shape[1])
    for t in range(x.shape[1]):
        reset_x, update_x, new_x = (x[:, t] @ weight_x.T + bias_x).chunk(3, dim=-1)
        reset_h, update_h, new_h = (hidden @ weight_h.T + bias_h).chunk(3, dim=-1)
        reset = torch.sigmoid(reset_x + reset_h)
        update = torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + reset * new_h)
        hidden = (1 - update) * new + update * hidden
    return hidden


def temp_conv(
    state: State, name: str, x: Tensor, positions: Sequence[float] | None = None, training: bool = False
) -> Tensor:
    """Convolutions over three neighbouring dates, then a perceptron: (B, T, C) -> (B, nfc[-1])."""
    if positions is not None:
        x = x + date_rows(state, name, x.shape[1], positions)
    layer = 0
    while f"{name}.conv1d.{layer}.weight" in state:
        kernel = state[f"{name}.conv1d.{layer}.weight"]  # out,in,3
        nothing = torch.zeros_like(x[:, :1])
        padded = torch.cat([nothing, x, nothing], dim=1)
        x = sum(padded[:, j : j + x.shape[1]] @ kernel[:, :, j].T for j in range(3))
        x = x + state[f"{name}.conv1d.{layer}.bias"]
        x = torch.relu(batch_norm(state, f"{name}.conv1d.{layer + 1}", x, training))
        layer += 3
    channels_then_dates = x.transpose(1, 2).flatten(1)
    return perceptron(state, f"{name}.linear", channels_then_dates, training)


# ----------------------------------------------------------------------------------------- whole classifier


def classify(
    architecture: str,
    state: State,
    pixels: Tensor,
    mask: Tensor,
    extra: Tensor | None = None,
    pooling: str = "mean_std",
    n_head: int | None = None,
    positions: Sequence[float] | None = None,
    training: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Pixel-set encoder, temporal encoder, decoder.

    Args:
        architecture: 'LTAE', 'TAE', 'GRU' or 'TempCNN'.
        state: the classifier's weights by name.
        pixels: (B, T, C, S).
        mask: (B, T, S).
        extra: (B, T, F), or None for a model without extra features.
        pooling: as given to the constructor.
        n_head: as given to the constructor (L-TAE and TAE).
        positions: as given to the constructor.
        training: see the module's docstring.

    Returns:
        Logits (B, classes), and the attention (H, B, T) where there is one.
    """
    dates = pixel_set_encoder(state, "spatial_encoder", pixels, mask, extra, pooling, training)
    name, attention = "temporal_encoder", None
    if architecture == "LTAE":
        embedding, attention = ltae(state, name, dates, n_head, positions, training)
    elif architecture == "TAE":
        embedding, attention = tae(state, name, dates, n_head, positions, training)
    elif architecture == "GRU":
        embedding = gru(state, name, dates, positions)
    else:
        embedding = temp_conv(state, name, dates, positions, training)
    return perceptron(state, "decoder", embedding, training, last="linear"), attention


def focal_loss(logits: Tensor, target: Tensor, gamma: float = 0, alpha: Tensor | None = None) -> Tensor:
    """-(1 - p)^gamma log p of the true class of each row, (B,); the factor in front carries no gradient."""
    log_p = torch.log_softmax(logits, dim=-1)[torch.arange(len(target)), target]
    factor = (1 - log_p.detach().exp()) ** gamma
    if alpha is not None:
        factor = factor * alpha[target]
    return -factor * log_p
