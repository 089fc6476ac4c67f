"""What a checkpoint is: sizes, token maps and the facts its file does not say. No torch here.

A configuration is data. Everything that differs between two STAR checkpoints (width, scales, rotary base,
which text a row's cross-attention reads) stands in these frozen records, travels in safetensors metadata as
one JSON string, and is checked when it is built.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

TokenMap = tuple[int, int]
"""(height, width) of one scale's token map."""

CrossAttention = Literal["paired", "independent"]
"""`paired`: the unconditional row gets its conditional twin's cross-attention (what the released weights were
trained with); `independent`: each row reads its own text (the paper's equation)."""

MAP_AREA_TOLERANCE = 0.12
"""How far the area of an untrained token map may stray from the trained one's (relative)."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def square_maps(sides: Sequence[int]) -> tuple[TokenMap, ...]:
    """Return the square token maps with these sides, coarse to fine."""
    return tuple((side, side) for side in sides)


def token_count(maps: Sequence[TokenMap]) -> int:
    """Return the number of tokens in all maps together."""
    return sum(height * width for height, width in maps)


def check_maps(maps: Sequence[TokenMap]) -> None:
    """Refuse token maps that are empty, not positive, or that shrink from one scale to the next."""
    _require(len(maps) > 1, f"a model needs at least two scales, got {list(maps)}")
    for before, after in zip(maps, maps[1:], strict=False):
        grows = before[0] <= after[0] and before[1] <= after[1]
        _require(grows, f"token maps must not shrink from coarse to fine: {before} before {after}")
    _require(min(min(m) for m in maps) >= 1, f"token maps need positive sides, got {list(maps)}")


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the scale-wise transformer and, where present, of its causal sampler (paper 4.1-4.3)."""

    depth: int
    width: int
    heads: int
    scales: int
    text_width: int
    codebook_size: int
    code_width: int = 32
    rope_theta: float = 10_000.0
    rope_extent: float = 64.0
    cross_attention: CrossAttention = "paired"
    sampler_depth: int = 0

    def __post_init__(self) -> None:
        for name in (
            "depth",
            "width",
            "heads",
            "scales",
            "text_width",
            "codebook_size",
            "code_width",
        ):
            value = getattr(self, name)
            _require(value > 0, f"{name} must be positive, got {value}")
        _require(
            self.width % self.heads == 0,
            f"width {self.width} cannot be split into {self.heads} heads",
        )
        _require(
            self.head_width % 4 == 0,
            f"axial RoPE needs a head width divisible by 4, got {self.width}/{self.heads} = {self.head_width}",
        )
        _require(self.sampler_depth >= 0, f"sampler_depth cannot be {self.sampler_depth}")
        _require(self.rope_theta > 0, f"rope_theta must be positive, got {self.rope_theta}")
        _require(self.rope_extent > 0, f"rope_extent must be positive, got {self.rope_extent}")
        _require(
            self.cross_attention in get_args(CrossAttention),
            f"cross_attention is one of {get_args(CrossAttention)}, got {self.cross_attention!r}",
        )

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def has_sampler(self) -> bool:
        return self.sampler_depth > 0


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of the multi-scale VQ-VAE: taming's encoder and decoder around a residual quantizer."""

    base_channels: int = 160
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    residual_blocks: int = 2
    codebook_size: int = 4096
    code_width: int = 32
    norm_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        _require(len(self.channel_multipliers) > 0, "channel_multipliers is empty")
        _require(self.norm_groups > 0, f"norm_groups must be positive, got {self.norm_groups}")
        for multiplier in self.channel_multipliers:
            channels = self.base_channels * multiplier
            _require(
                channels > 0 and channels % self.norm_groups == 0,
                f"{channels} channels cannot be normalised in {self.norm_groups} groups",
            )
        _require(self.residual_blocks > 0, f"residual_blocks cannot be {self.residual_blocks}")
        _require(self.codebook_size > 0 and self.code_width > 0, "the codebook is empty")

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along a side: 2 ** (levels - 1)."""
        return int(2 ** (len(self.channel_multipliers) - 1))


@dataclass(frozen=True)
class StarConfig:
    """A whole model: transformer, VQ-VAE and the token maps it was trained on.

    `schedule` is the text of the schedule that suits the checkpoint (see schedule.py); `name` is for people.
    """

    name: str
    transformer: TransformerConfig
    vqvae: VQVAEConfig
    maps: tuple[TokenMap, ...]
    schedule: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "maps", tuple((int(h), int(w)) for h, w in self.maps))
        check_maps(self.maps)
        _require(
            len(self.maps) == self.transformer.scales,
            f"{self.name}: {len(self.maps)} token maps, but the transformer has"
            f" {self.transformer.scales} scales",
        )
        for name in ("codebook_size", "code_width"):
            ours, theirs = getattr(self.transformer, name), getattr(self.vqvae, name)
            _require(
                ours == theirs,
                f"{self.name}: {name} is {ours} in the transformer and {theirs} in the VQ-VAE",
            )

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) in pixels of the trained pictures."""
        height, width = self.maps[-1]
        return height * self.vqvae.downsample, width * self.vqvae.downsample

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> StarConfig:
        """Read `to_json`'s text back. Raises ValueError naming the field that is wrong or missing."""
        try:
            record = json.loads(text)
            return StarConfig(
                name=record["name"],
                transformer=TransformerConfig(**record["transformer"]),
                vqvae=VQVAEConfig(**record["vqvae"]),
                maps=tuple((h, w) for h, w in record["maps"]),
                schedule=record["schedule"],
            )
        except KeyError as error:
            raise ValueError(f"not a STAR configuration (no field {error}): {text:.120}") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a STAR configuration ({error!s:.200}): {text:.120}") from error


def maps_for_size(config: StarConfig, height: int, width: int) -> tuple[tuple[TokenMap, ...], bool]:
    """Return the token maps for a picture of (height, width) pixels and whether they were trained.

    Another aspect ratio gets maps of nearly the trained area per scale, as VAR's community and the
    normalised RoPE of paper 4.2 allow; they work to a degree only, hence the flag.
    Raises ValueError, with the sizes that exist, for anything else.
    """
    if (height, width) == config.resolution:
        return config.maps, True
    latent = (height / config.vqvae.downsample, width / config.vqvae.downsample)
    for last in _untrained_last_maps(config):
        if last == latent and (maps := _stretched_maps(config, last)):
            return maps, False
    sizes = ", ".join(f"{w}x{h}" for h, w in untrained_sizes(config)) or "none"
    trained = f"{config.resolution[1]}x{config.resolution[0]}"
    raise ValueError(
        f"{config.name} cannot draw {width}x{height} pixels. Trained: {trained}. Untrained, same area: {sizes}"
    )


def untrained_sizes(config: StarConfig) -> list[tuple[int, int]]:
    """Return the (height, width) in pixels that `maps_for_size` offers beside the trained size."""
    step = config.vqvae.downsample
    lasts = [last for last in _untrained_last_maps(config) if _stretched_maps(config, last)]
    return [(height * step, width * step) for height, width in lasts]


def _untrained_last_maps(config: StarConfig) -> list[TokenMap]:
    """Return the last maps of nearly the trained area with sides within half and twice the trained ones."""
    last_height, last_width = config.maps[-1]
    return [
        (height, width)
        for height, width in _shapes_of_area(last_height * last_width)
        if 0.5 <= height / last_height <= 2 and 0.5 <= width / last_width <= 2
        if (height, width) != (last_height, last_width)
    ]


def _shapes_of_area(area: int) -> list[TokenMap]:
    """Return the token maps of nearly an area, low ones first: one per short side, both ways round."""
    flat = [(short, round(area / short)) for short in range(1, math.isqrt(area) + 1)]
    every = {*flat, *((width, height) for height, width in flat)}
    return sorted(shape for shape in every if abs(math.prod(shape) / area - 1) <= MAP_AREA_TOLERANCE)


def _stretched_maps(config: StarConfig, last: TokenMap) -> tuple[TokenMap, ...] | None:
    """Return maps up to `last`, each of nearly its scale's trained area and closest to the new aspect.

    None where no such maps grow from coarse to fine, as with two trained scales of nearly one area.
    """
    stretch = math.log(last[0] / last[1] * config.maps[-1][1] / config.maps[-1][0])
    maps: list[TokenMap] = []
    for height, width in config.maps[:-1]:
        aspect = math.log(height / width) + stretch
        lowest = maps[-1] if maps else (1, 1)
        fitting = [
            shape
            for shape in _shapes_of_area(height * width)
            if lowest[0] <= shape[0] <= last[0] and lowest[1] <= shape[1] <= last[1]
        ]
        if not fitting:
            return None
        maps.append(min(fitting, key=lambda shape: _strangeness(shape, aspect)))
    return (*maps, last)


def _strangeness(shape: TokenMap, aspect: float) -> tuple[float, int]:
    """Return how far a map is from log(height / width) = aspect; the shorter short side decides ties."""
    return round(abs(math.log(shape[0] / shape[1]) - aspect), 9), min(shape)


SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
SCALES_512_LONG = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 24, 32)
SCALES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


def _released(name: str, depth: int, sides: Sequence[int], schedule: str, **fields: Any) -> StarConfig:
    return StarConfig(
        name=name,
        transformer=TransformerConfig(
            depth=depth,
            width=64 * depth,
            heads=depth,
            scales=len(sides),
            text_width=1024,
            codebook_size=4096,
            **fields,
        ),
        vqvae=VQVAEConfig(),
        maps=square_maps(sides),
        schedule=schedule,
    )


LAST_SCALE_REFINED = (
    "top_k 4096; top_p 0.8; guidance ramp 4; steps 0*9 8; transformer_steps 0*9 5; random_steps 0*9 5"
)
"""Of the 256 px sampler run: the released code refines from index 9 on (`sample_from_idx`), whatever a model's
number of scales, and has taught its sampler nothing else; of these ten it is the last. Steps as its demo's."""

PRESETS: Mapping[str, StarConfig] = {
    config.name: config
    for config in (
        _released("star-256-d16", 16, SCALES_256, "official-256"),
        _released("star-256-d30", 30, SCALES_256, "official-256"),
        _released(
            "star-256-d30-sampler",
            30,
            SCALES_256,
            LAST_SCALE_REFINED,
            sampler_depth=3,
            rope_theta=100.0,
            rope_extent=32.0,
        ),
        _released("star-512-d30", 30, SCALES_512, "official-512"),
        _released("star-512-d30-12-scales", 30, SCALES_512_LONG, "official-512"),
        _released("star-1024-d30", 30, SCALES_1024, "official-512"),
        _released("star-1024-d30-sampler", 30, SCALES_1024, "official-1024", sampler_depth=3),
    )
}
"""The released checkpoints, and the official configuration of a 256 px run with a causal sampler
(official-star.md section 4). Files that say nothing need one of these names."""


def preset(name: str, overrides: Mapping[str, Any] | None = None) -> StarConfig:
    """Return a released configuration, with transformer fields replaced by `overrides`.

    Raises ValueError for an unknown name or field.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}. There are: {', '.join(PRESETS)}")
    config = PRESETS[name]
    if not overrides:
        return config
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    unknown = sorted(set(overrides) - fields)
    _require(not unknown, f"no field {', '.join(unknown)} to override. There are: {sorted(fields)}")
    return dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, **overrides))
