"""A ComfyUI page as a user has it before them: mouse, keyboard, and what stands on the canvas."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page

READY = "window.app && window.app.graph && window.app.canvas && window.app.extensionManager"
EMPTY = {"last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "groups": [], "version": 0.4}
SLOT = """([id, side, name]) => {
    const node = app.canvas.graph.getNodeById(id);
    const slot = node[side].findIndex((slot) => slot.name === name || slot.label === name);
    if (slot < 0) throw new Error(`${node.type} has no ${name}`);
    const input = side === "inputs";
    const at = node.getInputPos ? (input ? node.getInputPos(slot) : node.getOutputPos(slot))
        : node.getConnectionPos(input, slot);
    const rect = app.canvas.canvas.getBoundingClientRect();
    const { scale, offset } = app.canvas.ds;
    return [rect.left + (at[0] + offset[0]) * scale, rect.top + (at[1] + offset[1]) * scale];
}"""


class ComfyPage:
    """One tab with the canvas. `renderer` is "canvas" or "vue" (Nodes 2.0)."""

    def __init__(self, page: Page, url: str, renderer: str, shots: Path) -> None:
        self.page = page
        self.url = url
        self.renderer = renderer
        self.shots = shots
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(f"{error.message}\n{error.stack or ''}"))
        # Other hosts (fonts, accounts) fail at once instead of hanging.
        page.route(re.compile(r"^https?://"), self._only_the_server)

    def _only_the_server(self, route: Any) -> None:
        if route.request.url.startswith(self.url):
            route.continue_()
        else:
            route.abort()

    def open(self) -> None:
        self.page.goto(self.url, wait_until="domcontentloaded", timeout=180_000)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        self.page.wait_for_function(READY, timeout=180_000)
        self.page.wait_for_function(
            "Object.keys(LiteGraph.registered_node_types).includes('StarLoad')", timeout=60_000
        )
        self.page.wait_for_timeout(2000)

    def pack_errors(self) -> list[str]:
        """Return what went wrong in our own files."""
        return [error for error in self.errors if "comfyui-star" in error]

    def start_empty(self) -> None:
        self.page.keyboard.press("Escape")
        self.page.evaluate("(empty) => app.loadGraphData(empty, true, true)", EMPTY)
        self.look_at(0, 0, 1)

    def look_at(self, x: float, y: float, scale: float) -> None:
        """Scroll and zoom so that this point of the graph is in the upper left corner."""
        self.page.evaluate(
            """([x, y, scale]) => { const { ds } = app.canvas; ds.scale = scale;
            ds.offset[0] = -x; ds.offset[1] = -y; app.canvas.setDirty(true, true); }""",
            [x, y, scale],
        )
        self.settle()

    def settle(self, milliseconds: int = 500) -> None:
        self.page.wait_for_timeout(milliseconds)

    def nodes(self, kind: str) -> list[int]:
        """Return the ids of all nodes of a type in the graph that is open."""
        ids = self.page.evaluate(
            "(kind) => app.canvas.graph._nodes.filter((n) => n.type === kind).map((n) => Number(n.id))", kind
        )
        return sorted(ids)

    def add_by_search(self, title: str, kind: str, x: int, y: int) -> int:
        """Double-click the empty canvas, type a name, press Enter."""
        before = self.nodes(kind)
        self.page.mouse.move(x, y)
        self.settle()
        self.page.mouse.dblclick(x, y)
        if not self._search_is_open():  # a busy frontend may take the two clicks for one
            self.page.mouse.dblclick(x, y)
            assert self._search_is_open(), "a double click on the empty canvas opens no search"
        self.page.keyboard.type(title)
        self.settle(1200)
        self.page.keyboard.press("Enter")
        self.page.wait_for_function(
            "([kind, n]) => app.canvas.graph._nodes.filter((x) => x.type === kind).length > n",
            arg=[kind, len(before)],
        )
        self.settle()
        (added,) = set(self.nodes(kind)) - set(before)
        if self.page.evaluate("(id) => Boolean(app.canvas.graph.getNodeById(id).flags.ghost)", added):
            self.page.mouse.click(x, y)  # newer frontends let a new node hang on the pointer until a click
            self.settle()
        return added

    def _search_is_open(self) -> bool:
        for _ in range(20):
            if self.page.evaluate("document.activeElement?.tagName === 'INPUT'"):
                return True
            self.settle(200)
        return False

    def add(self, kind: str, x: float, y: float, **values: object) -> int:
        """Put a node on the canvas by the graph's own means, for tests about something else."""
        made = self.page.evaluate(
            """([kind, x, y, values]) => { const node = LiteGraph.createNode(kind); node.pos = [x, y];
            app.canvas.emitBeforeChange();
            app.canvas.graph.add(node);
            for (const widget of node.widgets ?? [])
                if (widget.name in values) widget.value = values[widget.name];
            app.canvas.emitAfterChange();
            return Number(node.id); }""",
            [kind, x, y, values],
        )
        self.settle(800)
        return int(made)

    def connect(self, origin: int, output: str, target: int, name: str) -> None:
        self.page.evaluate(
            """([origin, output, target, name]) => {
            const [from, to] = [origin, target].map((id) => app.canvas.graph.getNodeById(id));
            const slot = from.outputs.findIndex((s) => s.name === output || s.label === output);
            from.connect(slot, to, name); }""",
            [origin, output, target, name],
        )
        self.settle(300)

    def drag_link(self, origin: int, output: str, target: int, name: str) -> None:
        """Drag from an output to an input with the mouse, and see that the link is there."""
        start = self.page.evaluate(SLOT, [origin, "outputs", output])
        end = self.page.evaluate(SLOT, [target, "inputs", name])
        self.page.mouse.move(*start)
        self.page.mouse.down()
        self.page.mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, steps=4)
        self.page.mouse.move(*end, steps=4)
        self.settle(200)
        self.page.mouse.up()
        self.settle(300)
        linked = self.page.evaluate(
            """([id, name, origin]) => { const graph = app.canvas.graph;
            const input = graph.getNodeById(id).inputs.find((i) => i.name === name);
            const link = graph.getLink ? graph.getLink(input.link) : graph.links.get(input.link);
            return link ? Number(link.origin_id) === origin : false; }""",
            [target, name, origin],
        )
        assert linked, f"{name} of node {target} is not linked to node {origin}"

    def value(self, node: int, widget: str) -> Any:
        return self.page.evaluate(
            "([id, name]) => app.canvas.graph.getNodeById(id).widgets.find((w) => w.name === name).value",
            [node, widget],
        )

    def write(self, node: int, widget: str, value: object) -> None:
        """Set a widget as the frontend does: value, then callback."""
        self.page.evaluate(
            """([id, name, value]) => {
            const w = app.canvas.graph.getNodeById(id).widgets.find((w) => w.name === name);
            w.value = value; w.callback?.(value); }""",
            [node, widget, value],
        )
        self.settle()

    def editor(self, node: int) -> Locator:
        """Return the editor of one node: the one of the node that is in the graph now, seen in the page."""
        self.page.evaluate(
            """(id) => { const node = app.canvas.graph.getNodeById(id);
            for (const other of document.querySelectorAll("[data-test-node]")) delete other.dataset.testNode;
            node.widgets.find((w) => w.name === "schedule_bars").element.dataset.testNode = String(id); }""",
            node,
        )
        found = self.page.locator(f'.star-editor[data-test-node="{node}"]')
        found.wait_for(state="visible", timeout=15_000)
        return found

    def bar(self, node: int, quantity: str, scale: int) -> Locator:
        return self.editor(node).locator(f'[data-quantity="{quantity}"] .star-slider').nth(scale)

    def bar_values(self, node: int, quantity: str) -> list[float]:
        sliders = self.editor(node).locator(f'[data-quantity="{quantity}"] .star-slider')
        return [
            float(text)
            for text in sliders.evaluate_all("all => all.map((s) => s.getAttribute('aria-valuenow'))")
        ]

    def drag_bar(self, node: int, quantity: str, scale: int, height: float, *, hold: str | None = None) -> None:
        """Drag a bar with the mouse until its top is at a height between 0 and 1."""
        box = self.bar(node, quantity, scale).locator(".star-track").bounding_box()
        assert box is not None
        x, bottom = box["x"] + box["width"] / 2, box["y"] + box["height"]
        self.page.mouse.move(x, bottom - box["height"] / 2)
        if hold:
            self.page.keyboard.down(hold)
        self.page.mouse.down()
        self.page.mouse.move(x, bottom - box["height"] * 0.2, steps=3)
        self.page.mouse.move(x, bottom - box["height"] * height, steps=5)
        self.page.mouse.up()
        if hold:
            self.page.keyboard.up(hold)
        self.settle()

    def click_title(self, node: int) -> None:
        at = self.page.evaluate(
            """(id) => { const { pos } = app.canvas.graph.getNodeById(id);
            const { left, top } = app.canvas.canvas.getBoundingClientRect();
            const { scale, offset } = app.canvas.ds;
            return [left + (pos[0] + 200 + offset[0]) * scale, top + (pos[1] - 15 + offset[1]) * scale]; }""",
            node,
        )
        self.page.mouse.click(*at)
        self.settle()

    def press(self, keys: str) -> None:
        self.page.keyboard.press(keys)
        self.settle(700)

    def queue(self) -> dict[str, Any]:
        """Press Run; return the prompt that went to the server."""
        with self.page.expect_request(lambda r: r.method == "POST" and r.url.endswith("/prompt")) as sent:
            self.page.get_by_role("button", name="Run", exact=True).first.click()
        return dict(json.loads(sent.value.post_data or "{}"))

    def shot(self, name: str) -> Path:
        path = self.shots / f"{name}-{self.renderer}.png"
        self.page.screenshot(path=path)
        return path


def shots_folder(otherwise: Path) -> Path:
    """Return where screenshots go: $STAR_SCREENSHOTS, else pytest's own folder."""
    folder = Path(os.environ.get("STAR_SCREENSHOTS") or otherwise)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
