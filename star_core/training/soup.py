"""The mean of the weights that several runs of one transformer ended with (model soups, arXiv 2203.05482).

Ends of runs that start from one another lie in one valley of the loss: their mean draws what they draw, and has
less loss on pictures that none of them learnt (NOTES.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import resolve_config
from ..config import TokenMap, TransformerConfig
from ..weights import TensorFile


class Soup(Mapping[str, Tensor]):
    """The tensors of a file, each the mean of those that go by its name in it and in the others.

    A tensor that no other file has, such as a causal sampler's, stays as it is. Means are formed in
    float32, one tensor at a time when it is asked for, and come in the dtype of the first file.
    """

    def __init__(self, path: Path, others: Sequence[Path]) -> None:
        """Open the files. Raises ValueError where one of them is missing or of another transformer."""
        self._files = [TensorFile(path), *map(TensorFile, others)]
        first, *rest = ((file.path, _transformer(file)) for file in self._files)
        for other, transformer in rest:
            if transformer != first[1]:
                raise ValueError(
                    f"{other} is another transformer than {path}: only runs that start from one another"
                    " have a mean"
                )

    def __getitem__(self, name: str) -> Tensor:
        parts = [file[name] for file in self._files if name in file]
        if not parts:
            raise KeyError(name)
        return torch.stack([part.float() for part in parts]).mean(0).to(parts[0].dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files[0])

    def __len__(self) -> int:
        return len(self._files[0])


def _transformer(file: TensorFile) -> tuple[TransformerConfig, tuple[TokenMap, ...]]:
    """Return what a file's transformer is, whatever causal sampler is beside it."""
    config = resolve_config(file, None)
    return dataclasses.replace(config.transformer, sampler_depth=0), config.maps
