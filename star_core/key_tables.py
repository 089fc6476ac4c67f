"""Names of tensors: the official ones, which files carry, beside ours.

Files keep the official names, so that a converted checkpoint stays readable for every other tool. In a
pattern `#` stands for a number and `*` for the rest of the name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", r"(.+)")
    return re.compile(escaped)


def _fill(pattern: str, parts: tuple[str, ...]) -> str:
    values = iter(parts)
    return re.sub(r"[#*]", lambda _: next(values), pattern)


@dataclass(frozen=True)
class KeyTable:
    """Pairs (official pattern -> our pattern), and official keys left out, each with its reason."""

    pairs: Mapping[str, str]
    dropped: Mapping[str, str]

    def ours(self, official: str) -> str | None:
        """Return our name of an official tensor, None where the table does not know it."""
        return _translate(self.pairs, official)

    def official(self, ours: str) -> str | None:
        """Return the official name of one of our tensors, None where the table does not know it."""
        return _translate({b: a for a, b in self.pairs.items()}, ours)

    def reason_dropped(self, official: str) -> str | None:
        """Return why an official key is left out, None where it is not."""
        for pattern, reason in self.dropped.items():
            if _expression(pattern).fullmatch(official):
                return reason
        return None


def _translate(pairs: Mapping[str, str], name: str) -> str | None:
    for source, target in pairs.items():
        if match := _expression(source).fullmatch(name):
            return _fill(target, match.groups())
    return None


def _block(official: str, ours: str, *, cross: bool) -> dict[str, str]:
    names = {
        "attn.scale_mul_1H11": "attn.log_scale",
        "attn.q_bias": "attn.q_bias",
        "attn.v_bias": "attn.v_bias",
        "attn.mat_qkv.weight": "attn.qkv.weight",
        "attn.proj.*": "attn.proj.*",
        "ffn.fc1.*": "ffn.expand.*",
        "ffn.fc2.*": "ffn.contract.*",
    }
    if cross:
        names |= {
            "cross_attn.scale_mul_1H11": "cross_attn.log_scale",
            "cross_attn.q_bias": "cross_attn.q_bias",
            "cross_attn.v_bias": "cross_attn.v_bias",
            "cross_attn.mat_q.weight": "cross_attn.q.weight",
            "cross_attn.mat_kv.weight": "cross_attn.kv.weight",
            "cross_attn.proj.*": "cross_attn.proj.*",
        }
    return {f"{official}.#.{a}": f"{ours}.#.{b}" for a, b in names.items()}


SAMPLER_PREFIX = "causal_sampler."
"""Our names of the causal sampler's tensors begin with this; the official ones have no common prefix."""

STAR_KEYS = KeyTable(
    pairs={
        "pos_start": "transformer.start_position",
        "word_embed.*": "transformer.word_embed.*",
        "lvl_embed.weight": "transformer.scale_embed.weight",
        "encoder_proj.*": "transformer.text_proj.*",
        "head_logits.*": "transformer.head.*",
        **_block("blocks", "transformer.blocks", cross=True),
        "word_embed_head.*": "causal_sampler.known_embed.*",
        "encoder_proj2.*": "causal_sampler.text_proj.*",
        "head_proj.*": "causal_sampler.fuse.*",
        "pos_start_last": "causal_sampler.start_position",
        "lvl_embed_2.weight": "causal_sampler.scale_embed.weight",
        "head_logits2.*": "causal_sampler.head.*",
        **_block("feat_extract_blocks", "causal_sampler.blocks", cross=False),
    },
    dropped={
        "class_emb.weight": "VAR's ImageNet classes; text replaced them and nothing reads it",
        "blocks.#.attn.zero_k_bias": "always zero: keys have no bias",
        "blocks.#.cross_attn.zero_k_bias": "always zero: keys have no bias",
        "feat_extract_blocks.#.attn.zero_k_bias": "always zero: keys have no bias",
    },
)

VQVAE_KEYS = KeyTable(
    pairs={
        "quantize.embedding.weight": "quantizer.codebook.weight",
        "quantize.quant_resi.qresi_ls.#.*": "quantizer.phis.#.conv.*",
        "encoder.down.#.downsample.conv.*": "encoder.down.#.resize.conv.*",
        "decoder.up.#.upsample.conv.*": "decoder.up.#.resize.conv.*",
        "encoder.down.#.block.#.nin_shortcut.*": "encoder.down.#.block.#.shortcut.*",
        "decoder.up.#.block.#.nin_shortcut.*": "decoder.up.#.block.#.shortcut.*",
        "encoder.down.#.attn.#.proj_out.*": "encoder.down.#.attn.#.proj.*",
        "decoder.up.#.attn.#.proj_out.*": "decoder.up.#.attn.#.proj.*",
        "encoder.mid.attn_1.proj_out.*": "encoder.mid.attn_1.proj.*",
        "decoder.mid.attn_1.proj_out.*": "decoder.mid.attn_1.proj.*",
        "encoder.*": "encoder.*",
        "decoder.*": "decoder.*",
        "quant_conv.*": "quant_conv.*",
        "post_quant_conv.*": "post_quant_conv.*",
    },
    dropped={"quantize.ema_vocab_hit_SV": "training statistics of codebook use"},
)
