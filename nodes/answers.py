"""What the schedule editor asks the server: a model's sides, and the presets for them. Reads metadata only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import host
from .load import checkpoint_path, preset_name


def register() -> None:
    """Offer the editor what it asks for."""
    host.offer("/star/model", model_facts)
    host.offer("/star/presets", preset_table)


def model_facts(query: Mapping[str, str]) -> dict[str, Any]:
    """Return what the editor needs of the checkpoint that a Load STAR node has chosen."""
    from ..star_core.checkpoint import resolve_config
    from ..star_core.schedule import sides_text
    from ..star_core.weights import TensorFile

    path = checkpoint_path(query.get("checkpoint", ""))
    config = resolve_config(TensorFile(path), preset_name(query.get("preset", "")))
    return {
        "name": config.name,
        "sides": sides_text(config.maps).split(),
        "codebook": config.transformer.codebook_size,
        "has_sampler": config.transformer.has_sampler,
        "schedule": config.schedule,
    }


def preset_table(query: Mapping[str, str]) -> dict[str, Any]:
    """Return every preset for the token maps in `maps`, split into the two nodes' texts."""
    from ..star_core.presets import SCHEDULES
    from ..star_core.schedule import parse_schedule
    from ..star_core.schedule_parts import part_text

    sides = query.get("maps", "")
    maps = parse_schedule(f"maps {sides}; top_k 0").maps
    assert maps is not None, "the text has a maps line"
    presets = []
    for name, preset in SCHEDULES.items():
        schedule = preset.build(maps)
        sampler = {
            "steps": part_text(schedule, "sampler"),
            "strategy": schedule.strategy,
            "guidance": schedule.sampler_guidance,
        }
        presets.append(
            {
                "name": name,
                "description": preset.description,
                "schedule": part_text(schedule, "drawing"),
                "sampler": sampler if schedule.refines else None,
            }
        )
    return {"presets": presets}
