"""Arrays on disk that are computed once: the features of real pictures and of captions."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger(__name__)


def stored(file: Path, compute: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the float32 array in `file`; where there is none, compute it and write it.

    The file's name must tell everything the array depends on.
    """
    if file.is_file():
        return np.asarray(np.load(file, allow_pickle=False), dtype=np.float32)
    array = compute()
    file.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that a killed run leaves no half file under the name.
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as stream:
        np.save(stream, array)
    unfinished.replace(file)
    _log.info("computed %s %s", file, array.shape)
    return array
