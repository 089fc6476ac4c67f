"""The judge of the VQ-VAE's pictures: a patch discriminator with the hinge loss (VQGAN, arXiv 2012.09841).

Pixels and features alone leave a decoder blurred wherever tokens do not say enough; a judge of real and
drawn patches makes it choose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2
LARGEST_WEIGHT = 100.0


class PatchDiscriminator(nn.Module):
    """Three halvings and a score per patch: (B, 3, H, W) in [-1, 1] to (B, 1, H / 8, W / 8)."""

    def __init__(self, channels: int = 32, groups: int = 8) -> None:
        super().__init__()
        widths = [channels, 2 * channels, 4 * channels]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for narrow, wide in zip(widths, widths[1:], strict=False):
            layers += [
                nn.Conv2d(narrow, wide, 4, stride=2, padding=1, bias=False),
                nn.GroupNorm(groups, wide),
                nn.LeakyReLU(SLOPE),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the scores, high for real."""
        scores: Tensor = self.layers(pictures)
        return scores.float()


def judging_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """Return the discriminator's hinge loss of its scores."""
    return (F.relu(1 - real).mean() + F.relu(1 + drawn).mean()) / 2


def convincing_loss(drawn: Tensor) -> Tensor:
    """Return the decoder's loss of the scores of its pictures."""
    return -drawn.mean()


def balance(distance: Tensor, convincing: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Return the weight at which both losses pull the decoder's last layer equally hard (VQGAN, equation 7)."""
    (near,) = torch.autograd.grad(distance, last_layer, retain_graph=True)
    (real,) = torch.autograd.grad(convincing, last_layer, retain_graph=True)
    share: Tensor = near.norm() / (real.norm() + 1e-4)
    return share.clamp(0, LARGEST_WEIGHT).detach()
