"""Weights that find no room: streamed blocks draw what resident ones draw, and what does not fit is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch

from star_core import load
from star_core.generate import generate
from star_core.memory import decoding_bytes, drawing_bytes
from star_core.request import Options
from star_core.sampling import PictureSeed
from star_core.star import Star
from star_core.streaming import (
    PLACES,
    Parts,
    least_room,
    stream_weights,
    streamed_count,
    tensor_bytes,
    visiting,
)
from star_core.transformer import Transformer

CPU = torch.device("cpu")


@pytest.fixture
def deep(paired: object) -> Transformer:
    """A transformer of five blocks, made of the tiny one's two with other weights in each."""
    config = dataclasses.replace(paired.config.transformer, depth=5)
    transformer = Transformer(config)
    transformer.load_state_dict(
        {
            name: torch.randn(t.shape, generator=torch.Generator().manual_seed(i)) * 0.2 + (t.ndim == 4)
            for i, (name, t) in enumerate(transformer.state_dict().items())
        }
    )
    return transformer.requires_grad_(False).eval()


def matrices(transformer: Transformer) -> int:
    block = transformer.blocks[0]
    kept = block.cross_attn.kv.weight
    return sum(p.nbytes for p in block.parameters() if p.ndim == 2 and p is not kept)


@pytest.mark.parametrize("kind", ["plain", "official"])
@pytest.mark.parametrize(("more", "number"), [(0, 5), (1, 4), (2.9, 4)])
def test_streamed_blocks_draw_what_resident_ones_draw(
    deep: Transformer,
    paired: object,
    ask: Callable,
    make_schedule: Callable,
    kind: str,
    more: float,
    number: int,
):
    request = ask([1, 2], make_schedule(kind), seeds=[PictureSeed(1), PictureSeed(1, 1)])
    expected = list(generate(deep, paired.sampler, paired.quantizer, request, CPU))
    small = copy.deepcopy(deep)
    streamed = stream_weights(small, least_room(deep) + int(more * matrices(deep)), CPU)
    assert streamed is not None
    assert streamed.number == number
    for _ in range(2):
        steps = list(generate(small, paired.sampler, paired.quantizer, request, CPU))
        for ours, theirs in zip(steps, expected, strict=True):
            assert torch.equal(ours.tokens, theirs.tokens)
            assert torch.equal(ours.f_hat, theirs.f_hat)
    assert streamed.copied > 0


def test_what_is_there_takes_no_more_than_the_room_given(deep: Transformer):
    for room in range(least_room(deep), tensor_bytes(deep) + 1, matrices(deep) // 3):
        small = copy.deepcopy(deep)
        stream_weights(small, room, CPU)
        places = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in small.parameters()}
        assert sum(places.values()) <= room


def test_nothing_is_streamed_where_all_fits(deep: Transformer):
    assert stream_weights(deep, tensor_bytes(deep), CPU) is None
    assert not deep.blocks[0]._forward_pre_hooks


def test_every_scale_reads_the_streamed_weights_once(
    deep: Transformer, paired: object, ask: Callable, make_schedule: Callable
):
    streamed = stream_weights(deep, least_room(deep) + matrices(deep), CPU)
    assert streamed is not None
    assert streamed.number == 4
    request = ask([1], make_schedule("plain"), seeds=[PictureSeed(1)])
    counts = []
    for _ in range(3):
        before = streamed.copied
        list(generate(deep, paired.sampler, paired.quantizer, request, CPU))
        counts.append((streamed.copied - before) / matrices(deep))
    # The last scale has the first block of the next picture copied, which the first picture had to fetch.
    assert counts == [4 * len(paired.maps) + 1, 4 * len(paired.maps), 4 * len(paired.maps)]


def test_too_little_room_is_refused_naming_the_least(deep: Transformer):
    with pytest.raises(ValueError, match=f"{least_room(deep)} at least"):
        streamed_count(deep, least_room(deep) - 1)
    assert streamed_count(deep, least_room(deep)) == len(deep.blocks)
    assert least_room(deep) == tensor_bytes(deep) - (len(deep.blocks) - PLACES) * matrices(deep)


@pytest.fixture(scope="module")
def shipped() -> Star:
    return load()


def parts(star: Star) -> Parts:
    return Parts(star.config, star.transformer, star.causal_sampler, star.vqvae, star.text_encoder)


def test_a_model_fits_into_what_it_says_is_the_least(shipped: Star):
    expected = shipped.draw(["rocket"], options=Options(seed=3))
    other = load()
    with pytest.raises(ValueError, match="GB is the least that works"):
        parts(other).fit_into(parts(other).least() - 1, CPU)
    streamed = parts(other).fit_into(parts(other).least(), CPU)
    assert streamed is not None
    small = Star(
        other.config,
        other.transformer,
        other.causal_sampler,
        other.vqvae,
        other.text_encoder,
        CPU,
        short_of_memory=True,
    )
    *_, step = small.generate(["rocket"], options=Options(seed=3))
    assert torch.equal(small.decode(step.f_hat, sliced=False), expected)
    torch.testing.assert_close(small.decode(step.f_hat), expected, atol=1e-4, rtol=0)


def test_the_least_counts_what_drawing_and_decoding_take(shipped: Star):
    config = shipped.config
    drawing = drawing_bytes(config.transformer, config.maps, 1, guided=True, itemsize=4)
    decoding = decoding_bytes(config.vqvae, config.maps[-1], 1, itemsize=4)
    assert parts(shipped).least() > max(drawing, decoding) + least_room(shipped.transformer)


def test_a_visitor_goes_home(shipped: Star):
    encoder = shipped.text_encoder
    before = {name: t.data_ptr() for name, t in encoder.state_dict().items()}
    with visiting(encoder, CPU):
        for tensor in encoder.parameters():
            tensor.data = tensor.data.clone()
    assert {name: t.data_ptr() for name, t in encoder.state_dict().items()} == before


def test_a_limit_is_for_a_gpu_alone():
    with pytest.raises(ValueError, match="gpu_memory is for a GPU"):
        load(gpu_memory=6_000_000_000)
