"""The VQ-VAE's adversary: discriminator heads on frozen networks' features, with the hinge loss.

Pixels and features alone leave a decoder blurred wherever tokens do not say enough; a discriminator of real and
drawn pictures makes it choose (VQGAN, arXiv 2012.09841). One that begins with pixels learned nothing from ten
thousand pictures; one that begins with what an ImageNet network sees does (Projected GAN, arXiv 2111.01007).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .augmentation import gathered
from .optimizers import adamw, recordable

RATE = 1e-3
"""Of its optimizer: a few times the decoder's, since the heads are new when the decoder is not."""
SLOPE = 0.2
LARGEST_WEIGHT = 100.0
ENLARGED = 2
"""How many times larger a network sees a picture: AlexNet's and EfficientNet's first features have a quarter of
its sides, too few for the details of a small one."""
LEAST_LENGTH = 1e-2
"""Feature vectors shorter than it are not normalised: their direction means nothing, its gradient is huge."""


class FeatureNetwork(Protocol):
    """A frozen network that sees pictures, such as LPIPS's."""

    @property
    def channels(self) -> Sequence[int]:
        """How many channels each of its features has."""

    def features(self, pictures: Tensor) -> Iterator[Tensor]:
        """Yield its features (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1]."""


class Discriminator(nn.Module):
    """A head per feature map of the network: (B, C, h, w) to (B, h * w) scores, one per place."""

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

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return each head's scores (B, h * w), high for real."""
        return [head(seen).flatten(1) for head, seen in zip(self.heads, features, strict=True)]


class Adversary:
    """A discriminator with its optimizer and the steps it has learnt. All in float32: it costs little."""

    def __init__(self, networks: Sequence[FeatureNetwork], head_start: int, device: torch.device) -> None:
        """head_start: steps in which it learns and gives the decoder nothing to follow."""
        self.networks = networks
        self.head_start = head_start
        self.device = device
        self.discriminator = Discriminator(chain.from_iterable(n.channels for n in networks)).to(device)
        self.optimizer = adamw(self.discriminator.parameters(), RATE, device, betas=(0.5, 0.99), decay=0.01)
        self.steps = 0

    def state(self) -> dict[str, Any]:
        """Return what `resume` goes on from."""
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a stored state."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        recordable(self.optimizer, self.device)
        self.steps = state["steps"]

    @property
    def ready(self) -> bool:
        """Whether its head start is over. Whoever has made a step counts it in `steps`."""
        return self.steps >= self.head_start

    def step(
        self, made: Tensor, real: Tensor, sources: tuple[Tensor, Tensor], *, ready: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Learn from drawn and real pictures (B, 3, H, W), seen by way of `sources` (`pixel_sources`).

        Returns the gradient of the generator loss on the drawn ones, as the discriminator was before, None
        where it is not `ready`; and its own loss.
        """
        drawn_features = self._features(made if ready else made.detach(), sources[0])
        push = None
        if ready:
            loss = generator_loss(self.discriminator(drawn_features))
            (push,) = torch.autograd.grad(loss, made)
        with torch.no_grad():
            real_features = self._features(real, sources[1])
        own_loss = discriminator_loss(
            self.discriminator(real_features), self.discriminator([seen.detach() for seen in drawn_features])
        )
        self.optimizer.zero_grad()
        own_loss.backward()
        self.optimizer.step()
        return push, own_loss.detach()

    def _features(self, pictures: Tensor, sources: Tensor) -> list[Tensor]:
        seen = gathered(pictures.clamp(-1, 1), sources)
        return [features for network in self.networks for features in network_features(network, seen)]


def network_features(network: FeatureNetwork, pictures: Tensor) -> list[Tensor]:
    """Return the network's features of pictures (B, 3, H, W), scaled so that a place's channels have a mean
    square of 1, or zero where none is active."""
    enlarged = F.interpolate(pictures, scale_factor=ENLARGED, mode="bilinear", align_corners=False)
    found = network.features(enlarged)
    return [F.normalize(seen, dim=1, eps=LEAST_LENGTH) * seen.shape[1] ** 0.5 for seen in found]


def feature_distance(network: FeatureNetwork, made: Tensor, real: Tensor) -> Tensor:
    """Return the feature matching loss of two batches (B, 3, H, W): the mean square by which the network's
    features differ, over places and channels, all of `network_features` counting alike."""
    with torch.no_grad():
        wanted = network_features(network, real)
    pairs = zip(network_features(network, made.clamp(-1, 1)), wanted, strict=True)
    return torch.stack([(m - r).square().mean() for m, r in pairs]).mean()


def discriminator_loss(real: Sequence[Tensor], drawn: Sequence[Tensor]) -> Tensor:
    """Return the discriminator's hinge loss of its heads' scores, 1 where it tells nothing apart."""
    losses = [F.relu(1 - r).mean() + F.relu(1 + d).mean() for r, d in zip(real, drawn, strict=True)]
    return torch.stack(losses).mean() / 2


def generator_loss(drawn: Sequence[Tensor]) -> Tensor:
    """Return the decoder's loss of the heads' scores of its pictures."""
    return -torch.stack([scores.mean() for scores in drawn]).mean()


def adaptive_weight(pictures: Tensor, pull: Tensor, push: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Return the weight at which both gradients move the decoder's last layer equally hard (VQGAN, equation 7).

    pull and push: the distance's and the generator loss's gradients on the pictures, all (B, 3, H, W).
    """
    norms = []
    for gradient in (pull, push):
        (moves,) = torch.autograd.grad(pictures, last_layer, gradient, retain_graph=True)
        norms.append(moves.norm())
    share: Tensor = norms[0] / (norms[1] + 1e-6)
    return share.clamp(0, LARGEST_WEIGHT).detach()
