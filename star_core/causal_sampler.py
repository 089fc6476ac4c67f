"""Causal-driven stable sampling: a small head that draws a large map's tokens in several steps (paper 4.3).

The transformer draws all tokens of a scale at once, independently of each other. The causal sampler sees the
tokens fixed so far and draws the rest given them; every step redraws all positions and keeps those it fixes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from .config import TransformerConfig
from .rope import Rotation
from .sampling import Draw, ScaleNoise, draw, guide
from .schedule import ScalePolicy, Strategy
from .transfer import upload
from .transformer import SelfBlock, TextBlock, Transformer, norm


class CausalSampler(nn.Module):
    """The head: known tokens and transformer features in, logits out, one scale at a time."""

    def __init__(self, config: TransformerConfig, *, operations: ModuleType = nn) -> None:
        super().__init__()
        width = config.width
        self.start_position = nn.Parameter(torch.zeros(1, 1, width))
        self.text_proj = operations.Linear(config.text_width, width)
        self.known_embed = operations.Linear(config.code_width, width)
        self.scale_embed = operations.Embedding(config.scales, width)
        self.fuse = operations.Linear(2 * width, width)
        self.blocks = nn.ModuleList(
            SelfBlock(width, config.heads, operations=operations) for _ in range(config.sampler_depth)
        )
        self.head = operations.Linear(width, config.codebook_size)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations: that of the weights, but for matrices kept as halves (`upcast`)."""
        return self.start_position.dtype

    def forward(
        self,
        known_codes: Tensor,
        features: Tensor,
        pooled: Tensor,
        scale: int,
        rotation: Rotation,
    ) -> Tensor:
        """Return logits (R, n, V) in float32 for every position of a scale.

        known_codes (R, n, D): codebook vectors of known tokens, zero vectors at masked ones.
        features (R, n, C): the transformer's last block's output. pooled (R, D_text): each row's own
        text. rotation (1 + n, head_width / 2): position 0's, then the scale's.
        """
        text: Tensor = self.text_proj(pooled.to(self.dtype))
        start = text.unsqueeze(1) + self.start_position.to(text)
        known: Tensor = self.known_embed(known_codes.to(self.dtype))
        level = torch.full((1, 1), scale, device=known.device)
        known = known + self.scale_embed(level).to(known)
        pairs = torch.cat(
            [torch.cat([start, known], dim=1), torch.cat([start, features.to(known)], dim=1)],
            dim=-1,
        )
        x = self.fuse(pairs)
        for block in self.blocks:
            x = block(x, rotation)
        normalised = norm(x[:, 1:].float())
        scores: Tensor = self.head(normalised.to(self.dtype))
        return scores.float()

    def initialise(self, generator: torch.Generator) -> None:
        """Draw fresh weights as `Transformer.initialise` does."""
        deviation = math.sqrt(1 / self.start_position.shape[-1] / 3)
        for name, parameter in self.named_parameters():
            if name.endswith(("weight", "start_position")):
                nn.init.trunc_normal_(parameter, std=deviation, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            self.head.weight.mul_(0.02)

    @torch.no_grad()
    def begin_as(self, transformer: Transformer, feature_deviation: float, code_deviation: float) -> None:
        """Let an initialised sampler say of unknown tokens what the transformer says, up to the norm's epsilon.

        Its attention looks where that of the transformer's last blocks looks, and adds nothing yet. The
        deviations are those of the transformer's features and of codebook vectors: both come in at about 1, so
        that known tokens are there to be seen from the start.
        """
        self.head.load_state_dict(transformer.head.state_dict())
        embedded, width = self.known_embed.weight, self.fuse.out_features
        known, features = self.fuse.weight[:, :width], self.fuse.weight[:, width:]
        embedded.div_(embedded.std() * code_deviation * math.sqrt(embedded.shape[1]))
        known.div_(known.std() * math.sqrt(width))
        features.copy_(torch.eye(width) / feature_deviation)
        self.scale_embed.weight.zero_()  # where a token is unknown, nothing but the features comes in
        for block, seen in zip(reversed(self.blocks), reversed(transformer.blocks), strict=False):
            assert isinstance(block, SelfBlock), "every block of the sampler is without text"
            assert isinstance(seen, TextBlock), "every block of the transformer reads text"
            block.attn.load_state_dict(seen.attn.state_dict())
        for block in self.blocks:
            assert isinstance(block, SelfBlock), "every block of the sampler is without text"
            for last in (block.attn.proj, block.ffn.contract):
                last.weight.zero_()
                last.bias.zero_()


def unmask_counts(steps: int, tokens: int) -> list[int]:
    """Return how many of `tokens` positions each step fixes: the arccos schedule of the released code.

    With more steps than tokens the official formula goes wrong (it ends in counts below 1; its models
    never refine maps that small): then one token per step. Counts below 1 are lifted likewise.
    """
    return list(_unmask_counts(min(steps, tokens), tokens))


@functools.cache
def _unmask_counts(steps: int, tokens: int) -> tuple[int, ...]:
    if steps < 2:
        return (tokens,) * steps
    shares = torch.arccos(torch.linspace(1, 0, steps)) / (math.pi * 0.5)
    counts = [int(c) for c in (shares / shares.sum() * tokens).round().int().clamp_min(1)]
    counts[-1] += tokens - sum(counts)
    while counts[-1] < 1:
        counts[counts.index(max(counts))] -= 1
        counts[-1] += 1
    return tuple(counts)


@dataclass(frozen=True)
class Refinement:
    """One scale's work for the causal sampler, all fixed while its steps run.

    transformer_logits (B, n, V) are guided already, None where no step draws from them. `logits` maps tokens
    (B, n) and known (B, n) to the sampler's guided logits (B, n, V).
    """

    transformer_logits: Tensor | None
    logits: Callable[[Tensor, Tensor], Tensor]
    policy: ScalePolicy
    strategy: Strategy
    noise: ScaleNoise


@dataclass(frozen=True)
class PartialMap:
    """A token map being filled: tokens (B, n) int64, meaningful where known (B, n) is True."""

    tokens: Tensor
    known: Tensor

    def fix(self, drawn: Tensor, chosen: Tensor) -> PartialMap:
        """Take over drawn tokens (B, n) where `chosen` (B, n); known tokens never change."""
        fresh = chosen & ~self.known
        return PartialMap(torch.where(fresh, drawn, self.tokens), self.known | fresh)


def refine(
    work: Refinement,
    start: PartialMap,
    free: Sequence[int] | None = None,
    look: Callable[[Tensor], bool] = bool,
) -> Iterator[PartialMap]:
    """Yield the map after each step, until every token is known.

    free: how many tokens of each row are not known yet, where the caller has counted them already. Then only
    the official strategy asks the device on the way, through `look`, whether it is done before its last step;
    it alone may be.
    """
    if free is None:
        free = (~start.known).sum(dim=1).tolist()
    plans = [unmask_counts(work.policy.steps, n) if n else [] for n in free]
    filling = start
    for step in range(max(map(len, plans))):
        if _may_be_full(work, plans, step) and look(filling.known.all()):
            return
        wanted = [plan[step] if step < len(plan) else 0 for plan in plans]
        filling = _refine_step(work, filling, step, _on_device(wanted, start.tokens.device))
        yield filling


def _may_be_full(work: Refinement, plans: Sequence[Sequence[int]], step: int) -> bool:
    """Whether every row's steps before this one can have fixed all that its plan fixes in the end."""
    if work.strategy != "official":
        return False
    twice = min(step, work.policy.transformer_steps)
    return all(sum(plan[:step]) + sum(plan[:twice]) >= sum(plan) for plan in plans)


def _on_device(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return counts (B,); without a transfer where all are equal, as they are unless some tokens are kept."""
    if len(set(counts)) == 1:
        return torch.full((len(counts),), counts[0], device=device)
    return upload(torch.tensor(counts), device)


def _refine_step(work: Refinement, filling: PartialMap, step: int, counts: Tensor) -> PartialMap:
    policy = work.policy
    by_transformer = step < policy.transformer_steps and work.strategy != "masked"
    if by_transformer:
        assert work.transformer_logits is not None, "schedule.asks_transformer says that a step draws from them"
        logits = work.transformer_logits
    else:
        logits = work.logits(filling.tokens, filling.known)
    positions = filling.tokens.shape[1]
    drawn = draw(
        logits,
        work.noise.uniform(positions),
        top_k=policy.top_k,
        top_p=policy.top_p,
        temperature=policy.temperature,
    )
    if by_transformer and work.strategy == "official":
        # The released loop first fixes the most confident of all positions, known ones counted in,
        # and then goes on to fix as many again: kept as it is because released schedules rely on it.
        filling = filling.fix(drawn.tokens, _highest(drawn.confidence, counts))
    order = _fixing_order(work, drawn, step, positions)
    return filling.fix(drawn.tokens, _highest(order.masked_fill(filling.known, -1.0), counts))


def _fixing_order(work: Refinement, drawn: Draw, step: int, positions: int) -> Tensor:
    """Return what decides who is fixed next, (B, n) in [0, 1]: chance first, then confidence."""
    if step < work.policy.random_steps:
        return work.noise.uniform(positions)
    return drawn.confidence


def _highest(scores: Tensor, counts: Tensor) -> Tensor:
    """Return a mask (B, n) of each row's counts (B,) highest scores (B, n)."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(order.shape[1], device=order.device) < rearrange(counts, "b -> b 1")
    return torch.zeros_like(first).scatter(1, order, first)


def sampler_logits(
    sampler: CausalSampler,
    codes: Tensor,
    features: Tensor,
    pooled: Tensor,
    scale: int,
    rotation: Rotation,
    guidance: float,
) -> Tensor:
    """Return the sampler's guided logits (B, n, V).

    codes (B, n, D) are zero at masked positions; features (R, n, C) and pooled (R, D_text) hold the
    unconditional twins behind the B conditional rows where R = 2 B, and no guidance is applied where R = B.
    Guidance is constant here, not a ramp, as in the released code.
    """
    batch = codes.shape[0]
    rows = repeat(codes, "b n d -> (twins b) n d", twins=features.shape[0] // batch)
    logits = sampler(rows, features, pooled, scale, rotation)
    if features.shape[0] == batch:
        return logits  # type: ignore[no-any-return]  # Module call: Any
    return guide(logits[:batch], logits[batch:], guidance)
