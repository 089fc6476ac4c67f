"""Weights laid out for a CPU's bfloat16 products: near what plain ones give, and one copy of them in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from star_core import Options, load
from star_core.kernels import given_up, references_only
from star_core.packed import PackedLinear, check_packing, has_bfloat16_products, packed
from star_core.transformer import expanded
from star_core.weights import TensorFile, fill, save_tensors

needs_products = pytest.mark.skipif(
    not has_bfloat16_products(), reason="this processor multiplies no bfloat16: packed weights are not run"
)
PROMPTS = ["a red apple", "a blue fish"]


def linear(columns: int, rows: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(columns + rows)
    return nn.Linear(columns, rows, bias=bias).bfloat16().requires_grad_(False)


@needs_products
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_multiplies_as_a_plain_one(bias: bool):
    plain = linear(256, 1024, bias=bias)
    small = PackedLinear(packed(plain.weight), plain.bias)
    assert (small.in_features, small.out_features) == (256, 1024)
    for shape in ((256,), (1, 256), (3, 7, 256), (2, 300, 256)):
        x = torch.randn(shape).bfloat16()
        exact = F.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
        # Half a unit in the last of bfloat16's 8 bits.
        torch.testing.assert_close(small(x).double(), exact, rtol=2**-8, atol=1e-3)
        gelu = F.gelu(exact, approximate="tanh")
        torch.testing.assert_close(small.expanded(x).double(), gelu, rtol=2**-8, atol=1e-3)


@needs_products
def test_a_gelu_is_read_from_the_sums_before_they_are_rounded():
    layer, x = linear(256, 1024), torch.randn(3, 50, 256).bfloat16()
    with torch.no_grad():
        fused = expanded(x, layer)
    with references_only():
        plain = expanded(x, layer)
    exact = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()), approximate="tanh")
    assert not given_up()
    assert not torch.equal(fused, plain)
    assert (fused.double() - exact).abs().mean() < (plain.double() - exact).abs().mean()


def test_a_gelu_in_float32_is_the_reference_s():
    layer, x = linear(32, 128).float(), torch.randn(3, 5, 32)
    with references_only():
        plain = expanded(x, layer)
    with torch.no_grad():
        assert torch.equal(expanded(x, layer), plain)


@needs_products
def test_a_packed_model_draws_what_the_plain_one_draws_but_for_rounding():
    plain, small = load(dtype=torch.bfloat16), load(dtype=torch.bfloat16, packed=True)
    kinds = {type(m) for m in small.transformer.modules()} | {type(m) for m in small.causal_sampler.modules()}
    assert PackedLinear in kinds
    assert nn.Linear not in kinds
    text = plain.encode_text(PROMPTS)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1024, (2, sum(h * w for h, w in plain.config.maps)), generator=generator)
    inputs = plain.vqvae.quantizer.teacher_inputs(
        tokens.split([h * w for h, w in plain.config.maps], dim=1), plain.config.maps
    )
    found = []
    for star in (plain, small):
        keys = star.transformer.text_keys(text.hidden, text.mask)
        features = star.transformer(inputs, text.pooled, keys, star.config.maps)
        found.append(star.transformer.logits(features))
    # At most what bfloat16 itself costs (NOTES.md), in deviations of the logits: another order of sums.
    difference = (found[0] - found[1]) / found[0].std()
    assert difference.abs().max() < 0.25
    assert difference.abs().mean() < 0.01
    pictures = small.draw(PROMPTS, options=Options(seed=3))
    assert pictures.shape == (2, 3, 64, 64)
    assert torch.equal(pictures, small.draw(PROMPTS, options=Options(seed=3)))
    assert torch.isfinite(pictures).all()


@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.float16}, {"dtype": torch.bfloat16, "eight_bit": "int8"}]
)
def test_what_cannot_be_packed_is_refused_with_the_remedy(options: dict):
    with pytest.raises(ValueError, match=r"packed .*bfloat16.*leave packed out"):
        load(packed=True, **options)


def test_a_device_that_packs_nothing_is_refused():
    with pytest.raises(ValueError, match="device cuda"):
        check_packing(torch.bfloat16, torch.device("cuda"), None)


@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_a_tensor_that_is_dropped_does_not_decide_whether_a_file_is_mapped(tmp_path: Path, monkeypatch, kind):
    whole = Layers()
    extra = {"position_ids": torch.zeros(1, 77, dtype=kind)}
    save_tensors(tmp_path / "layers.safetensors", {**whole.state_dict(), **extra}, {})
    monkeypatch.setattr(TensorFile, "release", lambda self: pytest.fail("copied"))
    monkeypatch.setattr("star_core.weights.RELEASE_AFTER", 0)
    with torch.device("meta"):
        module = Layers()
    fill(module, TensorFile(tmp_path / "layers.safetensors"), Names(), source="layers", dtype=torch.float32)
    assert torch.equal(module.gain, whole.gain)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 32), nn.Linear(32, 16, bias=False)
        self.gain = nn.Parameter(torch.ones(5))


class Names:
    """A key table whose official names are ours."""

    def ours(self, name: str) -> str:
        return name

    official = ours

    def reason_dropped(self, name: str) -> str | None:
        return "positions are counted" if name == "position_ids" else None


@needs_products
def test_a_module_is_filled_with_packed_layers_and_plain_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("star_core.weights.RELEASE_AFTER", 100)  # the file is let go of and opened again
    whole = Layers()
    save_tensors(tmp_path / "layers.safetensors", whole.state_dict(), {})
    file = TensorFile(tmp_path / "layers.safetensors")
    with torch.device("meta"):
        module = Layers()
    fill(module, file, Names(), source="layers", dtype=torch.bfloat16, packing=True)
    assert isinstance(module.one, PackedLinear)
    assert isinstance(module.two, PackedLinear)
    assert module.two.bias is None
    assert torch.equal(module.one.bias, whole.one.bias.bfloat16())
    assert torch.equal(module.gain, whole.gain.bfloat16())
    assert not module.one.bias.requires_grad
    x = torch.randn(3, 64).bfloat16()
    expected = F.linear(x, whole.one.weight.bfloat16(), whole.one.bias.bfloat16())
    torch.testing.assert_close(module.one(x), expected, rtol=2**-7, atol=1e-2)


def test_a_file_that_is_cast_is_let_go_of_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = Layers()
    save_tensors(tmp_path / "layers.safetensors", whole.state_dict(), {})
    released = []
    original = TensorFile.release
    monkeypatch.setattr(TensorFile, "release", lambda self: (released.append(self), original(self)))
    monkeypatch.setattr("star_core.weights.RELEASE_AFTER", 100)
    for dtype, lets_go in ((None, False), (torch.float32, False), (torch.bfloat16, True)):
        released.clear()
        with torch.device("meta"):
            module = Layers()
        file = TensorFile(tmp_path / "layers.safetensors")
        fill(module, file, Names(), source="layers", dtype=dtype)
        assert bool(released) == lets_go
        for name, tensor in whole.state_dict().items():
            assert torch.equal(module.state_dict()[name], tensor.to(dtype or torch.float32))
