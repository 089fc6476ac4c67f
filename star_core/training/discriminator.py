"""The judge of the VQ-VAE's pictures: small heads on a frozen network's features, with the hinge loss.

Pixels and features alone leave a decoder blurred wherever tokens do not say enough; a judge of real and drawn
pictures makes it choose (VQGAN, arXiv 2012.09841). One that begins with pixels learned nothing from 10,000
pictures; one that begins with what an ImageNet network sees does (Projected GAN, arXiv 2111.01007).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

RATE = 1e-3
SLOPE = 0.2
LARGEST_WEIGHT = 100.0
ENLARGED = 2
"""How many times larger the network sees a picture: its first convolution has a stride of four pixels."""
LONGEST_SHIFT = 0.125
"""Of a side: how far real and drawn pictures are moved, so that the judge learns no picture by heart."""


class Backbone(Protocol):
    """A frozen network that sees pictures, such as LPIPS's."""

    @property
    def channels(self) -> Sequence[int]:
        """How many channels each of its maps has."""

    def features(self, pictures: Tensor) -> Iterator[Tensor]:
        """Yield its maps (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1]."""


class Judge(nn.Module):
    """A head per map: (B, C, h, w) to (B, h * w) scores, one per place of each."""

    def __init__(self, channels: Iterable[int], width: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(wide, width, 1)),
                nn.LeakyReLU(SLOPE),
                spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
                nn.LeakyReLU(SLOPE),
                spectral_norm(nn.Conv2d(width, 1, 1)),
            )
            for wide in channels
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return each head's scores (B, h * w) of the network's maps, high for real."""
        return [head(seen).flatten(1).float() for head, seen in zip(self.heads, maps, strict=True)]


class Adversary:
    """A judge with its optimizer, and how many steps it has learnt: after `head_start` of them it may push."""

    def __init__(self, network: Backbone, head_start: int, device: torch.device) -> None:
        self.network = network
        self.head_start = head_start
        self.judge = Judge(network.channels).to(device)
        self.optimizer = torch.optim.AdamW(self.judge.parameters(), RATE, betas=(0.5, 0.99))
        self.steps = 0

    def state(self) -> dict[str, Any]:
        """Return what `resume` goes on from."""
        return {"judge": self.judge.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self.steps}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a stored state."""
        self.judge.load_state_dict(state["judge"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]

    def step(self, made: Tensor, real: Tensor, generator: torch.Generator) -> tuple[Tensor | None, float]:
        """Learn from drawn and real pictures (B, 3, H, W).

        Returns the gradient of the convincing loss on the drawn ones, as the judge was before, None during its
        head start; and its own loss.
        """
        drawn_maps = seen_maps(self.network, moved(made, generator))
        push = None
        if self.steps >= self.head_start:
            convincing = convincing_loss(self.judge(drawn_maps))
            (push,) = torch.autograd.grad(convincing, made, retain_graph=True)
        with torch.no_grad():
            real_maps = seen_maps(self.network, moved(real, generator))
        loss = judging_loss(self.judge(real_maps), self.judge([seen.detach() for seen in drawn_maps]))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return push, loss.item()


def seen_maps(network: Backbone, pictures: Tensor) -> list[Tensor]:
    """Return the network's maps of pictures (B, 3, H, W), each position's channels with a mean square of 1."""
    enlarged = F.interpolate(pictures, scale_factor=ENLARGED, mode="bilinear")
    maps = network.features(enlarged)
    return [F.normalize(found, dim=1) * found.shape[1] ** 0.5 for found in maps]


def moved(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures (B, 3, H, W), each mirrored or not and shifted by whole pixels, the edge repeated."""
    count, _, height, width = pictures.shape
    reach = max(1, int(height * LONGEST_SHIFT)), max(1, int(width * LONGEST_SHIFT))
    padded = F.pad(pictures, (reach[1], reach[1], reach[0], reach[0]), mode="replicate")
    rows, columns = (torch.randint(2 * r + 1, (count,), generator=generator).tolist() for r in reach)
    mirrored = (torch.rand(count, generator=generator) < 0.5).tolist()
    places = zip(padded, rows, columns, mirrored, strict=True)
    cut = [(one[:, y : y + height, x : x + width], flip) for one, y, x, flip in places]
    return torch.stack([part.flip(2) if flip else part for part, flip in cut])


def judging_loss(real: Sequence[Tensor], drawn: Sequence[Tensor]) -> Tensor:
    """Return the judge's hinge loss of its heads' scores, 1 where it tells nothing apart."""
    losses = [F.relu(1 - r).mean() + F.relu(1 + d).mean() for r, d in zip(real, drawn, strict=True)]
    return torch.stack(losses).mean() / 2


def convincing_loss(drawn: Sequence[Tensor]) -> Tensor:
    """Return the decoder's loss of the heads' scores of its pictures."""
    return -torch.stack([scores.mean() for scores in drawn]).mean()


def balance(pictures: Tensor, pull: Tensor, push: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Return the weight at which both gradients move the decoder's last layer equally hard (VQGAN, equation 7).

    pull and push: the distance's and the convincing loss's gradients on the pictures, all (B, 3, H, W).
    """
    norms = []
    for gradient in (pull, push):
        (moves,) = torch.autograd.grad(pictures, last_layer, gradient, retain_graph=True)
        norms.append(moves.norm())
    share: Tensor = norms[0] / (norms[1] + 1e-6)
    return share.clamp(0, LARGEST_WEIGHT).detach()
