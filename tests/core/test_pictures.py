"""A picture's recipe as text: it comes back whole, or is refused with the field that is wrong."""

from __future__ import annotations

import dataclasses
import json

import pytest

from star_core.pictures import Recipe

RECIPE = Recipe("cat", "dog", 2, 1, "top_k 5", (16, 24), "tiny", "bfloat16", "int8", False, True)


def test_a_recipe_comes_back_from_its_text():
    assert Recipe.from_json(RECIPE.to_json()) == RECIPE


def test_fields_that_came_later_may_be_missing():
    fields = {name: value for name, value in json.loads(RECIPE.to_json()).items() if name in OLDEST}
    older = Recipe.from_json(json.dumps(fields))
    assert (older.dtype, older.eight_bit, older.graphs, older.packed) == ("float32", None, False, False)


OLDEST = ("prompt", "negative", "seed", "index", "schedule", "size", "model")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 5),
        ("prompt", "\ud800"),
        ("negative", None),
        ("seed", "1"),
        ("seed", 1.5),
        ("seed", True),
        ("seed", -1),
        ("seed", 2**64),
        ("index", "0"),
        ("index", -1),
        ("schedule", None),
        ("schedule", ["a"]),
        ("size", 64),
        ("size", [64]),
        ("size", [64, 64.0]),
        ("size", [float("inf"), 64]),
        ("size", [0, 64]),
        ("size", [10**400, 64]),
        ("model", None),
        ("dtype", "load"),
        ("dtype", None),
        ("eight_bit", ["int8"]),
        ("graphs", 1),
        ("packed", "no"),
        ("int8", "no"),
    ],
)
def test_a_field_of_another_kind_is_refused_with_its_value(field: str, value: object):
    text = json.dumps({**dataclasses.asdict(RECIPE), field: value})
    with pytest.raises(ValueError, match=f"^the recipe says {field} ") as refusal:
        Recipe.from_json(text)
    assert f"{value!r:.80}, which is not " in str(refusal.value)


@pytest.mark.parametrize("name", OLDEST)
def test_a_missing_field_is_named(name: str):
    fields = json.loads(RECIPE.to_json())
    del fields[name]
    with pytest.raises(ValueError, match=f"the recipe says no {name}"):
        Recipe.from_json(json.dumps(fields))


def test_a_field_of_a_later_version_is_refused():
    with pytest.raises(ValueError, match="'style', which this version does not know"):
        Recipe.from_json(json.dumps({**json.loads(RECIPE.to_json()), "style": 1}))


@pytest.mark.parametrize(
    "text",
    ["", "5", "[]", "null", "top_k 5\n", "[" * 100_000, '{"seed": ' + "[" * 600 + "]" * 600 + "}"],
    ids=["nothing", "number", "list", "null", "schedule", "too deep", "deep"],
)
def test_what_is_no_recipe_is_refused_in_one_line(text: str):
    with pytest.raises(ValueError, match="recipe") as refusal:
        Recipe.from_json(text)
    assert "\n" not in str(refusal.value)


def test_a_number_of_5000_digits_is_refused():
    with pytest.raises(ValueError, match="not a recipe of a picture"):
        Recipe.from_json(RECIPE.to_json().replace('"seed": 2', '"seed": ' + "9" * 5000))
