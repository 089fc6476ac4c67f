"""The official model and this engine on the same fresh random weights.

Only for the process that `compare_official.py` runs in: the official builder patches torch for all of it.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from star_core import generate
from star_core import request as requests
from star_core.checkpoint import Networks
from star_core.config import TokenMap, TransformerConfig, VQVAEConfig, square_maps
from star_core.key_tables import STAR_KEYS, VQVAE_KEYS
from star_core.sampling import PictureSeed
from star_core.schedule import ScaleSchedule
from star_core.text_encoder import TextStates
from star_core.vqvae import VQVAE
from star_core.weights import build_on_meta, fill

CPU = torch.device("cpu")
CFG = 4.0
TEXT_LENGTH = 77
LONG_SIDES = (1, 1, 1, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 6)
"""14 small scales: the official loop treats indices 9-12 and 13 differently. Its unmask schedule breaks down on
refined maps below 4 x 4 in 8 steps and 5 x 5 in 15."""


@dataclass(frozen=True)
class Size:
    """One configuration to build twice.

    gain spreads the logits. Where the sampler fixes by confidence it is low: two positions for which top-p
    leaves one token are both certain, and which of them topk takes is the processor's choice.
    """

    depth: int
    sides: tuple[int, ...]
    codebook: int
    text_width: int
    channels: int
    sampler_from: int | None = None
    theta: float = 10_000.0
    extent: float = 64.0
    gain: float = 3.0
    tiny: bool = False

    @property
    def width(self) -> int:
        return 64 if self.tiny else 64 * self.depth

    @property
    def heads(self) -> int:
        return 2 if self.tiny else self.depth

    @property
    def sampler_depth(self) -> int:
        return 0 if self.sampler_from is None else 1 if self.tiny else 3

    @property
    def maps(self) -> tuple[TokenMap, ...]:
        return square_maps(self.sides)


SIZES = {
    "depth-2": Size(2, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 256, 48, 32),
    "depth-3-sampler": Size(3, (1, 2, 3, 5, 7, 9), 512, 64, 32, sampler_from=3),
    "depth-4": Size(4, (1, 2, 3, 4, 6), 128, 32, 64, theta=100.0, extent=32.0),
    "14-scales": Size(3, LONG_SIDES, 64, 64, 32, sampler_from=9, gain=1.0),
    "statistics": Size(1, LONG_SIDES, 32, 64, 32, sampler_from=9, gain=1.0, tiny=True),
    "d16": Size(16, (1, 2, 3, 4, 6, 8), 4096, 1024, 160),
}


# The two models


def stub_unused_packages() -> None:
    """Offer what the official files name and never use in what is compared here."""
    names = {
        "timm": (),
        "timm.models": (),
        "timm.models.vision_transformer": ("Mlp", "PatchEmbed", "_cfg"),
        "timm.models.layers": ("DropPath", "to_2tuple", "trunc_normal_"),
        "timm.models.registry": ("register_model",),
        "huggingface_hub": ("PyTorchModelHubMixin",),
        "yaml": (),
    }
    # Deprecated names that newer builds of torch lose; both only choose CUDA behaviour.
    torch.backends.cuda.sdp_kernel = lambda **_: nullcontext()
    torch.cuda.amp.autocast = lambda **_: nullcontext()
    for name, attributes in names.items():
        module = types.ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, type(attribute, (), {}))
        sys.modules[name] = module


@dataclass
class Pair:
    """The official modules and ours, on the same parameters."""

    size: Size
    var: Any
    vae: Any
    networks: Networks
    vqvae: VQVAE
    conditional: TextStates
    unconditional: TextStates

    def official_text(self, *, rows: int) -> dict[str, Tensor]:
        both = [self.conditional, self.unconditional][:rows]
        return {
            "encoder_hidden_states": torch.cat([text.hidden for text in both]),
            "encoder_attention_mask": torch.cat([text.mask for text in both]).long(),
            "encoder_pool_feat": torch.cat([text.pooled for text in both]),
        }

    def official_run(self, seed: int = 0, **options: Any) -> Tensor:
        picture: Tensor = self.var.autoregressive_infer_cfg(
            B=1, label_B=None, g_seed=seed, cfg=CFG, **self.official_text(rows=2), **options
        )
        return picture

    def our_run(self, schedule: ScaleSchedule, seeds: Sequence[int] = (0,)) -> list[requests.ScaleStep]:
        number = len(seeds)
        span = requests.PromptSpan(self.conditional.repeat_each(number), self.unconditional.repeat_each(number))
        pictures = tuple(PictureSeed(seed) for seed in seeds)
        request = requests.Request((span,), self.size.maps, schedule, pictures)
        sampler = self.networks.causal_sampler
        return list(generate.generate(self.networks.transformer, sampler, self.vqvae.quantizer, request, CPU))


def randomise(module: nn.Module, generator: torch.Generator, head_gain: float) -> None:
    """Give every parameter a value that keeps activations near unit size and makes each of them matter."""
    for name, parameter in module.named_parameters():
        parameter.normal_(generator=generator)
        if name.endswith("scale_mul_1H11"):
            parameter.mul_(0.3).add_(1.4)
        elif parameter.ndim <= 1:
            parameter.mul_(0.1).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif "pos_start" in name or "lvl_embed" in name or name == "quantize.embedding.weight":
            parameter.mul_(0.5)
        else:
            # The picture so far must weigh more than its prompt, or every position gets the same token.
            gain = head_gain if name.startswith("head_logits") else 6.0 if "word_embed" in name else 1.0
            parameter.mul_(gain / math.sqrt(parameter[0].numel()))


def random_text(width: int, words: int, generator: torch.Generator) -> TextStates:
    mask = (torch.arange(TEXT_LENGTH) < words).unsqueeze(0)
    hidden = torch.randn(1, TEXT_LENGTH, width, generator=generator)
    return TextStates(hidden, mask, torch.randn(1, width, generator=generator))


def build_official(size: Size) -> tuple[Any, Any]:
    """Return the official VQ-VAE and transformer of this size, their parameters still undefined."""
    from models import build_vae_var  # the official package
    from models.var_drop import VAR

    # Half the time, and every value is overwritten.
    nn.init.trunc_normal_ = lambda tensor, *_, **__: tensor
    VAR.init_weights = lambda *_, **__: None
    options: dict[str, Any] = {
        "depth": size.depth,
        "attn_l2_norm": True,
        "patch_nums": size.sides,
        "in_dim_cross": size.text_width,
        "flash_if_available": False,
        "enable_adaptive_norm": size.sampler_from is not None,
        "train_mode": "none",
        "rope_theta": size.theta,
        "rope_norm": size.extent,
        "sample_from_idx": 9 if size.sampler_from is None else size.sampler_from,
    }
    if size.tiny:  # the builder knows one width per depth, and the sampler no depth below 3
        options["depth"] = 3
    vae, var = build_vae_var(device="cpu", V=size.codebook, Cvae=32, ch=size.channels, **options)
    if size.tiny:
        var = VAR(vae_local=vae, embed_dim=size.width, num_heads=size.heads, **options)
        var.blocks, var.feat_extract_blocks = var.blocks[: size.depth], var.feat_extract_blocks[:1]
    return vae.eval(), var.eval()


def build(size: Size, seed: int) -> Pair:
    """Build the official model of this size with fresh random weights, and ours on the same tensors."""
    vae, var = build_official(size)
    generator = torch.Generator().manual_seed(seed)
    randomise(vae, generator, size.gain)
    randomise(var, generator, size.gain)
    config = TransformerConfig(
        depth=size.depth,
        width=size.width,
        heads=size.heads,
        scales=len(size.sides),
        text_width=size.text_width,
        codebook_size=size.codebook,
        rope_theta=size.theta,
        rope_extent=size.extent,
        sampler_depth=size.sampler_depth,
    )
    vqvae_config = VQVAEConfig(base_channels=size.channels, codebook_size=size.codebook)
    networks = build_on_meta(lambda: Networks(config))
    vqvae = build_on_meta(lambda: VQVAE(vqvae_config))
    return Pair(
        size,
        var,
        vae,
        fill(networks, dict(var.state_dict()), STAR_KEYS, source="the official transformer"),
        fill(vqvae, dict(vae.state_dict()), VQVAE_KEYS, source="the official VQ-VAE"),
        random_text(size.text_width, 9, generator),
        random_text(size.text_width, 2, generator),
    )
