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
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}); expected a pickle of NumPy arrays and nothing else."
        ) from error


def _reconstruct(subtype: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    return np.empty(0)  # its content follows separately


def _scalar(dtype: np.dtype, data: bytes) -> Any:
    return np.frombuffer(data, _plain(dtype))[0]


def _from_buffer(data: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(data, _plain(dtype)).reshape(shape, order=order).copy()


def _plain(dtype: np.dtype) -> np.dtype:
    if dtype.hasobject:
        raise pickle.UnpicklingError("arrays of Python objects are not read")
    return dtype


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")  # how old protocols spell bytes


# What pickles of NumPy arrays refer to, in NumPy 1 (core) and 2 (_core), and what each name stands for here.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
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
