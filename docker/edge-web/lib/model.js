/** A bundle from the page's own server, and its artifacts in onnxruntime-web. */

import { Engine } from "./engine.js";
import { readNpz } from "./npz.js";
import { MANIFEST_FILE, parseManifest, requireAnswers } from "./manifest.js";
import { InputError } from "./preprocess.js";
import { GOLDEN_FILE, openGolden } from "./prove.js";

const MODEL = new URL("../model/", import.meta.url);
const VENDOR = new URL("../vendor/", import.meta.url);
/** Beyond four threads the small networks of edge devices gain nothing. */
const MAX_THREADS = 4;
const BUILDS = { wasm: "ort.wasm.min.mjs", webgpu: "ort.webgpu.min.mjs" };

/** @returns {Promise<object>} manifest.json  @throws {InputError} not there, of another version, incomplete */
export async function fetchManifest() {
  const manifest = parseManifest(new TextDecoder().decode(await fetchBytes(MANIFEST_FILE)), `model/${MANIFEST_FILE}`);
  requireAnswers(manifest);
  return manifest;
}

async function fetchBytes(name, onProgress = () => {}) {
  const url = new URL(encodeURIComponent(name), MODEL);
  let response;
  try {
    response = await fetch(url, { cache: "no-cache" });
  } catch {
    throw new InputError(`model/${name}: the page's server does not answer`, "start it again");
  }
  if (!response.ok) {
    throw new InputError(
      `model/${name}: ${response.status} from the page's server`,
      "build the page with a bundle: node build.mjs BUNDLE",
    );
  }
  const parts = [];
  let received = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    received += value.length;
    onProgress(received);
  }
  const bytes = new Uint8Array(received);
  parts.reduce((at, part) => (bytes.set(part, at), at + part.length), 0);
  return bytes;
}

/** A file of the manifest: its size is right, and its hash where the page may compute one (https, localhost). */
async function fetchRecord({ file, sha256, num_bytes: size }, onProgress) {
  const bytes = await fetchBytes(file, onProgress);
  const fix = "copy the whole bundle again, then reload the page";
  if (bytes.length !== size)
    throw new InputError(`model/${file}: ${bytes.length} bytes, the manifest says ${size}`, fix);
  if (globalThis.crypto?.subtle) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (found !== sha256) throw new InputError(`model/${file}: SHA-256 differs from the manifest's`, fix);
  }
  return bytes;
}

/** @returns {Promise<boolean>} WebGPU gives this page a device */
export async function hasWebgpu() {
  try {
    return Boolean(await navigator.gpu?.requestAdapter());
  } catch {
    return false;
  }
}

/**
 * @param {object} artifact of the manifest  @param {"wasm" | "webgpu"} provider
 * @param {(received: number) => void} onProgress bytes  @returns {Promise<Engine>}
 * @throws {InputError} a broken file, or one that the engine does not open
 */
export async function openEngine(artifact, provider, onProgress) {
  const bytes = await fetchRecord(artifact, onProgress);
  const ort = await import(new URL(BUILDS[provider], VENDOR).href);
  ort.env.wasm.wasmPaths = VENDOR.href;
  ort.env.wasm.numThreads = numThreads();
  ort.env.logLevel = "error";
  try {
    const session = await ort.InferenceSession.create(bytes, { executionProviders: [provider] });
    return new Engine(ort, session, artifact);
  } catch (error) {
    const why = String(error?.message ?? error).split("\n")[0];
    const wants = artifact.opset ? `opset ${artifact.opset}` : artifact.format;
    const fix =
      provider === "webgpu"
        ? "choose the engine WASM"
        : "build the page with another artifact, or export with a lower --opset";
    throw new InputError(
      `${artifact.file} (${wants}): onnxruntime-web ${ort.env.versions?.web ?? ""} does not open it: ${why}`,
      fix,
    );
  }
}

/** @returns {number} one, unless the server's headers isolate the page, as threads ask for */
export function numThreads() {
  return globalThis.crossOriginIsolated ? Math.min(MAX_THREADS, navigator.hardwareConcurrency ?? 1) : 1;
}

/** @param {object} manifest  @throws {InputError} no golden file here */
export async function fetchGolden(manifest) {
  const record = manifest.files.find(({ file }) => file === GOLDEN_FILE);
  if (!record) throw new InputError(`the page was built without ${GOLDEN_FILE}`, "build it from a whole bundle");
  return openGolden(await readNpz(await fetchRecord(record), GOLDEN_FILE, inflate), manifest);
}

async function inflate(packed, size) {
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const bytes = new Uint8Array(size);
  let at = 0;
  for (const reader = stream.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return bytes.subarray(0, at);
    if (at + value.length > size) throw new Error("larger than its header says");
    bytes.set(value, at);
    at += value.length;
  }
}
