// How Python reads and writes numbers and words: the engine's schedule texts are Python's, character by character.

const SPACE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const INTEGER = /^[+-]?\d+(?:_\d+)*$/;
const DECIMAL = /^[+-]?(?:\d+(?:_\d+)*\.?(?:\d+(?:_\d+)*)?|\.\d+(?:_\d+)*)(?:e[+-]?\d+(?:_\d+)*)?$/i;
const INFINITE = /^[+-]?(?:inf|infinity|nan)$/i;
const LONGEST_INTEGER = 4300;

/** A word as `\S+` finds it in Python, whose white space is not JavaScript's. */
export const WORD = new RegExp(`[^${SPACE}]+`, "g");

/** Full-width digits, as an input method for Chinese or Japanese types them, count as digits in Python. */
export function asciiDigits(text) {
  return text.replace(/[\uff10-\uff19]/g, (digit) => String.fromCharCode(digit.charCodeAt(0) - 0xfee0));
}

/** Python's int(text): a number, a BigInt where a number is not exact, or null where it is none. */
export function readInteger(text) {
  const plain = asciiDigits(text);
  if (!INTEGER.test(plain)) return null;
  const digits = plain.replace(/[+_]/g, "");
  if (digits.replace("-", "").length > LONGEST_INTEGER) return null;
  const value = Number(digits) + 0;
  return Number.isSafeInteger(value) ? value : BigInt(digits);
}

/** Python's float(text), or null where it is none. Infinite and not-a-number are values here. */
export function readDecimal(text) {
  const plain = asciiDigits(text);
  if (INFINITE.test(plain)) return /nan/i.test(plain) ? NaN : plain.startsWith("-") ? -Infinity : Infinity;
  return DECIMAL.test(plain) ? Number(plain.replace(/_/g, "")) : null;
}

/** Python's repr of a float: shortest digits, an exponent below 1e-4 and from 1e16 on. */
export function decimalText(value) {
  if (Object.is(value, -0)) return "-0.0";
  const [mantissa, power] = value.toExponential().split("e");
  const exponent = Number(power);
  if (exponent < -4 || exponent >= 16) {
    return `${mantissa}e${exponent < 0 ? "-" : "+"}${String(Math.abs(exponent)).padStart(2, "0")}`;
  }
  const digits = mantissa.replace(/[-.]/g, "");
  const sign = value < 0 ? "-" : "";
  if (exponent < 0) return `${sign}0.${"0".repeat(-exponent - 1)}${digits}`;
  const whole = digits.slice(0, exponent + 1).padEnd(exponent + 1, "0");
  return `${sign}${whole}.${digits.slice(exponent + 1) || "0"}`;
}

/** Python's repr of a string. */
export function quoted(text) {
  const quote = text.includes("'") && !text.includes('"') ? '"' : "'";
  const shown = Array.from(text, (character) => escaped(character, quote)).join("");
  return quote + shown + quote;
}

function escaped(character, quote) {
  const named = { "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", [quote]: `\\${quote}` }[character];
  if (named !== undefined) return named;
  if (character === " " || !/[\p{C}\p{Z}]/u.test(character)) return character;
  const code = character.codePointAt(0);
  if (code < 0x100) return `\\x${code.toString(16).padStart(2, "0")}`;
  if (code < 0x10000) return `\\u${code.toString(16).padStart(4, "0")}`;
  return `\\U${code.toString(16).padStart(8, "0")}`;
}

/** How many characters Python counts in a piece of text: code points, not UTF-16 halves. */
export function characters(text) {
  return Array.from(text).length;
}
