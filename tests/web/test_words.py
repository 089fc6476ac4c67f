"""What the editor says of the server's presets, in every language of the pack."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from star_core.presets import SCHEDULES

from .node_script import needs_node, run_node

pytestmark = needs_node

OWN = "checkpoint's own"
LANGUAGES = sorted(folder.name for folder in (Path(__file__).parents[2] / "locales").iterdir())
PRESETS = [{"name": name, "description": preset.description} for name, preset in SCHEDULES.items()]
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def test_english_is_the_servers_own():
    assert run_node("words_main.mjs", [["described", "en", preset] for preset in PRESETS]) == [
        preset["description"] for preset in PRESETS
    ]


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
def test_every_preset_is_described_with_the_same_numbers(language: str):
    own = {"name": OWN, "description": "what the checkpoint draws by where no schedule is connected"}
    told = run_node("words_main.mjs", [["described", language, preset] for preset in [*PRESETS, own]])
    for preset, text in zip([*PRESETS, own], told, strict=True):
        assert text != preset["description"], f"{preset['name']} has no words in {language}"
        # Languages count "two scales" by digits or words: what English writes in digits they must write, too.
        assert set(NUMBER.findall(preset["description"])) <= set(NUMBER.findall(text)), preset["name"]
    assert run_node("words_main.mjs", [["nameOf", language, own]])[0] not in (OWN, "")


def test_a_preset_that_nobody_translated_keeps_its_words():
    newer = {"name": "newer", "description": "top-k 7"}
    asked = [["described", "zh-TW", newer], ["nameOf", "ja", newer], ["described", "xx", PRESETS[0]]]
    assert run_node("words_main.mjs", asked) == ["top-k 7", "newer", PRESETS[0]["description"]]
    named = run_node("words_main.mjs", [["described", "zh-TW", PRESETS[0]], ["described", "zh", PRESETS[0]]])
    assert named[0] == named[1] != PRESETS[0]["description"]
