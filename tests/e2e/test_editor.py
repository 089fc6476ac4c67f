"""The schedule editor in a real browser: it edits the readable text, and nothing but the text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from browser import ComfyPage

DEFAULT = "maps 1 2 3 4 5 6 8 10 13 16\ntop_k 600\ntop_p 0.8\nguidance ramp 4\ntemperature 1"
LONG = "maps 1 2 3 4 5 6 8 10 13 16 20 24 28 32\ntop_k 4096\ntop_p 0.8\nguidance ramp 4"


@pytest.fixture
def schedule(comfy: ComfyPage) -> int:
    return comfy.add("StarScaleSchedule", 80, 90)


def line(text: str, name: str) -> str:
    (found,) = re.findall(rf"^{name} (.*)$", text, re.MULTILINE)
    return found


def test_a_new_node_shows_its_text_as_bars(comfy: ComfyPage, schedule: int) -> None:
    assert comfy.value(schedule, "schedule") == DEFAULT
    assert comfy.bar_values(schedule, "top_k") == [600] * 10
    assert comfy.bar_values(schedule, "guidance") == pytest.approx([4 * scale / 9 for scale in range(10)])
    sides = comfy.editor(schedule).locator('[data-quantity="top_p"] .star-side').all_inner_texts()
    assert sides == ["1", "2", "3", "4", "5", "6", "8", "10", "13", "16"]
    comfy.shot("new-node")


def test_a_drag_changes_one_value_and_is_one_step_of_undo(comfy: ComfyPage, schedule: int) -> None:
    comfy.drag_bar(schedule, "top_p", 2, 0.5)
    dragged = comfy.value(schedule, "schedule")
    values = [
        float(word)
        for word in re.sub(r"(\S+)\*(\d)", lambda m: f"{m[1]} " * int(m[2]), line(dragged, "top_p")).split()
    ]
    assert values == pytest.approx([0.8, 0.8, values[2], *[0.8] * 7])
    assert values[2] == pytest.approx(0.5, abs=0.03)
    assert line(dragged, "top_p").startswith("0.8*2 ")
    assert dragged.replace(line(dragged, "top_p"), "0.8") == DEFAULT, "every other line stays as it was"
    comfy.press("Control+z")
    assert comfy.value(schedule, "schedule") == DEFAULT
    assert comfy.bar_values(schedule, "top_p") == [0.8] * 10
    comfy.press("Control+Shift+z")
    assert comfy.value(schedule, "schedule") == dragged
    assert comfy.bar_values(schedule, "top_p")[2] == values[2]


def test_alt_drags_all_scales(comfy: ComfyPage, schedule: int) -> None:
    comfy.drag_bar(schedule, "temperature", 1, 0.25, hold="Alt")
    value = float(line(comfy.value(schedule, "schedule"), "temperature"))
    assert value == pytest.approx(0.5, abs=0.1)
    assert comfy.bar_values(schedule, "temperature") == [value] * 10


def test_top_k_has_a_logarithmic_bar(comfy: ComfyPage, schedule: int) -> None:
    comfy.write(schedule, "schedule", DEFAULT.replace("top_k 600", "top_k 4096"))
    comfy.drag_bar(schedule, "top_k", 9, 0.54)
    middle = comfy.bar_values(schedule, "top_k")[9]
    assert 32 <= middle <= 128, "half way up lies the geometric mean of 1 and 4096"
    comfy.drag_bar(schedule, "top_k", 9, 0.0)
    assert line(comfy.value(schedule, "schedule"), "top_k") == "4096*9 0"
    assert comfy.bar(schedule, "top_k", 9).get_attribute("aria-valuetext") == "off"


def test_a_click_changes_nothing_and_takes_the_focus(comfy: ComfyPage, schedule: int) -> None:
    bar = comfy.bar(schedule, "top_p", 3)
    bar.click()
    assert comfy.value(schedule, "schedule") == DEFAULT
    assert bar.evaluate("bar => bar === document.activeElement")


def test_numbers_are_typed(comfy: ComfyPage, schedule: int) -> None:
    comfy.bar(schedule, "top_p", 3).dblclick()
    comfy.page.keyboard.type("0.375")
    comfy.press("Enter")
    assert line(comfy.value(schedule, "schedule"), "top_p") == "0.8*3 0.375 0.8*6"
    comfy.page.keyboard.type("7")  # the bar has the focus again: a digit opens the field
    assert comfy.editor(schedule).locator("input.star-typed").get_attribute("aria-invalid") is not None
    comfy.press("Enter")
    assert line(comfy.value(schedule, "schedule"), "top_p") == "0.8*3 0.375 0.8*6", "7 is no top_p"
    comfy.page.keyboard.type(".5")
    comfy.press("Escape")
    assert line(comfy.value(schedule, "schedule"), "top_p") == "0.8*3 0.375 0.8*6"


@pytest.mark.parametrize("leave", ["Enter", "Tab", "a click elsewhere"])
def test_a_field_that_is_left_as_it_was_changes_nothing(comfy: ComfyPage, schedule: int, leave: str) -> None:
    # The second scale's guidance is 4 / 9, and shown as 0.44.
    comfy.bar(schedule, "guidance", 1).dblclick()
    assert comfy.editor(schedule).locator("input.star-typed").input_value() == "0.44"
    if leave in ("Enter", "Tab"):
        comfy.press(leave)
    else:
        comfy.page.mouse.click(900, 700)
    comfy.settle()
    assert comfy.editor(schedule).locator("input.star-typed").count() == 0
    assert comfy.value(schedule, "schedule") == DEFAULT


def test_the_rounded_number_itself_can_be_typed(comfy: ComfyPage, schedule: int) -> None:
    comfy.bar(schedule, "guidance", 1).dblclick()
    comfy.page.keyboard.type("0.44")
    comfy.press("Enter")
    assert line(comfy.value(schedule, "schedule"), "guidance").split()[1] == "0.44"


def test_the_keyboard_reaches_every_bar(comfy: ComfyPage, schedule: int) -> None:
    comfy.bar(schedule, "top_p", 8).click()
    for keys, expected in {
        "ArrowUp": "0.8*8 0.81 0.8",
        "ArrowDown": "0.8",
        "PageDown": "0.8*8 0.7 0.8",
        "Shift+ArrowUp": "0.8*8 0.701 0.8",
        "End": "0.8*8 1 0.8",
        "Home": "0.8*8 0 0.8",
    }.items():
        comfy.press(keys)
        assert line(comfy.value(schedule, "schedule"), "top_p") == expected, keys
    assert comfy.page.evaluate("app.extensionManager.shiftDown") is False, "the frontend saw Shift go up"
    comfy.press("Delete")
    assert comfy.nodes("StarScaleSchedule") == [schedule], "Delete on a bar leaves the node alone"
    comfy.page.keyboard.press("Tab")
    comfy.press("ArrowUp")
    assert line(comfy.value(schedule, "schedule"), "top_p") == "0.8*8 0 0.81"
    role = comfy.bar(schedule, "top_p", 9)
    assert role.get_attribute("role") == "slider"
    assert role.get_attribute("aria-valuenow") == "0.81"
    assert "scale 10 of 10" in (role.get_attribute("aria-label") or "")
    comfy.press("Control+z")
    assert line(comfy.value(schedule, "schedule"), "top_p") == "0.8*8 0 0.8"


def test_an_error_is_shown_at_its_place_and_the_text_stays(comfy: ComfyPage, schedule: int) -> None:
    broken = DEFAULT.replace("top_p 0.8", "top_p 0.8 0.9")
    comfy.write(schedule, "schedule", broken)
    editor = comfy.editor(schedule)
    assert "2 values for 10 scales" in editor.locator(".star-message").inner_text()
    assert editor.locator("mark").inner_text() == "0.8"
    assert comfy.value(schedule, "schedule") == broken
    comfy.shot("error")
    editor.locator(".star-show").click()
    selected = comfy.page.evaluate(
        """() => { const area = document.activeElement;
        const { tagName, selectionStart, selectionEnd } = area;
        return tagName === "TEXTAREA" ? area.value.slice(selectionStart, selectionEnd) : null }"""
    )
    assert selected == "0.8"
    comfy.page.keyboard.type("0.7*8 0.5")
    comfy.settle()
    assert comfy.bar_values(schedule, "top_p") == [0.7] * 8 + [0.5, 0.9], "typing in the text redraws the bars"


def test_lines_of_the_other_node_are_refused(comfy: ComfyPage, schedule: int) -> None:
    comfy.write(schedule, "schedule", DEFAULT + "\nsteps 8")
    assert "belongs to the node Causal Sampler" in comfy.editor(schedule).locator(".star-message").inner_text()


def test_unknown_form_is_kept_when_a_bar_is_dragged(comfy: ComfyPage, schedule: int) -> None:
    text = "maps 1 2 3 4 5 6 8 10 13 16;  top_k 600*9   300 ;\n\n  guidance ramp 2\nstretch yes"
    comfy.write(schedule, "schedule", text)
    comfy.bar(schedule, "top_k", 9).dblclick()
    comfy.page.keyboard.type("100")
    comfy.press("Enter")
    assert comfy.value(schedule, "schedule") == text.replace("600*9   300", "600*9 100")


def test_the_causal_sampler_has_bars_for_its_steps(comfy: ComfyPage) -> None:
    sampler = comfy.add("StarCausalSampler", 80, 90)
    assert comfy.bar_values(sampler, "steps") == [0] * 6 + [8] * 4
    comfy.bar(sampler, "steps", 5).dblclick()
    comfy.page.keyboard.type("4")
    comfy.press("Enter")
    assert line(comfy.value(sampler, "steps"), "steps") == "0*5 4 8*4"
    comfy.shot("causal-sampler")


def test_presets_are_written_into_the_text(comfy: ComfyPage) -> None:
    schedule = comfy.add("StarScaleSchedule", 80, 90, schedule="demo-1024")
    load = comfy.add("StarLoad", 600, 90, checkpoint="tiny.safetensors")
    assert "demo-1024" in comfy.editor(schedule).locator(".star-message").inner_text()
    comfy.connect(load, "model", schedule, "model")
    comfy.editor(schedule).locator(".star-fill-sides").click()
    comfy.settle(1500)
    assert comfy.value(schedule, "schedule") == DEFAULT + "\nsmooth no"
    comfy.editor(schedule).locator("select").focus()
    comfy.settle(1500)
    comfy.editor(schedule).locator("select").select_option("official-256")
    comfy.settle()
    assert line(comfy.value(schedule, "schedule"), "top_k") == "4096"
    comfy.page.evaluate("document.activeElement.blur()")
    comfy.press("Control+z")
    assert line(comfy.value(schedule, "schedule"), "top_k") == "600", "a preset is one step of undo"


def test_the_checkpoint_s_own_schedule_is_in_the_menu_of_a_connected_model(comfy: ComfyPage) -> None:
    load = comfy.add("StarLoad", 600, 90)
    schedule = comfy.add("StarScaleSchedule", 80, 90)
    comfy.connect(load, "model", schedule, "model")
    comfy.settle(1000)
    comfy.editor(schedule).locator("select").focus()
    comfy.settle(1500)
    comfy.editor(schedule).locator("select").select_option("checkpoint's own")
    comfy.settle()
    assert line(comfy.value(schedule, "schedule"), "guidance") == "1*8 0.5 0", "the shipped model's"
    assert comfy.bar_values(schedule, "guidance") == [1] * 8 + [0.5, 0]


def test_the_editor_sees_that_another_checkpoint_was_chosen(comfy: ComfyPage) -> None:
    load = comfy.add("StarLoad", 600, 90)
    schedule = comfy.add("StarScaleSchedule", 80, 90)
    comfy.connect(load, "model", schedule, "model")
    comfy.settle(1000)
    options = comfy.editor(schedule).locator("select")
    options.focus()
    comfy.settle(1500)
    options.select_option("checkpoint's own")
    assert line(comfy.value(schedule, "schedule"), "guidance") == "1*8 0.5 0"
    comfy.write(load, "checkpoint", "tiny.safetensors")
    comfy.page.mouse.move(2, 2)  # the pointer may rest where the editor has come to be
    with comfy.page.expect_response("**/star/presets*"):
        comfy.editor(schedule).hover()
    comfy.settle()
    options.select_option("checkpoint's own")
    comfy.settle()
    assert line(comfy.value(schedule, "schedule"), "guidance") == "ramp 4", "the tiny model's"


def test_texts_that_the_server_takes_are_no_errors_here(comfy: ComfyPage) -> None:
    any_scales = "top_k 600\ntop_p 0.8\nguidance ramp 4"
    schedule = comfy.add("StarScaleSchedule", 80, 90, schedule=any_scales)
    message = comfy.editor(schedule).locator(".star-message")
    comfy.settle()
    assert "any number of scales" in message.inner_text()
    comfy.write(schedule, "schedule", "top_k many\ntop_p 0.8")
    comfy.settle()
    assert "many" in message.inner_text()
    comfy.write(schedule, "schedule", any_scales)
    load = comfy.add("StarLoad", 600, 90)
    comfy.connect(load, "model", schedule, "model")
    comfy.settle(1000)
    assert comfy.bar_values(schedule, "top_k") == [600] * 10
    sides = comfy.editor(schedule).locator('[data-quantity="top_p"] .star-side').all_inner_texts()
    assert sides[-1] == "16"


def test_a_preset_s_name_is_told_from_a_slip_of_the_pen(comfy: ComfyPage) -> None:
    schedule = comfy.add("StarScaleSchedule", 80, 90, schedule="official1024")
    comfy.settle(1000)
    message = comfy.editor(schedule).locator(".star-message")
    assert "There is no preset “official1024”" in message.inner_text()
    assert "official-1024" in message.inner_text()
    comfy.write(schedule, "schedule", "official-1024")
    comfy.settle()
    assert "The text is the preset" in message.inner_text()
    comfy.editor(schedule).locator("select").focus()
    comfy.settle(1000)
    assert "No Load STAR" in comfy.editor(schedule).locator(".star-note").inner_text()


def test_a_sampler_preset_sets_its_fields_too(comfy: ComfyPage) -> None:
    sampler = comfy.add("StarCausalSampler", 80, 90)
    comfy.editor(sampler).locator("select").focus()
    comfy.settle(1500)
    assert "official-256" not in comfy.editor(sampler).locator("select").inner_text(), "it has no sampler"
    comfy.editor(sampler).locator("select").select_option("sampler")
    comfy.settle()
    assert comfy.value(sampler, "strategy") == "masked"
    assert line(comfy.value(sampler, "steps"), "steps") == "0*6 8*4"
    assert line(comfy.value(sampler, "steps"), "transformer_steps") == "0"


def test_sides_come_from_the_connected_model_and_nothing_is_stretched(comfy: ComfyPage) -> None:
    load = comfy.add("StarLoad", 600, 90, checkpoint="tiny.safetensors")
    schedule = comfy.add("StarScaleSchedule", 80, 90, schedule="maps 1 2 3\ntop_k 600\nguidance ramp 4")
    fill = comfy.editor(schedule).locator(".star-fill-sides")
    fill.click()
    comfy.settle(800)
    assert "No Load STAR" in comfy.editor(schedule).locator(".star-note").inner_text()
    comfy.connect(load, "model", schedule, "model")
    comfy.settle(1000)
    assert "1 2 3 4 5 6 8 10 13 16" in comfy.editor(schedule).locator(".star-note").inner_text()
    fill.click()
    comfy.settle(1000)
    assert comfy.value(schedule, "schedule") == "maps 1 2 3 4 5 6 8 10 13 16\ntop_k 600\nguidance ramp 4"
    listed = "maps 1 2 3\ntop_k 600 500 400"
    comfy.write(schedule, "schedule", listed)
    fill.click()
    comfy.settle(1000)
    assert comfy.value(schedule, "schedule") == listed
    assert "Nothing was changed" in comfy.editor(schedule).locator(".star-note").inner_text()


def test_sides_from_a_model_leave_the_sampler_s_fields_alone(comfy: ComfyPage) -> None:
    load = comfy.add("StarLoad", 600, 90)
    sampler = comfy.add("StarCausalSampler", 80, 90, steps="official-1024", strategy="confidence", guidance=2)
    comfy.connect(load, "model", sampler, "model")
    comfy.settle(1000)
    fill = comfy.editor(sampler).locator(".star-fill-sides")
    fill.click()
    comfy.settle(1500)
    assert line(comfy.value(sampler, "steps"), "steps") == "0*6 8*3 15"
    assert (comfy.value(sampler, "strategy"), comfy.value(sampler, "guidance")) == ("confidence", 2)
    comfy.write(sampler, "steps", "smooth")
    fill.click()
    comfy.settle(1500)
    assert comfy.value(sampler, "steps") == "smooth"
    assert "no part for this node" in comfy.editor(sampler).locator(".star-note").inner_text()


def test_a_refusal_of_the_server_is_told_in_its_own_words(comfy: ComfyPage) -> None:
    schedule = comfy.add("StarScaleSchedule", 80, 90, schedule="maps 1 2 x\ntop_k 600")
    comfy.editor(schedule).hover()
    comfy.settle(1000)
    assert comfy.editor(schedule).locator(".star-note").inner_text() == "", "half a line is nobody's question"
    load = comfy.add("StarLoad", 600, 90, checkpoint="nowhere.safetensors")
    comfy.connect(load, "model", schedule, "model")
    comfy.settle(1000)
    note = comfy.editor(schedule).locator(".star-note").inner_text()
    assert "no file 'nowhere.safetensors'" in note
    assert "did not answer" not in note


def test_a_text_over_a_link_is_not_edited(comfy: ComfyPage, schedule: int) -> None:
    comfy.add("PrimitiveStringMultiline", 600, 90, value=DEFAULT)
    (source,) = comfy.nodes("PrimitiveStringMultiline")
    comfy.connect(source, "STRING", schedule, "schedule")
    comfy.settle(800)
    assert "over a link" in comfy.editor(schedule).locator(".star-message").inner_text()


def test_fourteen_scales_are_readable(comfy: ComfyPage, schedule: int) -> None:
    comfy.write(schedule, "schedule", LONG)
    values = comfy.editor(schedule).locator('[data-quantity="top_k"] .star-value')
    assert values.count() == 14
    overflow = values.evaluate_all("all => all.filter((v) => v.scrollWidth > v.clientWidth + 1).length")
    assert overflow == 0, "a number is cut off"
    comfy.shot("fourteen-scales")


def test_copies_are_independent(comfy: ComfyPage, schedule: int) -> None:
    comfy.drag_bar(schedule, "top_p", 0, 0.3)
    text = comfy.value(schedule, "schedule")
    comfy.click_title(schedule)
    comfy.page.mouse.move(1100, 300)
    comfy.press("Control+c")
    comfy.press("Control+v")
    comfy.settle(1000)
    first, second = comfy.nodes("StarScaleSchedule")
    copy = second if first == schedule else first
    comfy.page.evaluate(
        "(id) => { app.canvas.graph.getNodeById(id).pos = [620, 90]; app.canvas.setDirty(true, true) }", copy
    )
    comfy.settle(1000)
    assert comfy.value(copy, "schedule") == text
    assert comfy.bar_values(copy, "top_p") == comfy.bar_values(schedule, "top_p")
    comfy.drag_bar(copy, "temperature", 2, 0.9)
    assert comfy.value(schedule, "schedule") == text
    assert comfy.value(copy, "schedule") != text


def test_a_reload_keeps_text_and_bars(comfy: ComfyPage, schedule: int) -> None:
    comfy.drag_bar(schedule, "guidance", 1, 0.6)
    text, bars = comfy.value(schedule, "schedule"), comfy.bar_values(schedule, "guidance")
    assert text != DEFAULT
    comfy.settle(2500)  # the frontend saves its draft a moment after a change
    comfy.page.reload(wait_until="domcontentloaded")
    comfy.wait_until_ready()
    (again,) = comfy.nodes("StarScaleSchedule")
    assert comfy.value(again, "schedule") == text
    assert comfy.bar_values(again, "guidance") == bars


def test_it_works_inside_a_subgraph(comfy: ComfyPage, schedule: int) -> None:
    load = comfy.add("StarLoad", 620, 90, checkpoint="tiny.safetensors")
    comfy.connect(load, "model", schedule, "model")
    comfy.write(schedule, "schedule", "maps 1 2 3\ntop_k 600\ntop_p 0.8")
    comfy.page.evaluate(
        """(id) => { const { graph } = app.canvas;
        const { subgraph } = graph.convertToSubgraph(new Set([graph.getNodeById(id)]));
        app.canvas.setGraph(subgraph); }""",
        schedule,
    )
    comfy.settle(1500)
    comfy.look_at(
        *comfy.page.evaluate(
            "(() => { const [x, y] = app.canvas.graph._nodes[0].pos; return [x - 80, y - 90, 1] })()"
        )
    )
    (inner,) = comfy.nodes("StarScaleSchedule")
    comfy.editor(inner).locator(".star-fill-sides").click()
    comfy.settle(1500)
    assert comfy.value(inner, "schedule") == "maps 1 2 3 4 5 6 8 10 13 16\ntop_k 600\ntop_p 0.8", (
        "found outside the subgraph"
    )
    comfy.drag_bar(inner, "top_p", 9, 0.4)
    assert comfy.bar_values(inner, "top_p")[9] == pytest.approx(0.4, abs=0.03)
    comfy.shot("subgraph")
    comfy.page.evaluate("app.canvas.setGraph(app.rootGraph ?? app.graph)")


CONTRAST = """(editor) => {
    const luminance = (colour) => {
        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
            .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const row = editor.querySelector(".star-row");
    const back = luminance(getComputedStyle(row).backgroundColor);
    const front = luminance(getComputedStyle(row.querySelector(".star-value")).color);
    return [back, (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05)];
}"""


def test_it_follows_the_theme(comfy: ComfyPage, schedule: int) -> None:
    set_palette = "(name) => app.extensionManager.setting.set('Comfy.ColorPalette', name)"
    backs = {}
    try:
        for palette in ("light", "dark"):
            comfy.page.evaluate(set_palette, palette)
            comfy.settle(1500)
            backs[palette], contrast = comfy.editor(schedule).evaluate(CONTRAST)
            assert contrast >= 4.5, palette
            comfy.shot(f"theme-{palette}")
    finally:
        comfy.page.evaluate(set_palette, "dark")
    assert backs["light"] > 0.5 > 0.2 > backs["dark"]
