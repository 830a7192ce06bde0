"""Recorded values of the published method, and the weights, batch and configurations that belong to them.

What the numbers are, and how closely they must be met, is told in golden/README.md.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "golden"
VALUES = json.loads((FOLDER / "golden.json").read_text())
ARRAYS = np.load(FOLDER / "golden.npz")
POSITIONS: list[int] = VALUES["date_positions"]

# Largest difference as a share of the largest entry; what the published method itself keeps in float32.
EVALUATION_TOLERANCE = 2e-5
TRAINING_TOLERANCE = 2e-4
GRADIENT_TOLERANCE = 5e-3
# Recorded gradient norms are either rounding noise below 2e-5 or real and above 0.04.
ZERO_GRADIENT = 1e-4

CONFIGURATIONS_FILE = FOLDER.parent.parent / "config_fig2.json"
PUBLISHED = list(VALUES["params"])  # the 25 configurations with recorded values


def rs(*words: str) -> np.random.RandomState:
    """A random generator that depends on these words alone."""
    return np.random.RandomState(zlib.crc32("|".join(words).encode()))


def is_derived(key: str) -> bool:
    """Whether the entry of this name gets derived values: no positional table and no counter of batches."""
    return not key.endswith(("position_enc.weight", "num_batches_tracked"))


def derived_weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of one entry of a state_dict, in float64."""
    r = rs(VALUES["salt"], key)
    if key.endswith("running_var") or (len(shape) == 1 and key.endswith("weight")):
        return r.uniform(0.5, 1.5, shape)
    if len(shape) <= 1:
        return 0.1 * r.standard_normal(shape)
    return r.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))


def fill(model: nn.Module) -> nn.Module:
    """Give every weight and running statistic its derived value, in the model's own dtype."""
    for key, tensor in model.state_dict().items():
        if is_derived(key):
            with torch.no_grad():
                tensor.copy_(torch.from_numpy(np.asarray(derived_weight(key, tuple(tensor.shape)))))
    return model


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recorded batch: pixels (7,24,10,64), mask (7,24,64), extra (7,24,4), target (7,)."""
    r = rs(VALUES["salt"], "batch")
    pixels = r.standard_normal((7, 24, 10, 64)).astype(np.float32)
    mask = np.ones((7, 24, 64), np.float32)
    for parcel, n in enumerate([64, 1, 2, 17, 64, 40, 63]):
        pixels[parcel, :, :, n:] = pixels[parcel, :, :, :1]
        mask[parcel, :, n:] = 0
    extra = np.repeat(r.standard_normal((7, 1, 4)), 24, axis=1)
    target = r.randint(0, 20, 7)
    tensors = [torch.from_numpy(a).to(dtype) for a in (pixels, mask, extra.astype(np.float32))]
    return *tensors, torch.from_numpy(target)


def configurations() -> dict[str, dict]:
    """Constructor arguments of every entry of config_fig2.json by 'ARCHITECTURE/NAME', without positions."""
    arguments = {}
    for architecture, entries in json.loads(CONFIGURATIONS_FILE.read_text()).items():
        for name, flags in entries.items():
            arguments[f"{architecture}/{name}"] = {
                flag: json.loads(value) if isinstance(value, str) else value
                for flag, value in flags.items()
                if flag not in ("tae", "gru", "tcnn")
            }
    return arguments


def relative_error(actual, expected) -> float:
    """Largest difference as a share of the largest expected entry."""
    actual, expected = (
        np.asarray(a.detach().cpu() if isinstance(a, Tensor) else a, np.float64) for a in (actual, expected)
    )
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
