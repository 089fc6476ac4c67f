"""Configurations: what they refuse, what they carry, which sizes a model can draw."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from star_core.config import (
    MAP_AREA_TOLERANCE,
    PRESETS,
    StarConfig,
    TransformerConfig,
    VQVAEConfig,
    check_maps,
    maps_for_size,
    preset,
    square_maps,
    token_count,
    untrained_sizes,
)


@pytest.fixture
def config(tiny: Callable) -> StarConfig:
    return tiny().config


def with_maps(config: StarConfig, maps: tuple) -> StarConfig:
    transformer = dataclasses.replace(config.transformer, scales=len(maps))
    return dataclasses.replace(config, transformer=transformer, maps=maps)


def test_a_configuration_survives_its_json(config: StarConfig):
    assert StarConfig.from_json(config.to_json()) == config
    for released in PRESETS.values():
        assert StarConfig.from_json(released.to_json()) == released


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"star"',
        "{}",
        '{"name": "x"}',
        '{"name": "x", "transformer": [], "vqvae": {}, "maps": [], "schedule": ""}',
    ],
)
def test_foreign_text_is_no_configuration(text: str):
    with pytest.raises(ValueError, match="not a STAR configuration"):
        StarConfig.from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("maps", [[1], [2]]),
        ("maps", [[1, 1, 1]]),
        ("maps", 4),
        ("maps", [["a", "b"], [2, 2]]),
        ("transformer", {"depth": 3}),
        ("transformer", {"surprise": 3}),
        ("vqvae", {"norm_groups": 0}),
        ("vqvae", {"channel_multipliers": []}),
        ("vqvae", None),
    ],
)
def test_a_damaged_configuration_is_a_value_error(config: StarConfig, field: str, value: object):
    record = json.loads(config.to_json())
    record[field] = {**record[field], **value} if isinstance(value, dict) and "depth" not in value else value
    with pytest.raises(ValueError, match="not a STAR configuration"):
        StarConfig.from_json(json.dumps(record))


def test_a_missing_field_is_named(config: StarConfig):
    record = json.loads(config.to_json())
    del record["maps"]
    with pytest.raises(ValueError, match="no field 'maps'"):
        StarConfig.from_json(json.dumps(record))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be positive, got 0"),
        ({"width": 65}, "width 65 cannot be split into 2 heads"),
        ({"width": 12}, "divisible by 4, got 12/2 = 6"),
        ({"rope_theta": 0.0}, "rope_theta must be positive, got 0.0"),
        ({"rope_extent": -1.0}, "rope_extent must be positive, got -1.0"),
        ({"sampler_depth": -1}, "sampler_depth cannot be -1"),
        ({"cross_attention": "broadcast"}, "cross_attention is one of .*'broadcast'"),
    ],
)
def test_a_transformer_configuration_prints_what_is_wrong(config: StarConfig, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config.transformer, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_groups": 3}, "cannot be normalised in 3 groups"),
        ({"norm_groups": 0}, "norm_groups must be positive"),
        ({"residual_blocks": 0}, "residual_blocks cannot be 0"),
        ({"codebook_size": 0}, "codebook is empty"),
    ],
)
def test_a_vqvae_configuration_prints_what_is_wrong(config: StarConfig, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config.vqvae, **changes)


def test_parts_of_one_model_must_agree(config: StarConfig):
    with pytest.raises(ValueError, match="3 token maps, but the transformer has 4 scales"):
        dataclasses.replace(config, maps=config.maps[:3])
    other = dataclasses.replace(config.vqvae, codebook_size=63)
    with pytest.raises(ValueError, match="codebook_size is 64 in the transformer and 63 in the VQ-VAE"):
        dataclasses.replace(config, vqvae=other)


@pytest.mark.parametrize("maps", [(), ((1, 1),), ((2, 2), (1, 4)), ((0, 1), (1, 1)), ((1, 2), (2, 1))])
def test_maps_that_do_not_grow_are_refused(maps: tuple):
    with pytest.raises(ValueError, match="maps|scales"):
        check_maps(maps)


def test_tokens_are_counted_over_rectangles():
    assert token_count(((1, 1), (2, 3), (4, 5))) == 27
    assert token_count(square_maps((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))) == 680
    assert token_count(PRESETS["star-1024-d30"].maps) == 9451


def test_released_presets_have_the_released_sizes():
    for config in PRESETS.values():
        transformer = config.transformer
        assert (transformer.width, transformer.heads) == (64 * transformer.depth, transformer.depth)
        assert transformer.cross_attention == "paired"
        other = config.name == "star-256-d30-sampler"
        assert (transformer.rope_theta, transformer.rope_extent) == ((100, 32) if other else (10_000, 64))
        assert config.vqvae == VQVAEConfig()
        assert f"-{config.resolution[0]}-" in config.name
    assert preset("star-1024-d30-sampler").transformer.sampler_depth == 3


def test_a_preset_takes_overrides_and_refuses_unknown_ones():
    changed = preset("star-256-d30", {"rope_theta": 100.0, "rope_extent": 32.0})
    assert changed.transformer.rope_theta == 100.0
    assert preset("star-256-d30").transformer.rope_theta == 10_000.0
    with pytest.raises(ValueError, match="no preset 'star-257'. There are: star-256-d16"):
        preset("star-257")
    with pytest.raises(ValueError, match="no field theta"):
        preset("star-256-d30", {"theta": 1})
    with pytest.raises(ValueError, match="cannot be split"):
        preset("star-256-d30", {"heads": 7})


def test_the_trained_size_has_the_trained_maps(config: StarConfig):
    assert config.resolution == (16, 24)
    assert maps_for_size(config, 16, 24) == (config.maps, True)


def sizes_of_presets() -> list:
    small = dataclasses.replace(
        PRESETS["star-256-d16"],
        name="64 pixels",
        transformer=dataclasses.replace(PRESETS["star-256-d16"].transformer, scales=6),
        maps=square_maps((1, 2, 3, 4, 6, 8)),
    )
    return [*PRESETS.values(), small]


@pytest.mark.parametrize("config", sizes_of_presets(), ids=lambda config: config.name)
def test_another_aspect_ratio_gets_maps_of_nearly_the_same_area_at_every_scale(config: StarConfig):
    assert len(untrained_sizes(config)) >= 6
    for height, width in untrained_sizes(config):
        maps, trained = maps_for_size(config, height, width)
        assert not trained
        check_maps(maps)
        step = config.vqvae.downsample
        assert maps[-1] == (height // step, width // step)
        for drawn, known in zip(maps, config.maps, strict=True):
            assert abs(math.prod(drawn) / math.prod(known) - 1) <= MAP_AREA_TOLERANCE


@pytest.mark.parametrize("config", sizes_of_presets(), ids=lambda config: config.name)
def test_landscape_and_portrait_are_the_same_maps_turned(config: StarConfig):
    for height, width in untrained_sizes(config):
        landscape, _ = maps_for_size(config, height, width)
        portrait, _ = maps_for_size(config, width, height)
        assert portrait == tuple((w, h) for h, w in landscape)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=6))
def test_every_size_that_is_offered_can_be_had(growth: list):
    height = width = 1
    maps = []
    for more_height, more_width in growth:
        height, width = height + more_height, width + more_width
        maps.append((height, width))
    config = with_maps(PRESETS["star-256-d16"], tuple(maps))
    for size in untrained_sizes(config):
        stretched, trained = maps_for_size(config, *size)
        check_maps(stretched)
        assert not trained
        for drawn, known in zip(stretched, maps, strict=True):
            assert abs(math.prod(drawn) / math.prod(known) - 1) <= MAP_AREA_TOLERANCE


@pytest.mark.parametrize("size", [(0, 0), (16, 25), (64, 64), (24, 24), (-16, -24)])
def test_a_size_that_cannot_be_drawn_is_refused_with_those_that_can(config: StarConfig, size: tuple):
    with pytest.raises(ValueError, match="tiny cannot draw") as refusal:
        maps_for_size(config, *size)
    message = str(refusal.value)
    assert f"{size[1]}x{size[0]} pixels" in message
    assert "Trained: 24x16." in message
    for height, width in untrained_sizes(config):
        assert f"{width}x{height}" in message


def test_configurations_cannot_be_changed(config: StarConfig):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.transformer.depth = 3
    assert isinstance(hash(config), int)
    assert TransformerConfig(**dataclasses.asdict(config.transformer)) == config.transformer
