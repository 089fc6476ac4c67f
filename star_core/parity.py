"""Recomputes what the official implementation computed on small reproducible weights, and compares.

A golden file holds inputs and outputs only; every parameter has a value that follows from its official name.
Each stored quantity is recomputed from the stored ones before it, and once more chained from the image.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .causal_sampler import CausalSampler, sampler_logits, unmask_counts
from .config import StarConfig, TransformerConfig, VQVAEConfig, square_maps
from .generate import generate
from .key_tables import STAR_KEYS, VQVAE_KEYS, KeyTable
from .memory import is_out_of_memory
from .request import PromptSpan, Request, ScaleStep
from .rope import Rotation
from .sampling import PictureSeed, keep_likely
from .schedule import ScalePolicy, ScaleSchedule, ramp
from .text_encoder import TextStates
from .transformer import Transformer
from .vqvae import VQVAE
from .weights import ModuleT, TensorFile, build_on_meta

GREEDY_GUIDANCE = 4.0

TOLERANCES: Mapping[str, float] = {
    "rope_cos": 5e-6,
    "rope_sin": 5e-6,
    "encoder_features": 1e-4,
    "tokens": 0,
    "f_hat_mid": 1e-4,
    "f_hat": 1e-4,
    "reconstruction": 1e-3,
    "teacher_inputs": 1e-4,
    "teacher_features": 2e-4,
    "teacher_logits": 1e-3,
    "sampler_features": 2e-4,
    "sampler_logits": 1e-3,
    "greedy_tokens": 0,
    "greedy_image": 1e-3,
}
"""Largest absolute difference in float32 on the CPU; 0 means equal. Filters and counts are exact too."""

INPUTS = (
    "image",
    "kept_positions",
    "text_hidden",
    "text_mask",
    "text_pooled",
    "sampler_known",
    "sampler_kept",
    "filter_logits",
)

FILTERED = re.compile(r"filtered_k(\d+)_p(\d+)")
COUNTS = re.compile(r"unmask_counts_s([1-9]\d*)_n([1-9]\d*)")


@dataclass(frozen=True)
class ParityRow:
    """One comparison: a stored quantity, how it was reached, and how far it is off."""

    name: str
    source: str
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance


def reproducible_value(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the golden format's value of the parameter with this official name, float32."""
    state = np.random.RandomState(zlib.crc32(name.encode()))
    x = state.standard_normal(shape).astype(np.float32)
    if name.endswith("scale_mul_1H11"):
        value = np.log(4 + 0.5 * np.tanh(x))
    elif len(shape) <= 1:
        value = (1 + 0.1 * x) if "norm" in name and name.endswith("weight") else 0.1 * x
    elif (
        "pos_start" in name or "lvl_embed" in name or name in ("quantize.embedding.weight", "class_emb.weight")
    ):
        value = 0.5 * x
    else:
        gain = 3.0 if name.startswith("head_logits") else 1.0
        value = gain / math.sqrt(math.prod(shape[1:])) * x
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def _reproduced(make: Callable[[], ModuleT], table: KeyTable, prefix: str) -> ModuleT:
    module = build_on_meta(make)
    state = {}
    for name, parameter in module.named_parameters():
        official = table.official(prefix + name)
        assert official is not None, f"the key table has no official name for {prefix}{name}"
        state[name] = reproducible_value(official, tuple(parameter.shape))
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


@dataclass(frozen=True)
class GoldenModel:
    """The modules of a golden file's configuration, with their reproducible weights."""

    config: StarConfig
    transformer: Transformer
    sampler: CausalSampler
    vqvae: VQVAE


def golden_model(metadata: Mapping[str, str], path: Path) -> GoldenModel:
    """Build the modules that a golden file's metadata describes. Raises ValueError naming the wrong field."""
    depth, channels, codebook, text_width = (
        _described(metadata, name, path) for name in ("depth", "ch", "vocab", "text_dim")
    )
    sides = _described(metadata, "patch_nums", path, several=True)
    transformer_config = TransformerConfig(
        depth=depth,
        width=64 * depth,
        heads=depth,
        scales=len(sides),
        text_width=text_width,
        codebook_size=codebook,
        sampler_depth=3,
    )
    vqvae_config = VQVAEConfig(base_channels=channels, codebook_size=codebook)
    config = StarConfig("golden", transformer_config, vqvae_config, square_maps(sides), "")
    transformer = _reproduced(lambda: Transformer(transformer_config), STAR_KEYS, "transformer.")
    sampler = _reproduced(lambda: CausalSampler(transformer_config), STAR_KEYS, "causal_sampler.")
    vqvae = _reproduced(lambda: VQVAE(vqvae_config), VQVAE_KEYS, "")
    return GoldenModel(config, transformer, sampler, vqvae)


def _described(metadata: Mapping[str, str], name: str, path: Path, *, several: bool = False) -> Any:
    """Return a field of a golden file's metadata: a whole number above 0, or `several` of them in a list."""
    if name not in metadata:
        raise ValueError(f"{path}: no golden file, its metadata lacks {name!r}")
    try:
        value = json.loads(metadata[name])
    except json.JSONDecodeError:
        value = None
    numbers = value if several else [value]
    if not isinstance(numbers, list) or not numbers or any(type(n) is not int or n < 1 for n in numbers):
        wanted = "a list of whole numbers above 0" if several else "a whole number above 0"
        raise ValueError(
            f"{path}: its metadata says that {name} is {metadata[name]:.80}, which is not {wanted}"
        )
    return value


class Recomputation:
    """Computes golden quantities by name, from earlier ones that `known` hands over."""

    def __init__(self, model: GoldenModel, known: Mapping[str, Tensor]) -> None:
        self.model = model
        self.known = known
        self.maps = model.config.maps
        self.lengths = [h * w for h, w in self.maps]

    def compute(self, name: str) -> Tensor:
        """Return the quantity called `name`, in the golden file's shape."""
        if match := FILTERED.fullmatch(name):
            return self._filtered(*map(int, match.groups()))
        if match := COUNTS.fullmatch(name):
            steps, side = map(int, match.groups())
            return torch.tensor(unmask_counts(steps, side * side))
        recipes: Mapping[str, Callable[[], Tensor]] = {
            "rope_cos": lambda: self.model.transformer.rotations(self.maps).cos,
            "rope_sin": lambda: self.model.transformer.rotations(self.maps).sin,
            "encoder_features": lambda: self.model.vqvae.encode(self.known["image"]),
            "tokens": lambda: torch.cat(self._quantized()[0], dim=1),
            "f_hat_mid": lambda: self._quantized()[1][len(self.maps) // 2],
            "f_hat": lambda: self._quantized()[1][-1],
            "reconstruction": lambda: self.model.vqvae.decode(self.known["f_hat"]),
            "teacher_inputs": self._teacher_inputs,
            "teacher_features": lambda: self._teacher()[:, self.known["kept_positions"]],
            "teacher_logits": lambda: self.model.transformer.logits(
                self._teacher()[:, self.known["kept_positions"]]
            ),
            "sampler_features": lambda: self._teacher()[:, -self.lengths[-1] :],
            "sampler_logits": self._sampler_logits,
            "greedy_tokens": lambda: torch.cat([s.tokens for s in self._greedy()], dim=1),
            "greedy_image": lambda: self.model.vqvae.decode(self._greedy()[-1].f_hat) / 2 + 0.5,
        }
        return recipes[name]()

    def _quantized(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        result = self.model.vqvae.quantizer.quantize(self.known["encoder_features"], self.maps)
        return result.tokens, result.f_hats

    def _teacher_inputs(self) -> Tensor:
        tokens = self.known["tokens"].split(self.lengths, dim=1)
        return self.model.vqvae.quantizer.teacher_inputs(tokens, self.maps)

    def _teacher(self) -> Tensor:
        text = self._text(0)
        keys = self.model.transformer.text_keys(text.hidden, text.mask)
        features: Tensor = self.model.transformer(self.known["teacher_inputs"], text.pooled, keys, self.maps)
        return features

    def _sampler_logits(self) -> Tensor:
        last = self.known["tokens"].split(self.lengths, dim=1)[-1]
        codes = self.model.vqvae.quantizer.lookup(last, self.maps[-1])
        codes = rearrange(codes, "b d h w -> b (h w) d") * self.known["sampler_known"].unsqueeze(-1)
        whole = self.model.transformer.rotations(self.maps)
        start = sum(self.lengths[:-1])
        positions = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(start, len(whole.cos))])
        rotation: Rotation = whole.select(positions)
        logits = sampler_logits(
            self.model.sampler,
            codes,
            self.known["sampler_features"],
            self._text(0).pooled,
            len(self.maps) - 1,
            rotation,
            0.0,
        )
        return logits[:, self.known["sampler_kept"]]

    def _text(self, row: int) -> TextStates:
        names = ("text_hidden", "text_mask", "text_pooled")
        hidden, mask, pooled = (self.known[name][row : row + 1] for name in names)
        return TextStates(hidden, mask.bool(), pooled)

    def _greedy(self) -> list[ScaleStep]:
        scales = len(self.maps)
        schedule = ScaleSchedule(tuple(ScalePolicy(top_k=1, guidance=t) for t in ramp(GREEDY_GUIDANCE, scales)))
        request = Request((PromptSpan(self._text(0), self._text(1)),), self.maps, schedule, (PictureSeed(0),))
        model = self.model
        return list(generate(model.transformer, None, model.vqvae.quantizer, request, torch.device("cpu")))

    def _filtered(self, k: int, tenths: int) -> Tensor:
        return keep_likely(self.known["filter_logits"], top_k=k, top_p=tenths / 10) > -torch.inf


class LackError(ValueError):
    """A golden file lacks a quantity from which another one that it stores follows."""


class _Stored(dict[str, Tensor]):
    """The quantities of the golden file at `path`, to recompute others from."""

    path: Path

    def __missing__(self, name: str) -> Tensor:
        raise LackError(f"{self.path} lacks {name}, which is needed to recompute what it stores")


class _Chained(dict[str, Tensor]):
    """Inputs from the file; every other quantity as this engine computed it."""

    recomputation: Recomputation

    def __missing__(self, name: str) -> Tensor:
        self[name] = self.recomputation.compute(name)
        return self[name]


def compare(name: str, source: str, ours: Tensor, stored: Tensor) -> ParityRow:
    """Compare a quantity; other shapes, and none of any size, count as infinitely far off."""
    tolerance = TOLERANCES.get(name, 0.0)
    if ours.shape != stored.shape or not stored.numel():
        return ParityRow(name, source, math.inf, tolerance)
    difference = (ours.double() - stored.double()).abs().max()
    return ParityRow(name, source, float(difference.nan_to_num(math.inf)), tolerance)


def parity_rows(path: Path) -> Iterator[ParityRow]:
    """Return a row for every stored quantity of a golden file, then the chained ones, as they are computed.

    Raises ValueError for a file that is not in the golden format, stores what is not known here, or nothing to
    compare; the rows raise it for a quantity that is stored without what it is recomputed from.
    """
    file = TensorFile(path)
    stored = _Stored({name: file[name] for name in file})
    stored.path = path
    names = [name for name in _ORDER if name in stored]
    names += sorted(n for n in stored if FILTERED.fullmatch(n) or COUNTS.fullmatch(n))
    unknown = sorted(set(stored) - set(names) - set(INPUTS))
    if unknown:
        raise ValueError(f"{path} stores {', '.join(unknown)}, which is not in the golden format")
    if not names:
        raise ValueError(f"{path} stores nothing to compare: its tensors are {', '.join(stored) or 'none'}")
    return _rows(golden_model(file.metadata, path), stored, names)


def _rows(model: GoldenModel, stored: _Stored, names: Sequence[str]) -> Iterator[ParityRow]:
    with torch.no_grad():
        from_stored = Recomputation(model, stored)
        for name in names:
            with _told(stored.path, name):
                ours = from_stored.compute(name)
            yield compare(name, "stored", ours, stored[name])
        chained = _Chained({name: stored[name] for name in INPUTS if name in stored})
        chained.recomputation = Recomputation(model, chained)
        for name in names:
            if name in _CHAINED:
                with _told(stored.path, name):
                    ours = chained[name]
                yield compare(name, "chained", ours, stored[name])


@contextmanager
def _told(path: Path, name: str) -> Iterator[None]:
    """Raise ValueError where shapes, kinds or places that a file holds cannot be computed with."""
    try:
        yield
    except LackError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{path}: {name} cannot be recomputed from what the file stores ({first:.200})"
        ) from error


_ORDER = tuple(TOLERANCES)
_CHAINED = tuple(name for name in TOLERANCES if not name.startswith(("rope_", "greedy_", "encoder_")))
