// How fast llama.cpp generates from a GGUF file on the processor: tokens/s of one conversation and of eight, greedy.
//
//     npm install --ignore-scripts node-llama-cpp && node benchmarks/llamacpp_speed.mjs FILE.gguf [threads] [tokens]
//
// The npm package brings llama.cpp compiled; import it from the folder where it was installed.
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const installed = createRequire(`${process.cwd()}/`).resolve("node-llama-cpp");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(installed));
const [file, threads = "2", tokens = "64"] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", maxThreads: +threads, logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: file});
const prompt = model.tokenize("Tell me a long story about a river and the people who live on it.");

async function generate(sequence, limit) {
  await sequence.clearHistory();
  let count = 0;
  for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true}))
    if (++count >= limit) break;
  return count;
}

// The prompt's share is taken out by replies of one token each.
async function measure(conversations) {
  const context = await model.createContext({contextSize: 512, sequences: conversations, threads: +threads});
  const sequences = Array.from({length: conversations}, () => context.getSequence());
  const timed = async (limit) => {
    const began = performance.now();
    const counts = await Promise.all(sequences.map((sequence) => generate(sequence, limit)));
    return [counts.reduce((sum, count) => sum + count), (performance.now() - began) / 1e3];
  };
  await timed(2);
  const [first, prompts] = await timed(1);
  const [all, seconds] = await timed(+tokens);
  await context.dispose();
  return (all - first) / (seconds - prompts);
}

console.log(`one ${(await measure(1)).toFixed(1)} tokens/s, eight ${(await measure(8)).toFixed(1)}`);
process.exit(0);
