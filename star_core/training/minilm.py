"""all-MiniLM-L6-v2, a small sentence encoder, in plain torch: the teacher of the shipped text encoder.

A BERT of 6 layers and width 384 (Apache-2.0) whose sentence embedding is the normalised mean of the
last states. Written out here because training needs one forward pass, and evaluation reads it too.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

from ..weights import TensorFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

WIDTH = 384
_LAYERS = 6
_HEADS = 12
_LAYER_NORM_EPS = 1e-12


class MiniLM:
    """The frozen sentence encoder: texts in, unit vectors (N, 384) out."""

    def __init__(self, tensors: dict[str, Tensor], tokenizer: Tokenizer) -> None:
        """Take the tensors under their published names, and the file's own tokenizer."""
        self._tensors = tensors
        self._tokenizer = tokenizer

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], *, batch: int = 256, max_tokens: int = 64) -> Tensor:
        """Return the unit sentence embeddings (N, 384) in float32.

        Texts are batched by length, so that short ones are not computed at the longest one's price.
        """
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        found = torch.empty(len(ids), WIDTH)
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            found[rows] = self._embed_ids([ids[row] for row in rows])
        return found

    def _embed_ids(self, ids: list[list[int]]) -> Tensor:
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in ids])
        device = next(iter(self._tensors.values())).device
        padded, mask = padded.to(device), mask.to(device)
        total = (self._states(padded, mask) * mask[..., None]).sum(1)
        return F.normalize(total, dim=-1).cpu()

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the last layer's states (N, L, 384) of padded ids (N, L) under a mask (N, L)."""
        words = self._tensors["embeddings.word_embeddings.weight"][ids]
        places = self._tensors["embeddings.position_embeddings.weight"][: ids.shape[1]]
        sentence = self._tensors["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(words + places + sentence, "embeddings.LayerNorm")
        for layer in range(_LAYERS):
            x = self._layer(x, mask, f"encoder.layer.{layer}")
        return x

    def _layer(self, x: Tensor, mask: Tensor, name: str) -> Tensor:
        q, k, v = (
            rearrange(self._linear(x, f"{name}.attention.self.{part}"), "n l (h c) -> n h l c", h=_HEADS)
            for part in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        mixed = rearrange(mixed, "n h l c -> n l (h c)")
        mixed = self._linear(mixed, f"{name}.attention.output.dense")
        x = self._norm(x + mixed, f"{name}.attention.output.LayerNorm")
        inner = F.gelu(self._linear(x, f"{name}.intermediate.dense"))
        return self._norm(x + self._linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        return F.layer_norm(x, (WIDTH,), weight, bias, _LAYER_NORM_EPS)


def load_minilm(folder: Path, *, device: str = "cpu") -> MiniLM:
    """Load the teacher from the package's folder (model.fp16.safetensors and tokenizer.json).

    The file is float16, the computation float32.
    """
    from tokenizers import Tokenizer

    words = folder / "tokenizer.json"
    if not words.is_file():
        raise ValueError(f"{words}: no such file. The asset `minilm` holds it")
    file = TensorFile(folder / "model.fp16.safetensors")
    tensors = {name: file[name].to(device, torch.float32) for name in file}
    missing = [name for name in tensor_names() if name not in tensors]
    if missing:
        raise ValueError(f"{file.path}: no tensor {missing[0]}. Is this all-MiniLM-L6-v2?")
    return MiniLM(tensors, Tokenizer.from_file(str(words)))


def tensor_names() -> Iterator[str]:
    """Yield the name of every tensor that the forward pass reads."""
    yield from (f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type"))
    parts = [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    ]
    layers = [f"encoder.layer.{layer}.{part}" for layer in range(_LAYERS) for part in parts]
    for name in ["embeddings.LayerNorm", *layers]:
        yield f"{name}.weight"
        yield f"{name}.bias"


def embed_cached(teacher: MiniLM, texts: Sequence[str], folder: Path, *, chunk: int = 8192) -> Tensor:
    """Return the embeddings (N, 384) of `texts`, kept in float16 in `folder` chunk by chunk.

    A chunk's file is named after its texts, so that a killed run goes on where it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = [torch.empty(0, WIDTH)]
    for start in range(0, len(texts), chunk):
        part = texts[start : start + chunk]
        digest = hashlib.sha256("\0".join(part).encode("utf-8")).hexdigest()[:20]
        path = folder / f"{digest}.safetensors"
        if not path.is_file():
            log.info("teacher: texts %d to %d of %d", start, start + len(part), len(texts))
            unfinished = path.with_suffix(".part")
            save_file({"embeddings": teacher.embed(part).half()}, unfinished)
            os.replace(unfinished, path)
        found.append(TensorFile(path)["embeddings"].float())
    return torch.cat(found)
