"""The VQ-VAE around the quantizer: shapes, ranges, rows and refusals."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor

from star_core import memory
from star_core.config import VQVAEConfig
from star_core.memory import pictures_at_once
from star_core.vqvae import LAYOUT, VQVAE, SpatialAttention


@pytest.fixture
def vqvae(paired: object) -> VQVAE:
    return paired.vqvae


def pictures(batch: int = 2, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("height", "width"), [(16, 24), (16, 16), (24, 8), (4, 20)])
def test_rectangular_pictures_become_features_and_pictures_again(vqvae: VQVAE, height: int, width: int):
    features = vqvae.encode(pictures(2, height, width))
    assert features.shape == (2, 8, height // 4, width // 4)
    assert vqvae.decode(features).shape == (2, 3, height, width)


@torch.no_grad()
def test_a_block_lets_go_of_what_it_has_convolved(vqvae: VQVAE):
    block = vqvae.decoder.mid.block_1
    seen: list[weakref.ref[Tensor]] = []
    gone: list[bool] = []
    block.conv1.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    block.norm2.register_forward_pre_hook(lambda *_: gone.append(seen[0]() is None))
    block(torch.randn(1, block.norm1.num_channels, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert gone == [True], "one more picture-sized tensor would be a third more at the peak"


def test_decoded_pictures_are_clamped(vqvae: VQVAE):
    f_hat = 100 * torch.randn(1, 8, 4, 6, generator=torch.Generator().manual_seed(0))
    picture = vqvae.decode(f_hat)
    assert picture.min() >= -1
    assert picture.max() <= 1
    assert picture.abs().max() == 1


@pytest.mark.parametrize(("height", "width"), [(15, 24), (16, 25), (2, 4)])
def test_a_side_that_is_no_multiple_of_the_step_is_refused(vqvae: VQVAE, height: int, width: int):
    with pytest.raises(
        ValueError, match=f"pictures of {width}x{height} pixels: both sides must be multiples of 4"
    ):
        vqvae.encode(pictures(1, height, width))


def test_pictures_of_a_batch_never_touch_each_other(vqvae: VQVAE):
    batch = pictures(3)
    features = vqvae.encode(batch)
    decoded = vqvae.decode(features)
    for row in range(3):
        alone = vqvae.encode(batch[row : row + 1])
        torch.testing.assert_close(alone, features[row : row + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vqvae.decode(alone), decoded[row : row + 1], atol=1e-5, rtol=1e-5)


def test_as_many_pictures_are_computed_together_as_32_bits_count(vqvae: VQVAE, monkeypatch: pytest.MonkeyPatch):
    # 160 channels of a million pixels: the thirteenth picture would pass 2 ** 31.
    assert pictures_at_once(VQVAEConfig(), (64, 64)) == 12
    assert pictures_at_once(VQVAEConfig(channel_multipliers=(1, 4, 2)), (256, 256)) == 3
    assert pictures_at_once(VQVAEConfig(), (1024, 1024)) == 1
    batch = pictures(5)
    features = vqvae.encode(batch)
    decoded = vqvae.decode(features)
    sizes: list[int] = []
    for part in (vqvae.encoder, vqvae.decoder):
        part.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    largest = 16 * 24 * 8 * 2  # a picture's numbers where it is widest: the second level, enlarged
    monkeypatch.setattr(memory, "MOST_NUMBERS", 2 * largest)
    torch.testing.assert_close(vqvae.encode(batch), features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vqvae.decode(features), decoded, atol=1e-5, rtol=1e-5)
    assert sizes == [2, 2, 1, 2, 2, 1]


def test_what_is_written_in_place_without_gradients_is_nobodys(vqvae: VQVAE):
    # Sums of residual blocks go into their inputs then: the caller's tensors and the results stay the same.
    picture = pictures(2)
    with torch.enable_grad():
        features = vqvae.encode(picture)
        decoded = vqvae.decode(features)
    shown, coded = picture.clone(), features.clone()
    with torch.no_grad():
        assert torch.equal(vqvae.encode(picture), features)
        assert torch.equal(vqvae.decode(features), decoded)
    assert torch.equal(picture, shown)
    assert torch.equal(features, coded)


def test_height_and_width_are_not_mixed_up(vqvae: VQVAE):
    picture = pictures(1, 16, 24)
    changed = picture.clone()
    changed[:, :, :, 20:] = 0
    moved = (vqvae.encoder.conv_in(changed) - vqvae.encoder.conv_in(picture)).abs().amax(dim=(0, 1, 2))
    assert not moved[:19].any()
    assert moved[19:].all()


def test_attention_stands_at_the_lowest_resolution_and_in_the_middle(vqvae: VQVAE):
    places = [name for name, module in vqvae.named_modules() if isinstance(module, SpatialAttention)]
    assert places == [
        "encoder.down.2.attn.0",
        "encoder.mid.attn_1",
        "decoder.mid.attn_1",
        "decoder.up.2.attn.0",
        "decoder.up.2.attn.1",
    ]


def test_the_vqvae_runs_in_bfloat16_and_answers_in_float32(vqvae: VQVAE):
    coarse = copy.deepcopy(vqvae).bfloat16()
    features = coarse.encode(pictures())
    assert features.dtype == torch.float32
    exact = vqvae.encode(pictures())
    assert (features - exact).abs().mean() < 0.1 * exact.abs().mean()
    picture = coarse.decode(exact)
    assert picture.dtype == torch.float32
    assert torch.isfinite(picture).all()


def test_what_a_quantized_picture_decodes_to_depends_on_its_tokens_alone(vqvae: VQVAE, paired: object):
    quantized = vqvae.quantizer.quantize(vqvae.encode(pictures()), paired.maps)
    rebuilt = vqvae.quantizer.f_hats(quantized.tokens, paired.maps)
    torch.testing.assert_close(vqvae.decode(rebuilt[-1]), vqvae.decode(quantized.f_hats[-1]))


def test_channels_last_is_the_same_picture(vqvae: VQVAE):
    turned = copy.deepcopy(vqvae).to(memory_format=LAYOUT)
    assert turned.decoder.conv_in.weight.is_contiguous(memory_format=LAYOUT)
    features = vqvae.encode(pictures())
    torch.testing.assert_close(turned.encode(pictures()), features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned.decode(features), vqvae.decode(features), atol=1e-5, rtol=1e-5)
