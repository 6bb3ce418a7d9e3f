// node llama_cpp.mjs NODE_MODULES MODEL TEXTS COUNT: of each text its ids, their text, and COUNT greedy tokens, as JSON.
import {pathToFileURL} from "node:url";

const [modules, file, texts, count] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(`${modules}/node-llama-cpp/dist/index.js`).href);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({
  contextSize: 256, threads: 1, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", // not rounded
});
const answers = [];
for (const text of JSON.parse(texts)) {
  const ids = model.tokenize(text, false, "trimLeadingSpace");
  const sequence = context.getSequence();
  const made = [];
  for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
    made.push(token);
    if (made.length >= Number(count)) break;
  }
  answers.push({ids, made, text: model.detokenize(ids)});
  sequence.dispose();
}
console.log(JSON.stringify(answers));
process.exit(0);
