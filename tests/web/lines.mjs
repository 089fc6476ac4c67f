// Answers every line of standard input, a JSON list of cases, by a line with the JSON list of their answers.
import { createInterface } from "node:readline";

export async function answerLines(answer) {
  for await (const line of createInterface({ input: process.stdin })) {
    process.stdout.write(JSON.stringify(JSON.parse(line).map(answer)) + "\n");
  }
}
