"""EfficientNet-Lite0 from a state dict of random numbers: the layers, the padding, the folded normalisation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from star_core.training.efficientnet import FILE, NORM_EPS, SEEN, load_efficientnet

# Blocks of table 1 of the paper, B0's: kernel, expansion, channels; the Lite variant leaves them as they are.
BLOCKS = (
    [(3, 1, 16)]
    + [(3, 6, 24)] * 2
    + [(5, 6, 40)] * 2
    + [(3, 6, 80)] * 3
    + [(5, 6, 112)] * 3
    + [(5, 6, 192)] * 4
    + [(3, 6, 320)]
)


def random_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def add(convolution: str, norm: str, *shape: int) -> None:
        fan_in = shape[1] * shape[2] * shape[3]
        state[f"{convolution}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        for name, least in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            state[f"{norm}.{name}"] = torch.rand(shape[0], generator=generator) + least

    add("_conv_stem", "_bn0", 32, 3, 3, 3)
    before = 32
    for index, (kernel, expansion, channels) in enumerate(BLOCKS):
        name, wide = f"_blocks.{index}.", before * expansion
        if expansion > 1:
            add(f"{name}_expand_conv", f"{name}_bn0", wide, before, 1, 1)
        add(f"{name}_depthwise_conv", f"{name}_bn1", wide, 1, kernel, kernel)
        add(f"{name}_project_conv", f"{name}_bn2", channels, wide, 1, 1)
        before = channels
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("efficientnet")
    torch.save(random_state(), found / FILE)
    return found


def test_features_have_the_channels_and_sides_of_their_resolutions(folder):
    network = load_efficientnet(folder)
    maps = list(network.features(torch.rand(2, 3, 64, 96) * 2 - 1))
    assert [tuple(found.shape) for found in maps] == [
        (2, channels, 64 // share, 96 // share)
        for channels, share in zip(network.channels, (4, 8, 16, 32), strict=True)
    ]
    assert network.channels == (24, 40, 112, 320)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_layers_are_those_of_the_unfolded_network(folder):
    state = random_state()
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def normalised(x: Tensor, norm: str) -> Tensor:
        parts = [state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *parts, eps=NORM_EPS)

    def same(x: Tensor, weight: Tensor, stride: int) -> Tensor:
        # SAME of TensorFlow for sides that the stride divides: kernel - stride zeros, the odd one behind.
        total = weight.shape[-1] - stride
        x = F.pad(x, (total // 2, total - total // 2) * 2)
        return F.conv2d(x, weight, stride=stride, groups=len(weight) if weight.shape[1] == 1 else 1)

    levels = (pictures + 1) * 127.5
    x = F.relu6(normalised(same((levels - 127) / 128, state["_conv_stem.weight"], 2), "_bn0"))
    found = load_efficientnet(folder).features(pictures)
    before = None
    for index, block in enumerate(BLOCKS):
        name, state_of_block = f"_blocks.{index}.", x
        # The first block of a stage halves the sides, but in the first, fifth and seventh stage.
        stride = 2 if block != before and block[2] in (24, 40, 80, 192) else 1
        if block[1] > 1:
            wide = same(x, state[f"{name}_expand_conv.weight"], 1)
            x = F.relu6(normalised(wide, f"{name}_bn0"))
        x = F.relu6(normalised(same(x, state[f"{name}_depthwise_conv.weight"], stride), f"{name}_bn1"))
        x = normalised(same(x, state[f"{name}_project_conv.weight"], 1), f"{name}_bn2")
        if x.shape == state_of_block.shape:
            x = x + state_of_block
        if index in SEEN:
            torch.testing.assert_close(next(found), x, rtol=1e-3, atol=1e-4)
        before = block
    assert next(found, None) is None


def test_a_file_of_another_network_is_refused(tmp_path):
    state = random_state()
    del state["_blocks.7._bn1.bias"]
    torch.save(state, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"has no tensor '_blocks\.7\._bn1\.bias'"):
        load_efficientnet(tmp_path)
    for changed in ("_blocks.16._project_conv.weight", "_blocks.2."):
        state = random_state()
        if changed.endswith("."):
            for name in [name for name in state if name.startswith((f"{changed}_project", f"{changed}_bn2"))]:
                state[name] = state[name][:8]
        else:
            state[changed] = torch.zeros(1)
        torch.save(state, tmp_path / FILE)
        with pytest.raises(ValueError, match="another EfficientNet than Lite0"):
            load_efficientnet(tmp_path)
