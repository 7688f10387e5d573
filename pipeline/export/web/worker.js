// The model at work, beside the page, which stays quick while a large photo is decoded or a network calculates.
//
// One thread and the plain WebAssembly build of onnxruntime: more threads need headers (COOP, COEP) that a plain file server
// does not send. Messages in: {id, blob} or {id, tensor, batch}; out: {id, answer} or {id, problem}. Of the model itself:
// {loaded} (a share of 1), then {metadata, numBytes}, or {broken}.

import * as ort from "./vendor/ort.wasm.bundle.min.js";
import { decode } from "./decode.js";
import { readMetadata } from "./metadata.js";
import { inputSize, preprocess, toTensor } from "./preprocess.js";

const model = load();
model.catch((error) => postMessage({ broken: error.message }));

async function load() {
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = await download("vendor/ort-wasm-simd-threaded.wasm", 0);
  const bytes = await download("model.onnx", 0.5);
  const metadata = readMetadata(bytes);
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  const found = { metadata, session };
  const [height, width] = inputSize(metadata.preprocess);
  await ask(found, new Uint8Array(3 * height * width), 1); // the first answer takes longest, and shows that there are any
  postMessage({ metadata, numBytes: bytes.length });
  return found;
}

// All bytes of a file beside the page. Each of the two counts for half of what there is to load.
async function download(name, before) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} is missing beside this page (${response.status}). Export the model again.`);
  const total = Number(response.headers.get("Content-Length"));
  const parts = [];
  let loaded = 0;
  for (let reader = response.body.getReader(), part; !(part = await reader.read()).done; ) {
    parts.push(part.value);
    loaded += part.value.length;
    // A compressed answer is longer than its header says.
    if (total > 0) postMessage({ loaded: before + 0.5 * Math.min(1, loaded / total) });
  }
  const bytes = new Uint8Array(loaded);
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

async function ask({ metadata, session }, tensor, batch) {
  const shape = [batch, 3, ...inputSize(metadata.preprocess)];
  const answers = await session.run({ image: new ort.Tensor("uint8", tensor, shape) }, ["probabilities"]);
  return answers.probabilities.data;
}

async function classify(found, blob) {
  const photo = await decode(blob, found.metadata.preprocess.background);
  const seen = preprocess(photo, found.metadata.preprocess);
  const started = performance.now();
  const probabilities = await ask(found, toTensor(seen), 1);
  return { probabilities, seen, milliseconds: performance.now() - started, size: [photo.width, photo.height] };
}

async function answer({ id, blob, tensor, batch }) {
  try {
    const found = await model;
    postMessage({ id, answer: blob ? await classify(found, blob) : await ask(found, tensor, batch) });
  } catch (error) {
    postMessage({ id, problem: error.message });
  }
}

// One after the other: a session answers one question at a time, and two large photos at once may be too much for a phone.
let last = Promise.resolve();
onmessage = ({ data }) => {
  last = last.then(() => answer(data));
};
