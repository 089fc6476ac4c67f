"""The VQ-VAE's kernels against their references in Triton's interpreter. `test_kernels.py` starts this file."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core import kernels
from star_core.kernels import channels, convolutions, norms, references_only, wide
from star_core.vqvae import LAYOUT, VQVAE, SpatialAttention

assert os.environ.get("TRITON_INTERPRET") == "1", "test_kernels.py runs this file, in Triton's interpreter"

ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2**-6}
"""Greatest difference, in deviations of what is expected. The interpreter cuts bfloat16 off."""
SHAPES = {
    "five channels a group": ((1, 40, 7, 6), 8),
    "ten": ((2, 80, 6, 4), 8),
    "twenty": ((1, 160, 7, 5), 8),
    "more blocks than one": ((1, 160, 20, 16), 32),
    "two pictures of odd sides": ((2, 40, 5, 7), 8),
    "one position": ((2, 64, 1, 1), 4),
    "few channels": ((2, 8, 7, 8), 4),
    "twelve channels": ((3, 12, 5, 3), 3),
    "one group": ((1, 160, 5, 8), 1),
    "a group for each": ((2, 16, 6, 6), 16),
}


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have kernels serve CPU tensors. Which took a call, `served` of conftest.py tells."""
    monkeypatch.setattr(kernels, "DEVICES", ("cpu",))


@pytest.fixture(scope="module", autouse=True)
def _sums_unchecked() -> None:
    """The interpreter asks of every sum and product of integers whether it overflows, a third of its time. Of
    maps as small as these none does."""
    builder = pytest.importorskip("triton.runtime.interpreter").interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return channels far from zero and unlike each other, and positions unlike each other, channels last."""
    steps = torch.linspace(0.1, 3, shape[2])[:, None]
    x = 5 + 4 * normal(1, 1, shape[1], 1, 1) + normal(2, *shape) * steps
    return x.to(dtype).contiguous(memory_format=LAYOUT)


def layer(groups: int, channels: int, dtype: torch.dtype = torch.float32) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(1 + 0.5 * normal(3, channels))
    norm.bias.copy_(normal(4, channels))
    return norm.to(dtype)


def assert_near(ours: Tensor | None, theirs: Tensor, error: float) -> None:
    assert ours is not None
    assert (ours.float() - theirs.float()).abs().max() <= error * max(1, float(theirs.float().abs().max()))


def expected(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    return F.group_norm(x.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)


IN_EVERY_DTYPE = ("five channels a group", "two pictures of odd sides", "few channels")


@pytest.mark.parametrize(
    ("case", "dtype"), [(c, d) for c in SHAPES for d in ERROR if c in IN_EVERY_DTYPE or d == torch.float32]
)
def test_pictures_are_normalised_as_the_reference_does(case: str, dtype: torch.dtype):
    shape, groups = SHAPES[case]
    x, norm = picture(*shape, dtype=dtype), layer(groups, shape[1], dtype)
    for kernel, theirs in (
        (norms.normalised, expected(x, norm)),
        (norms.norm_silu, F.silu(expected(x, norm))),
    ):
        ours = kernel(x, norm)
        assert_near(ours, theirs, ERROR[dtype])
        assert ours.dtype == dtype
        assert ours.is_contiguous(memory_format=LAYOUT)
        assert ours.stride() == x.stride()


@pytest.mark.parametrize(("programs", "tile"), [(1, 512), (7, 1024), (4096, 256)])
def test_however_the_work_is_divided(monkeypatch: pytest.MonkeyPatch, programs: int, tile: int):
    monkeypatch.setattr(norms, "PROGRAMS", programs)
    monkeypatch.setattr(channels, "TILE", tile)
    monkeypatch.setattr(norms, "TOGETHER", 256)
    for shape in ((1, 40, 11, 13), (2, 40, 10, 12), (1, 80, 9, 8)):
        x, norm = picture(*shape), layer(8, shape[1])
        assert_near(norms.norm_silu(x, norm), F.silu(expected(x, norm)), 1e-5)


def test_a_mean_that_is_large_beside_the_deviation_loses_no_digits():
    # By sums of squares in float32 nothing would be left of such a variance.
    x, norm = picture(1, 160, 24, 20) + 4000, layer(32, 160)
    assert_near(norms.normalised(x, norm), expected(x, norm), 1e-3)


def test_a_flat_picture_becomes_the_bias():
    norm = layer(32, 160)
    x = torch.full((1, 160, 6, 6), 3.0).contiguous(memory_format=LAYOUT)
    # The scale is 1000 then, as eps is 1e-6: a rounding of the mean counts as much.
    assert_near(norms.normalised(x, norm), norm.bias.view(1, -1, 1, 1).expand_as(x), 1e-3)


def test_weights_may_be_of_another_dtype():
    x, norm = picture(1, 64, 8, 8, dtype=torch.float16), layer(8, 64)
    assert_near(norms.norm_silu(x, norm), F.silu(expected(x, norm)), 2e-3)


def test_what_the_kernels_are_not_made_for_is_left_to_the_reference():
    x, norm = picture(1, 64, 8, 8), layer(8, 64)
    assert norms.norm_silu(x, norm) is not None
    assert norms.norm_silu(x.contiguous(), norm) is None
    assert norms.norm_silu(x.double(), norm) is None
    assert norms.norm_silu(x[:, :, :, :5], norm) is None
    assert norms.norm_silu(picture(1, 6, 3, 3), layer(3, 6)) is None
    assert norms.norm_silu(x, nn.GroupNorm(8, 64, affine=False)) is None
    assert norms.norm_silu(x, layer(8, 64).to("meta")) is None
    trained = layer(8, 64).requires_grad_(True)
    assert norms.norm_silu(x, trained) is None
    with torch.no_grad():
        assert norms.norm_silu(x, trained) is not None
    assert wide.attended(*normal(1, 3, 1, 1, 4, 256)) is None
    q, k, v = normal(1, 3, 1, 1, 4, 320)
    assert wide.attended(q, k, v) is not None
    assert wide.attended(q.double(), k.double(), v.double()) is None
    with torch.autocast("cpu"):
        assert wide.attended(q, k, v) is None


class Host(nn.GroupNorm):
    """A host's layer as ComfyUI makes them: weights are cast, and changed by functions, as it computes."""

    weight_function: list[Callable] = []
    bias_function: list[Callable] = []

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        for change in self.weight_function:
            weight = change(weight)
        return F.group_norm(x, self.num_groups, weight.to(x), bias.to(x), self.eps)


class Doubled(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_host_s_layer_is_served_only_while_its_weights_stand_there_as_they_are():
    x, norm = picture(1, 64, 8, 8), Host(8, 64).requires_grad_(False)
    assert norms.norm_silu(x, norm) is not None
    norm.weight_function = [lambda weight: weight + 1]
    assert norms.norm_silu(x, norm) is None
    norm.weight_function = []
    norm.bias_function = [lambda bias: bias + 1]
    assert norms.norm_silu(x, norm) is None


def test_a_layer_that_computes_something_else_or_is_watched_computes_itself():
    x = picture(1, 64, 8, 8)
    assert norms.norm_silu(x, Doubled(8, 64).requires_grad_(False)) is None
    norm = layer(8, 64)
    hook = norm.register_forward_hook(lambda *_: None)
    assert norms.norm_silu(x, norm) is None
    hook.remove()
    assert norms.norm_silu(x, norm) is not None
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert norms.norm_silu(x, norm) is None
    hook.remove()
    norm.forward = norm.forward
    assert norms.norm_silu(x, norm) is None, "which somebody has wrapped"


CONVOLUTION_KERNELS = ("convolved", "convolved_apart", "convolved_onto", "doubled")
CONVOLUTIONS = {
    "as many channels": ((1, 40, 9, 6), 40, 3),
    "more": ((2, 16, 5, 7), 64, 3),
    "a batch of odd sides": ((3, 24, 7, 3), 12, 3),
    "of one place": ((2, 32, 6, 4), 80, 1),
}


def convolution(
    channels_in: int, channels_out: int, side: int, dtype: torch.dtype = torch.float32
) -> nn.Conv2d:
    conv = nn.Conv2d(channels_in, channels_out, side, padding=side // 2).requires_grad_(False)
    conv.weight.copy_(normal(5, *conv.weight.shape) / conv.weight[0].numel() ** 0.5)
    conv.bias.copy_(3 * normal(6, channels_out))
    return conv.to(dtype)


def apart(x: Tensor, conv: nn.Conv2d, norm: nn.GroupNorm) -> tuple[Tensor, nn.GroupNorm, Tensor]:
    made, bias = convolutions.convolved_apart(x, conv)
    return made, norm, bias


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_are_the_reference_s(case: str, dtype: torch.dtype):
    shape, out, side = CONVOLUTIONS[case]
    x, conv, norm = picture(*shape, dtype=dtype), convolution(shape[1], out, side, dtype), layer(4, out, dtype)
    total = normal(7, shape[0], out, *shape[2:]).to(dtype).contiguous(memory_format=LAYOUT)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=side // 2)
    error = {torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    summed = exact + total.double()
    for ours, theirs in (
        (convolutions.convolved(x, conv), exact),
        (norms.norm_silu(*apart(x, conv, norm)), F.silu(expected(exact, norm))),
        (convolutions.convolved_onto(total, x, conv), summed),
    ):
        assert_near(ours, theirs, error)
        assert ours.dtype == dtype
        assert ours.is_contiguous(memory_format=LAYOUT)
    assert_near(total, summed, error)  # in its place


def test_a_bias_much_larger_than_what_it_moves_loses_no_digits_of_the_norm():
    x, conv, norm = picture(1, 32, 8, 6), convolution(32, 64, 3), layer(8, 64)
    conv.bias.copy_((1000 * normal(6, 8)).repeat_interleave(8))
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert_near(norms.norm_silu(*apart(x, conv, norm)), F.silu(expected(exact, norm)), 1e-4)


# Of bfloat16 the interpreter multiplies the bits.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 16, 3, 4), (1, 160, 3, 4), (1, 48, 2, 131), (2, 32, 1, 1)], ids=str)
def test_a_convolution_to_a_few_channels(shape: tuple[int, ...], dtype: torch.dtype):
    x, conv = picture(*shape, dtype=dtype), convolution(shape[1], 3, 3, dtype)
    ours = convolutions.convolved(x, conv)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    own = convolutions._to_few_channels(x, conv)
    assert (own is None) == (dtype == torch.float32)
    if ours is None:
        return  # rows of three numbers of float32 may be nobody's
    assert_near(ours, exact, ERROR[dtype])
    assert ours.shape == exact.shape
    assert ours.is_contiguous(memory_format=LAYOUT)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("shape", [(1, 4, 3, 5), (2, 40, 1, 1), (3, 12, 4, 2)], ids=str)
def test_doubled_maps_hold_each_number_four_times(shape: tuple[int, ...], dtype: torch.dtype):
    x = picture(*shape, dtype=dtype)
    ours = convolutions.doubled(x)
    assert torch.equal(ours, F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert ours.is_contiguous(memory_format=LAYOUT)
    assert convolutions.doubled(x[:, :3].contiguous(memory_format=LAYOUT)) is None


@torch.no_grad()
def test_convolutions_that_are_made_otherwise_are_left_to_the_reference(monkeypatch: pytest.MonkeyPatch):
    x, conv = picture(1, 16, 6, 5), convolution(16, 16, 3)
    total = picture(1, 16, 6, 5)
    assert convolutions.convolved(x, conv) is not None
    assert convolutions.convolved(x.contiguous(), conv) is None
    assert convolutions.convolved_onto(total.contiguous(), x, conv) is None
    assert convolutions.convolved_onto(total.bfloat16(), x, conv) is None
    assert convolutions.convolved(x.bfloat16(), conv) is None, "whose weights are to be cast"
    with torch.autocast("cpu"):
        assert convolutions.convolved(x, conv) is None
    for other in (
        nn.Conv2d(16, 16, 3, padding="same"),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2),
        nn.Conv2d(16, 16, 3, padding=1, groups=4),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
    ):
        assert convolutions.convolved(x, other.requires_grad_(False)) is None
    with torch.enable_grad():
        assert convolutions.convolved_onto(total, x, conv) is None, "whose total may still be wanted"
    assert convolutions.convolved_onto(picture(2, 16, 6, 5), x, conv) is None
    with monkeypatch.context() as patch:
        patch.setattr(conv, "_conv_forward", nn.Conv2d._conv_forward.__get__(conv))
        assert convolutions.convolved(x, conv) is None, "which another pack has changed"
    conv.bias.data = torch.ones(32)[::2]
    assert convolutions.convolved(x, conv) is None
    conv.bias.data = torch.ones(16)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "enabled", False)
        assert convolutions.convolved(x, conv) is None
    assert convolutions.convolved(x, conv) is not None
    conv.register_forward_hook(lambda *_: None)
    assert convolutions.convolved(x, conv) is None


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "width"), [(1, 1, 35, 640), (2, 1, 1, 260), (2, 3, 17, 320)]
)
def test_wide_heads_attend_as_the_reference_does(
    monkeypatch: pytest.MonkeyPatch, batch: int, heads: int, tokens: int, width: int
):
    q, k, v = normal(5, 3, batch, heads, tokens, width) * torch.tensor([3.0, 1.0, 1.0]).view(3, 1, 1, 1, 1)
    theirs = F.scaled_dot_product_attention(q, k, v)
    assert_near(wide.attended(q, k, v), theirs, 1e-5)
    monkeypatch.setattr(wide, "SCORES", 4 * batch * heads * tokens)
    ours = wide.attended(q, k, v)
    assert_near(ours, theirs, 1e-5)
    assert ours.shape == theirs.shape


@torch.no_grad()
def test_whole_pictures_are_the_reference_s(paired: object, served: list[str]):
    vqvae: VQVAE = paired.vqvae
    f_hat = normal(6, 2, 8, 3, 2)
    ours = vqvae.pictures(f_hat)
    features = vqvae.encode(2 * ours - 1)
    assert {"norms.norm_silu", "norms.normalised"} <= set(served)
    assert {f"convolutions.{name}" for name in CONVOLUTION_KERNELS} <= set(served)
    assert not kernels.given_up()
    served.clear()
    with references_only():
        theirs = vqvae.pictures(f_hat)
        assert_near(features, vqvae.encode(2 * ours - 1), 1e-4)
    assert not served
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_channels_stay_last_from_layer_to_layer(paired: object, served: list[str]):
    layouts = {}
    vqvae = copy.deepcopy(paired.vqvae).channels_last()
    for name, module in vqvae.decoder.named_modules():
        if not isinstance(module, nn.Identity | nn.GroupNorm | nn.Conv2d):  # watched, those compute themselves
            module.register_forward_hook(
                lambda _, args, out, name=name: layouts.update(
                    {name: [t.is_contiguous(memory_format=LAYOUT) for t in (*args, out)]}
                )
            )
    vqvae.pictures(normal(6, 1, 8, 2, 3))
    assert {f"convolutions.{name}" for name in CONVOLUTION_KERNELS} <= set(served)
    assert layouts
    assert all(all(last) for last in layouts.values()), layouts


@torch.no_grad()
def test_attention_of_wide_heads_reads_queries_as_they_lie(served: list[str]):
    attention = SpatialAttention(320, 32, nn).requires_grad_(False)
    x = picture(2, 320, 3, 5)
    ours = attention(x)
    assert "wide.attended" in served
    with references_only():
        assert_near(ours, attention(x), 1e-5)
    assert ours.is_contiguous(memory_format=LAYOUT)
