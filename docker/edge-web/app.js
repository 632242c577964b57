/** The page: what is chosen, what is shown. */

import { detectionFor, findBoxes, inPicture } from "./lib/detect.js";
import { drawBoxes } from "./lib/draw.js";
import { fetchGolden, fetchManifest, hasWebgpu, numThreads, openEngine } from "./lib/model.js";
import { decodePhoto } from "./lib/photo.js";
import { portableArtifacts } from "./lib/manifest.js";
import { InputError, classes, networkInput } from "./lib/preprocess.js";
import { checkArtifact, checkPreprocessing } from "./lib/prove.js";

const TOP = 5;
/** Boxes in the list; the picture shows all of them. */
const LISTED = 50;
const MEGABYTE = 1e6;
const at = (id) => document.getElementById(id);
const controls = ["file", "artifact", "engine", "prove"].map(at);

let manifest;
let engine;
let photo; // the last one, to run again when the artifact or the engine changes
let previewUrl = "";

function say(text) {
  at("status").textContent = text;
}

/** Errors are explained in the page; what nobody foresaw also goes to the console. */
function explain(error) {
  const foreseen = error instanceof InputError;
  if (!foreseen) console.error(error);
  at("error").textContent = foreseen
    ? `${error.message}. To mend it: ${error.fix}.`
    : `Unexpected: ${error?.message ?? error}`;
  at("error").hidden = false;
  say("");
}

/** One thing at a time: while `work` runs, nothing else can be started. `data-state` tells a test the same. */
async function busy(work) {
  document.body.dataset.state = "busy";
  document.body.setAttribute("aria-busy", "true");
  const focused = document.activeElement;
  controls.forEach((control) => {
    control.disabled = true;
  });
  at("error").hidden = true;
  try {
    await work();
    document.body.dataset.state = "ready";
  } catch (error) {
    explain(error);
    document.body.dataset.state = "failed";
  } finally {
    document.body.removeAttribute("aria-busy");
    controls.forEach((control) => {
      control.disabled = !manifest;
    });
    if (controls.includes(focused)) focused.focus(); // what is disabled loses it
  }
}

/** Let the browser draw before the thread is taken; a hidden page draws nothing and must not wait. */
function painted() {
  return new Promise((resolve) => {
    setTimeout(resolve, document.hidden ? 0 : 20);
  });
}

async function open() {
  const artifact = manifest.artifacts.find(({ kind }) => kind === at("artifact").value);
  const provider = at("engine").value;
  const total = (artifact.num_bytes / MEGABYTE).toFixed(1);
  const former = engine;
  engine = undefined;
  await former?.release(); // before the next one is loaded: a small device holds one model, not two
  engine = await openEngine(artifact, provider, (received) =>
    say(`Loading the model: ${(received / MEGABYTE).toFixed(1)} of ${total} MB`),
  );
  engine.name = provider === "webgpu" ? "WebGPU" : `WASM, ${numThreads()} thread${numThreads() > 1 ? "s" : ""}`;
  await warmUp(artifact);
  say("Ready.");
}

/** The first run allocates and compiles: its time would say nothing of those that follow. */
async function warmUp(artifact) {
  const { width_px: width, height_px: height } = manifest.spec.preprocess;
  const grey = { width, height, data: new Uint8Array(width * height * 3).fill(128) };
  say("Warming up…");
  await painted();
  await engine.run(networkInput(grey, manifest.spec.preprocess, artifact.frontend));
}

/** The photograph's classes, or the boxes in it. */
async function answer() {
  if (!photo || !engine) return;
  say("Working…");
  clearResult();
  await painted();
  const { image, transparent } = await decodePhoto(photo);
  const start = performance.now();
  const input = networkInput(image, manifest.spec.preprocess, engine.artifact.frontend);
  const prepared = performance.now();
  const outputs = await engine.run(input);
  const done = performance.now();
  const told = manifest.spec.task === "detect" ? showBoxes(outputs, image) : showBest(outputs);
  at("preprocessing").textContent = `${(prepared - start).toFixed(1)} ms`;
  at("inference").textContent = `${(done - prepared).toFixed(1)} ms`;
  at("ran-on").textContent = engine.name;
  at("times").hidden = false;
  const note = transparent ? " It has transparent parts, whose colours a browser does not keep." : "";
  say(`${photo.name ?? "Image"}, ${image.width}x${image.height} px: ${told}.${note}`);
}

/** @returns {string} the likeliest class */
function showBest(outputs) {
  const logits = outputs[manifest.spec.outputs[0]].data;
  if (!logits.every(Number.isFinite))
    throw new InputError("the engine gave values that are no numbers", "choose another artifact or engine");
  const found = classes(logits, manifest.labels, TOP);
  showItems(found.map((one) => ({ ...one, share: one.probability, text: `${(100 * one.probability).toFixed(1)} %` })));
  at("classes").dataset.index = String(found[0].index);
  return found[0].label;
}

/** @returns {string} how many boxes there are */
function showBoxes(outputs, image) {
  const detection = detectionFor(manifest.spec.detection, engine.artifact);
  const found = findBoxes(outputs, detection, engine.artifact.decode);
  const boxes = inPicture(found, manifest.labels, manifest.spec.preprocess, image);
  drawBoxes(at("drawn"), image, boxes);
  at("drawn").setAttribute("aria-label", `the photograph with ${boxes.length} boxes`);
  at("drawn").hidden = false;
  at("preview").hidden = true;
  showItems(boxes.slice(0, LISTED).map((box) => ({ ...box, share: box.score, text: box.score.toFixed(3) })));
  if (!boxes.length) return `no box above ${detection.suppression.score_threshold}`;
  return boxes.length > 1 ? `${boxes.length} boxes` : "1 box";
}

function clearResult() {
  at("classes").replaceChildren();
  delete at("classes").dataset.index;
  at("times").hidden = true;
  at("drawn").hidden = true;
  at("preview").hidden = !previewUrl;
}

/** A class or a box each; `data-` attributes tell a test the same. */
function showItems(found) {
  const items = found.map(({ label, share, text, ...values }) => {
    const item = document.createElement("li");
    for (const [name, value] of Object.entries(values)) item.dataset[name] = String(value);
    item.append(bar(share), span("label", label), span("share", text));
    return item;
  });
  at("classes").replaceChildren(...items);
}

/** Drawn as SVG: the page's own policy forbids styles in elements. */
function bar(share) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  svg.setAttribute("aria-hidden", "true");
  rect.setAttribute("width", `${100 * share}%`);
  rect.setAttribute("height", "100%");
  svg.append(rect);
  return svg;
}

function span(name, text) {
  const element = document.createElement("span");
  element.className = name;
  element.textContent = text;
  return element;
}

async function prove() {
  at("checks").replaceChildren();
  say("Checking…");
  await painted();
  const golden = await fetchGolden(manifest);
  const rows = [checkPreprocessing(golden, manifest.spec.preprocess)];
  rows.push(await checkArtifact(engine, manifest, golden));
  at("checks").replaceChildren(
    ...rows.map(({ check, artifact, verdict, reason }) => {
      const item = document.createElement("li");
      item.className = verdict;
      item.textContent = `${artifact || check}: ${reason}`;
      return item;
    }),
  );
  const told = new Set(rows.map((row) => row.verdict));
  const same = told.has("skip")
    ? "What this artifact gives could not be judged."
    : `This browser computes what the original network said (${engine.name}).`;
  say(told.has("fail") ? "This browser computes something else than the original network." : same);
}

function take(file) {
  if (!file || document.body.dataset.state === "busy" || !manifest) return;
  photo = file;
  URL.revokeObjectURL(previewUrl);
  previewUrl = URL.createObjectURL(file);
  at("preview").src = previewUrl;
  at("preview").alt = `the chosen photograph, ${file.name ?? "pasted"}`;
  at("preview").hidden = false;
  busy(async () => {
    clearResult();
    if (!engine) await open();
    await answer();
  });
}

async function start() {
  say("Loading the model…");
  const read = await fetchManifest();
  const choices = portableArtifacts(read);
  if (!choices.length)
    throw new InputError(`${read.spec.name}: no artifact for ONNX Runtime`, "build the page again with its bundle");
  at("artifact").replaceChildren(
    ...choices.map(({ kind, num_bytes: size }) => new Option(`${kind} (${(size / MEGABYTE).toFixed(1)} MB)`, kind)),
  );
  at("title").textContent = read.spec.name;
  if (read.spec.task === "detect") {
    at("result-title").textContent = "Boxes";
    at("classes").setAttribute("aria-label", "boxes, best first");
  }
  at("untrained").hidden = read.spec.provenance.source !== "random";
  document.title = `${read.spec.name} in the browser`;
  at("engine").querySelector("[value=webgpu]").disabled = !(await hasWebgpu());
  const asked = new URLSearchParams(location.search);
  for (const name of ["artifact", "engine"]) {
    const option = Array.from(at(name).options).find(({ value, disabled }) => value === asked.get(name) && !disabled);
    if (option) option.selected = true;
  }
  manifest = read;
  await open();
  keepForOffline().catch((error) => console.warn(error)); // private windows may not keep anything
}

/** From the next visit on the page works without its server: see sw.js. */
async function keepForOffline() {
  if (!navigator.serviceWorker) return; // neither https nor localhost
  await navigator.serviceWorker.register("sw.js");
  if (!navigator.serviceWorker.controller) {
    // What was loaded before there was a worker to keep it.
    const loaded = performance.getEntriesByType("resource").map(({ name }) => name);
    const own = [location.href, ...loaded].map((url) => url.split(/[?#]/)[0]);
    const cache = await caches.open("cspdeploy-page");
    await cache.addAll(new Set(own.filter((url) => url.startsWith(new URL(".", location.href).href))));
  }
  document.body.dataset.offline = "ready";
}

at("file").addEventListener("change", ({ target }) => take(target.files[0]));
for (const name of ["artifact", "engine"]) {
  at(name).addEventListener("change", () =>
    busy(async () => {
      clearResult();
      at("checks").replaceChildren();
      await open();
      await answer();
    }),
  );
}
at("prove").addEventListener("click", () =>
  busy(async () => {
    if (!engine) await open();
    await prove();
  }),
);
at("preview").addEventListener("error", () => {
  at("preview").hidden = true;
});
const drop = at("drop");
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", ({ clipboardData }) => take(clipboardData?.files[0]));
busy(start);
