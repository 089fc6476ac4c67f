"""What the schedule editor asks the server: a model's sides, and the presets for them. Reads metadata only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import host
from .load import checkpoint_path, preset_name

if TYPE_CHECKING:
    from ..star_core.schedule import ScaleSchedule


def register() -> None:
    """Offer the editor what it asks for."""
    host.offer("/star/model", model_facts)
    host.offer("/star/presets", preset_table)


def model_facts(query: Mapping[str, str]) -> dict[str, Any]:
    """Return what the editor needs of the checkpoint that a Load STAR node has chosen."""
    from ..star_core.presets import read_schedule
    from ..star_core.schedule import sides_text
    from ..star_core.stored import FileHeader, resolve_config

    path = checkpoint_path(query.get("checkpoint", ""))
    config = resolve_config(FileHeader(path), preset_name(query.get("preset", "")))
    return {
        "name": config.name,
        "sides": sides_text(config.maps).split(),
        "codebook": config.transformer.codebook_size,
        "has_sampler": config.transformer.has_sampler,
        "own": _entry(
            "checkpoint's own",
            "what the checkpoint draws by where no schedule is connected",
            dataclasses.replace(read_schedule(config.schedule, config.maps), maps=config.maps),
        ),
    }


def preset_table(query: Mapping[str, str]) -> dict[str, Any]:
    """Return every preset for the token maps in `maps`, split into the two nodes' texts."""
    from ..star_core.presets import SCHEDULES
    from ..star_core.schedule_text import parse_schedule

    sides = query.get("maps", "")
    maps = parse_schedule(f"maps {sides}; top_k 0").maps
    assert maps is not None, "the text has a maps line"
    entries = [_entry(name, preset.description, preset.build(maps)) for name, preset in SCHEDULES.items()]
    return {"presets": entries}


def _entry(name: str, description: str, schedule: ScaleSchedule) -> dict[str, Any]:
    """Return an entry of the editor's menu; `sampler` is None where nothing is refined."""
    from ..star_core.schedule_parts import part_text

    sampler = {
        "steps": part_text(schedule, "sampler"),
        "strategy": schedule.strategy,
        "guidance": schedule.sampler_guidance,
    }
    return {
        "name": name,
        "description": description,
        "schedule": part_text(schedule, "drawing"),
        "sampler": sampler if schedule.refines else None,
    }
