// How each quantity looks as a bar: its range, its steps under the mouse, its scale and its colour. No DOM.

import { FAST_MODES, QUANTITIES, numberText, valuesOf } from "./schedule_text.js";

const LOG_FLOOR = 0.08; // what a log bar keeps for "one", so that it differs from "off"

const LOOKS = {
  top_k: { top: 4096, log: true, decimals: 0, off: true, colour: "#4f8ff7" },
  top_p: { top: 1, step: 0.01, decimals: 3, off: true, colour: "#1fae9b" },
  guidance: { top: 8, step: 0.1, decimals: 2, grows: true, colour: "#d99a1c" },
  temperature: { top: 2, step: 0.05, decimals: 3, grows: true, colour: "#e0645c" },
  smooth: { top: 1, step: 1, decimals: 0, switch: true, colour: "#c56bc9" },
  steps: { top: 16, step: 1, decimals: 0, off: true, grows: true, colour: "#8b74f2" },
  transformer_steps: { top: 16, step: 1, decimals: 0, grows: true, colour: "#4f8ff7" },
  random_steps: { top: 16, step: 1, decimals: 0, grows: true, colour: "#1fae9b" },
  unguided: { top: 1, step: 1, decimals: 0, switch: true, colour: "#8b74f2" },
  prune: { top: 0.95, step: 0.05, decimals: 2, off: true, colour: "#7c8794" },
};

/** Whether a quantity is one that few schedules have: its row waits until the text asks for it. */
export function isRare(name) {
  return name === "smooth" || FAST_MODES.includes(name);
}

/** Whether a schedule's row of a quantity is shown. */
export function isShown(name, schedule) {
  // A fast mode's line is written only where someone wants it; presets write `smooth no`.
  if (FAST_MODES.includes(name)) return Object.hasOwn(schedule.values, name);
  return !isRare(name) || valuesOf(schedule, name).some(Boolean);
}

/** Values that a text may have: the first scale has none before it to restore tokens from, so it is never pruned. */
export function possible(name, values) {
  return name === "prune" ? values.map((value, scale) => (scale === 0 ? 0 : value)) : values;
}

export function colourOf(name) {
  return LOOKS[name].colour;
}

/** The range that a row of bars shows: wide enough for its values, 0 always in it. */
export function rangeOf(name, values, codebook = null) {
  const look = LOOKS[name];
  const numbers = values.map(Number);
  const highest = Math.max(...numbers);
  const lowest = Math.min(0, ...numbers);
  const usual = name === "top_k" ? (codebook ?? look.top) : look.top;
  const top = highest > usual ? roundUp(highest, look.log ? 1 : 1.25, QUANTITIES[name].most) : usual;
  return { bottom: lowest < 0 ? -roundUp(-lowest, 1.25, 100) : 0, top };
}

/** Where a value stands in a range, from 0 (bottom) to 1 (top). */
export function heightOf(name, value, { bottom, top }) {
  const number = Number(value);
  if (LOOKS[name].log) return number < 1 ? 0 : LOG_FLOOR + (1 - LOG_FLOOR) * (Math.log(number) / Math.log(top));
  return Math.min(1, Math.max(0, (number - bottom) / (top - bottom)));
}

/** The value at a height, in the steps that a hand can hold; `fine` divides them by ten. */
export function valueAt(name, height, { bottom, top }, fine = false) {
  const look = LOOKS[name];
  const inside = Math.min(1, Math.max(0, height));
  if (look.switch) return inside >= 0.5;
  if (look.log) {
    if (inside < LOG_FLOOR / 2) return 0;
    const share = Math.max(0, (inside - LOG_FLOOR) / (1 - LOG_FLOOR));
    return share === 1 ? top : Math.round(Number((top ** share).toPrecision(fine ? 4 : 2)));
  }
  return settle(name, bottom + inside * (top - bottom), fine);
}

/** The value one key press away: `steps` small ones, `fine` a tenth of them. */
export function stepped(name, value, steps, fine = false) {
  const look = LOOKS[name];
  if (look.switch) return steps > 0;
  if (!look.log) return settle(name, Number(value) + steps * stepOf(look, fine), fine);
  if (fine) return clamp(name, value + Math.sign(steps));
  // A tenth of a factor of two per step: 600 goes to 643, never less than one whole code.
  const moved = value < 1 ? Math.max(0, steps) : Math.round(value * 2 ** (steps / 10));
  return clamp(name, moved === value ? value + Math.sign(steps) : moved);
}

/** A value as it is written above its bar. */
export function shownValue(name, value) {
  const look = LOOKS[name];
  if (look.off && value === 0) return "off";
  if (typeof value === "boolean") return numberText(value);
  return String(Number(Number(value).toFixed(look.decimals)));
}

function settle(name, value, fine) {
  const look = LOOKS[name];
  const step = stepOf(look, fine);
  return clamp(name, Number((Math.round(value / step) * step).toFixed(look.decimals)));
}

function stepOf(look, fine) {
  return fine && look.decimals > 0 ? look.step / 10 : look.step;
}

function clamp(name, value) {
  const { least, most } = QUANTITIES[name];
  return Math.min(most, Math.max(least, value));
}

function roundUp(value, room, most) {
  const wanted = value * room;
  const unit = 10 ** Math.floor(Math.log10(wanted));
  const round = [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((factor) => factor * unit >= wanted) * unit;
  return Math.min(round, most);
}
