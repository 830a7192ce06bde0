"""Which parcels the folds of a run trained on, chose their epoch by, and were tested on, recognised wherever they lie."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.errors import UserError
from common.files import write_bytes
from common.progress import progress_bar
from data.days import find_used, read_days
from data.folds import Split

if TYPE_CHECKING:
    from data.store import PixelStore

PARTS = "parcels.npz"  # in a results folder
_NOT, _LEARNED, _TEST = 0, 1, 2
_CHUNK = 2**13  # parcels whose first pixels are read at a time


def fingerprints(
    folder: Path,
    ids: Sequence[str],
    store: "PixelStore",
    season_start: tuple[int, int] | None = None,
    until: str | None = None,
) -> np.ndarray:
    """One number for each parcel that differs where id, dates, number of pixels or first pixel do, (N,) int64.

    Next year's parcels with the same ids are others; a copy of a dataset folder has the same ones.

    Args:
        folder: dataset folder.
        ids: of the parcels.
        store: its pixels.
        season_start, until: of the training, where it used no later dates: then it does not matter which there are.
    """
    numbers = np.array(ids, np.int64)
    days = read_days(folder, numbers)
    used = None if until is None else find_used(days, season_start, until)
    dates = days.begin
    places = np.searchsorted(store.ids, numbers)
    found = np.empty(len(places), np.int64)
    for start in progress_bar(range(0, len(places), _CHUNK), "recognising parcels", "chunks"):
        part = slice(start, start + _CHUNK)
        sizes, n_dates, numbered = (
            values[places[part]].tolist() for values in (store.sizes, store.dates, store.ids)
        )
        begin = store.locate(torch.from_numpy(places[part]), torch.zeros(len(numbered), 1, dtype=torch.long))
        pixels = store.read(begin, max(n_dates)).squeeze(1).numpy().astype(np.float64)
        for i, (parcel, size, n, pixel) in enumerate(zip(numbered, sizes, n_dates, pixels), start=start):
            digest = hashlib.blake2b(f"{parcel} {size} ".encode(), digest_size=8)
            here = slice(None) if days.counts is None else slice(dates[i], dates[i + 1])
            own, pixel = days.values[here], pixel[:n]
            if used is not None:
                own, pixel = own[used.values[here]], pixel[used.values[here]]
            digest.update(own.astype(np.int64).tobytes())
            if size:
                digest.update(pixel.tobytes())
            found[i] = int.from_bytes(digest.digest(), "little", signed=True)
    return found


def data_key(ids: Sequence[str], targets: np.ndarray, splits: Sequence[Split]) -> str:
    """Differs between datasets of other parcels or classes, and between other folds."""
    digest = hashlib.blake2b(digest_size=8)
    for values in (ids, targets, *(part for split in splits for part in split)):
        digest.update(np.asarray(values, dtype=np.int64).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Parts:
    """The parcels of a run.

    Attributes:
        marks: fingerprint of each parcel, (N,) int64.
        roles: what each fold did with each parcel, (K, N) uint8: nothing, learned from it, or tested on it.
    """

    marks: np.ndarray
    roles: np.ndarray

    @classmethod
    def of(cls, marks: np.ndarray, splits: Sequence[Split]) -> "Parts":
        """The parts of the folds, as indices of training, validation and test parcels."""
        roles = np.full((len(splits), len(marks)), _NOT, np.uint8)
        for role, (train, val, test) in zip(roles, splits):
            role[train], role[val], role[test] = _LEARNED, _LEARNED, _TEST
        return cls(marks, roles)

    def save(self, path: Path) -> None:
        """Writes them to a file."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, marks=self.marks, roles=self.roles)
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Parts":
        """Reads what `save` wrote.

        Raises:
            UserError: if the file is damaged.
        """
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                marks, roles = arrays["marks"], arrays["roles"]
            if marks.dtype != np.int64 or roles.dtype != np.uint8 or roles.shape[1:] != marks.shape:
                raise ValueError("arrays of another shape")
        except Exception as error:  # damaged bytes can fail in any way
            raise UserError(
                f"{path} is damaged ({error}); copy it again, or give --fold all to have all folds predict every parcel."
            ) from error
        return cls(marks, roles)

    def look_up(self, marks: np.ndarray, folds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """What is known of parcels that are to be predicted.

        Args:
            marks: their fingerprints, (M,).
            folds: numbers, from 1, of the folds that are there to predict.

        Returns:
            The fold that tested on each parcel and did not learn from it, (M,), 0 for none; and whether it was seen, (M,):
            no fold held it out but one, of any, learned from it.
        """
        order = np.argsort(self.marks, kind="stable")
        place = np.searchsorted(self.marks, marks, sorter=order).clip(max=max(0, len(order) - 1))
        place = order[place] if len(order) else np.zeros(len(marks), np.int64)
        known = self.marks[place] == marks if len(order) else np.zeros(len(marks), bool)
        roles = (
            self.roles[:, place] * known if len(order) else np.zeros((len(self.roles), len(marks)), np.uint8)
        )
        held_out = np.zeros(len(marks), np.int64)
        for fold in reversed([fold for fold in folds if fold <= len(roles)]):
            held_out[roles[fold - 1] == _TEST] = fold
        return held_out, (held_out == 0) & (roles == _LEARNED).any(0)
