"""Half precision on a CPU without products for it: the layers' numbers, who gets them, who does not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core import Options, attention, eight_bit, load, slices, upcast, vqvae
from star_core.checkpoint import load_networks, operations_for
from star_core.kernels import cpu, references_only
from star_core.model_files import SHIPPED
from star_core.text_encoder import load_text_encoder
from star_core.transformer import expanded
from star_core.upcast import HALVES, Conv2d, Linear, multiplies, needs_upcast, upcast_linears

CPU, GPU = torch.device("cpu"), torch.device("cuda")
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def say(monkeypatch: pytest.MonkeyPatch, has_products: bool) -> None:
    """Let the processor be one that multiplies halves, or none."""
    monkeypatch.setattr(upcast, "multiplies", lambda half: has_products)


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies no halves."""
    say(monkeypatch, False)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules()}


def test_halves_are_made_wide_on_a_cpu_that_does_not_multiply_them_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(upcast, "multiplies", lambda half: half == torch.bfloat16)
    assert not needs_upcast(torch.bfloat16, CPU)
    assert needs_upcast(torch.float16, CPU)
    assert operations_for(torch.float16, CPU) is upcast
    assert operations_for(torch.bfloat16, CPU) is nn
    assert operations_for(torch.float32, CPU, keep_halves=True) is upcast
    for dtype, device in ((torch.float32, CPU), (torch.float16, GPU), (torch.float16, torch.device("meta"))):
        assert not needs_upcast(dtype, device)
        assert operations_for(dtype, device) is nn


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was found out of the processor, forgotten before and after."""
    multiplies.cache_clear()
    yield
    multiplies.cache_clear()


@halves
def test_the_processor_is_asked_once_by_a_name_that_pytorch_knows(
    forgotten: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    answers = [True, False]
    monkeypatch.setattr(torch.ops.mkldnn, HALVES[dtype], lambda: answers.pop())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert not multiplies(dtype)
    assert not multiplies(dtype), "remembered"
    multiplies.cache_clear()
    assert multiplies(dtype)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    multiplies.cache_clear()
    assert not multiplies(dtype), "without oneDNN no halves are multiplied"


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes in which PyTorch is asked for products and convolutions."""
    seen: list[torch.dtype] = []

    def counted(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *args: object, **kwargs: object) -> Tensor:
            seen.append(x.dtype)
            return compute(x, *args, **kwargs)

        return run

    for name in ("linear", "conv2d"):
        monkeypatch.setattr(F, name, counted(getattr(F, name)))
    return seen


@halves
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_float32_s_rounded_once(old: None, dtype: torch.dtype, bias: bool):
    layer = Linear(64, 48, bias=bias).to(dtype).requires_grad_(False)
    for shape in ((64,), (1, 64), (3, 7, 64)):
        x = normal(1, *shape, dtype=dtype)
        wide = F.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None)
        assert torch.equal(layer(x), wide.to(dtype))
        assert torch.equal(layer.expanded(x), F.gelu(wide, approximate="tanh").to(dtype))


@halves
def test_a_convolution_is_float32_s_rounded_once(old: None, dtype: torch.dtype):
    layer = Conv2d(8, 6, 3, padding=1, stride=2).to(dtype).requires_grad_(False)
    x = normal(1, 2, 8, 10, 12, dtype=dtype).contiguous(memory_format=vqvae.LAYOUT)
    wide = F.conv2d(x.float(), layer.weight.float(), layer.bias.float(), stride=2, padding=1)
    made = layer(x)
    assert torch.equal(made, wide.to(dtype))
    assert made.is_contiguous(memory_format=vqvae.LAYOUT)
    mirrored = Conv2d(8, 6, 3, padding=1, padding_mode="reflect", bias=False).to(dtype)
    padded = F.pad(x.float(), (1, 1, 1, 1), mode="reflect")
    assert torch.equal(mirrored(x), F.conv2d(padded, mirrored.weight.float()).to(dtype))


def test_elsewhere_the_layers_multiply_as_torch_s_do(multiplied: list[torch.dtype]):
    for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "meta"), (torch.float16, "meta")):
        Linear(16, 8).to(device, dtype)(torch.ones(5, 16, device=device, dtype=dtype))
        Conv2d(4, 4, 3).to(device, dtype)(torch.ones(1, 4, 5, 5, device=device, dtype=dtype))
        assert multiplied == [dtype, dtype]
        multiplied.clear()


@pytest.mark.parametrize("kind", ["upcast", *eight_bit.FORMATS])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_compiled_graph_is_not_broken(kind: str, dtype: torch.dtype):
    layer = Linear(16, 8) if kind == "upcast" else eight_bit.FORMATS[kind](nn.Linear(16, 8))
    model = nn.Sequential(layer, nn.Unflatten(1, (2, 2, 2)), Conv2d(2, 2, 1).to(dtype)).requires_grad_(False)
    if kind == "upcast":
        model.to(dtype)
    x = normal(1, 5, 16, dtype=dtype)
    torch.compiler.reset()  # it compiles one function for eight models at most
    with torch.no_grad():
        whole = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(whole(x), model(x))


def test_a_gelu_is_read_from_the_sums_before_they_are_rounded(old: None):
    layer, x = Linear(256, 1024).bfloat16().requires_grad_(False), normal(1, 3, 50, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        fused = expanded(x, layer)
        with references_only():
            plain = expanded(x, layer)
    exact = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()), approximate="tanh")
    assert (fused.double() - exact).abs().mean() < (plain.double() - exact).abs().mean()
    layer.register_forward_hook(lambda *_: None)
    assert cpu.expanded(x, layer) is None, "a layer with a hook is left to it"


@pytest.mark.parametrize("mask", ["none", "truth values", "added"])
def test_attention_to_float16_is_float32_s_rounded_once(old: None, mask: str):
    q, k, v = (normal(seed, 2, 3, n, 16, dtype=torch.float16) for seed, n in ((1, 5), (2, 9), (3, 9)))
    seen = normal(4, 2, 1, 1, 9) > 0
    masks = {"none": None, "truth values": seen, "added": torch.zeros(2, 1, 1, 9).half().masked_fill(~seen, -9)}
    with torch.no_grad():
        made = attention.attended(q, k, v, masks[mask])
    given = masks[mask].float() if mask == "added" else masks[mask]
    wide = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=given, scale=1.0)
    assert torch.equal(made, wide.half())
    assert cpu.attended(q.bfloat16(), k.bfloat16(), v.bfloat16(), None) is None
    assert cpu.attended(q.float(), k.float(), v.float(), None) is None


def test_somebody_else_s_plain_layers_become_ours_with_all_they_have():
    class Theirs(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"inner": nn.Linear(4, 4)}), Theirs(4, 4)).eval()
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    upcast_linears(model)
    assert [type(m) for m in (model[0], model[1]["inner"], model[2])] == [Linear, Linear, Theirs]
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    assert not model[0].training


@halves
def test_a_model_in_half_precision_multiplies_in_float32_alone(
    old: None, dtype: torch.dtype, multiplied: list[torch.dtype]
):
    star = load(dtype=dtype, text_dtype=dtype)
    for part in (star.transformer, star.causal_sampler, star.vqvae, star.text_encoder):
        assert Linear in kinds(part) or Conv2d in kinds(part)
        assert not {nn.Linear, nn.Conv2d} & kinds(part)
    assert star.transformer.head.weight.dtype == star.vqvae.decoder.conv_in.weight.dtype == dtype

    picture = star.draw(["a red apple"])
    assert len(multiplied) > 500
    assert set(multiplied) == {torch.float32}
    assert float((picture.amax(dim=(2, 3)) - picture.amin(dim=(2, 3))).max()) > 0.5, "there is something on it"


def test_a_processor_with_products_gets_torch_s_layers(monkeypatch: pytest.MonkeyPatch):
    say(monkeypatch, True)
    star = load(dtype=torch.bfloat16, text_dtype=torch.bfloat16)
    found = kinds(star.transformer) | kinds(star.vqvae) | kinds(star.text_encoder)
    assert {nn.Linear, nn.Conv2d} <= found
    assert not {Linear, Conv2d} & found


def test_float32_gets_torch_s_layers(old: None):
    star = load()
    assert not {Linear, Conv2d} & (kinds(star.transformer) | kinds(star.vqvae))


def test_a_float32_text_encoder_s_halves_stay_in_their_file_unasked():
    wide = load_text_encoder(SHIPPED / "text_encoder", SHIPPED / "tokenizer")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    for star in (load(), load(dtype=torch.bfloat16), load(eight_bit="int8")):
        halves = [name for name, p in star.text_encoder.named_parameters() if p.dtype == torch.float16]
        assert sum("weight" in name for name in halves) == len(halves) > 6
        ours, theirs = star.encode_text(["a red apple", ""]), wide.encode(["a red apple", ""])
        assert ours.hidden.dtype == torch.float32
        assert torch.equal(ours.hidden, theirs.hidden)
        assert torch.equal(ours.pooled, theirs.pooled)
    asked = load(text_dtype=torch.bfloat16).text_encoder
    assert {p.dtype for p in asked.parameters()} == {torch.bfloat16}


def test_in_little_memory_halves_stay_in_their_files_and_the_picture_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
):
    plain, small = load(), load(low_memory=True)
    assert small.transformer.dtype == small.vqvae.dtype == torch.float32
    assert small.transformer.head.weight.dtype == small.vqvae.decoder.conv_in.weight.dtype == torch.float16
    found = (
        kinds(small.transformer) | kinds(small.causal_sampler) | kinds(small.vqvae) | kinds(small.text_encoder)
    )
    assert not {nn.Linear, nn.Conv2d} & found
    steps = [list(star.generate(["a red apple"], options=Options(seed=3))) for star in (plain, small)]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(*steps, strict=True))
    f_hat = steps[0][-1].f_hat
    whole = plain.decode(f_hat)
    torch.testing.assert_close(small.decode(f_hat, sliced=False), whole, atol=1e-5, rtol=0)
    strips, original = [], slices.norm_silu_conv
    monkeypatch.setitem(slices.STRIP, "cpu", 64)
    monkeypatch.setattr(vqvae, "norm_silu_conv", lambda *a, **k: strips.append(1) or original(*a, **k))
    torch.testing.assert_close(small.decode(f_hat), whole, atol=1e-5, rtol=0)
    assert strips


@halves
def test_a_text_encoder_s_halves_stay_and_its_states_are_the_same(dtype: torch.dtype, tmp_path: Path):
    # Rows of words and positions are added up: if both stayed halves, so would their sum.
    shipped = load_text_encoder(SHIPPED / "text_encoder", SHIPPED / "tokenizer")
    shutil.copytree(SHIPPED / "text_encoder", tmp_path / "text_encoder")
    shipped.model.to(dtype).save_pretrained(tmp_path / "text_encoder")
    folder = tmp_path / "text_encoder", SHIPPED / "tokenizer"
    plain, small = load_text_encoder(*folder), load_text_encoder(*folder, keep_halves=True)
    kept = [
        p
        for name, p in small.named_parameters()
        if name.endswith("weight") and p.ndim > 1 and "pos" not in name
    ]
    assert {p.dtype for p in kept} == {dtype}
    states = [encoder.encode(["a red apple", ""]) for encoder in (plain, small)]
    assert torch.equal(states[0].hidden, states[1].hidden)
    assert torch.equal(states[0].pooled, states[1].pooled)


def test_halves_are_kept_on_a_cpu_alone():
    with pytest.raises(AssertionError, match="mapped into a CPU's memory"):
        load_networks(SHIPPED / "star.safetensors", operations=upcast, device="meta", keep_halves=True)


def test_what_is_kept_exact_is_made_wide_all_the_same():
    small = load(low_memory=True)
    exact = [*small.vqvae.quantizer.parameters(), small.transformer.start_position]
    exact += [p for name, p in small.transformer.named_parameters() if name.endswith(("bias", "log_scale"))]
    assert {p.dtype for p in exact} == {torch.float32}


def test_in_little_memory_a_batch_of_pictures_is_encoded_as_ever():
    plain, small = load(), load(low_memory=True)
    pictures = normal(1, 1, 3, 64, 64).sigmoid()
    for ours, theirs in zip(small.encode_image(pictures), plain.encode_image(pictures), strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)


def test_in_little_memory_8_bit_weights_are_the_same():
    plain, small = load(eight_bit="int8"), load(eight_bit="int8", low_memory=True)
    ours, theirs = small.transformer.blocks[0].ffn.expand, plain.transformer.blocks[0].ffn.expand
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.scale, theirs.scale)
    assert small.transformer.head.weight.dtype == torch.float16


def test_little_memory_is_a_cpu_s():
    with pytest.raises(ValueError, match="low_memory is for a CPU"):
        load(low_memory=True, device="meta")
