"""Training that can go on: what a fold has reached is on disk after every epoch, complete."""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from common.errors import UserError, as_user_error
from common.files import read_json, remove_unfinished, write_bytes, write_json
from common.processes import is_main, share_bytes
from data.parts import PARTS, Parts
from learning.calibration import CALIBRATION
from learning.results import (
    CONFIG,
    CONFUSION,
    NORMALISATION,
    TEST_METRICS,
    TRAINLOG,
    load_normalisation,
    remove_results,
    save_normalisation,
)
from learning.run import Run, Training, read_run
from models.weights import CHECKPOINT, load_weights, read_checkpoint

STATE = "last.pth.tar"
# What may differ when a run goes on: where things are, and what does not change results.
_FREE = set(
    "overwrite resume res_dir dataset_folder folds norm cache_dir preload num_workers device display_step cuda_graph command versions "
    "class_names nodata_declared notes".split()
)

Log = dict[int, dict[str, float]]


class FoldProgress:
    """How far the training of a fold has come; takes up what an earlier process left in the fold's folder.

    Attributes:
        epoch: the last finished one, 0 before the first.
        best_epoch: the one with the best validation mIoU, the later one on a tie.
        log: scores of every finished epoch.
        averaged: the epochs whose mean weights are kept in the end; none to keep those of the best one.
    """

    def __init__(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, averaged: range = range(0)
    ) -> None:
        self.folder, self.model, self.optimizer, self.averaged = folder, model, optimizer, averaged
        # On a GPU the default for all tensors at once fails for whole numbers, such as BatchNorm's count of batches.
        self._mean = AveragedModel(model, avg_fn=get_swa_avg_fn(), use_buffers=True) if averaged else None
        self.epoch = self.best_epoch = 0
        self.log: Log = {}
        self._best = b""
        path = folder / STATE
        if state := share_bytes(lambda: path.read_bytes() if path.exists() else b""):
            self._restore(path, state)

    def finish_epoch(self, scores: dict[str, float]) -> bool:
        """Notes the scores of an epoch and writes all files; returns whether it is the best one so far."""
        self.epoch += 1
        self.log[self.epoch] = _plain(scores)
        is_best = not self.best_epoch or scores["val_IoU"] >= self.log[self.best_epoch]["val_IoU"]
        state = self._state()
        if is_best:
            self.best_epoch, self._best = self.epoch, _to_bytes(state)
        state |= {"log": self.log, "best_epoch": self.best_epoch}
        if self.epoch in self.averaged:
            self._mean.update_parameters(self.model)
        if self._mean is not None:
            state["mean"] = self._mean.state_dict()
        state["best"] = torch.frombuffer(bytearray(self._best), dtype=torch.uint8)
        if is_main():
            write_bytes(self.folder / STATE, _to_bytes(state), durable=True)
            self._write()
        return is_best

    def finish(self) -> str:
        """Gives the model the weights that are kept, and says in words which these are."""
        path = self.folder / CHECKPOINT
        if self._mean is None:
            load_weights(self.model, read_checkpoint(path, data=self._best)["state_dict"], path)
            return f"epoch {self.best_epoch}"
        self.model.load_state_dict(self._mean.module.state_dict())
        if is_main():
            write_bytes(path, _to_bytes(self._state()), durable=True)
        return f"the mean of epochs {self.averaged[0]} to {self.averaged[-1]}"

    def close(self) -> None:
        """Removes what only a fold that goes on needs."""
        if is_main():
            (self.folder / STATE).unlink(missing_ok=True)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        optimizer = _plain(self.optimizer.state_dict())
        return {"epoch": self.epoch, "state_dict": self.model.state_dict(), "optimizer": optimizer}

    def _write(self) -> None:
        write_bytes(self.folder / CHECKPOINT, self._best, durable=True)
        write_json(self.folder / TRAINLOG, self.log)

    def _restore(self, path: Path, data: bytes) -> None:
        with as_user_error(ValueError, prefix="--resume: "):
            state = read_checkpoint(path, data=data)
            try:
                self.epoch, self.best_epoch, self.log = (state[key] for key in ("epoch", "best_epoch", "log"))
                self._best = state["best"].numpy().tobytes()
                _check_log(self.log, self.epoch, self.best_epoch)
                _restore_optimizer(self.optimizer, state["optimizer"])
                if self._mean is not None:
                    load_weights(self._mean, state["mean"], path)
                    if not all(x.isfinite().all() for x in state["mean"].values()):
                        raise ValueError("the mean of its weights is not finite")
            except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"{path} is not the state of a training ({error}); remove it to begin this fold again."
                ) from error
            load_weights(self.model, state["state_dict"], path)
            read_checkpoint(self.folder / CHECKPOINT, data=self._best)
        if is_main():  # the process may have been killed in between
            self._write()


def _to_bytes(value: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    """The same without NumPy's numbers and arrays, which no reader that takes a file as data accepts."""
    if isinstance(value, dict):
        return type(value)((_plain(key), _plain(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return value.item() if isinstance(value, np.generic) else value


def _check_log(log: Any, epoch: Any, best_epoch: Any) -> None:
    """Raises ValueError unless the log has numbers for all epochs, one of which is the best."""
    complete = isinstance(epoch, int) and list(log) == list(range(1, epoch + 1)) and best_epoch in log
    if not complete or not all(isinstance(x, float) for scores in log.values() for x in scores.values()):
        raise ValueError("its log is incomplete")


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Gives an optimiser its state back; checked, since what is wrong would show up in the middle of an epoch."""
    own = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # With the names of the program: a file written later is then the same as without the interruption.
    state = {
        i: {sys.intern(name): value for name, value in values.items()} for i, values in saved["state"].items()
    }
    for i, values in state.items():
        if any(value.shape not in (torch.Size(), parameters[i].shape) for value in values.values()):
            raise ValueError(f"the optimiser's entry {i} is of another shape")
        if not all(value.isfinite().all() for value in values.values()) or values.get("step", 1) < 1:
            raise ValueError(f"the optimiser's entry {i} holds impossible numbers")
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})


def finished_folds(res_dir: Path, kfold: int) -> list[tuple[dict[str, float], dict[str, dict[str, float]]]]:
    """Test metrics and log of the folds, from the first on, that are finished."""

    def read() -> bytes:
        found = []
        for fold in range(1, kfold + 1):
            folder = res_dir / f"Fold_{fold}"
            files = [folder / name for name in (TEST_METRICS, CONFUSION, CALIBRATION, TRAINLOG, CHECKPOINT)]
            if (folder / STATE).exists() or not all(path.exists() for path in files):
                break
            found.append((read_json(folder / TEST_METRICS), read_json(folder / TRAINLOG)))
        return json.dumps(found).encode()

    return [
        ({name: np.nan if value is None else value for name, value in metrics.items()}, log)
        for metrics, log in json.loads(share_bytes(read))
    ]


def check_typed_settings(res_dir: Path, args: argparse.Namespace) -> None:
    """`check_same_settings` for what is known before the data are read, and was typed."""
    typed = asdict(Training.from_config(vars(args))) | {"rdm_seed": args.rdm_seed}
    _compare(res_dir, typed | ({"npixel": args.npixel} if args.npixel else {}))


def check_same_settings(run: Run) -> None:
    """Raises a UserError naming the first difference to the run in its folder that has an influence on results."""
    res_dir = run.folder
    _compare(res_dir, {name: value for name, value in run.to_config().items() if name not in _FREE})
    for earlier, now in zip(load_normalisation(res_dir), (run.data.norm, run.data.extra_stats)):
        if (earlier is None) != (now is None) or any(
            a.shape != np.shape(b) or not np.allclose(a, b) for a, b in zip(earlier or (), now or ())
        ):
            raise UserError(
                f"{res_dir / NORMALISATION} does not fit the data, which changed since the run was begun; restore them, or "
                "choose another --res_dir."
            )


def _compare(res_dir: Path, settings: dict[str, Any]) -> None:
    """Raises a UserError naming the first of these settings that is not that of the run in res_dir."""
    earlier = read_run(res_dir).to_config()
    for name, value in settings.items():
        value = json.loads(json.dumps(value))
        if earlier.get(name, value) != value:  # what nothing is known of may be of a later version
            raise UserError(
                f"{name} is {_brief(value)} but was {_brief(earlier[name])} when {res_dir} was begun; give the same "
                "settings and data, or choose another --res_dir."
            )


def begin_run(run: Run, parts: Parts, resume: bool) -> None:
    """Makes the results folder ready for a new run, or for an earlier one to go on if that is the same.

    Args:
        run: its settings.
        parts: its parcels, which are kept with it.
        resume: whether an earlier run may go on.

    Raises:
        UserError: if it is another one.
    """
    remove_unfinished(run.folder)
    if resume and (run.folder / CONFIG).exists():
        check_same_settings(run)
        return
    remove_results(run.folder)
    save_normalisation(run.folder, run.data.norm, run.data.extra_stats)
    parts.save(run.folder / PARTS)
    write_json(run.folder / CONFIG, run.to_config())


@contextmanager
def resumable(res_dir: Path) -> Iterator[None]:
    """Keeps other trainings out of a results folder and, should the run be stopped, says how to go on.

    Raises:
        UserError: if another training is at work there.
    """
    lock = FileLock(res_dir / ".lock", timeout=0)
    try:
        if is_main():
            lock.acquire()
        yield
    except Timeout:
        raise UserError(f"another training writes in {res_dir}; wait, or choose another --res_dir.") from None
    except KeyboardInterrupt as stop:
        stop.add_note(
            f"{res_dir} has everything up to the last finished epoch; the same command with --resume goes on"
        )
        raise
    finally:
        lock.release()


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
