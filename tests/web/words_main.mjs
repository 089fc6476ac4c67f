// Reads one JSON list of [function, ...arguments] from standard input, answers what words.js says.
import { readFileSync } from "node:fs";
import * as words from "../../web/js/words.js";

const cases = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(cases.map(([name, ...parameters]) => words[name](...parameters))));
