"""What travels between the nodes: socket types and the records on them.

A record that carries a network has it in `patcher`: ComfyUI decides where its weights are, and looks for
this name to count and to free them. Records never change, but for the last runs that a model remembers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from comfy_api.v0_0_2 import io

if TYPE_CHECKING:
    from ..star_core.config import StarConfig, TokenMap, VQVAEConfig
    from ..star_core.prompts import Timeline
    from ..star_core.request import Request, ScaleStep
    from ..star_core.text_encoder import TextStates

CATEGORY = "STAR"

Model = io.Custom("STAR_MODEL")
TextEncoder = io.Custom("STAR_TEXT_ENCODER")
VQVAE = io.Custom("STAR_VQVAE")
Schedule = io.Custom("STAR_SCHEDULE")
Sampler = io.Custom("STAR_SAMPLER")
Tokens = io.Custom("STAR_TOKENS")


@dataclass(frozen=True)
class TextEncoderHandle:
    """STAR_TEXT_ENCODER: the CLIP text model with its tokenizer."""

    patcher: Any


@dataclass(frozen=True)
class VQVAEHandle:
    """STAR_VQVAE."""

    config: VQVAEConfig
    patcher: Any


@dataclass
class LastRun:
    """The request that a node drew last and its finished scales, on the CPU."""

    request: Request | None = None
    steps: tuple[ScaleStep, ...] = ()

    @property
    def size(self) -> int:
        """How many bytes its scales take."""
        return sum(step.tokens.nbytes + step.f_hat.nbytes for step in self.steps)


NODES_REMEMBERED = 16
BYTES_REMEMBERED = 512 * 2**20
"""Of all nodes together: a picture of 1024 px takes 7 MB, so that some seventy pictures are remembered."""


@dataclass
class LastRuns:
    """What each Scale-wise Sample drew last, of so many nodes: the one that drew longest ago goes first."""

    by_node: dict[str | None, LastRun] = field(default_factory=dict)

    def of(self, node_id: str | None) -> LastRun:
        """Return a node's last run, an empty one where there is none yet."""
        last = self.by_node.pop(node_id, None) or LastRun()
        self.by_node[node_id] = last
        if len(self.by_node) > NODES_REMEMBERED:
            del self.by_node[next(iter(self.by_node))]
        return last

    def make_room(self) -> None:
        """Forget the runs of longest ago, as many as it takes; the latest one is kept whatever its size."""
        while len(self.by_node) > 1 and sum(run.size for run in self.by_node.values()) > BYTES_REMEMBERED:
            del self.by_node[next(iter(self.by_node))]


@dataclass(frozen=True)
class ModelHandle:
    """STAR_MODEL: transformer and causal sampler, with the VQ-VAE whose codebook they read."""

    config: StarConfig
    patcher: Any
    vqvae: VQVAEHandle
    runs: LastRuns = field(default_factory=LastRuns)

    @property
    def has_sampler(self) -> bool:
        return self.config.transformer.has_sampler


@dataclass(frozen=True)
class ScheduleText:
    """STAR_SCHEDULE: a checked text; which model it is for shows where it is used."""

    text: str


@dataclass(frozen=True)
class TokensRecord:
    """STAR_TOKENS: every scale of a batch of pictures, on the CPU."""

    maps: tuple[TokenMap, ...]
    steps: tuple[ScaleStep, ...]
    vqvae: VQVAEConfig

    @property
    def batch(self) -> int:
        return len(self.steps[0].tokens)


@dataclass(frozen=True)
class Prompt:
    """What a CONDITIONING of CLIP Encode (STAR) carries under PROMPT_KEY.

    timeline: which text holds from which scale on. empty: the same encoder's states of the empty prompt,
    which guidance leads away from where no negative prompt is connected.
    """

    timeline: Timeline
    empty: TextStates


PROMPT_KEY = "star_prompt"
POOLED_KEY = "pooled_output"


def conditioning(prompt: Prompt) -> list[list[Any]]:
    """Return a prompt as CONDITIONING: core's shape, with ours beside it."""
    first = prompt.timeline[0][1]
    return [[first.hidden, {POOLED_KEY: first.pooled, PROMPT_KEY: prompt}]]


def prompt_of(conditioning: list[list[Any]], name: str) -> Prompt:
    """Return the prompt of a CONDITIONING. Raises ValueError for one that STAR cannot draw from."""
    wanted = 'connect the output of "CLIP Encode (STAR)"'
    if len(conditioning) != 1:
        raise ValueError(
            f"{name} holds {len(conditioning)} prompts (Conditioning (Combine) or the like), STAR draws from"
            f' one: {wanted}, or change prompts on the way with "Prompt from Scale"'
        )
    hidden, extra = conditioning[0]
    prompt = extra.get(PROMPT_KEY)
    if prompt is None:
        raise ValueError(
            f'{name} does not come from "CLIP Encode (STAR)" but from another encoder, such as core\'s CLIP'
            f" Text Encode. It lacks what STAR was trained with (the last layer, the unprojected pooled"
            f" state, the mask of the words): {wanted}"
        )
    first = prompt.timeline[0][1]
    surplus = sorted(set(extra) - {PROMPT_KEY, POOLED_KEY})
    if surplus or hidden is not first.hidden or extra.get(POOLED_KEY) is not first.pooled:
        what = f"it sets {', '.join(surplus)}" if surplus else "its states are no longer those of the prompt"
        raise ValueError(f"{name} was changed by a node that STAR cannot follow ({what}): {wanted} directly")
    return prompt
