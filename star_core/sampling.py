"""Pure functions from logits to tokens: guidance, top-k, top-p, drawing, smooth drawing.

Randomness comes in as numbers. Each picture has its own stream, so that it never depends on its neighbours
in a batch, and each scale its own, so that resuming at a scale draws what the whole run would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import fused
from .transfer import upload

MAX_SEED = 2**64 - 1
FEW = 512
"""Logits looked at before a row is sorted whole: 1 / 8 of the released codebook, at 1 / 4 of a sort's time."""
ROUNDING = 2e-6
"""Sums of a row's probabilities from its best and from its least likely tokens on differ by less than this: of
rows whose border lies nearer to 1 - p the whole sort decides."""


@dataclass(frozen=True)
class PictureSeed:
    """Whose randomness a batch row uses: picture `index` of a prompt under `seed`."""

    seed: int
    index: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"a seed lies between 0 and {MAX_SEED}, got {self.seed}")
        if self.index < 0:
            raise ValueError(f"a picture's index cannot be negative, got {self.index}")

    def generator(self, scale: int) -> torch.Generator:
        """Return the random stream of one scale, on the CPU so that devices agree."""
        name = f"star/{self.seed}/{self.index}/{scale}".encode()
        number = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
        return torch.Generator().manual_seed(number)


class ScaleNoise:
    """The random numbers of one scale of a batch: a stream per row, drawn on the CPU, then moved."""

    def __init__(self, seeds: Sequence[PictureSeed], scale: int, device: torch.device) -> None:
        self._generators = [seed.generator(scale) for seed in seeds]
        self._device = device

    def uniform(self, *shape: int) -> Tensor:
        """Return uniform numbers in [0, 1), (B, *shape)."""
        rows = [torch.rand(shape, generator=g) for g in self._generators]
        return upload(torch.stack(rows), self._device)

    def gumbel(self, *shape: int) -> Tensor:
        """Return standard Gumbel numbers (B, *shape)."""
        rows = [-torch.empty(shape).exponential_(generator=g).log() for g in self._generators]
        return upload(torch.stack(rows), self._device)


class KeptNoise(ScaleNoise):
    """Random numbers that lie in the same memory for every picture, for work that is recorded.

    The calls of the first run say what is needed; later ones get the same tensors again.
    """

    def __init__(self, seeds: Sequence[PictureSeed], scale: int, device: torch.device) -> None:
        super().__init__(seeds, scale, device)
        self._scale = scale
        self._made: list[tuple[Callable[..., Tensor], tuple[int, ...], Tensor]] = []
        self._next = 0

    def rewind(self) -> None:
        """Begin again with the first numbers."""
        self._next = 0

    def renew(self, seeds: Sequence[PictureSeed]) -> None:
        """Put the numbers of other pictures where the last ones' are."""
        fresh = ScaleNoise(seeds, self._scale, self._device)
        for draw, shape, held in self._made:
            held.copy_(draw(fresh, *shape))

    def uniform(self, *shape: int) -> Tensor:
        return self._kept(ScaleNoise.uniform, shape)

    def gumbel(self, *shape: int) -> Tensor:
        return self._kept(ScaleNoise.gumbel, shape)

    def _kept(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        if self._next == len(self._made):
            self._made.append((draw, shape, draw(self, *shape)))
        made, wanted, held = self._made[self._next]
        assert (made, wanted) == (draw, shape), "a scale asks for the same numbers each time"
        self._next += 1
        return held


@fused("sampling.guide")
def guide(conditional: Tensor, unconditional: Tensor, strength: float) -> Tensor:
    """Return (1 + t) conditional - t unconditional (classifier-free guidance), any shape."""
    return (1 + strength) * conditional - strength * unconditional


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return logits (..., V) with all below the k-th largest at -inf; ties with it stay.

    k of 0 means off; k beyond V keeps all (the official code raises there).
    """
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (..., V) with the least likely ones, of cumulative probability <= 1 - p, at -inf.

    The best one always stays. Of equal logits, of which half precision is full, the first ones go first, on
    every device; the official code's sort takes any. p of 0 means off.
    """
    if p <= 0:
        return logits
    order = logits.argsort(dim=-1, stable=True)
    # Not of the sorted row, whose sum is rounded otherwise (1e-6 of it for 4,096 logits, 1e-5 for 16,384): the
    # short way below has these very numbers.
    removed = logits.softmax(dim=-1).gather(-1, order).cumsum(dim=-1) <= 1 - p
    removed[..., -1] = False
    return logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)


def _keep_top_p_by_few(logits: Tensor, p: float) -> Tensor:
    """Return what `keep_top_p` does for rows (N, V), sorting whole rows only where few logits do not suffice.

    Most positions reach p within their best tokens. Which row needs more is known on the host: for the CPU.
    """
    best, order = logits.topk(min(FEW, logits.shape[-1]), dim=-1)
    shares = logits.softmax(dim=-1)
    better = shares.gather(-1, order).cumsum(dim=-1)
    # A token goes where it and all less likely ones come to 1 - p at most.
    left = shares.sum(dim=-1, keepdim=True) - F.pad(better[:, :-1], (1, 0))
    stays = left > 1 - p
    stays[:, 0] = True
    count = stays.sum(dim=-1, keepdim=True)
    border = torch.cat([count - 1, count.clamp(max=best.shape[-1] - 1)], dim=-1)
    least, next_best = best.gather(-1, border).unbind(dim=-1)
    if len(split := (least == next_best).nonzero().squeeze(-1)):
        tied = best[split] == least[split].unsqueeze(-1)
        stays[split] = _last_of_ties(stays[split], tied, order[split])
    kept = shares.fill_(-torch.inf).scatter_(-1, order, best.masked_fill(~stays, -torch.inf))
    close = ((left.gather(-1, border) - (1 - p)).abs() < ROUNDING).any(dim=-1)
    if len(whole := (close | (least == best[:, -1])).nonzero().squeeze(-1)):
        kept[whole] = keep_top_p(logits[whole], p)
    return kept


def _last_of_ties(stays: Tensor, tied: Tensor, tokens: Tensor) -> Tensor:
    """Return `stays` (N, K) with as many of the `tied` (N, K) as before, those of the highest tokens (N, K)."""
    count = (stays & tied).sum(dim=-1, keepdim=True)
    falling = tokens.masked_fill(~tied, -1).sort(dim=-1, descending=True).values
    return torch.where(tied, tokens >= falling.gather(-1, count - 1), stays)


def keep_likely(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Return logits (B, n, V) with what `keep_top_k`, then `keep_top_p` leave out at -inf."""
    return _filtered(keep_top_k(logits, top_k), top_p)


@dataclass(frozen=True)
class Draw:
    """Tokens (B, n) and their confidence (B, n): the probability after both filters."""

    tokens: Tensor
    confidence: Tensor


@fused("sampling.draw")
def draw(logits: Tensor, uniform: Tensor, *, top_k: int, top_p: float, temperature: float = 1.0) -> Draw:
    """Draw a token per position from logits (B, n, V) by inverting the cumulative distribution.

    `uniform` (B, n) decides; one number per position, so that no noise of size V is ever made.
    """
    if temperature != 1.0:
        logits = logits / temperature
    probabilities = keep_likely(logits, top_k=top_k, top_p=top_p).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    target = uniform.unsqueeze(-1) * cumulative[..., -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # Rounding may put the target on the total itself, past every token: take the likeliest then.
    likely = probabilities.argmax(dim=-1)
    tokens = torch.where(tokens < logits.shape[-1], tokens, likely)
    confidence = probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return Draw(tokens, confidence)


def _filtered(logits: Tensor, top_p: float) -> Tensor:
    """Return `keep_top_p` of logits (B, n, V), in the way that suits the device."""
    if not 0 < top_p < 1 or logits.device.type != "cpu":
        return keep_top_p(logits, top_p)
    return _keep_top_p_by_few(logits.flatten(0, -2), top_p).view_as(logits)


def smooth_weights(logits: Tensor, gumbel: Tensor, ratio: float) -> Tensor:
    """Return soft weights (B, n, V) over the codebook: VAR's "more smooth" Gumbel-softmax.

    `ratio` is s / (S - 1). The logits are sharpened by 1 + ratio and the temperature falls from 0.27
    to 0.0135. Top-k and top-p do not apply here, as in the released code (in VAR they do).
    """
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    return ((logits * (1 + ratio) + gumbel) / temperature).softmax(dim=-1)
