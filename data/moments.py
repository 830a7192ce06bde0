"""Mean and standard deviation of pixels: of values that come in pieces, their file, and which to normalise with."""

import pickle
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from common.errors import UserError
from common.files import write_bytes
from data.metadata import Arrays, read_norm

NORM = "normalisation_values.pkl"
PUBLISHED_NORM = "S2-2017-T31TFM-meanstd.pkl"  # its name in the published dataset
AXES = {"date": (2,), "channel": (0, 2), "all": (0, 1, 2)}  # of values (L, C, S), summed over
_MOST_PIXELS = 2**14  # that are taken at a time


class Moments:
    """Mean and standard deviation of values that come in pieces, numerically stable (Chan et al., 1979).

    Args:
        per: "date" (and channel), "channel", or "all" for a single number.
    """

    def __init__(self, per: str) -> None:
        self.axes = AXES[per]
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0  # squares of deviations from the mean

    def add(self, values: np.ndarray, missing: np.ndarray | None = None) -> None:
        """Adds values (L, C, S); of pixels that are `missing`, (L, S), no channel counts."""
        present = np.ones((len(values), values.shape[2]), bool) if missing is None else ~missing
        for start in range(0, values.shape[2], _MOST_PIXELS):
            part = slice(start, start + _MOST_PIXELS)
            self._add(values[:, :, part].astype(np.float64), present[:, None, part])

    def _add(self, values: np.ndarray, present: np.ndarray) -> None:
        np.copyto(values, 0, where=~present)
        n_channels = values.shape[1] if 1 in self.axes else 1
        count = present.sum(self.axes, keepdims=True) * n_channels
        mean = values.sum(self.axes, keepdims=True) / np.maximum(count, 1)
        values -= mean
        np.copyto(values, 0, where=~present)
        squares = np.einsum("lcs,lcs->lc", values, values)[:, :, None].sum(self.axes, keepdims=True)
        total = self.count + count
        share = count / np.maximum(total, 1)
        shift = mean - self.mean
        self.squares = self.squares + squares + shift**2 * self.count * share
        self.mean = self.mean + shift * share
        self.count = total

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, float32: two (L, C), two (C,), or two numbers.

        A deviation of 0 becomes 1, since values are divided by it; so does that of no values.
        """
        std = np.sqrt(self.squares / np.maximum(self.count, 1))
        mean, std = (np.squeeze(x, self.axes) for x in (self.mean, np.where(std > 0, std, 1)))
        return mean.astype(np.float32), std.astype(np.float32)


def write_norm(path: Path, norm: tuple[np.ndarray, np.ndarray]) -> None:
    """Writes a pickled (mean, std), in the protocol that older NumPy and Python releases wrote too."""
    write_bytes(path, pickle.dumps(norm, protocol=4))


def find_norm(dataset: Dataset, path: str | Path | None = None) -> tuple[Arrays, str]:
    """Mean and standard deviation to normalise a dataset with, and a line that says where they come from.

    From `path` if given, else from the dataset folder, else computed: per date and channel, or per channel for a
    varying dataset, so that they serve other dates.
    """
    candidates = [dataset.folder / name for name in (PUBLISHED_NORM, NORM)] if path is None else [Path(path)]
    if dataset.until is not None and path is None:  # the folder's know of later dates
        described = f"mean and standard deviation computed per channel, until {dataset.until}"
        return dataset.statistics(), described
    for candidate in candidates:
        if path is not None or candidate.exists():
            norm = read_norm(candidate, dataset.norm_shape)
            if not dataset.varying or all(values.ndim < 2 for values in norm):
                return norm, f"mean and standard deviation from {candidate}"
            if path is not None:
                raise UserError(
                    f"--norm {candidate} has values per date, which do not serve varying dates; give one value per channel."
                )
            break
    per = "channel" if dataset.varying else "date"
    mean, std = dataset.store.statistics(per)
    described = "per channel, to serve any dates" if dataset.varying else "per date and channel"
    return (mean, np.where(std > 0, std, 1)), f"mean and standard deviation computed {described}"
