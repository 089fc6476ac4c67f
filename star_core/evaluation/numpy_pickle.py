"""Reads pickles that hold nothing but numpy arrays, without running what else a pickle may ask for.

A pickle names callables and has them called, so an untrusted one can run anything. This reader
knows three names, those an array is made of, and refuses every other one. It takes the objects
from the running numpy and not from the names in the file, because numpy 2 moved
``numpy.core.multiarray`` to ``numpy._core.multiarray``.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np

# An array pickles itself as a call of numpy's private `_reconstruct`: ask an array for it.
_RECONSTRUCT = np.zeros(0, np.float32).__reduce__()[0]
_ALLOWED: Mapping[tuple[str, str], object] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}


class NumpyUnpickler(pickle.Unpickler):
    """An unpickler whose only callables are those a numpy array is rebuilt with."""

    def find_class(self, module_name: str, global_name: str, /) -> object:
        """Return one of the three allowed objects; raise `pickle.UnpicklingError` for others."""
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"the pickle asks for {module_name}.{global_name}; only numpy arrays are read"
            ) from None


def read_numpy_pickle(file: Path, *, sha256: str) -> object:
    """Return the nested dicts and arrays of a pickle whose bytes have the given sha256.

    Raises ValueError when the file is missing, is another file than the pinned one, or holds
    anything but plain containers and numpy arrays.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}; fetch the package again") from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"{file} has sha256 {found}, expected {sha256}; delete it and fetch the package again")
    return unpickle_numpy(data, name=str(file))


def unpickle_numpy(data: bytes, *, name: str) -> object:
    """Return what the pickle holds; `name` is only for the ValueError of a refused pickle."""
    try:
        return NumpyUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{name} is not a pickle of plain numpy arrays: {error}") from error
