// The page: takes photos however they come, has the worker look at them, and shows its answers.

const MOST_SHOWN = 5;
const MOST_NAMED = 30; // classes, in the list of facts
const YES = 0.5; // with several labels an image, a label of this probability or more is an answer
const element = (id) => document.getElementById(id);

const worker = new Worker("worker.js", { type: "module" });
const waiting = new Map();
let nextId = 0;
let haveModel;
const model = new Promise((resolve) => { haveModel = resolve; });

worker.onmessage = ({ data }) => {
  if (data.loaded !== undefined) element("loading").value = data.loaded;
  else if (data.metadata) haveModel(data);
  else if (data.broken) showBroken(data.broken);
  else {
    const { resolve, reject } = waiting.get(data.id);
    waiting.delete(data.id);
    if (data.problem === undefined) resolve(data.answer);
    else reject(new Error(data.problem));
  }
};
worker.onerror = (event) => showBroken(event.message || "This browser is too old for it: it needs WebAssembly and OffscreenCanvas.");

function request(message) {
  nextId += 1;
  worker.postMessage({ id: nextId, ...message });
  return new Promise((resolve, reject) => waiting.set(nextId, { resolve, reject }));
}

// For other scripts and for tests. `ask`: probabilities (N * K) of N images of the network's own size, uint8 (N, 3, H, W).
// `classify`: of one encoded image, with the pixels {width, height, data} that the network saw.
window.shardline = {
  metadata: model.then(({ metadata }) => metadata),
  ask: (tensor, batch) => request({ tensor, batch }),
  classify: (blob) => request({ blob }),
};

element("notice").hidden = true;
element("drop").hidden = false;
model.then((found) => {
  showFacts(found);
  element("state").hidden = element("loading").hidden = true;
  element("ways").hidden = false;
  takePhotos(found.metadata);
});

function showBroken(reason) {
  const paragraph = document.createElement("p");
  paragraph.textContent = `The model cannot be run here. ${reason}`;
  element("notice").replaceChildren(paragraph);
  element("notice").className = "problem";
  element("notice").hidden = false;
  element("drop").hidden = true;
}

function takePhotos(metadata) {
  const take = (files) => [...files].forEach((file) => look(file, metadata));
  for (const input of [element("files"), element("camera")]) {
    input.addEventListener("change", () => {
      take(input.files);
      input.value = ""; // the same photo may be chosen again
    });
  }
  document.addEventListener("paste", (event) => take(event.clipboardData.files));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    element("drop").classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) element("drop").classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    element("drop").classList.remove("over");
    take(event.dataTransfer.files);
  });
}

async function look(file, metadata) {
  const card = element("answer").content.cloneNode(true).firstElementChild;
  const photo = card.querySelector(".photo");
  photo.onload = () => URL.revokeObjectURL(photo.src);
  photo.onerror = () => {
    photo.hidden = true;
    URL.revokeObjectURL(photo.src);
  };
  photo.src = URL.createObjectURL(file);
  card.querySelector(".source").textContent = file.name;
  element("answers").prepend(card);
  try {
    const answer = await request({ blob: file });
    showAnswer(card, answer, metadata);
    card.querySelector(".source").textContent = `${file.name}, ${answer.size.join(" x ")}, ${answer.milliseconds.toFixed(0)} ms`;
  } catch (error) {
    card.classList.add("problem");
    card.querySelector(".label").textContent = error.message;
  }
}

function showAnswer(card, { probabilities, seen }, metadata) {
  const several = metadata.task === "multi";
  const byProbability = [...probabilities.keys()].sort((one, other) => probabilities[other] - probabilities[one]);
  const isChosen = (number) => (several ? probabilities[number] >= YES : number === byProbability[0]);
  const chosen = byProbability.filter(isChosen);
  card.querySelector(".label").textContent = chosen.map((number) => metadata.class_names[number]).join(", ") || "none of the labels";
  const shown = byProbability.slice(0, Math.max(MOST_SHOWN, chosen.length));
  card.querySelector(".bars").replaceChildren(...shown.map((number) => {
    const bar = barOf(metadata.class_names[number], probabilities[number]);
    bar.classList.toggle("chosen", isChosen(number));
    return bar;
  }));
  showSeen(card, seen);
}

function barOf(name, probability) {
  const item = document.createElement("li");
  const parts = { name, number: percent(probability), bar: "" };
  for (const [kind, text] of Object.entries(parts)) {
    const part = document.createElement("span");
    part.className = kind;
    part.textContent = text;
    item.append(part);
  }
  item.lastElementChild.style.setProperty("--share", probability);
  return item;
}

function percent(share) {
  return share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
}

function showSeen(card, { width, height, data }) {
  const canvas = card.querySelector(".seen");
  Object.assign(canvas, { width, height });
  const pixels = new ImageData(width, height);
  for (let at = 0; at < width * height; at += 1) {
    pixels.data.set(data.subarray(3 * at, 3 * at + 3), 4 * at);
    pixels.data[4 * at + 3] = 255;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  canvas.hidden = card.querySelector("figcaption").hidden = false;
}

function showFacts({ metadata, numBytes }) {
  const [height, width] = metadata.preprocess.crop ?? metadata.preprocess.resize;
  const { metrics = {}, versions = {} } = metadata;
  const facts = {
    classes: classesOf(metadata.class_names),
    answers: metadata.task === "multi" ? "every label that fits" : "one class for each photo",
    accuracy: metrics.accuracy === undefined ? "" : accuracyOf(metrics),
    input: `${width} x ${height} pixels`,
    size: `${(numBytes / 1e6).toFixed(1)} MB${metadata.precision ? `, ${metadata.precision}` : ""}`,
    "data set": metadata.data_digest?.slice(0, 12),
    job: metadata.job_id,
    "made with": versions.shardline && `Shardline ${versions.shardline}`,
    licence: metadata.license,
  };
  for (const [name, value] of Object.entries(facts)) {
    if (!value) continue;
    const term = document.createElement("dt");
    const description = document.createElement("dd");
    term.textContent = name;
    description.textContent = value;
    element("facts").append(term, description);
  }
  element("about").hidden = false;
}

function classesOf(names) {
  const more = names.length > MOST_NAMED ? ` and ${names.length - MOST_NAMED} more` : "";
  return `${names.length}: ${names.slice(0, MOST_NAMED).join(", ")}${more}`;
}

function accuracyOf({ accuracy, num_samples: number, split }) {
  const images = number === undefined ? "" : ` on ${number.toLocaleString("en")} images`;
  return `${percent(accuracy)}${images}${split === undefined ? "" : ` of ${split}`}`;
}
