"""Models with 8-bit weights: which layers have them, what stays exact, and that nobody gets them unasked."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from star_core import eight_bit, pictures, star
from star_core.checkpoint import Networks, load_networks, save_networks
from star_core.eight_bit import FORMATS, check_eight_bit, quantize_linears
from star_core.request import Options
from star_core.star import load

both = pytest.mark.parametrize("name", FORMATS)
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def rounded_layers(model: nn.Module, name: str) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, FORMATS[name])]


@both
def test_heads_and_everything_but_linear_layers_stay_exact(paired: object, name: str):
    model = copy.deepcopy(paired.transformer)
    before = sum(p.numel() for p in model.parameters())
    quantize_linears(model, name)
    kept = dict(model.named_parameters())
    assert isinstance(model.head, nn.Linear)
    assert torch.equal(kept["head.weight"], paired.transformer.head.weight)
    assert torch.equal(kept["blocks.0.attn.log_scale"], paired.transformer.blocks[0].attn.log_scale)
    assert not [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("head")]
    rounded = rounded_layers(model, name)
    assert all(m.weight.dtype == DTYPES[name] for m in rounded)
    assert sum(m.weight.numel() for m in rounded) > 0.8 * before


@both
def test_a_model_with_8_bit_weights_draws_a_picture_like_the_exact_one(
    paired: object, ask: Callable, make_schedule: Callable, name: str
):
    model = dataclasses.replace(
        paired,
        transformer=quantize_linears(copy.deepcopy(paired.transformer), name),
        sampler=quantize_linears(copy.deepcopy(paired.sampler), name),
    )
    schedule = make_schedule("official", guidance=0.0)
    exact, ours = paired.run(ask([1, 2], schedule)), model.run(ask([1, 2], schedule))
    assert torch.equal(exact[0].tokens, ours[0].tokens)
    same = torch.cat([(a.tokens == b.tokens).float().flatten() for a, b in zip(exact, ours, strict=True)])
    assert 0.4 < same.mean() < 1


@both
def test_nobody_gets_8_bits_unasked(name: str):
    star, small = load(), load(eight_bit=name)
    assert not rounded_layers(star.transformer, name)
    assert rounded_layers(small.transformer, name)
    assert rounded_layers(small.causal_sampler, name)
    assert not rounded_layers(small.text_encoder, name)
    coarse = Options(seed=3, stop=6)
    exact, rough = (model.draw(["red heart"], options=coarse) for model in (star, small))
    assert 0 < (exact - rough).abs().mean() < 0.2


@both
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells which files are mapped")
def test_nothing_of_the_whole_weights_stays_in_memory(paired: object, tmp_path: Path, name: str):
    path = tmp_path / "star.safetensors"
    save_networks(path, paired.config, Networks(paired.config.transformer))
    _, exact = load_networks(path)
    assert str(path) in Path("/proc/self/maps").read_text(), "float32 weights stay in their file"
    del exact
    gc.collect()
    _, small = load_networks(path, eight_bit=name)
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert rounded_layers(small, name)


def test_a_format_that_cannot_be_had_is_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(star, "load_networks", lambda *args, **options: pytest.fail("gigabytes were read"))
    with pytest.raises(ValueError, match="int8 or fp8, not 'int4'"):
        load(eight_bit="int4")
    with pytest.raises(ValueError, match="choose int8 or bfloat16"):
        load(eight_bit="fp8", device="mps")


def test_the_formats_are_those_of_a_recipe():
    assert {*FORMATS, None} == {*pictures.EIGHT_BIT}


def test_fp8_without_products_is_warned_of_once_and_nothing_else_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    with caplog.at_level(logging.WARNING):
        load(eight_bit="int8")
        load()
        assert not caplog.records
        load(eight_bit="fp8")
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 1
    assert "slow on cpu" in warned[0]
    caplog.clear()
    monkeypatch.setattr(eight_bit, "has_products", lambda device: True)
    check_eight_bit("fp8", torch.device("cpu"))
    assert not caplog.records


def test_fp8_is_refused_where_no_tensor_can_hold_it():
    with pytest.raises(ValueError, match="choose int8 or bfloat16"):
        check_eight_bit("fp8", torch.device("mps"))
    check_eight_bit("int8", torch.device("mps"))
