// Reads one JSON list of [text, scales or null] from standard input, answers one JSON list of what the editor's
// parser makes of each.
import { readFileSync } from "node:fs";
import { parseSchedule, toText, valuesOf, QUANTITIES } from "../../web/js/schedule_text.js";

function answer([text, scales]) {
  try {
    const schedule = parseSchedule(text, scales);
    const values = Object.fromEntries(Object.keys(QUANTITIES).map((name) => [name, valuesOf(schedule, name)]));
    return { text: toText(schedule), scales: schedule.scales, maps: schedule.maps, values };
  } catch (error) {
    if (error.name !== "ScheduleTextError") throw error;
    const { message, start, end } = error;
    return { error: message, word: text.slice(start, end) };
  }
}

const cases = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(cases.map(answer)));
