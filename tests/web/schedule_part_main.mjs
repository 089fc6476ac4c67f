// Lists of [function, ...arguments], answered by what the editor's functions return.
import { answerLines } from "./lines.mjs";
import * as part from "../../web/js/schedule_part.js";
import * as quantities from "../../web/js/quantities.js";
import { parseSchedule } from "../../web/js/schedule_text.js";

function answer([name, ...parameters]) {
  if (name === "readPart") {
    const [text, node, scales] = parameters;
    return caught(() => part.readPart(text, part.PARTS[node], scales).scales);
  }
  if (name === "isShownIn") return caught(() => quantities.isShown(parameters[0], parseSchedule(parameters[1])));
  return caught(() => (part[name] ?? quantities[name])(...parameters));
}

function caught(call) {
  try {
    return { value: call() ?? null };
  } catch (error) {
    if (error.name !== "ScheduleTextError") throw error;
    return { error: error.message };
  }
}

await answerLines(answer);
