"""The scale-wise transformer: one forward pass per scale, text by start token and cross-attention (paper 4.1).

Rows of a batch are R = B conditional pictures, followed by their B unconditional twins where guidance needs
them. What the twins' cross-attention reads is decided by how many rows of text the caller hands over: B rows
(`paired`) make a twin share its conditional row's cross-attention, R rows (`independent`) give each its own.
The official code instead adds batch row 0's cross-attention to every row; at batch 1 that equals `paired`.

Below float32 the sums between blocks (the residual stream) are in the weights' dtype; under the official code's
autocast they stay in float32. What that costs is measured in NOTES.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from .attention import CrossAttention, KVCache, LayerCache, SelfAttention, TextKeys
from .config import TokenMap, TransformerConfig, token_count
from .kernels import fused
from .rope import Rotation, axial_rope_of_maps
from .transfer import upload

NORM_EPS = 1e-6
FFN_RATIO = 4


def norm(x: Tensor) -> Tensor:
    """Layer normalisation without parameters, over the last axis."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


@fused("products.expanded", on_cpu="cpu.expanded")
def expanded(x: Tensor, linear: nn.Module) -> Tensor:
    """Return the tanh-approximated GELU of a linear layer's output, fused where possible."""
    return F.gelu(linear(x), approximate="tanh")


@fused("residual.add_then_norm", on_cpu="cpu.add_then_norm")
def add_then_norm(x: Tensor, addend: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return x + addend (R, L, C), and the norm of its first `rows` rows, fused where possible.

    An addend (R / 2, L, C) is what rows and their twins share. It may be used up.
    """
    x = added(x, addend)
    return x, norm(x[:rows])


@fused(on_cpu="cpu.added")
def added(x: Tensor, addend: Tensor) -> Tensor:
    """Return x + addend (R, L, C), or an addend (R / 2, L, C) that rows and their twins share.

    The addend may be used up: fused, the sum is written into it.
    """
    if len(addend) == len(x):
        return x + addend
    twins: Tensor = x.unflatten(0, (-1, len(addend))) + addend
    return twins.flatten(0, 1)


class FeedForward(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, width: int, *, operations: ModuleType = nn) -> None:
        super().__init__()
        self.expand = operations.Linear(width, FFN_RATIO * width)
        self.contract = operations.Linear(FFN_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (R, L, C) to (R, L, C)."""
        contracted: Tensor = self.contract(expanded(x, self.expand))
        return contracted


class SelfBlock(nn.Module):
    """x += attn(LN(x)); x += ffn(LN(x)): a block that sees no text (the causal sampler's)."""

    def __init__(self, width: int, heads: int, *, operations: ModuleType = nn) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads, operations=operations)
        self.ffn = FeedForward(width, operations=operations)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Map (R, L, C) to (R, L, C)."""
        x, normed = add_then_norm(x, self.attn(norm(x), rotation), len(x))
        return added(x, self.ffn(normed))


class TextBlock(nn.Module):
    """x += attn(LN(x)); x += cross_attn(LN(x), text); x += ffn(LN(x))."""

    def __init__(self, width: int, heads: int, text_width: int, *, operations: ModuleType = nn) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads, operations=operations)
        self.cross_attn = CrossAttention(width, heads, text_width, operations=operations)
        self.ffn = FeedForward(width, operations=operations)

    def text_keys(self, hidden: Tensor, mask: Tensor | None) -> TextKeys:
        """Return what this block's cross-attention reads of text states (B, T, D), mask (B, T) or None."""
        return self.cross_attn.text_keys(hidden, mask)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        text: TextKeys,
        *,
        cache: LayerCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Map (R, L, C) to (R, L, C). `text` has R rows, or R / 2 that conditional rows and twins share."""
        readers = text.keys.shape[0]
        x, normed = add_then_norm(x, self.attn(norm(x), rotation, cache=cache, mask=mask), readers)
        x, normed = add_then_norm(x, self.cross_attn(normed, text), len(x))
        return added(x, self.ffn(normed))


class Places(NamedTuple):
    """Where tokens stand that are seen at once: their scales (K,), their rotation (K, head_width / 2)."""

    scales: Tensor
    rotation: Rotation

    def select(self, positions: Tensor) -> Places:
        """Return those of the tokens at `positions` (K,)."""
        return Places(self.scales[positions], self.rotation.select(positions))


class Transformer(nn.Module):
    """Start token, embeddings, blocks and head. Knows nothing of sampling, guidance or pictures."""

    def __init__(self, config: TransformerConfig, *, operations: ModuleType = nn) -> None:
        super().__init__()
        self.config = config
        width, heads = config.width, config.heads
        self.start_position = nn.Parameter(torch.zeros(1, 1, width))
        self.text_proj = operations.Linear(config.text_width, width)
        self.word_embed = operations.Linear(config.code_width, width)
        self.scale_embed = operations.Embedding(config.scales, width)
        self.blocks = nn.ModuleList(
            TextBlock(width, heads, config.text_width, operations=operations) for _ in range(config.depth)
        )
        self.head = operations.Linear(width, config.codebook_size)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations: that of the weights, but for matrices kept as halves (`upcast`)."""
        return self.start_position.dtype

    def rotations(self, maps: Sequence[TokenMap]) -> Rotation:
        """Return the rotations of all maps' tokens, (L, head_width / 2), on the CPU."""
        config = self.config
        return axial_rope_of_maps(maps, config.head_width, config.rope_theta, config.rope_extent)

    def places(self, maps: Sequence[TokenMap], device: torch.device) -> Places:
        """Return where all maps' tokens stand, on a device."""
        each = [torch.full((h * w,), s, dtype=torch.long) for s, (h, w) in enumerate(maps)]
        return Places(upload(torch.cat(each), device), self.rotations(maps).to(device))

    def start_token(self, pooled: Tensor) -> Tensor:
        """Return the input of the first scale, (R, 1, C), from the pooled text state (R, D)."""
        projected: Tensor = self.text_proj(pooled.to(self.dtype))
        start = projected.unsqueeze(1) + self.start_position.to(projected)
        return start + self._scale_vectors(torch.zeros(1, 1, dtype=torch.long, device=start.device), start)

    def scale_input(self, codes: Tensor, scale: int) -> Tensor:
        """Return the input (R, n, C) of a scale > 0 from the downsampled f_hat (R, n, D)."""
        embedded: Tensor = self.word_embed(codes.to(self.dtype))
        return embedded + self._scale_vectors(torch.full((1, 1), scale, device=embedded.device), embedded)

    def _scale_vectors(self, scales: Tensor, like: Tensor) -> Tensor:
        vectors: Tensor = self.scale_embed(scales.to(like.device))
        return vectors.to(like.dtype)

    def text_keys(self, hidden: Tensor, mask: Tensor | None) -> tuple[TextKeys, ...]:
        """Return every block's keys and values of text states (B, T, D), once per text.

        mask (B, T) is True at real tokens; None means that all are.
        """
        hidden = hidden.to(self.dtype)
        return tuple(block.text_keys(hidden, mask) for block in self._text_blocks())

    def _text_blocks(self) -> Iterator[TextBlock]:
        for block in self.blocks:
            assert isinstance(block, TextBlock), "every block of the transformer reads text"
            yield block

    def new_cache(self, rows: int, capacity: int, device: torch.device) -> KVCache:
        """Return an empty cache for `rows` rows and `capacity` tokens."""
        config = self.config
        shape = (rows, config.heads, capacity, config.head_width)
        return KVCache(config.depth, shape, self.dtype, device)

    def features(
        self,
        x: Tensor,
        rotation: Rotation,
        text: Sequence[TextKeys],
        *,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the last block's output (R, L, C) for inputs (R, L, C); extends the cache."""
        for index, block in enumerate(self.blocks):
            layer = cache.layers[index] if cache is not None else None
            x = block(x, rotation, text[index], cache=layer, mask=mask)
        return x

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits (R, L, V) in float32 of the last block's output (R, L, C)."""
        normalised = norm(features.float())
        scores: Tensor = self.head(normalised.to(self.dtype))
        return scores.float()

    def forward(
        self,
        teacher_inputs: Tensor,
        pooled: Tensor,
        text: Sequence[TextKeys],
        maps: Sequence[TokenMap],
        *,
        positions: Tensor | None = None,
        places: Places | None = None,
    ) -> Tensor:
        """Return the features (R, L, C) of all scales at once, under teacher forcing.

        teacher_inputs is (R, L - h0 w0, D), the downsampled f_hats of scales 1..; a token sees all scales
        up to its own. `positions` (K,) keeps only those of the L tokens (paper 4.4's efficient training):
        the result is then (R, K, C). `places` of all L tokens, where they are at hand, save the host from
        sending them.
        """
        if places is None:
            places = self.places(maps, teacher_inputs.device)
        embedded = self.word_embed(teacher_inputs.to(self.dtype))
        first = token_count(maps[:1])
        embedded = embedded + self._scale_vectors(places.scales[first:], embedded)
        start = repeat(self.start_token(pooled), "r 1 c -> r n c", n=first)
        x = torch.cat([start, embedded], dim=1)
        if positions is not None:
            x, places = x.index_select(1, positions), places.select(positions)
        mask = places.scales.unsqueeze(1) >= places.scales.unsqueeze(0)
        return self.features(x, places.rotation, text, mask=mask)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw fresh weights, as VAR does: deviation sqrt(1 / 3C), residual outputs / sqrt(2 depth)."""
        deviation = math.sqrt(1 / self.config.width / 3)
        for name, parameter in self.named_parameters():
            if name.endswith(("weight", "start_position")):
                nn.init.trunc_normal_(parameter, std=deviation, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            for block in self._text_blocks():
                block.attn.proj.weight.div_(math.sqrt(2 * self.config.depth))
                block.ffn.contract.weight.div_(math.sqrt(2 * self.config.depth))
