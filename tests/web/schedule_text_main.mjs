// Lists of [text, scales or null], answered by what the editor's parser makes of each.
import { answerLines } from "./lines.mjs";
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

await answerLines(answer);
