"""Pickled NumPy arrays (mean/std files, confusion matrices), read as data."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np


def load_arrays(path: str | Path) -> Any:
    """Reads a pickle that holds NumPy arrays, plain values and containers of these; nothing in it is executed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or asks for anything else.
    """
    data = Path(path).read_bytes()
    try:
        return _ArrayUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # damaged bytes can fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # in one line
        raise ValueError(
            f"{path} cannot be read ({reason}); expected a pickle of NumPy arrays and nothing else."
        ) from error


class _Type:
    """Stands for numpy.dtype, which believes a pickle that bytes are Python objects, and follows them as pointers."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"it holds values of type {self.dtype}, not numbers")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose content follows separately."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, kind, is_fortran, data = state
        super().__setstate__((version, shape, kind.dtype, is_fortran, data))


def _reconstruct(subtype: str, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    return _Array(0)


def _scalar(kind: _Type, data: bytes) -> Any:
    return np.frombuffer(data, kind.dtype)[0]


def _from_buffer(data: bytes, kind: _Type, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order).copy()


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")  # how old protocols spell bytes


# What pickles of NumPy arrays refer to, in NumPy 1 (core) and 2 (_core), and what each name stands for here.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "ndarray",  # only ever handed to _reconstruct
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytearray"): bytearray,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _from_buffer


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _ALLOWED[module, name]
