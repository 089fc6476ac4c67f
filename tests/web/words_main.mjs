// Lists of [function, ...arguments], answered by what words.js says.
import { answerLines } from "./lines.mjs";
import * as words from "../../web/js/words.js";

await answerLines(([name, ...parameters]) => words[name](...parameters));
