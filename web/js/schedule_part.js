// What one node edits of a schedule text: which lines are its own, and how a line changes while the others stay.
// No DOM, nothing of ComfyUI.

import { FAST_MODES, QUANTITIES, ScheduleTextError, fail, linesOf, numberText, parseSchedule, valuesText } from "./schedule_text.js";

const DRAWING = ["top_k", "top_p", "guidance", "temperature", "smooth", "unguided", "prune"];
const SAMPLER = ["steps", "transformer_steps", "random_steps"];
const IN_ITS_FIELD = {
  sampler_guidance: "sampler_guidance is written in the field guidance, not in the text",
  strategy: "strategy is chosen in its own field, not in the text",
};

/** The nodes that have an editor: the STRING widget, its quantities, and what stands elsewhere. */
export const PARTS = {
  StarScaleSchedule: {
    widget: "schedule",
    quantities: DRAWING,
    elsewhere: Object.fromEntries(
      [...SAMPLER, "sampler_guidance", "strategy"].map((name) => [
        name,
        `${name} is the causal sampler's: it belongs to the node Causal Sampler`,
      ]),
    ),
  },
  StarCausalSampler: {
    widget: "steps",
    quantities: SAMPLER,
    elsewhere: {
      ...Object.fromEntries(
        DRAWING.map((name) => [name, `${name} is not the causal sampler's: it belongs to the node Scale Schedule`]),
      ),
      ...IN_ITS_FIELD,
    },
  },
};

/** The one word of a text that is a preset's name, or null. */
export function presetName(text) {
  const lines = linesOf(text);
  return lines.length === 1 && lines[0].words.length === 1 ? lines[0].words[0].text : null;
}

/**
 * Read a node's text. Lines that belong to the other node are refused as the node itself refuses them. `scales` is
 * the model's number of them, for a text that says none.
 */
export function readPart(text, part, scales = null) {
  for (const line of linesOf(text)) {
    const name = line.words[0];
    if (Object.hasOwn(part.elsewhere, name.text)) throw fail(line, name, part.elsewhere[name.text]);
  }
  try {
    return parseSchedule(text);
  } catch (error) {
    if (scales === null || !error.lacksScales) throw error;
    return parseSchedule(text, scales);
  }
}

/** Write the values of one quantity into a text: its line changes, or is added; every other character stays. */
export function writeValues(text, name, values) {
  const written = writeLine(text, name, valuesText(name, values));
  if (scalesOf(written) === values.length) return written;
  // The line was the one that said how many scales there are: it must go on saying so.
  return writeLine(text, name, countedText(values));
}

/** Write a line `name rest` into a text, in the place of the one with this name, or at the end (`maps` first). */
export function writeLine(text, name, rest) {
  const line = linesOf(text).find((candidate) => candidate.words[0].text === name);
  if (line) {
    const last = line.words[line.words.length - 1];
    if (line.words.length === 1) return `${text.slice(0, last.end)} ${rest}${text.slice(last.end)}`;
    return text.slice(0, line.words[1].start) + rest + text.slice(last.end);
  }
  if (!linesOf(text).length) return `${name} ${rest}`;
  if (name === "maps") return `${name} ${rest}${gapOf(text)}${text}`;
  return `${text.trimEnd().replace(/;$/, "")}${gapOf(text)}${name} ${rest}`;
}

/** Take the line with this name out of a text, with the separator before it. */
function withoutLine(text, name) {
  const line = linesOf(text).find((candidate) => candidate.words[0].text === name);
  if (!line) return text;
  return line.start ? text.slice(0, line.start - 1) + text.slice(line.end) : text.slice(line.end + 1);
}

/** Write the sides of a model. Throws where values are listed for another number of scales: nothing is stretched. */
export function writeSides(text, sides) {
  const written = writeLine(text, "maps", sides.join(" "));
  parseSchedule(written);
  return written;
}

/** Write a preset's lines into a text that can be read, or put them in the place of one that cannot. */
export function writePreset(text, preset) {
  if (presetName(text) !== null || scalesOf(text) === null) return preset;
  let written = text;
  for (const line of linesOf(preset)) {
    const [name, ...rest] = line.words.map((word) => word.text);
    written = writeLine(written, name, rest.join(" "));
  }
  // A preset without a fast mode draws the exact picture: one that the text had would make it another.
  const exact = (name) => !linesOf(preset).some((line) => line.words[0].text === name);
  for (const name of FAST_MODES.filter(exact)) written = withoutLine(written, name);
  return written;
}

/** The number of scales a text says, or null where it cannot be read. */
export function scalesOf(text) {
  try {
    return parseSchedule(text).scales;
  } catch (error) {
    if (error instanceof ScheduleTextError) return null;
    throw error;
  }
}

/** A value typed by hand, or null where the quantity cannot have it. */
export function typedValue(name, typed) {
  const { read, least, most } = QUANTITIES[name];
  const value = read(typed.trim());
  if (value === null || typeof value === "boolean") return value;
  return value >= least && value <= most ? value : null;
}

function countedText(values) {
  const same = values.every((value) => value === values[0]);
  return same ? `${numberText(values[0])}*${values.length}` : values.map(numberText).join(" ");
}

function gapOf(text) {
  return text.includes("\n") || !text.includes(";") ? "\n" : "; ";
}
