// The editor of one text: rows of bars, a menu of presets, the sides from a model, the error at its place.
// Knows the DOM and the text; what it needs of ComfyUI comes in as `host`.

import { BarRow, element } from "./bars.js";
import { isRare, isShown } from "./quantities.js";
import { presetName, readPart, scalesOf, writePreset, writeSides, writeValues } from "./schedule_part.js";
import { ScheduleTextError, linesOf, parseSchedule, sidesText, valuesOf } from "./schedule_text.js";
import { described, nameOf, say } from "./words.js";

const TOOLS_HEIGHT = 24;
const NOTE_HEIGHT = 18;
const ROW_HEIGHT = 90;
const GAP = 4;

/** The server's own refusal, told as it is. */
export class RefusedError extends Error {}

/**
 * `host`: read() and write(text); begin() and end() around one step of undo; linked(); showText(start, end);
 * askModel(), askPresets(sides) and askNames(), all promises (of a RefusedError where the server refuses);
 * applyPreset(preset) for what stands outside the text; locale(); resized().
 */
export class ScheduleEditor {
  constructor(part, host) {
    this.part = part;
    this.host = host;
    this.model = null;
    this.rows = part.quantities.map((name) => new BarRow(name, this.reportOf(name)));
    this.visibleRows = part.quantities.filter((name) => !isRare(name)).length;
    this.build();
    this.refresh();
    this.learnNames();
  }

  get height() {
    return TOOLS_HEIGHT + NOTE_HEIGHT + this.visibleRows * (ROW_HEIGHT + GAP) + GAP;
  }

  word(key, ...values) {
    return say(this.host.locale(), key, ...values);
  }

  build() {
    this.presets = element("select", "star-presets", { title: this.word("presetsTip") });
    this.presets.append(new Option(this.word("presets"), ""));
    this.fillButton = element("button", "star-fill-sides", { type: "button", title: this.word("fillTip") }, [
      this.word("fill"),
    ]);
    this.said = element("span", "star-said");
    this.list = element("div", "star-rows", {}, this.rows.map((row) => row.root));
    this.message = element("div", "star-message", { role: "status" });
    this.note = element("div", "star-note", { role: "status" });
    this.root = element("div", "star-editor", {}, [
      element("div", "star-bar-tools", {}, [this.presets, this.fillButton, this.said]),
      this.list,
      this.message,
      this.note,
    ]);
    this.fillButton.addEventListener("click", () => this.fillSides());
    this.presets.addEventListener("focus", () => this.openPresets());
    this.presets.addEventListener("pointerdown", () => this.openPresets());
    this.presets.addEventListener("change", () => this.choosePreset());
    // Load STAR may have chosen another checkpoint since: of that no link tells.
    this.root.addEventListener("pointerenter", () => this.loadPresets());
    for (const control of [this.presets, this.fillButton]) {
      for (const name of ["pointerdown", "keydown"]) control.addEventListener(name, (event) => event.stopPropagation());
    }
  }

  reportOf(name) {
    return {
      begin: () => this.host.begin(),
      end: () => this.host.end(),
      change: (values) => this.host.write(writeValues(this.host.read(), name, values)),
      point: (scale) => {
        this.pointed = scale === null ? null : scale;
        this.sayPointed();
      },
    };
  }

  /** Draw what the text says now. */
  refresh() {
    const text = this.host.read();
    this.text = text;
    this.schedule = null;
    if (this.host.linked()) return this.showMessage("plain", this.word("linked"));
    const preset = presetName(text);
    if (preset !== null) {
      if (this.names?.includes(preset) ?? true) return this.showMessage("plain", this.word("named", `“${preset}”`));
      return this.showMessage("error", this.word("unknown", `“${preset}”`, this.names.join(", ")));
    }
    try {
      this.schedule = readPart(text, this.part, this.model?.sides.length);
    } catch (error) {
      if (!(error instanceof ScheduleTextError)) throw error;
      const wrong = error.lacksScales ? wrongForAnyModel(text, this.part) : error;
      return wrong ? this.showError(text, wrong) : this.showMessage("plain", this.word("anyScales"));
    }
    return this.showBars();
  }

  /** Ask which presets there are, to tell a name from a slip of the pen. */
  async learnNames() {
    this.names = await this.host.askNames();
    if (presetName(this.host.read()) !== null) this.refresh();
  }

  showBars() {
    const { schedule } = this;
    this.message.hidden = true;
    this.list.hidden = false;
    const sides = schedule.maps ? sidesText(schedule.maps).split(" ") : this.sidesOf(schedule.scales);
    const steps = this.part.quantities.includes("steps") ? valuesOf(schedule, "steps") : null;
    for (const row of this.rows) {
      const { name } = row;
      const values = valuesOf(schedule, name);
      row.root.hidden = !isShown(name, schedule);
      row.show(values, sides, {
        codebook: this.model?.codebook ?? null,
        idle: (scale) => (steps !== null && name !== "steps" ? steps[scale] === 0 : this.filtersIdle(name, scale)),
        label: (scale) => this.word("scale", scale + 1, schedule.scales, sides[scale]),
        rangeText: ({ bottom, top }) => `${bottom} – ${top}${name === "top_k" ? ` ${this.word("log")}` : ""}`,
      });
    }
    this.sides = sides;
    this.sayPointed();
    this.sayMismatch();
    const visible = this.rows.filter((row) => !row.root.hidden).length;
    if (visible !== this.visibleRows) {
      this.visibleRows = visible;
      this.host.resized();
    }
  }

  // A smooth scale draws a soft mixture: the filters do not apply to it. Nor does guidance to an unguided one,
  // and the first scale is never pruned.
  filtersIdle(name, scale) {
    if (name === "guidance") return Boolean(this.schedule.values.unguided?.[scale]);
    if (name === "prune") return scale === 0;
    return (name === "top_k" || name === "top_p") && Boolean(this.schedule.values.smooth?.[scale]);
  }

  sidesOf(scales) {
    if (this.model?.sides.length === scales) return this.model.sides;
    return Array.from({ length: scales }, (_, scale) => `#${scale + 1}`);
  }

  sayPointed() {
    const { pointed, schedule } = this;
    const known = schedule && pointed !== null && pointed !== undefined && pointed < schedule.scales;
    this.said.textContent = known ? this.word("scale", pointed + 1, schedule.scales, this.sides[pointed]) : "";
    if (!known && schedule) this.said.textContent = this.word("every");
  }

  sayMismatch() {
    const ours = this.schedule?.maps ? sidesText(this.schedule.maps) : null;
    const theirs = this.model?.sides?.join(" ");
    const differs = ours && theirs && ours !== theirs && !this.schedule.stretch;
    if (differs) this.setNote("warning", this.word("differs", theirs, ours));
    else if (this.note.dataset.kind === "warning") this.setNote("plain", "");
  }

  showMessage(kind, ...content) {
    this.list.hidden = true;
    this.message.hidden = false;
    this.message.dataset.kind = kind;
    this.message.replaceChildren(...content);
    this.said.textContent = "";
  }

  showError(text, error) {
    const start = text.lastIndexOf("\n", error.start - 1) + 1;
    const stop = text.indexOf("\n", error.end);
    const shown = element("pre", "", {}, [
      text.slice(start, error.start),
      element("mark", "", {}, [text.slice(error.start, error.end)]),
      text.slice(error.end, stop < 0 ? undefined : stop),
    ]);
    const button = element("button", "star-show", { type: "button" }, [this.word("show")]);
    button.addEventListener("click", () => this.host.showText(error.start, error.end));
    button.addEventListener("pointerdown", (event) => event.stopPropagation());
    const placed = error.end > error.start;
    this.showMessage("error", `${error.problem}`, ...(placed ? [shown, button] : []));
  }

  setNote(kind, text) {
    this.note.dataset.kind = kind;
    this.note.textContent = text;
    this.note.title = text;
  }

  /** Why the server gave nothing: its own words, or that it did not answer. */
  told(error) {
    return error instanceof RefusedError ? error.message : this.word("failed", error.message);
  }

  /** Make one change of the text, one step for undo. */
  edit(text) {
    this.host.begin();
    this.host.write(text);
    this.host.end();
  }

  /** Ask what the connected model draws; where none is connected, forget the last one. */
  async askModel() {
    const before = JSON.stringify(this.model);
    try {
      this.model = await this.host.askModel();
    } catch (error) {
      this.model = null;
      this.setNote("warning", this.told(error));
      return null;
    }
    if (JSON.stringify(this.model) !== before) this.refresh();
    return this.model;
  }

  /** Write the model's sides into the text, and the values of the preset that it names. Nothing else changes. */
  async fillSides() {
    this.setNote("plain", "");
    const model = await this.askModel();
    if (!model) {
      if (!this.note.textContent) this.setNote("warning", this.word("noModel"));
      return;
    }
    const text = this.host.read();
    if (presetName(text) !== null) {
      await this.loadPresets();
      const preset = this.offered?.find((candidate) => candidate.name === presetName(text));
      const lines = this.linesOf(preset);
      if (!lines) return this.setNote("warning", this.word("nothing", `“${presetName(text)}”`));
      this.edit(writePreset(text, lines));
      return this.setNote("plain", this.word("filled", model.name));
    }
    try {
      const filled = writeSides(text, model.sides);
      if (filled !== text) this.edit(filled);
      this.setNote("plain", this.word("filled", model.name));
    } catch (error) {
      if (!(error instanceof ScheduleTextError)) throw error;
      const { length } = model.sides;
      this.setNote("warning", this.word("other", length, model.sides.join(" "), scalesOf(text) ?? "?"));
    }
  }

  /** Fill the menu for the model's sides, or for the text's own where no model is connected. */
  async loadPresets() {
    const model = await this.askModel();
    const written = this.schedule?.maps ? sidesText(this.schedule.maps).split(" ") : mapsLine(this.host.read());
    const sides = model?.sides ?? written;
    const wanted = JSON.stringify([sides, model?.own]);
    if (!sides || this.offeredFor === wanted) return;
    try {
      const presets = [...(model ? [model.own] : []), ...(await this.host.askPresets(sides))];
      this.offeredFor = wanted;
      this.offered = presets.filter((preset) => this.part.widget === "schedule" || preset.sampler);
    } catch (error) {
      this.setNote("warning", this.told(error));
      return;
    }
    const options = this.offered.map((preset) => {
      const option = new Option(nameOf(this.host.locale(), preset), preset.name);
      option.title = described(this.host.locale(), preset);
      return option;
    });
    this.presets.replaceChildren(new Option(this.word("presets"), ""), ...options);
  }

  /** Fill the menu that is being opened, or say why it stays empty. */
  async openPresets() {
    await this.loadPresets();
    if (!this.offered && !this.note.textContent) this.setNote("warning", this.word("noModel"));
  }

  choosePreset() {
    const preset = this.offered?.find((candidate) => candidate.name === this.presets.value);
    this.presets.value = "";
    if (preset) this.usePreset(preset);
  }

  /** A preset's lines for this node, none where it has none. */
  linesOf(preset) {
    return this.part.widget === "schedule" ? preset?.schedule : preset?.sampler?.steps;
  }

  usePreset(preset) {
    const lines = this.linesOf(preset);
    if (!lines) return;
    this.host.begin();
    this.host.write(writePreset(this.host.read(), lines));
    this.host.applyPreset(preset);
    this.host.end();
    const locale = this.host.locale();
    this.setNote("plain", `${nameOf(locale, preset)}: ${described(locale, preset)}`);
  }
}

/** What is wrong with a text that says no number of scales, whatever the model; null where nothing is. */
function wrongForAnyModel(text, part) {
  try {
    readPart(text, part, 2);
  } catch (error) {
    if (!(error instanceof ScheduleTextError)) throw error;
    return error;
  }
  return null;
}

/** The sides of a text's maps line, or null where it has none or cannot be read: nobody is asked about those. */
function mapsLine(text) {
  const line = linesOf(text).find((candidate) => candidate.words[0].text === "maps");
  if (!line) return null;
  const sides = line.words.slice(1).map((word) => word.text);
  try {
    parseSchedule(`maps ${sides.join(" ")}; top_k 0`);
  } catch (error) {
    if (!(error instanceof ScheduleTextError)) throw error;
    return null;
  }
  return sides;
}
