"""The loop over scales: the paper's sections 3 and 4 read aloud.

For each scale, coarse to fine: the transformer looks at the picture so far, a token map is drawn from its
logits (all at once, softly, or step by step through the causal sampler), and the quantizer adds the map's
codebook vectors to f_hat. One `ScaleStep` is yielded per scale; whoever stops iterating stops the work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from einops import rearrange, repeat
from torch import Tensor

from .attention import TextKeys
from .causal_sampler import CausalSampler, PartialMap, Refinement, refine, sampler_logits
from .config import TokenMap, token_count
from .graphs import Look, Pace, Replays, look_at_once
from .pruning import restore, run_count, take, worth_running
from .quantizer import MultiScaleQuantizer
from .rope import Rotation
from .sampling import KeptNoise, PictureSeed, ScaleNoise, draw, guide, smooth_weights
from .schedule import ScalePolicy, ScaleSchedule
from .text_encoder import TextStates
from .transformer import Transformer, longest_cache


@dataclass(frozen=True)
class PromptSpan:
    """The text of B pictures that holds from scale `start` on, and the text that guidance leads away from.

    With paired cross-attention the unconditional text acts through its pooled state alone: in the start
    token, where the span starts at scale 0, and in the causal sampler.
    """

    conditional: TextStates
    unconditional: TextStates
    start: int = 0


@dataclass(frozen=True)
class ScaleStep:
    """One finished scale: tokens (B, h * w) int64 and f_hat (B, D, H, W) float32 with this scale in it.

    `given`: taken from a prefix, not drawn. `soft`: drawn smooth; tokens are the likeliest ones, for
    display, and do not rebuild f_hat.
    """

    scale: int
    token_map: TokenMap
    tokens: Tensor
    f_hat: Tensor
    given: bool = False
    soft: bool = False

    def to(self, device: torch.device) -> ScaleStep:
        """Return the step with its tensors on a device."""
        return dataclasses.replace(self, tokens=self.tokens.to(device), f_hat=self.f_hat.to(device))

    def copy(self) -> ScaleStep:
        """Return the step with tensors of its own."""
        return dataclasses.replace(self, tokens=self.tokens.clone(), f_hat=self.f_hat.clone())

    def repeated(self, count: int) -> ScaleStep:
        """Return a step of `count` pictures, all equal to the one that this step has."""
        if len(self.tokens) != 1:
            raise ValueError(f"one picture can be repeated, not {len(self.tokens)}")
        tokens, f_hat = self.tokens.expand(count, -1), self.f_hat.expand(count, -1, -1, -1)
        return dataclasses.replace(self, tokens=tokens, f_hat=f_hat)


@dataclass(frozen=True)
class KeptTokens:
    """Tokens to keep at every scale: tokens and masks, each (B, h * w) per scale, True where kept."""

    tokens: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]


@dataclass(frozen=True)
class Request:
    """Everything that one batch of pictures depends on besides the weights.

    prompts: spans by rising start, the first at scale 0. prefix: finished scales to begin with (from an
    earlier run or from an encoded picture). stop: how many scales to run, None for all.
    """

    prompts: tuple[PromptSpan, ...]
    maps: tuple[TokenMap, ...]
    schedule: ScaleSchedule
    seeds: tuple[PictureSeed, ...]
    prefix: tuple[ScaleStep, ...] = ()
    stop: int | None = None
    kept: KeptTokens | None = None

    def __post_init__(self) -> None:
        starts = [span.start for span in self.prompts]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ValueError(f"prompt spans start at rising scales, the first at 0, got {starts}")
        scales = len(self.maps)
        if starts[-1] >= scales:
            raise ValueError(f"a prompt starts at scale {starts[-1]}, the model has {scales} scales")
        if self.stop is not None and not 1 <= self.stop <= scales:
            raise ValueError(f"can stop after 1 to {scales} scales, not after {self.stop}")
        if len(self.prefix) > (self.stop or scales):
            raise ValueError(f"{len(self.prefix)} scales are given, {self.stop or scales} are wanted")
        for span in self.prompts:
            for text in (span.conditional, span.unconditional):
                if len(text.pooled) != len(self.seeds):
                    raise ValueError(f"{len(text.pooled)} texts for {len(self.seeds)} pictures")
        self._check_tokens()

    def _check_tokens(self) -> None:
        batch = len(self.seeds)
        shapes = [(batch, height * width) for height, width in self.maps]
        for scale, step in enumerate(self.prefix):
            if tuple(step.tokens.shape) != shapes[scale] or step.token_map != self.maps[scale]:
                raise ValueError(
                    f"given scale {scale + 1} has tokens {tuple(step.tokens.shape)} of a"
                    f" {step.token_map} map, wanted {shapes[scale]} of {self.maps[scale]}"
                )
        if self.kept is not None:
            for name, tensors in (("tokens", self.kept.tokens), ("masks", self.kept.masks)):
                got = [tuple(t.shape) for t in tensors]
                if got != shapes:
                    raise ValueError(f"kept {name} have shapes {got}, wanted {shapes}")


@dataclass
class _Picture:
    """The state of one batch while it is drawn: rows are B conditional ones, then their twins while any guide.

    `seen` are the last two scales' features, where a later one is pruned. A picture that `stays` serves one
    request after another from the same memory, for graphs that know no other.
    """

    transformer: Transformer
    request: Request
    schedule: ScaleSchedule
    device: torch.device
    stays: bool = False
    rotation: Rotation = field(init=False)
    text_keys: tuple[TextKeys, ...] = ()
    pooled: Tensor = field(init=False)
    seen: dict[int, Tensor] = field(default_factory=dict)
    noises: dict[int, KeptNoise] = field(default_factory=dict)

    def __post_init__(self) -> None:
        maps = self.request.maps
        self.rotation = self.transformer.rotations(maps).to(self.device)
        self.cache = self.transformer.new_cache(self.rows(0), longest_cache(maps), self.device)
        self.offsets = [token_count(maps[:scale]) for scale in range(len(maps) + 1)]
        run = [run_count(h * w, p.prune) for (h, w), p in zip(maps, self.schedule.scales, strict=True)]
        self.cached = [sum(run[:scale]) for scale in range(len(maps))]

    def forget(self) -> None:
        """Let go of the large tensors."""
        self.cache.layers = ()
        self.text_keys = ()
        self.seen.clear()
        self.noises.clear()

    def rows(self, scale: int) -> int:
        """Return how many rows a scale has: twins are left out where no later scale is guided."""
        guided = self.schedule.guided and scale < self.schedule.guided_scales
        return len(self.request.seeds) * (2 if guided else 1)

    def prepare(self, scale: int) -> None:
        """Do what the host has to do before a scale: hand over the prompt that starts here, and chance."""
        for span in self.request.prompts:
            if span.start == scale:
                self._read(span, self.rows(scale))
        if scale in self.noises:
            self.noises[scale].renew(self.request.seeds)

    def noise(self, scale: int) -> ScaleNoise:
        """Return a scale's random numbers, from its first one on."""
        if not self.stays:
            return ScaleNoise(self.request.seeds, scale, self.device)
        noise = self.noises.setdefault(scale, KeptNoise(self.request.seeds, scale, self.device))
        noise.rewind()
        return noise

    @torch.no_grad()
    def _read(self, span: PromptSpan, rows: int) -> None:
        texts = [span.conditional, span.unconditional][: rows // len(self.request.seeds)]
        pooled = torch.cat([text.pooled for text in texts]).to(self.device)
        if self.transformer.config.cross_attention == "paired":
            texts = texts[:1]
        hidden, mask = torch.cat([t.hidden for t in texts]), torch.cat([t.mask for t in texts])
        shown = mask if self.stays else None
        if not self.stays:
            hidden, shown = _without_padding(hidden, mask)
        shown = shown.to(self.device) if shown is not None else None
        keys = self.transformer.text_keys(hidden.to(self.device), shown)
        if self.stays and self.text_keys:
            self.pooled[: len(pooled)].copy_(pooled)
            for held, fresh in zip(self.text_keys, keys, strict=True):
                held.overwrite(fresh)
        else:
            self.pooled, self.text_keys = pooled, keys

    def scale_text(self, scale: int) -> tuple[TextKeys, ...]:
        """Return what every block reads of the text at a scale."""
        rows = self.rows(scale)
        return tuple(keys.rows(rows) for keys in self.text_keys)

    def scale_rotation(self, scale: int) -> Rotation:
        return self.rotation.rows(self.offsets[scale], self.offsets[scale + 1])

    def sampler_rotation(self, scale: int) -> Rotation:
        """Return position 0's rotation, then the scale's, for the causal sampler's extra position."""
        positions = torch.arange(self.offsets[scale], self.offsets[scale + 1], device=self.device)
        return self.rotation.select(torch.cat([positions.new_zeros(1), positions]))

    def first_input(self) -> Tensor:
        height, width = self.request.maps[0]
        start = self.transformer.start_token(self.pooled[: self.rows(0)])
        return repeat(start, "r 1 c -> r n c", n=height * width)

    def next_input(self, codes: Tensor, scale: int) -> Tensor:
        x = self.transformer.scale_input(codes, scale)
        return repeat(x, "b n c -> (twins b) n c", twins=self.rows(scale) // len(codes))

    def guided_logits(self, features: Tensor, strength: float) -> Tensor:
        """Return guided logits (B, n, V); twins' logits are computed only where guidance is on."""
        batch = len(self.request.seeds)
        if strength == 0:
            return self.transformer.logits(features[:batch])
        logits = self.transformer.logits(features)
        return guide(logits[:batch], logits[batch:], strength)


def _without_padding(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return text states (B, T, D) and mask (B, T) cut to the longest text, no mask where all are as long.

    Nothing looks at padding: the same pictures, with a fifth of the keys for a short prompt, and the attention
    kernels that take no mask.
    """
    longest = int(mask.any(dim=0).nonzero().max()) + 1
    # In one piece, strides included: of rows with gaps the CPU's products copy the weights, once per block.
    hidden = hidden[:, :longest].clone(memory_format=torch.contiguous_format)
    mask = mask[:, :longest]
    return hidden, None if bool(mask.all()) else mask


@dataclass(frozen=True)
class _Drawn:
    """A drawn scale: tokens (B, n), and codes (B, D, h, w) to add to f_hat."""

    tokens: Tensor
    codes: Tensor
    soft: bool = False


def generate(
    transformer: Transformer,
    sampler: CausalSampler | None,
    quantizer: MultiScaleQuantizer,
    request: Request,
    device: torch.device,
    replays: Replays[_Picture] | None = None,
) -> Generator[ScaleStep, None, None]:
    """Yield every scale of a batch of pictures as it is finished, given ones included.

    replays: where scales are recorded, and repeated for later pictures of the same shape. A run with given
    or kept tokens is not. Without it nothing outlives the generator.
    Raises ValueError for a schedule that this model cannot run.
    """
    maps = request.maps
    config = transformer.config
    schedule = request.schedule.fit(maps, config.codebook_size, has_sampler=sampler is not None)
    with ExitStack() as lent:
        picture = None
        if replays is not None and not request.prefix and request.kept is None:
            shape = _shape(request, (transformer, sampler, quantizer), device)
            picture = lent.enter_context(
                replays.opened(shape, lambda: _Picture(transformer, request, schedule, device, stays=True))
            )
        if picture is None:
            picture = _Picture(transformer, request, schedule, device)
            # A caller who keeps an exception keeps these frames: the cache must not stay with them.
            lent.callback(picture.forget)
        picture.request = request
        yield from _scales(picture, sampler, quantizer, schedule, replays if picture.stays else None)


def _shape(request: Request, modules: Sequence[torch.nn.Module | None], device: torch.device) -> Hashable:
    """Return what recorded work depends on besides what is copied into its memory: all but text and seeds."""
    spans = tuple((span.start, span.conditional.hidden.shape) for span in request.prompts)
    weights = tuple(
        tensor.data_ptr()
        for module in modules
        if module is not None
        for tensor in (*module.parameters(), *module.buffers())
    )
    return device, request.maps, request.schedule, len(request.seeds), spans, weights


def _scales(
    picture: _Picture,
    sampler: CausalSampler | None,
    quantizer: MultiScaleQuantizer,
    schedule: ScaleSchedule,
    replays: Replays[_Picture] | None,
) -> Generator[ScaleStep, None, None]:
    request, device, pace = picture.request, picture.device, Pace(picture.device)
    f_hat = quantizer.empty_f_hat(len(request.seeds), request.maps, device)
    scales = request.stop or len(request.maps)
    for scale in range(scales):
        pace.before_scale()
        picture.prepare(scale)

        def work(look: Look, scale: int = scale, f_hat: Tensor = f_hat) -> ScaleStep:
            features = _look(picture, quantizer, schedule, f_hat, scale)
            drawn = _draw_scale(picture, sampler, quantizer, schedule, features, scale, look)
            return _add(drawn, quantizer, f_hat, scale, request.maps)

        if scale < len(request.prefix):
            # A given last scale needs no look: nothing is drawn from it or after it.
            if scale < scales - 1:
                _look(picture, quantizer, schedule, f_hat, scale)
            step = _given(request.prefix[scale], device)
        else:
            step = work(look_at_once) if replays is None else replays.run(scale, work)
        f_hat = step.f_hat
        pace.after_scale()
        yield step if replays is None else step.copy()


@torch.no_grad()
def _look(
    picture: _Picture, quantizer: MultiScaleQuantizer, schedule: ScaleSchedule, f_hat: Tensor, scale: int
) -> Tensor:
    """Run the transformer over one scale; return the last block's output (R, n, C)."""
    picture.cache.seek(picture.cached[scale])
    if scale == 0:
        x = picture.first_input()
    else:
        codes = quantizer.next_input(f_hat, picture.request.maps[scale])
        x = picture.next_input(codes, scale)
    if share := schedule.scales[scale].prune:
        features = _look_at_part(picture, x, scale, share)
    else:
        features = picture.transformer.features(
            x, picture.scale_rotation(scale), picture.scale_text(scale), cache=picture.cache
        )
    if any(policy.prune for policy in schedule.scales[scale + 1 :]):
        picture.seen[scale] = features
    picture.seen.pop(scale - 2, None)
    return features


def _look_at_part(picture: _Picture, x: Tensor, scale: int, share: float) -> Tensor:
    """Run the transformer over the part of a scale that pruning leaves; restore the rest."""
    known = None
    if picture.request.kept is not None:
        kept = _kept_at(picture.request, scale, picture.device).known
        known = repeat(kept, "b n -> (twins b) n", twins=len(x) // len(kept))
    positions = worth_running(x, share, known)
    run = picture.transformer.features(
        take(x, positions),
        picture.scale_rotation(scale).select(positions),
        picture.scale_text(scale),
        cache=picture.cache,
    )
    # There is one before: a schedule's first scale is never pruned.
    earlier, maps = picture.seen[scale - 1][: len(x)], picture.request.maps
    return restore(run, positions, earlier, maps[scale - 1], maps[scale])


@torch.no_grad()
def _draw_scale(
    picture: _Picture,
    sampler: CausalSampler | None,
    quantizer: MultiScaleQuantizer,
    schedule: ScaleSchedule,
    features: Tensor,
    scale: int,
    look: Look = look_at_once,
) -> _Drawn:
    request = picture.request
    policy = schedule.scales[scale]
    noise = picture.noise(scale)
    logits = picture.guided_logits(features, policy.strength)
    kept = _kept_at(request, scale, picture.device)
    if policy.smooth:
        return _draw_smooth(logits, quantizer, noise, policy, kept, scale, request.maps)
    if policy.steps:
        assert sampler is not None, "fit() refuses sampler steps without a sampler"
        work = _refinement(picture, sampler, quantizer, schedule, features, logits, scale, noise)
        tokens = _settled(work, kept, _free_at(request, scale), look)
    else:
        drawn = draw(
            logits,
            noise.uniform(logits.shape[1]),
            top_k=policy.top_k,
            top_p=policy.top_p,
            temperature=policy.temperature,
        )
        tokens = torch.where(kept.known, kept.tokens, drawn.tokens)
    return _Drawn(tokens, quantizer.lookup(tokens, request.maps[scale]))


def _draw_smooth(
    logits: Tensor,
    quantizer: MultiScaleQuantizer,
    noise: ScaleNoise,
    policy: ScalePolicy,
    kept: PartialMap,
    scale: int,
    maps: Sequence[TokenMap],
) -> _Drawn:
    if policy.temperature != 1.0:
        logits = logits / policy.temperature
    weights = smooth_weights(logits, noise.gumbel(*logits.shape[1:]), scale / (len(maps) - 1))
    tokens = torch.where(kept.known, kept.tokens, weights.argmax(dim=-1))
    expected = weights @ quantizer.codebook_vectors(weights.device)
    height, width = maps[scale]
    codes = rearrange(expected, "b (h w) d -> b d h w", h=height, w=width)
    known = rearrange(kept.known, "b (h w) -> b 1 h w", h=height, w=width)
    exact = quantizer.lookup(tokens, maps[scale])
    return _Drawn(tokens, torch.where(known, exact, codes), soft=True)


def _refinement(
    picture: _Picture,
    sampler: CausalSampler,
    quantizer: MultiScaleQuantizer,
    schedule: ScaleSchedule,
    features: Tensor,
    logits: Tensor,
    scale: int,
    noise: ScaleNoise,
) -> Refinement:
    """Return the causal sampler's work on one scale."""
    rotation = picture.sampler_rotation(scale)
    token_map = picture.request.maps[scale]
    strength = schedule.sampler_strength(scale)
    rows = features.shape[0] if strength else len(picture.request.seeds)
    seen, pooled = features[:rows], picture.pooled[:rows]

    def guided_by_known(tokens: Tensor, known: Tensor) -> Tensor:
        vectors = rearrange(quantizer.lookup(tokens, token_map), "b d h w -> b (h w) d")
        codes = vectors * known.unsqueeze(-1)
        return sampler_logits(sampler, codes, seen, pooled, scale, rotation, strength)

    return Refinement(logits, guided_by_known, schedule.scales[scale], schedule.strategy, noise)


def _settled(work: Refinement, kept: PartialMap, free: Sequence[int], look: Look) -> Tensor:
    """Return the tokens (B, n) that the causal sampler's steps settle on.

    In one tensor all along: recorded work that ends early goes on from there.
    """
    tokens = kept.tokens.clone()
    for filled in refine(work, kept, free, look):
        tokens.copy_(filled.tokens)
    if work.strategy == "official":
        look(None)
    return tokens


def _free_at(request: Request, scale: int) -> list[int]:
    """Return how many tokens of each picture are to be drawn at a scale, counted where the masks lie."""
    height, width = request.maps[scale]
    if request.kept is None:
        return [height * width] * len(request.seeds)
    counts: list[int] = (~request.kept.masks[scale].bool()).sum(dim=1).tolist()
    return counts


def _kept_at(request: Request, scale: int, device: torch.device) -> PartialMap:
    """Return the tokens to keep at a scale; nothing is known where the request keeps none."""
    height, width = request.maps[scale]
    shape = (len(request.seeds), height * width)
    if request.kept is None:
        tokens = torch.zeros(shape, dtype=torch.long, device=device)
        return PartialMap(tokens, torch.zeros(shape, dtype=torch.bool, device=device))
    return PartialMap(request.kept.tokens[scale].to(device), request.kept.masks[scale].to(device).bool())


@torch.no_grad()
def _add(
    drawn: _Drawn,
    quantizer: MultiScaleQuantizer,
    f_hat: Tensor,
    scale: int,
    maps: Sequence[TokenMap],
) -> ScaleStep:
    added = quantizer.contribution(drawn.codes, scale, maps)
    return ScaleStep(scale, maps[scale], drawn.tokens, f_hat + added, soft=drawn.soft)


def _given(step: ScaleStep, device: torch.device) -> ScaleStep:
    return dataclasses.replace(step.to(device), given=True)
