// The text form of a schedule: parser and writer. No DOM, nothing of ComfyUI.
//
// Line by line the twin of star_core/schedule_text.py: the same texts are read, the same are refused, with the same
// words. What the engine keeps as one ScaleSchedule is here {scales, maps, values, strategy, samplerGuidance}
// with one list of values per written quantity.

import { WORD, asciiDigits, characters, decimalText, quoted, readDecimal, readInteger } from "./python_text.js";

const MAX_STEPS = 4096;
const MAX_PRUNE = 0.95;
const YES_NO = { yes: true, no: false };

/** The per-scale quantities in the order of their lines: what one value is, what stands where no line does. */
export const QUANTITIES = {
  top_k: { kind: "a whole number", read: readInteger, default: 0, least: 0, most: 1_000_000 },
  top_p: { kind: "a number", read: readDecimal, default: 0, least: 0, most: 1 },
  guidance: { kind: "a number", read: readDecimal, default: 0, least: -100, most: 100 },
  temperature: { kind: "a number", read: readDecimal, default: 1, least: 0.01, most: 100 },
  smooth: { kind: "yes or no", read: (word) => (Object.hasOwn(YES_NO, word) ? YES_NO[word] : null), default: false },
  steps: { kind: "a whole number", read: readInteger, default: 0, least: 0, most: MAX_STEPS },
  transformer_steps: { kind: "a whole number", read: readInteger, default: 0, least: 0, most: MAX_STEPS },
  random_steps: { kind: "a whole number", read: readInteger, default: 0, least: 0, most: MAX_STEPS },
  unguided: { kind: "yes or no", read: (word) => (Object.hasOwn(YES_NO, word) ? YES_NO[word] : null), default: false },
  prune: { kind: "a number", read: readDecimal, default: 0, least: 0, most: MAX_PRUNE },
};

/** Quantities that trade fidelity for time: a text without them means the exact picture. */
export const FAST_MODES = ["unguided", "prune"];

export const STRATEGIES = ["official", "confidence", "masked"];

/** A text that cannot be read: `problem` in words, and from where to where it stands in the text. */
export class ScheduleTextError extends Error {
  constructor(message, problem, start = 0, end = start) {
    super(message);
    this.name = "ScheduleTextError";
    this.problem = problem;
    this.start = start;
    this.end = end;
  }

  /** Whether nothing is missing but a number of scales, which a model would bring. */
  get lacksScales() {
    return this.problem === NO_SCALES;
  }
}

const NO_SCALES =
  "the schedule does not say how many scales it has: add a `maps` line, as in `maps 1 2 3 4 5 6 8 10 13 16`";

/** The released guidance per scale: strength s / (S - 1), none at the first scale. */
export function ramp(strength, scales) {
  return Array.from({ length: scales }, (_, scale) => strength * (scale / Math.max(scales - 1, 1)));
}

/** Read the text form. `scales` is the model's number of scales, needed where every line has one value. */
export function parseSchedule(text, scales = null) {
  const lines = linesOf(text);
  if (!lines.length) {
    throw plainError("the schedule is empty: write a preset's name, or `top_k 600; top_p 0.8`");
  }
  const stretch = stretches(lines);
  const expected = expectedScales(lines, scales, stretch);
  const schedule = { scales: expected, maps: null, values: {}, strategy: "official", samplerGuidance: 4, stretch };
  const seen = new Set();
  for (const line of lines) {
    const [name, ...rest] = line.words;
    if (seen.has(name.text)) throw fail(line, name, `${name.text} is written twice`);
    seen.add(name.text);
    if (!rest.length) throw fail(line, name, `${name.text} has no value`);
    if (name.text === "maps") schedule.maps = mapsOf(line, rest, expected);
    else if (name.text === "strategy") schedule.strategy = strategyOf(line, rest);
    else if (name.text === "sampler_guidance") schedule.samplerGuidance = onlyValue(line, rest);
    else if (name.text === "stretch") continue;
    else if (Object.hasOwn(QUANTITIES, name.text)) schedule.values[name.text] = spread(line, rest, expected);
    else {
      const known = ["maps", ...Object.keys(QUANTITIES), "sampler_guidance", "strategy", "stretch"].join(", ");
      throw fail(line, name, `${quoted(name.text)} is no quantity. There are: ${known}`);
    }
  }
  checkPolicies(lines, schedule);
  return schedule;
}

/** Write every quantity of a schedule, as the engine's `to_text` does. */
export function toText(schedule) {
  const lines = schedule.maps ? [`maps ${sidesText(schedule.maps)}`] : [];
  for (const name of Object.keys(QUANTITIES)) {
    const values = valuesOf(schedule, name);
    if (!FAST_MODES.includes(name) || values.some(Boolean)) lines.push(`${name} ${valuesText(name, values)}`);
  }
  lines.push(`sampler_guidance ${numberText(schedule.samplerGuidance)}`, `strategy ${schedule.strategy}`);
  if (schedule.stretch) lines.push("stretch yes");
  return lines.join("\n");
}

/** The value of every scale, the default where the text has no such line. */
export function valuesOf(schedule, name) {
  return schedule.values[name] ?? Array(schedule.scales).fill(QUANTITIES[name].default);
}

/** Values as a line writes them: runs as `600*9`, one value for all, guidance as `ramp 4` where it is one. */
export function valuesText(name, values) {
  const last = values[values.length - 1];
  if (name === "guidance" && values.length > 1 && last) {
    const released = ramp(last, values.length);
    if (values.every((value, scale) => value === released[scale])) return `ramp ${numberText(last)}`;
  }
  const runs = [];
  for (const value of values) {
    const run = runs[runs.length - 1];
    if (run && run.value === value) run.count += 1;
    else runs.push({ value, count: 1 });
  }
  if (runs.length === 1 && values.length > 1) return numberText(last);
  return runs.map(({ value, count }) => (count === 1 ? numberText(value) : `${numberText(value)}*${count}`)).join(" ");
}

/** A value as a text writes it. */
export function numberText(value) {
  if (typeof value === "boolean") return value ? "yes" : "no";
  return Number.isInteger(value) ? String(BigInt(value)) : decimalText(value);
}

/** Token maps as readable sides: `8` for a square map, `6x10` (height x width) for another. */
export function sidesText(maps) {
  return maps.map(([height, width]) => (height === width ? `${height}` : `${height}x${width}`)).join(" ");
}

/** The lines of a text that have words, each with where its words stand; `;` separates as a line break does. */
export function linesOf(text) {
  return Array.from(text.matchAll(/[^;\n]+/g), (match) => ({
    whole: text,
    start: match.index,
    end: match.index + match[0].length,
    words: Array.from(match[0].matchAll(WORD), (word) => ({
      text: word[0],
      start: match.index + word.index,
      end: match.index + word.index + word[0].length,
    })),
  })).filter((line) => line.words.length);
}

/** The error of one word, shown with its line and a pointer below it as the engine shows it. */
export function fail(line, word, problem) {
  const start = line.whole.lastIndexOf("\n", word.start - 1) + 1;
  const stop = line.whole.indexOf("\n", word.start);
  const shown = line.whole.slice(start, stop < 0 ? undefined : stop);
  const column = " ".repeat(characters(line.whole.slice(start, word.start)));
  const place = characters(line.whole.slice(0, word.start)) + 1;
  return new ScheduleTextError(`${problem} (character ${place})\n  ${shown}\n  ${column}^`, problem, word.start, word.end);
}

function plainError(problem) {
  return new ScheduleTextError(problem, problem);
}

function countOf(word) {
  const repeat = /\*(\d{1,9})$/.exec(asciiDigits(word.text));
  return repeat ? Number(repeat[1]) : 1;
}

function stretches(lines) {
  const line = lines.find(({ words }) => words[0].text === "stretch" && words.length > 1);
  return line ? onlyValue(line, line.words.slice(1), QUANTITIES.smooth) : false;
}

// A text that stretches is of its own number of scales, wherever it says one.
function expectedScales(lines, scales, stretch) {
  if (scales !== null && !stretch) return scales;
  const isMaps = (line) => line.words[0].text === "maps";
  for (const line of [...lines.filter(isMaps), ...lines.filter((other) => !isMaps(other))]) {
    const [name, ...rest] = line.words;
    const count = rest.reduce((sum, word) => sum + countOf(word), 0);
    const listed = Object.hasOwn(QUANTITIES, name.text) && rest.length && rest[0].text !== "ramp";
    if ((isMaps(line) && rest.length) || (listed && count > 1)) return Math.min(count, MAX_STEPS);
  }
  if (scales !== null) return scales;
  throw plainError(NO_SCALES);
}

function spread(line, words, scales) {
  const name = line.words[0].text;
  if (words[0].text === "ramp") {
    if (name !== "guidance" || words.length !== 2) {
      throw fail(line, words[0], "`ramp` is written as in `guidance ramp 4`");
    }
    return ramp(onlyValue(line, words.slice(1)), scales);
  }
  const values = [];
  for (const word of words) {
    const count = countOf(word);
    if (count > MAX_STEPS) throw fail(line, word, `${count} repetitions are too many`);
    const value = oneValue(line, word, QUANTITIES[name]);
    for (let repeat = 0; repeat < count; repeat += 1) values.push(value);
  }
  if (values.length === 1) return Array(scales).fill(values[0]);
  if (values.length !== scales) throw fail(line, words[0], `${values.length} values for ${scales} scales`);
  return values;
}

function onlyValue(line, words, quantity = QUANTITIES.guidance) {
  const name = line.words[0].text;
  if (words.length > 1) throw fail(line, words[1], `${name} takes one value`);
  if (words[0].text.includes("*")) throw fail(line, words[0], `${name} takes one value, for all scales together`);
  return oneValue(line, words[0], quantity);
}

function oneValue(line, word, quantity) {
  const text = word.text.replace(/\*[\d\uff10-\uff19]{1,9}$/, "");
  const value = quantity.read(text);
  if (value === null) throw fail(line, word, `${quoted(text)} is not ${quantity.kind}`);
  if (typeof value === "number" && !Number.isFinite(value)) {
    throw fail(line, word, `${quoted(text)} is not a finite number`);
  }
  return value;
}

function mapsOf(line, words, expected) {
  const maps = words.map((word) => mapOf(line, word));
  if (maps.length !== expected) throw fail(line, words[0], `${maps.length} maps for ${expected} scales`);
  if (maps.length < 2) throw fail(line, words[0], `a model needs at least two scales, got [${tuple(maps[0])}]`);
  for (let scale = 1; scale < maps.length; scale += 1) {
    const [before, after] = [maps[scale - 1], maps[scale]];
    if (before[0] <= after[0] && before[1] <= after[1]) continue;
    const problem = `token maps must not shrink from coarse to fine: ${tuple(before)} before ${tuple(after)}`;
    throw fail(line, words[scale], problem);
  }
  return maps;
}

function mapOf(line, word) {
  const match = /^([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?$/.exec(asciiDigitsAfterFirst(word.text));
  if (!match) throw fail(line, word, `${quoted(word.text)} is not a side such as 8 or 6x10`);
  return [Number(match[1]), Number(match[2] ?? match[1])];
}

// The engine's pattern wants an ASCII digit first (`[1-9]`) and takes any digit after it (`\d`).
function asciiDigitsAfterFirst(text) {
  return text.replace(/(^|x)([1-9])([\d\uff10-\uff19]*)/g, (_, before, first, more) => before + first + asciiDigits(more));
}

function tuple([height, width]) {
  return `(${height}, ${width})`;
}

function strategyOf(line, words) {
  if (words.length > 1) throw fail(line, words[1], "strategy takes one value");
  if (!STRATEGIES.includes(words[0].text)) {
    throw fail(line, words[0], `strategy is one of ${STRATEGIES.join(", ")}`);
  }
  return words[0].text;
}

function checkPolicies(lines, schedule) {
  for (let scale = 0; scale < schedule.scales; scale += 1) {
    const problem = policyProblem(schedule, scale);
    if (!problem) continue;
    const line = lines.find((candidate) => candidate.words[0].text === problem.name);
    throw fail(line, wordOfScale(line.words.slice(1), scale), `scale ${scale + 1}: ${problem.message}`);
  }
  if (schedule.scales < 1) throw fail(lines[0], lines[0].words[0], "a schedule needs at least one scale");
  if (Math.abs(schedule.samplerGuidance) > 100) {
    const line = lines.find((candidate) => candidate.words[0].text === "sampler_guidance");
    const problem = `sampler_guidance lies within -100..100, got ${decimalText(schedule.samplerGuidance)}`;
    throw fail(line, wordOfScale(line.words.slice(1), 0), problem);
  }
  const first = schedule.values.prune?.[0];
  if (first) {
    const line = lines.find((candidate) => candidate.words[0].text === "prune");
    const problem =
      `prune is ${decimalText(first)} at scale 1, which has no scale before it to restore tokens from:` +
      " begin with 0, as in `prune 0*4 0.4 0.5`";
    throw fail(line, wordOfScale(line.words.slice(1), 0), problem);
  }
}

const OUTSIDE = {
  top_k: (got) => `top_k is a count or 0 for off, got ${got}`,
  top_p: (got) => `top_p lies between 0 and 1, got ${got}`,
  guidance: (got) => `guidance lies within -100..100, got ${got}`,
  temperature: (got) => `temperature lies within 0.01..100, got ${got}`,
  steps: (got) => `steps lies within 0..${MAX_STEPS}, got ${got}`,
  transformer_steps: (got) => `transformer_steps lies within 0..${MAX_STEPS}, got ${got}`,
  random_steps: (got) => `random_steps lies within 0..${MAX_STEPS}, got ${got}`,
  prune: (got) => `prune lies within 0..${MAX_PRUNE}, got ${got}`,
};

function policyProblem(schedule, scale) {
  for (const [name, describe] of Object.entries(OUTSIDE)) {
    const value = schedule.values[name]?.[scale];
    if (value === undefined) continue;
    const { least, most, read } = QUANTITIES[name];
    if (value < least || value > most) {
      return { name, message: describe(read === readDecimal ? decimalText(value) : value.toString()) };
    }
  }
  const steps = schedule.values.steps?.[scale];
  if (schedule.values.smooth?.[scale] && steps) {
    const message = `steps is ${steps} on a smooth scale, which the causal sampler cannot draw`;
    return { name: "steps", message };
  }
  return null;
}

function wordOfScale(words, scale) {
  let reach = 0;
  for (const word of words) {
    reach += countOf(word);
    if (scale < reach && word.text !== "ramp") return word;
  }
  return words[words.length - 1];
}
