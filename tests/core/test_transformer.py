"""The transformer and its attention: caches, rows, text, positions, weights that a host may stream or cast."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from star_core.attention import MAX_LOG_SCALE, LayerCache, SelfAttention
from star_core.config import TokenMap, token_count
from star_core.rope import axial_rope
from star_core.text_encoder import TextStates
from star_core.transformer import Transformer, norm

CPU = torch.device("cpu")
RECTANGLES: tuple[TokenMap, ...] = ((1, 1), (2, 3), (3, 4), (4, 6))
SQUARES: tuple[TokenMap, ...] = ((1, 1), (2, 2), (3, 3), (4, 4))
WIDE_START: tuple[TokenMap, ...] = ((1, 2), (2, 3), (2, 6))


def inputs(maps: tuple[TokenMap, ...], rows: int, seed: int = 0) -> Tensor:
    length = token_count(maps) - token_count(maps[:1])
    return torch.randn(rows, length, 8, generator=torch.Generator().manual_seed(seed))


def teacher(transformer: Transformer, x: Tensor, states: TextStates, maps: tuple, **options: Tensor) -> Tensor:
    keys = transformer.text_keys(states.hidden, states.mask)
    return transformer(x, states.pooled, keys, maps, **options)


def scale_by_scale(transformer: Transformer, x: Tensor, states: TextStates, maps: tuple) -> Tensor:
    """Return the features of all scales, each seen alone after its cached forerunners."""
    keys = transformer.text_keys(states.hidden, states.mask)
    cache = transformer.new_cache(x.shape[0], token_count(maps[:-1]), CPU)
    rotation = transformer.rotations(maps)
    features, place = [], 0
    for scale, (height, width) in enumerate(maps):
        n = height * width
        if scale == 0:
            entered = transformer.start_token(states.pooled).expand(-1, n, -1)
        else:
            begin = place - token_count(maps[:1])
            entered = transformer.scale_input(x[:, begin : begin + n], scale)
        rows = rotation.rows(place, place + n)
        features.append(transformer.features(entered, rows, keys, cache=cache))
        place += n
    return torch.cat(features, dim=1)


@pytest.mark.parametrize("maps", [RECTANGLES, SQUARES, WIDE_START], ids=str)
def test_a_cached_forward_equals_an_uncached_one(tiny: Callable, texts: Callable, maps: tuple):
    transformer = tiny(maps=maps).transformer
    x, states = inputs(maps, 3), texts(1, 2, 3)
    at_once = teacher(transformer, x, states, maps)
    assert at_once.shape == (3, token_count(maps), 64)
    torch.testing.assert_close(scale_by_scale(transformer, x, states, maps), at_once, atol=2e-5, rtol=1e-5)


def test_the_last_scale_is_never_stored():
    cache = LayerCache(torch.empty(1, 1, 3, 4), torch.empty(1, 1, 3, 4))
    parts = [torch.randn(1, 1, n, 4) for n in (1, 2, 5)]
    for part in parts:
        keys, values = cache.extend(part, -part)
    assert torch.equal(keys, torch.cat(parts, dim=2))
    assert torch.equal(values, -keys)
    assert cache.filled == 3
    assert cache.keys.shape == (1, 1, 3, 4)


def test_a_token_sees_scales_up_to_its_own_and_none_behind(paired: object, texts: Callable):
    x, states = inputs(RECTANGLES, 1), texts(1)
    before = teacher(paired.transformer, x, states, RECTANGLES)
    changed = x.clone()
    changed[:, 6:18] += 1
    after = teacher(paired.transformer, changed, states, RECTANGLES)
    moved = (after - before).abs().amax(dim=(0, 2)) > 1e-6
    assert not moved[:7].any()
    assert moved[7:].all()


def test_any_token_of_a_scale_moves_its_whole_scale(paired: object, texts: Callable):
    x, states = inputs(RECTANGLES, 1), texts(1)
    changed = x.clone()
    changed[:, 0] += 1
    moved = teacher(paired.transformer, changed, states, RECTANGLES) - teacher(
        paired.transformer, x, states, RECTANGLES
    )
    assert (moved[:, 1:7].abs().amax(dim=2) > 1e-6).all()


def test_rows_of_a_batch_never_touch_each_other(model: object, texts: Callable):
    transformer = model.transformer
    x = inputs(RECTANGLES, 3)
    together = teacher(transformer, x, texts(1, 2, 3), RECTANGLES)
    for row, name in enumerate((1, 2, 3)):
        alone = teacher(transformer, x[row : row + 1], texts(name), RECTANGLES)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    other = x.clone()
    other[1] = -other[1]
    beside = teacher(transformer, other, texts(1, 9, 3), RECTANGLES)
    torch.testing.assert_close(beside[[0, 2]], together[[0, 2]], atol=1e-6, rtol=1e-6)
    assert (beside[1] - together[1]).abs().max() > 0.1


def test_half_as_many_texts_are_shared_by_rows_and_their_twins(paired: object, texts: Callable):
    transformer = paired.transformer
    x = inputs(RECTANGLES, 2)
    rows, pooled = x.repeat(2, 1, 1), torch.cat([texts(1, 2).pooled, texts(9, 9).pooled])
    short = transformer.text_keys(texts(1, 2).hidden, texts(1, 2).mask)
    long = transformer.text_keys(texts(1, 2, 1, 2).hidden, texts(1, 2, 1, 2).mask)
    shared = transformer(rows, pooled, short, RECTANGLES)
    # The conditional rows see exactly what they would alone; the twins get the read that their row made.
    alone = transformer(x, texts(1, 2).pooled, short, RECTANGLES)
    torch.testing.assert_close(shared[:2], alone, atol=1e-5, rtol=1e-5)
    own = transformer(rows, pooled, long, RECTANGLES)
    assert (shared[2:] - own[2:]).abs().max() > 1e-3
    same_start = transformer(rows, texts(1, 2, 1, 2).pooled, short, RECTANGLES)
    torch.testing.assert_close(same_start[2:], same_start[:2])


def test_a_twin_gets_its_rows_cross_attention_and_not_another_rows(paired: object, texts: Callable):
    transformer = paired.transformer
    rows = inputs(RECTANGLES, 2).repeat(2, 1, 1)
    pooled = torch.cat([texts(1, 2).pooled, texts(9, 9).pooled])
    states, changed = texts(1, 2), texts(1, 3)
    before = transformer(rows, pooled, transformer.text_keys(states.hidden, states.mask), RECTANGLES)
    after = transformer(rows, pooled, transformer.text_keys(changed.hidden, changed.mask), RECTANGLES)
    moved = (after - before).abs().amax(dim=(1, 2))
    assert moved[[0, 2]].max() < 1e-6
    assert moved[[1, 3]].min() > 1e-3


def test_padding_of_a_text_is_never_read(model: object, texts: Callable):
    x, states = inputs(RECTANGLES, 2), texts(1, 2)
    filled = states.hidden.masked_fill(~states.mask.unsqueeze(-1), 1e4)
    noisy = TextStates(filled, states.mask, states.pooled)
    expected = teacher(model.transformer, x, states, RECTANGLES)
    torch.testing.assert_close(teacher(model.transformer, x, noisy, RECTANGLES), expected)


def test_both_states_of_a_text_matter(model: object, texts: Callable):
    x, states, other = inputs(RECTANGLES, 1), texts(1), texts(4)
    expected = teacher(model.transformer, x, states, RECTANGLES)
    for changed in (
        TextStates(other.hidden, states.mask, states.pooled),
        TextStates(states.hidden, states.mask, other.pooled),
        TextStates(states.hidden, other.mask, states.pooled),
    ):
        assert (teacher(model.transformer, x, changed, RECTANGLES) - expected).abs().max() > 1e-2


def test_the_start_token_is_text_plus_position_plus_first_scale(paired: object, texts: Callable):
    transformer, pooled = paired.transformer, texts(1, 2).pooled
    expected = (
        transformer.text_proj(pooled) + transformer.start_position[0, 0] + transformer.scale_embed.weight[0]
    )
    torch.testing.assert_close(transformer.start_token(pooled), expected.unsqueeze(1))


def test_a_scales_input_is_its_embedded_codes_plus_its_scale(paired: object):
    transformer = paired.transformer
    codes = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = transformer.word_embed(codes) + transformer.scale_embed.weight[2]
    torch.testing.assert_close(transformer.scale_input(codes, 2), expected)


def test_keeping_all_positions_changes_nothing(paired: object, texts: Callable):
    x, states = inputs(RECTANGLES, 2), texts(1, 2)
    every = torch.arange(token_count(RECTANGLES))
    torch.testing.assert_close(
        teacher(paired.transformer, x, states, RECTANGLES, positions=every),
        teacher(paired.transformer, x, states, RECTANGLES),
    )


def test_keeping_whole_scales_equals_a_picture_that_ends_there(paired: object, texts: Callable):
    x, states = inputs(RECTANGLES, 2), texts(1, 2)
    first_three = torch.arange(token_count(RECTANGLES[:3]))
    kept = teacher(paired.transformer, x, states, RECTANGLES, positions=first_three)
    whole = teacher(paired.transformer, x, states, RECTANGLES)
    torch.testing.assert_close(kept, whole[:, : len(first_three)], atol=1e-5, rtol=1e-5)


def test_positions_that_are_left_out_are_not_seen(paired: object, texts: Callable):
    x, states = inputs(RECTANGLES, 1), texts(1)
    window = torch.tensor([0, 1, 2, 3, 4, 5, 6, 8, 9, 12, 13, 20, 21, 26, 27])
    before = teacher(paired.transformer, x, states, RECTANGLES, positions=window)
    assert before.shape == (1, len(window), 64)
    changed = x.clone()
    left_out = torch.tensor([p for p in range(43) if p not in window.tolist()])
    changed[:, left_out - 1] += 5
    torch.testing.assert_close(
        teacher(paired.transformer, changed, states, RECTANGLES, positions=window), before
    )


def test_logits_are_float32_of_the_normalised_features(paired: object):
    features = 5 * torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)) + 2
    expected = paired.transformer.head(nn.functional.layer_norm(features, (64,), eps=1e-6))
    logits = paired.transformer.logits(features)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(norm(features).mean(-1), torch.zeros(2, 3), atol=1e-6, rtol=0)


def test_attention_does_not_see_the_length_of_queries_and_keys(paired: object):
    attention = copy.deepcopy(paired.transformer.blocks[0].attn)
    x = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0))
    rotation = axial_rope((3, 4), 32, 1e4, 64.0)
    expected = attention(x, rotation)
    with torch.no_grad():
        attention.qkv.weight[:128] *= 7
        attention.q_bias *= 7
    torch.testing.assert_close(attention(x, rotation), expected, atol=1e-5, rtol=1e-5)


def test_the_learned_scale_of_attention_is_at_most_100():
    attention = SelfAttention(16, 2)
    x, rotation = (
        torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0)),
        axial_rope((2, 3), 8, 1e4, 64),
    )
    with torch.no_grad():
        attention.log_scale.fill_(MAX_LOG_SCALE)
        at_most = attention(x, rotation)
        attention.log_scale.fill_(50.0)
        torch.testing.assert_close(attention(x, rotation), at_most)


def test_fresh_weights_depend_on_the_generator_alone_and_begin_near_indifference(paired: object):
    fresh = [Transformer(paired.config.transformer) for _ in range(3)]
    for module, seed in zip(fresh, (0, 0, 1), strict=True):
        module.initialise(torch.Generator().manual_seed(seed))
    states = [module.state_dict() for module in fresh]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])
    assert all(torch.isfinite(value).all() for value in states[0].values())
    logits = fresh[0].logits(torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)))
    assert logits.abs().max() < 0.1


def counting_operations() -> types.SimpleNamespace:
    """Return a namespace of layers that count how often they are called."""
    calls: dict[str, int] = {}

    def counted(name: str) -> type[nn.Module]:
        def forward(self: nn.Module, *args: object) -> object:
            calls[name] = calls.get(name, 0) + 1
            return getattr(nn, name).forward(self, *args)

        return type(name, (getattr(nn, name),), {"forward": forward, "from_the_host": True})

    names = ("Linear", "Embedding", "Conv2d", "GroupNorm")
    return types.SimpleNamespace(calls=calls, **{name: counted(name) for name in names})


def test_every_layer_comes_from_the_operations_namespace(tiny: Callable, texts: Callable):
    operations = counting_operations()
    model = tiny("paired", operations=operations)
    for part in (model.transformer, model.sampler, model.vqvae):
        for name, module in part.named_modules():
            layer = isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d | nn.GroupNorm | nn.LayerNorm)
            assert not layer or hasattr(module, "from_the_host"), f"{name} is not the host's"
    # Per block: q k v, out, cross q, cross k v, cross out, two of the feed-forward; and the two embeddings.
    teacher(model.transformer, inputs(RECTANGLES, 1), texts(1), RECTANGLES)
    assert operations.calls == {"Linear": 2 * 7 + 2, "Embedding": 2}


def test_parameters_outside_layers_are_only_those_that_are_cast_at_use(paired: object):
    loose = {
        name.split(".")[-1]
        for part in (paired.transformer, paired.sampler, paired.vqvae)
        for name, _ in part.named_parameters()
        if name.split(".")[-1] not in ("weight", "bias")
    }
    assert loose == {"start_position", "q_bias", "v_bias", "log_scale"}


def test_the_transformer_runs_in_bfloat16_with_log_scales_in_float32(paired: object, texts: Callable):
    coarse = copy.deepcopy(paired.transformer).bfloat16()
    for name, parameter in coarse.named_parameters():
        if name.endswith("log_scale"):
            parameter.data = parameter.data.float()
    x, states = inputs(RECTANGLES, 2), texts(1, 2)
    features = teacher(coarse, x, states, RECTANGLES)
    assert features.dtype == torch.bfloat16
    exact = teacher(paired.transformer, x, states, RECTANGLES)
    assert (features.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    logits = coarse.logits(features)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    by_scale = scale_by_scale(coarse, x, states, RECTANGLES)
    assert (by_scale.float() - features.float()).abs().mean() < 0.05 * exact.abs().mean()


def test_a_forward_does_not_change_its_inputs_or_weights(model: object, texts: Callable):
    x, states = inputs(RECTANGLES, 2), texts(1, 2)
    kept = [t.clone() for t in (x, states.hidden, states.mask, states.pooled)]
    weights = {name: value.clone() for name, value in model.transformer.state_dict().items()}
    teacher(model.transformer, x, states, RECTANGLES)
    scale_by_scale(model.transformer, x, states, RECTANGLES)
    for before, after in zip(kept, (x, states.hidden, states.mask, states.pooled), strict=True):
        assert torch.equal(before, after)
    for name, value in model.transformer.state_dict().items():
        assert torch.equal(value, weights[name])
