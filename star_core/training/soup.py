"""The mean of the weights of transformers that were trained from one another (model soups, arXiv 2203.05482).

They lie in one valley of the loss: their mean draws what they draw, and has less loss on pictures that none of
them learnt (NOTES.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..key_tables import SAMPLER_PREFIX, STAR_KEYS
from ..stored import resolve_config
from ..weights import TensorFile


class Soup(Mapping[str, Tensor]):
    """The tensors of a file, those of its transformer each the mean of its own and other files'.

    A causal sampler stays the first file's: samplers learn apart, each for its own transformer. Means are
    formed in float32, a tensor at a time when it is asked for, and come in the first file's dtype.
    """

    def __init__(self, path: Path, others: Sequence[Path]) -> None:
        """Open the files.

        Raises ValueError where one is missing or its transformer has other sizes, maps or tensors. Whether they
        were trained from one another, on the tokens of one VQ-VAE, no file says.
        """
        self._first = TensorFile(path)
        self._others = [TensorFile(other) for other in others]
        self._averaged = [name for name in self._first if others and _is_transformer_s(name)]
        sizes = _transformer_facts(self._first)
        for file in self._others:
            theirs = _transformer_facts(file)
            wrong = [
                f"{name} is {theirs[name]} instead of {size}"
                for name, size in sizes.items()
                if theirs[name] != size
            ]
            wrong += [
                f"{name} is missing or of another shape"
                for name in self._averaged
                if name not in file or file.shape(name) != self._first.shape(name)
            ]
            if wrong:
                raise ValueError(f"{file.path} has no mean with {path}: {'; '.join(wrong[:3])}")

    def __getitem__(self, name: str) -> Tensor:
        own = self._first[name]
        if name not in self._averaged:
            return own
        parts = [own, *(file[name] for file in self._others)]
        return torch.stack([part.float() for part in parts]).mean(0).to(own.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._first)

    def __len__(self) -> int:
        return len(self._first)


def _is_transformer_s(name: str) -> bool:
    ours = STAR_KEYS.ours(name)
    return ours is not None and not ours.startswith(SAMPLER_PREFIX)


def _transformer_facts(file: TensorFile) -> dict[str, object]:
    """Return the sizes and the maps of a file's transformer, whatever causal sampler is beside it."""
    config = resolve_config(file, None)
    return {**dataclasses.asdict(dataclasses.replace(config.transformer, sampler_depth=0)), "maps": config.maps}
