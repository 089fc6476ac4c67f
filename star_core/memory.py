"""How many bytes drawing and decoding need beside the weights, for a host that makes room, and what torch says
where there are none. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from .config import TokenMap, TransformerConfig, VQVAEConfig, token_count

FLOAT32 = 4
BLOCK_COPIES = 14
"""Tensors of (R, n, C) alive at a block's peak: input, norm, q, k, v and turned copies, the FFN's four."""
LOGIT_COPIES = 6
"""Tensors of (R, n, V) in float32 while a token is drawn: logits, guided, sorted with their indices, sums."""
MOST_NUMBERS = 2**31 - 1
"""Of a map that a convolution takes or makes. GPUs' libraries may count in 32 bits, and read elsewhere beyond
(pytorch/pytorch#117736)."""
DECODER_COPIES = 6
"""Tensors of (B, C, H, W) at the decoder's widest level."""


def drawing_bytes(
    config: TransformerConfig,
    maps: Sequence[TokenMap],
    pictures: int,
    *,
    guided: bool,
    itemsize: int,
    between: int = 0,
) -> int:
    """Return the KV cache, which the last scale does not enter, plus what its pass and its logits take.

    between: what work between two passes takes, such as a preview's decoding; the cache alone lies beside it.
    """
    rows = pictures * (2 if guided else 1)
    largest = max(height * width for height, width in maps)
    cache = 2 * config.depth * rows * token_count(maps[:-1]) * config.width * itemsize
    block = (BLOCK_COPIES * largest + 2 * token_count(maps)) * rows * config.width * itemsize
    logits = LOGIT_COPIES * rows * largest * config.codebook_size * FLOAT32
    return cache + max(block + logits, between)


def decoding_bytes(config: VQVAEConfig, token_map: TokenMap, pictures: int, *, itemsize: int) -> int:
    """Return what decoding (or encoding) pictures of a latent size takes."""
    pixels = token_map[0] * token_map[1] * config.downsample * config.downsample
    widest = max(
        config.base_channels * multiplier // (1 << 2 * level)
        for level, multiplier in enumerate(config.channel_multipliers)
    )
    return DECODER_COPIES * pictures * pixels * widest * itemsize


def pictures_at_once(config: VQVAEConfig, token_map: Sequence[int]) -> int:
    """Return how many pictures of a latent size the VQ-VAE may compute together, one at least."""
    pixels = token_map[0] * token_map[1] * config.downsample * config.downsample
    # A level's maps are as wide as it is at the size of the finer one, too: enlarged, before their convolution.
    widest = max(
        pixels * config.base_channels * multiplier // (1 << 2 * max(0, level - 1))
        for level, multiplier in enumerate(config.channel_multipliers)
    )
    return max(1, MOST_NUMBERS // widest)


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch found no memory, told by name and words: importing torch for that would take its time."""
    words = ("out of memory", "DefaultCPUAllocator")
    return type(error).__name__ == "OutOfMemoryError" or any(word in str(error) for word in words)
