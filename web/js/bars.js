// One row of bars: a slider per scale for one quantity. Knows the DOM, neither the text nor ComfyUI.
//
// A change is reported as begin(), change(values)..., end(): everything between is one step for undo.

import { colourOf, heightOf, possible, rangeOf, shownValue, stepped, valueAt } from "./quantities.js";
import { typedValue } from "./schedule_part.js";

const DRAG_THRESHOLD = 3; // pixels of the screen: less is a click, which only moves the focus
const CROWDED = 10;
const STEPS_OF_KEY = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 };

/** Make an element with a class, attributes and children. */
export function element(tag, className, attributes = {}, children = []) {
  const made = document.createElement(tag);
  made.className = className;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export class BarRow {
  /** `report` has begin(), change(values), end() and point(scale or null). */
  constructor(name, report) {
    this.name = name;
    this.report = report;
    this.values = [];
    this.sides = [];
    this.range = null;
    this.codebook = null;
    this.sliders = [];
    this.editing = false;
    this.rangeText = element("span", "star-row-range");
    this.bars = element("div", "star-bars");
    this.root = element("div", "star-row", { "data-quantity": name }, [
      element("div", "star-row-name", {}, [name, this.rangeText]),
      this.bars,
    ]);
    this.root.style.setProperty("--star-colour", colourOf(name));
  }

  /** Show values; `idle` tells which scales make no use of them. */
  show(values, sides, { codebook = null, idle = () => false, label, rangeText }) {
    this.values = values;
    this.codebook = codebook;
    if (!this.editing) this.range = rangeOf(this.name, values, codebook);
    if (this.sliders.length !== values.length) this.build(values.length);
    this.sides = sides;
    this.bars.toggleAttribute("data-crowded", values.length > CROWDED);
    this.rangeText.textContent = rangeText(this.range);
    this.sliders.forEach((slider, scale) => {
      slider.setAttribute("aria-label", `${this.name}, ${label(scale)}`);
      slider.toggleAttribute("data-idle", idle(scale));
      slider.lastChild.textContent = sides[scale];
      this.paint(slider, values[scale]);
    });
  }

  build(count) {
    this.sliders = Array.from({ length: count }, (_, scale) => this.makeSlider(scale));
    this.bars.replaceChildren(...this.sliders);
  }

  makeSlider(scale) {
    const track = element("div", "star-track", {}, [element("div", "star-fill")]);
    const slider = element("div", "star-slider", { role: "slider", tabindex: "0", "aria-orientation": "vertical" }, [
      element("span", "star-value"),
      track,
      element("span", "star-side"),
    ]);
    slider.addEventListener("pointerdown", (event) => this.press(event, scale));
    slider.addEventListener("dblclick", (event) => {
      event.stopPropagation();
      this.type(scale);
    });
    slider.addEventListener("keydown", (event) => this.key(event, scale));
    // Not stopped: ComfyUI would think that Shift is still held.
    slider.addEventListener("keyup", () => this.finish());
    slider.addEventListener("blur", () => this.finish());
    slider.addEventListener("focus", () => this.report.point(scale));
    slider.addEventListener("pointerenter", () => this.report.point(scale));
    slider.addEventListener("pointerleave", () => this.report.point(null));
    return slider;
  }

  paint(slider, value) {
    const zero = heightOf(this.name, Math.max(0, this.range.bottom), this.range);
    const height = heightOf(this.name, value, this.range);
    const fill = slider.querySelector(".star-fill");
    fill.style.bottom = `${Math.min(zero, height) * 100}%`;
    fill.style.height = `${Math.abs(height - zero) * 100}%`;
    const shown = shownValue(this.name, value);
    slider.querySelector(".star-value").textContent = shown;
    slider.toggleAttribute("data-off", Number(value) === 0);
    slider.setAttribute("aria-valuemin", this.range.bottom);
    slider.setAttribute("aria-valuemax", this.range.top);
    slider.setAttribute("aria-valuenow", Number(value));
    slider.setAttribute("aria-valuetext", shown);
  }

  begin() {
    if (this.editing) return;
    this.editing = true;
    this.report.begin();
  }

  finish() {
    if (!this.editing) return;
    this.editing = false;
    this.report.end();
  }

  /** Set the value of one scale, or of all. */
  put(scale, value, all = false) {
    const wanted = this.values.map((old, index) => (all || index === scale ? value : old));
    const values = possible(this.name, wanted);
    if (values.some((changed, index) => changed !== this.values[index])) this.report.change(values);
  }

  press(event, scale) {
    if (event.button !== 0 || event.target.closest("input")) return;
    event.stopPropagation();
    const slider = this.sliders[scale];
    const track = slider.querySelector(".star-track").getBoundingClientRect();
    const { clientX, clientY } = event;
    slider.focus({ preventScroll: true });
    slider.setPointerCapture(event.pointerId);
    const move = (moved) => {
      moved.stopPropagation();
      const far = Math.hypot(moved.clientX - clientX, moved.clientY - clientY) >= DRAG_THRESHOLD;
      if (!this.editing && !far) return;
      this.begin();
      slider.setAttribute("data-held", "");
      const height = (track.bottom - moved.clientY) / track.height;
      this.put(scale, valueAt(this.name, height, this.range, moved.shiftKey), moved.altKey);
    };
    const leave = (last) => {
      last.stopPropagation();
      slider.removeEventListener("pointermove", move);
      for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) slider.removeEventListener(name, leave);
      slider.removeAttribute("data-held");
      this.finish();
    };
    slider.addEventListener("pointermove", move);
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) slider.addEventListener(name, leave);
  }

  key(event, scale) {
    if (event.ctrlKey || event.metaKey || event.target.closest("input")) return;
    const { key, shiftKey, altKey } = event;
    const ends = { Home: this.range.bottom, End: this.range.top };
    if (key in STEPS_OF_KEY || key in ends) {
      this.begin();
      const value =
        key in ends
          ? valueAt(this.name, key === "Home" ? 0 : 1, this.range)
          : stepped(this.name, this.values[scale], STEPS_OF_KEY[key], shiftKey);
      this.put(scale, value, altKey);
    } else if (key === "Enter" || key === "F2") this.type(scale);
    else if (/^[\d.-]$/.test(key)) this.type(scale, key);
    else if (key !== "Delete" && key !== "Backspace") return;
    // Delete on a bar must not delete the node, nor arrows move it.
    event.preventDefault();
    event.stopPropagation();
  }

  /** Open a field for a number over a bar. Enter and leaving it keep the number, Escape does not. */
  type(scale, first = null) {
    const slider = this.sliders[scale];
    if (slider.querySelector("input")) return;
    const shown = shownValue(this.name, this.values[scale]);
    const field = element("input", "star-typed", { "aria-label": slider.getAttribute("aria-label") });
    field.value = first ?? (shown === "off" ? "0" : shown);
    let typed = first !== null;
    const close = (keep) => {
      if (!field.isConnected || field.closing) return;
      field.closing = true;
      const value = typedValue(this.name, field.value);
      field.remove();
      // What is shown is rounded: a field that nobody typed in must not round the value.
      if (!keep || value === null || !typed) return;
      this.begin();
      this.put(scale, value);
      this.finish();
    };
    const check = () => field.toggleAttribute("aria-invalid", typedValue(this.name, field.value) === null);
    check();
    field.addEventListener("input", () => {
      typed = true;
      check();
    });
    field.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter" || event.key === "Escape") {
        event.preventDefault();
        close(event.key === "Enter");
        slider.focus({ preventScroll: true });
      } else if (event.key === "Tab") {
        event.preventDefault();
        close(true);
        this.sliders[scale + (event.shiftKey ? -1 : 1)]?.focus({ preventScroll: true });
      }
    });
    for (const name of ["pointerdown", "pointermove", "pointerup", "mousedown", "dblclick"]) {
      field.addEventListener(name, (event) => event.stopPropagation());
    }
    field.addEventListener("blur", () => close(true));
    slider.append(field);
    field.focus({ preventScroll: true });
    if (first === null) field.select();
  }
}
