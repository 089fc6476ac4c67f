"""What one batch of pictures is asked for (`Request`, made from a caller's `Options`), and what is given back
scale by scale.

Shapes: B pictures, maps of h * w tokens; f_hat is (B, D, H, W), the sum of all token maps so far (paper 3.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TokenMap
from .sampling import PictureSeed
from .schedule import ScaleSchedule
from .text_encoder import TextStates

WHOLE_NUMBERS = {torch.int64, torch.int32}
"""What tokens may be stored as."""


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


def joined(batches: Sequence[Sequence[ScaleStep]]) -> tuple[ScaleStep, ...]:
    """Return the scales of several batches as those of one, pictures in their order."""
    return tuple(
        dataclasses.replace(
            same_scale[0],
            tokens=torch.cat([step.tokens for step in same_scale]),
            f_hat=torch.cat([step.f_hat for step in same_scale]),
        )
        for same_scale in zip(*batches, strict=True)
    )


@dataclass(frozen=True)
class KeptTokens:
    """Tokens to keep at every scale: tokens and masks, each (B, h * w) per scale, True where kept.

    Tokens that are not kept may be any numbers: nothing depends on them.
    """

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
            if step.f_hat.shape[0] != batch or tuple(step.f_hat.shape[2:]) != self.maps[-1]:
                raise ValueError(
                    f"given scale {scale + 1} is of a picture of another size: f_hat {tuple(step.f_hat.shape)},"
                    f" wanted {batch} of {self.maps[-1]}"
                )
        if self.kept is not None:
            for name, tensors in (("tokens", self.kept.tokens), ("masks", self.kept.masks)):
                got = [tuple(t.shape) for t in tensors]
                if got != shapes:
                    raise ValueError(f"kept {name} have shapes {got}, wanted {shapes}")
            if kinds := {tokens.dtype for tokens in self.kept.tokens} - WHOLE_NUMBERS:
                raise ValueError(f"kept tokens are whole numbers, these are {', '.join(map(str, kinds))}")


@dataclass(frozen=True)
class Options:
    """How pictures are drawn. None takes the checkpoint's own choice.

    schedule: a ScaleSchedule, a preset's name or a schedule text. size: (height, width) in pixels.
    count: pictures per prompt, with indices 0.. . indices: instead, one picture per prompt with this index.
    prefix, stop, kept: see `Request`.
    In float32 a picture depends on its prompt, seed and index alone. In other formats, and with 8-bit weights,
    its last bits, and so a token now and then, depend on how many others are drawn with it.
    """

    seed: int = 0
    count: int = 1
    indices: tuple[int, ...] | None = None
    schedule: ScaleSchedule | str | None = None
    size: tuple[int, int] | None = None
    prefix: tuple[ScaleStep, ...] = ()
    stop: int | None = None
    kept: KeptTokens | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if self.indices is not None and self.count != 1:
            raise ValueError("indices name one picture per prompt: leave count at 1")

    def seeds(self, prompts: int) -> tuple[PictureSeed, ...]:
        """Return whose randomness each row of a batch of prompts uses."""
        if self.indices is None:
            per_prompt = range(self.count)
            return tuple(PictureSeed(self.seed, i) for _ in range(prompts) for i in per_prompt)
        if len(self.indices) != prompts:
            raise ValueError(f"{len(self.indices)} indices for {prompts} prompts")
        return tuple(PictureSeed(self.seed, index) for index in self.indices)
