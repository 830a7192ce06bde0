"""One file with a trained model that runs without this repository: ONNX, or PyTorch's own .pt2."""

import io
import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError, as_user_error
from common.files import write_bytes
from learning.run import Run, open_run, published_run
from models.ensemble import Ensemble

SUFFIXES = (".onnx", ".pt2")
OUTPUT = "log_probabilities"


class Exported(nn.Module):
    """An ensemble as it is exported: from raw values to log-probabilities, with plain tensors in and out.

    Args:
        ensemble: trained classifiers; in the CPU's memory.
        with_extra: whether they take extra features.
        varying: whether they take any dates, and dates that are absent.
        norm: mean and standard deviation of the pixels, of shape (L, C), (C,) or (); None to take them normalised.
        extra_norm: mean and standard deviation of the extra features, (F,); None to take them standardised.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        with_extra: bool,
        varying: bool,
        norm: tuple[np.ndarray, np.ndarray] | None,
        extra_norm: tuple[np.ndarray, np.ndarray] | None,
    ) -> None:
        super().__init__()
        self.ensemble, self.with_extra, self.varying = ensemble, with_extra, varying
        mean, std = norm if norm is not None else (np.zeros(1), np.ones(1))
        for name, values in (("scale", 1 / std), ("shift", -mean / std)):
            self.register_buffer(name, torch.from_numpy(np.atleast_1d(values)).float().unsqueeze(-1))
        mean, std = extra_norm if extra_norm is not None else (np.zeros(1), np.ones(1))
        self.register_buffer("extra_mean", torch.from_numpy(np.asarray(mean, np.float64)))
        self.register_buffer("extra_std", torch.from_numpy(np.asarray(std, np.float64)))

    def forward(self, pixels: Tensor, mask: Tensor, *others: Tensor) -> Tensor:
        """Mean over the members of their log-softmax, (B, K).

        Args:
            pixels: (B, L, C, S), dates in order.
            mask: 1 for a pixel that is there, else 0, (B, L, S); at least one per parcel and date unless dates vary.
            others: extra features (B, F), if the model takes some; then days (B, L), if its dates vary.
        """
        pixels = self.shift + pixels * self.scale
        extra = None
        if self.with_extra:
            extra = ((others[0].double() - self.extra_mean) / self.extra_std).float()
            extra = extra.unsqueeze(1).expand(-1, pixels.shape[1], -1)
        days = present = None
        if self.varying:
            days, present = others[-1], (mask != 0).any(2)
            mask = torch.where(present.unsqueeze(2), mask, 1)  # absent dates are encoded, without influence
        sets = (pixels, mask) if extra is None else ((pixels, mask), extra)
        outputs = []
        for member in self.ensemble.members:
            encoded = member.temporal_encoder(member.spatial_encoder(sets), days, present)
            outputs.append(torch.log_softmax(member.decoder(encoded), dim=1))
        result = torch.stack(outputs).mean(0)
        return result if present is None else result.masked_fill(~present.any(1, keepdim=True), torch.nan)


def check_export(path: Path) -> None:
    """Raises a UserError if a model cannot be written to such a file."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--export {path}: the name tells the format; end it with {' or '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise UserError(f"--export {path}: there is no folder {path.parent}; make it first.")
    if path.suffix == ".onnx":
        with as_user_error(
            ImportError, prefix="--export: ONNX needs the packages of requirements-export.txt: "
        ):
            import onnxscript  # noqa: F401


def export_run(path: Path, weight_dir: Path, fold: str, typed: dict[str, Any], preset: dict[str, Any]) -> str:
    """Writes the model of a results folder, or of published weights, to a file; returns in words what it is.

    Args:
        path: FILE.onnx or FILE.pt2.
        weight_dir: results folder of train.py; or one with weights alone, of these settings and else the published ones:
        fold: "all", or the number of one.
        typed, preset: architecture flags, and the preset's settings.

    Raises:
        UserError: if weights or file are not as expected, or this PyTorch cannot export the model.
    """
    run = open_run(weight_dir)
    if not run.is_bare and (typed or preset):
        flag = next(iter(typed), "preset")
        raise UserError(f"--export writes the model as it was trained; leave --{flag} out.")
    if run.is_bare:
        run = published_run(weight_dir, typed, preset)
    check_export(path)
    with as_user_error(FileNotFoundError, ValueError, TypeError, prefix="--weight_dir: "):
        ensemble = run.load(fold, "cpu")
    inputs = export(path, ensemble, run)
    values = "as in DATA"
    if run.data.norm is None:
        values = "already normalised, since no normalisation.npz is there"
    return (
        f"{path}: {run.architecture.kind.classifier.__name__}, {len(ensemble.members)} fold(s) of {weight_dir}\n"
        f"Inputs: {', '.join(inputs)}; values {values}\nOutput: {OUTPUT} (batch, {len(run.data.classes)})"
    )


def export(path: Path, ensemble: Ensemble, run: Run) -> list[str]:
    """Writes an ensemble to a file, checked by `check_export`; returns its inputs in words.

    Args:
        path: FILE.onnx or FILE.pt2.
        ensemble: trained classifiers, on the CPU.
        run: theirs. Its normalisation becomes part of the model; without one, the model takes normalised values.
    """
    sizes, norm = run.architecture, run.data.norm
    varying, n_extra = sizes.varying, sizes.n_extra
    model = Exported(ensemble, n_extra > 0, varying, norm, run.data.extra_stats).eval()
    B, L, C, S = 2, sizes.n_dates or 5, sizes.input_dim, 3
    batch, dates, pixels = (torch.export.Dim(name, max=2**31 - 1) for name in ("batch", "dates", "pixels"))
    first = {0: batch, 1: dates} if varying else {0: batch}
    inputs = {
        "pixels": (torch.zeros(B, L, C, S), {**first, 3: pixels}),
        "mask": (torch.ones(B, L, S), {**first, 2: pixels}),
    }
    if n_extra:
        inputs["extra"] = torch.zeros(B, n_extra), {0: batch}
    if varying:
        inputs["days"] = torch.zeros(B, L), first
    names, (examples, shapes) = list(inputs), zip(*inputs.values())
    others = [tuple(shapes[2:])] if shapes[2:] else []  # those of *others
    name = sizes.kind.classifier.__name__
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nn.GRU lists its weights twice
        try:
            program = torch.export.export(
                model, tuple(examples), dynamic_shapes=(*shapes[:2], *others), strict=False
            )
        except Exception as error:  # as 2.6 does for a GRU and varying dates
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"--export: PyTorch {torch.__version__} cannot export this {name}; 2.13 can. It says: {reason}"
            ) from error
    about = {
        "classifier": name,
        "members": len(ensemble.members),
        "classes": [str(label) for label in run.data.classes],
        "class_names": run.class_names,
        "date_positions": sizes.date_positions,
        "normalised": norm is not None,
    }
    about = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    write_bytes(path, _to_onnx(program, names, about) if path.suffix == ".onnx" else _to_pt2(program, about))
    return [f"{name} {_words(example.shape, shape)}" for name, example, shape in zip(names, examples, shapes)]


def _to_onnx(program: torch.export.ExportedProgram, names: Sequence[str], about: dict[str, str]) -> bytes:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # it reports on its own steps, packages
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            onnx = torch.onnx.export(
                program, dynamo=True, input_names=names, output_names=[OUTPUT], verbose=False
            )
        finally:
            logging.disable(logging.NOTSET)
    onnx.model.metadata_props.update(about)
    return onnx.model_proto.SerializeToString()


def _to_pt2(program: torch.export.ExportedProgram, about: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"about.json": json.dumps(about)})
    return buffer.getvalue()


def _words(shape: Sequence[int], dynamic: dict[int, Any]) -> str:
    """A shape with names for what may vary."""
    sizes = [getattr(dynamic.get(i), "__name__", None) or str(size) for i, size in enumerate(shape)]
    return f"({', '.join(sizes)})"
