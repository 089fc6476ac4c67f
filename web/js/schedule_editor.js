// The extension: gives Scale Schedule and Causal Sampler their editor, a DOM widget that only edits the STRING.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { RefusedError, ScheduleEditor } from "./editor.js";
import { choiceOf, loaderOf } from "./model_link.js";
import { PARTS } from "./schedule_part.js";
import { addStyle } from "./style.js";

const WIDGET = "schedule_bars";
const MARGIN = 6;
const WIDTH = 480;
const TEXT_HEIGHT = 100;

let names = null;

async function ask(route) {
  const response = await api.fetchApi(route);
  const answer = await response.json().catch(() => ({}));
  // What the server says is told as it is: it names the file or the model.
  if (answer.error) throw new RefusedError(answer.error);
  if (!response.ok) throw new Error(`HTTP ${response.status}`);
  return answer;
}

function rootGraph() {
  return app.rootGraph ?? app.graph;
}

function hostOf(node, part, textWidget) {
  const named = (name) => node.widgets?.find((widget) => widget.name === name);
  const write = (widget, value) => {
    if (widget.value === value) return;
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
    node.graph?.setDirtyCanvas?.(true, true);
  };
  return {
    read: () => String(textWidget.value ?? ""),
    write: (text) => write(textWidget, text),
    // One transaction of ComfyUI's change tracker: what lies between is one step of undo.
    begin: () => app.canvas?.emitBeforeChange?.(),
    end: () => app.canvas?.emitAfterChange?.(),
    linked: () => node.inputs?.some((input) => input.widget?.name === part.widget && input.link != null) ?? false,
    locale: () => app.extensionManager?.setting?.get?.("Comfy.Locale") ?? "en",
    async askModel() {
      const loader = loaderOf(node, "model", rootGraph());
      return loader ? ask(`/star/model?${new URLSearchParams(choiceOf(loader))}`) : null;
    },
    async askPresets(sides) {
      return (await ask(`/star/presets?${new URLSearchParams({ maps: sides.join(" ") })}`)).presets;
    },
    // The same for every editor. A server that does not answer now may do so later.
    async askNames() {
      names ??= ask("/star/presets?maps=1+2").then(({ presets }) => presets.map((preset) => preset.name));
      return names.catch(() => {
        names = null;
        return null;
      });
    },
    applyPreset(preset) {
      if (part.widget !== "steps" || !preset.sampler) return;
      for (const name of ["strategy", "guidance"]) {
        const widget = named(name);
        if (widget) write(widget, preset.sampler[name]);
      }
    },
    showText(start, end) {
      const area = textAreaOf(node, textWidget);
      area?.focus();
      area?.setSelectionRange(start, end);
    },
  };
}

// In Nodes 2.0 the widget's own element is not the one on the screen.
function textAreaOf(node, widget) {
  const own = widget.element ?? widget.inputEl;
  if (own?.isConnected) return own;
  return document.querySelector(`[data-node-id="${node.id}"] textarea`);
}

function inVueNodes(root) {
  return root.closest("[data-node-id]") !== null;
}

// Outside of Nodes 2.0 the widget lies over the canvas: the wheel and the middle button are the canvas's.
function handToCanvas(root) {
  root.addEventListener(
    "wheel",
    (event) => {
      if (inVueNodes(root) || event.target.closest("pre, .star-note")) return;
      event.preventDefault();
      app.canvas.processMouseWheel(event);
    },
    { passive: false },
  );
  const middle = { pointerdown: "processMouseDown", pointermove: "processMouseMove", pointerup: "processMouseUp" };
  for (const [name, process] of Object.entries(middle)) {
    root.addEventListener(name, (event) => {
      const held = name === "pointermove" ? (event.buttons & 4) === 4 : event.button === 1;
      if (held && !inVueNodes(root)) app.canvas[process](event);
    });
  }
}

// The canvas does not take the focus when it is clicked: keys would go on to a bar, and Ctrl+C copy nothing.
function letGoOutside(root) {
  const outside = (event) => {
    // Firefox fires no focusout for what is taken away, as undo does.
    if (!root.isConnected) document.removeEventListener("pointerdown", outside, true);
    else if (!root.contains(event.target)) document.activeElement?.blur();
  };
  root.addEventListener("focusin", () => document.addEventListener("pointerdown", outside, true));
  root.addEventListener("focusout", () => document.removeEventListener("pointerdown", outside, true));
}

// Nodes 2.0 keeps what it has mounted when undo or another workflow brings a new node with the same id: on the
// screen would stand the editor of a node that is gone.
function takePlace(node, root) {
  if (root.isConnected || node.graph !== app.canvas?.graph) return;
  document.querySelector(`[data-node-id="${node.id}"] .star-editor`)?.replaceWith(root);
}

/** Call `after` whenever a function of an object has been called. */
function follow(object, name, after) {
  const before = object[name];
  object[name] = function (...parameters) {
    const result = before?.apply(this, parameters);
    after(...parameters);
    return result;
  };
}

function addEditor(node, part) {
  const textWidget = node.widgets?.find((widget) => widget.name === part.widget);
  if (!textWidget || node.widgets.some((widget) => widget.name === WIDGET)) return;
  addStyle();
  const host = hostOf(node, part, textWidget);
  const fit = () => {
    editor.root.style.minHeight = `${editor.height}px`;
    const [width, height] = node.size;
    node.setSize([width, Math.max(height, node.computeSize()[1])]);
    node.graph?.setDirtyCanvas?.(true, true);
  };
  host.resized = () => queueMicrotask(fit);
  const editor = new ScheduleEditor(part, host);
  editor.root.style.minHeight = `${editor.height}px`;
  const height = () => editor.height + 2 * MARGIN;
  const redraw = () => {
    if (host.read() !== editor.text || host.linked() !== editor.wasLinked) editor.refresh();
    editor.wasLinked = host.linked();
  };
  const widget = node.addDOMWidget(WIDGET, "star_schedule_bars", editor.root, {
    serialize: false,
    hideOnZoom: true,
    margin: MARGIN,
    getMinHeight: height,
    getMaxHeight: height,
    getValue: () => "",
    setValue: () => {},
    onDraw: redraw,
  });
  widget.serialize = false;
  follow(textWidget, "callback", redraw);
  let waiting = null;
  const lookUpstream = () => {
    // Links are made or gone only after these calls, and a graph that loads makes many of them.
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      takePlace(node, editor.root);
      redraw();
      editor.askModel();
    }, 50);
    setTimeout(() => takePlace(node, editor.root), 400);
  };
  follow(node, "onConfigure", lookUpstream);
  follow(node, "onConnectionsChange", lookUpstream);
  new ResizeObserver(redraw).observe(editor.root);
  handToCanvas(editor.root);
  letGoOutside(editor.root);
  const smallest = node.computeSize();
  node.setSize([Math.max(WIDTH, smallest[0]), smallest[1] + TEXT_HEIGHT]);
}

app.registerExtension({
  name: "STAR.ScheduleEditor",
  nodeCreated(node) {
    const part = PARTS[node.comfyClass];
    if (part) addEditor(node, part);
  },
});
