"""The loop over scales: the paper's sections 3 and 4 read aloud.

For each scale, coarse to fine: the transformer looks at the picture so far, a token map is drawn from its
logits (all at once, softly, or step by step through the causal sampler), and the quantizer adds the map's
codebook vectors to f_hat. One `ScaleStep` is yielded per scale; whoever stops iterating stops the work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from .canvas import Canvas
from .causal_sampler import CausalSampler, PartialMap, Refinement, refine, sampler_logits
from .config import TokenMap
from .graphs import Look, Pace, Replays, look_at_once
from .pruning import restore, take, worth_running
from .quantizer import MultiScaleQuantizer
from .request import Request, ScaleStep
from .sampling import ScaleNoise, draw, smooth_weights
from .schedule import ScalePolicy, ScaleSchedule
from .transfer import upload
from .transformer import Transformer


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
    replays: Replays[Canvas] | None = None,
) -> Generator[ScaleStep, None, None]:
    """Yield every scale of a batch of pictures as it is finished, given ones included.

    replays: where scales are recorded, and repeated for later pictures of the same shape. A run with given
    or kept tokens is not. Without it nothing outlives the generator.
    Raises ValueError for a schedule that this model cannot run, and for kept tokens that it does not have.
    """
    maps = request.maps
    config = transformer.config
    schedule = request.schedule.fit(maps, config.codebook_size, has_sampler=sampler is not None)
    _check_kept(request, config.codebook_size)
    with ExitStack() as lent:
        canvas = None
        if replays is not None and not request.prefix and request.kept is None:
            shape = _shape(request, (transformer, sampler, quantizer), device)
            canvas = lent.enter_context(
                replays.opened(
                    shape, device, lambda: Canvas(transformer, request, schedule, device, stays=True)
                )
            )
        if canvas is None:
            canvas = Canvas(transformer, request, schedule, device)
            # A caller who keeps an exception keeps these frames: the cache must not stay with them.
            lent.callback(canvas.forget)
        canvas.request = request
        yield from _scales(canvas, sampler, quantizer, schedule, replays if canvas.stays else None)


def _check_kept(request: Request, codebook_size: int) -> None:
    """Raise ValueError for kept tokens of another codebook: on a GPU they would end the process."""
    if request.kept is None:
        return
    for scale, (tokens, mask) in enumerate(zip(request.kept.tokens, request.kept.masks, strict=True)):
        kept = tokens[mask.to(tokens.device, torch.bool)]
        if not len(kept):
            continue
        least, most = (int(value) for value in kept.aminmax())
        if least < 0 or most >= codebook_size:
            raise ValueError(
                f"kept tokens of scale {scale + 1} are {least} to {most}, this model's codebook has"
                f" {codebook_size}: take them from a picture that its own VQ-VAE has encoded"
            )


def _shape(request: Request, modules: Sequence[torch.nn.Module | None], device: torch.device) -> Hashable:
    """Return what recorded work depends on besides what is copied into its memory: all but text and seeds."""
    spans = tuple((span.start, span.conditional.hidden.shape) for span in request.prompts)
    weights = tuple(
        tensor.data_ptr()
        for module in modules
        if module is not None
        for tensor in (*module.parameters(), *module.buffers())
    )
    # Tensors made in inference mode cannot be written to outside it.
    mode = torch.is_inference_mode_enabled()
    return device, mode, request.maps, request.schedule, len(request.seeds), spans, weights


def _scales(
    canvas: Canvas,
    sampler: CausalSampler | None,
    quantizer: MultiScaleQuantizer,
    schedule: ScaleSchedule,
    replays: Replays[Canvas] | None,
) -> Generator[ScaleStep, None, None]:
    """Yield the scales of a canvas whose request is set."""
    request, device, pace = canvas.request, canvas.device, Pace(canvas.device)
    f_hat = quantizer.empty_f_hat(len(request.seeds), request.maps, device)
    scales = request.stop or len(request.maps)
    for scale in range(scales):
        pace.before_scale()
        canvas.prepare(scale)

        def work(look: Look, scale: int = scale, f_hat: Tensor = f_hat) -> ScaleStep:
            features = _look(canvas, quantizer, schedule, f_hat, scale)
            if replays is None:
                _check_finite(features, scale)
            drawn = _draw_scale(canvas, sampler, quantizer, schedule, features, scale, look)
            return _add(drawn, quantizer, f_hat, scale, request.maps)

        if scale < len(request.prefix):
            # A given last scale needs no look: nothing is drawn from it or after it.
            if scale < scales - 1:
                _look(canvas, quantizer, schedule, f_hat, scale)
            step = _given(request.prefix[scale], device)
        else:
            step = work(look_at_once) if replays is None else replays.run(scale, work)
        f_hat = step.f_hat
        pace.after_scale()
        yield step if replays is None else step.copy()


@torch.no_grad()
def _look(
    canvas: Canvas, quantizer: MultiScaleQuantizer, schedule: ScaleSchedule, f_hat: Tensor, scale: int
) -> Tensor:
    """Run the transformer over one scale; return the last block's output (R, n, C)."""
    canvas.read(scale)
    canvas.cache.seek(canvas.cached[scale])
    if scale == 0:
        x = canvas.first_input()
    else:
        codes = quantizer.next_input(f_hat, canvas.request.maps[scale])
        x = canvas.next_input(codes, scale)
    if share := schedule.scales[scale].prune:
        features = _look_at_part(canvas, x, scale, share)
    else:
        features = canvas.transformer.features(
            x, canvas.scale_rotation(scale), canvas.scale_text(scale), cache=canvas.cache
        )
    if any(policy.prune for policy in schedule.scales[scale + 1 :]):
        canvas.seen[scale] = features
    canvas.seen.pop(scale - 2, None)
    return features


def _check_finite(features: Tensor, scale: int) -> None:
    """Raise ValueError where a CPU has computed no numbers: all tokens would be 0, and nobody told.

    Not on a GPU, which would have to wait for it.
    """
    if features.device.type == "cpu" and not features.sum(dtype=torch.float32).isfinite():
        kind = str(features.dtype).removeprefix("torch.")
        raise ValueError(
            f"the transformer's numbers are not finite at scale {scale + 1}, in {kind}: choose bfloat16 or"
            " float32; if it is one of them, the checkpoint is damaged"
        )


def _look_at_part(canvas: Canvas, x: Tensor, scale: int, share: float) -> Tensor:
    """Run the transformer over the part of a scale that pruning leaves; restore the rest."""
    known = None
    if canvas.request.kept is not None:
        kept = _kept_at(canvas.request, scale, canvas.device).known
        known = repeat(kept, "b n -> (twins b) n", twins=len(x) // len(kept))
    positions = worth_running(x, share, known)
    run = canvas.transformer.features(
        take(x, positions),
        canvas.scale_rotation(scale).select(positions),
        canvas.scale_text(scale),
        cache=canvas.cache,
    )
    # There is one before: a schedule's first scale is never pruned.
    earlier, maps = canvas.seen[scale - 1][: len(x)], canvas.request.maps
    return restore(run, positions, earlier, maps[scale - 1], maps[scale])


@torch.no_grad()
def _draw_scale(
    canvas: Canvas,
    sampler: CausalSampler | None,
    quantizer: MultiScaleQuantizer,
    schedule: ScaleSchedule,
    features: Tensor,
    scale: int,
    look: Look = look_at_once,
) -> _Drawn:
    request = canvas.request
    policy = schedule.scales[scale]
    noise = canvas.noise(scale)
    kept = _kept_at(request, scale, canvas.device)
    if policy.steps:
        assert sampler is not None, "fit() refuses sampler steps without a sampler"
        work = _refinement(canvas, sampler, quantizer, schedule, features, scale, noise)
        tokens = _settled(work, kept, _free_at(request, scale), look)
    else:
        logits = canvas.guided_logits(features, policy.strength)
        if policy.smooth:
            return _draw_smooth(logits, quantizer, noise, policy, kept, scale, request.maps)
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
    canvas: Canvas,
    sampler: CausalSampler,
    quantizer: MultiScaleQuantizer,
    schedule: ScaleSchedule,
    features: Tensor,
    scale: int,
    noise: ScaleNoise,
) -> Refinement:
    """Return the causal sampler's work on one scale."""
    policy = schedule.scales[scale]
    # At 64x64 tokens they take 134 MB: not where no step draws from them.
    logits = canvas.guided_logits(features, policy.strength) if schedule.asks_transformer(scale) else None
    rotation = canvas.sampler_rotation(scale)
    token_map = canvas.request.maps[scale]
    strength = schedule.sampler_strength(scale)
    rows = features.shape[0] if strength else len(canvas.request.seeds)
    seen, pooled = features[:rows], canvas.pooled[:rows]

    def guided_by_known(tokens: Tensor, known: Tensor) -> Tensor:
        vectors = rearrange(quantizer.lookup(tokens, token_map), "b d h w -> b (h w) d")
        codes = vectors * known.unsqueeze(-1)
        return sampler_logits(sampler, codes, seen, pooled, scale, rotation, strength)

    return Refinement(logits, guided_by_known, policy, schedule.strategy, noise)


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
    tokens, mask = (upload(kept[scale], device) for kept in (request.kept.tokens, request.kept.masks))
    known = mask.bool()
    # What is not kept may be anything, and is looked up by the causal sampler before it is left out.
    return PartialMap(tokens.long().masked_fill(~known, 0), known)


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
    f_hat, tokens = upload(step.f_hat, device), upload(step.tokens, device)
    return dataclasses.replace(step, f_hat=f_hat, tokens=tokens, given=True)
