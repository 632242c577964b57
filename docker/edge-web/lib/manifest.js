/** manifest.json of a bundle, as a text of unknown origin: what the examples read of it is there and of its type. */

import { checkDetection } from "./detect.js";
import { InputError, checkContract } from "./preprocess.js";

export const MANIFEST_FILE = "manifest.json";
const MANIFEST_SCHEMA_VERSION = 3;
const AGAIN = "export the bundle again";

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isText = (value) => typeof value === "string" && value !== "";

/**
 * @param {string} text  @param {string} name what errors call it  @returns {object} the manifest
 * @throws {InputError} not JSON, of another version, incomplete, or a file name that leaves the folder
 */
export function parseManifest(text, name) {
  let manifest;
  try {
    manifest = JSON.parse(text);
  } catch {
    throw new InputError(`${name}: not JSON, expected a bundle's manifest`, "name a folder that cspdeploy export made");
  }
  const version = manifest?.schema_version;
  if (version !== MANIFEST_SCHEMA_VERSION) {
    const fix = version > MANIFEST_SCHEMA_VERSION ? "update this application" : AGAIN;
    throw new InputError(`${name}: schema_version ${version}, expected ${MANIFEST_SCHEMA_VERSION}`, fix);
  }
  const { spec, artifacts, files, labels } = manifest;
  if (!isObject(spec) || ![artifacts, files, labels].every(Array.isArray))
    throw new InputError(`${name}: spec, labels, artifacts or files missing`, AGAIN);
  checkContract(spec.preprocess);
  const told = isText(spec.name) && Array.isArray(spec.outputs) && spec.outputs.length && spec.outputs.every(isText);
  if (!told || !isObject(spec.provenance) || !labels.every((label) => typeof label === "string"))
    throw new InputError(`${name}: spec.name, spec.outputs, spec.provenance or labels broken`, AGAIN);
  for (const record of [...artifacts, ...files]) checkRecord(record, name);
  for (const artifact of artifacts) checkArtifact(artifact, name);
  if (spec.task === "detect") checkDetection(spec.detection);
  if ((spec.task === "classify" || spec.task === "detect") && labels.length !== spec.num_classes)
    throw new InputError(`${name}: ${labels.length} labels, expected ${spec.num_classes}`, AGAIN);
  return manifest;
}

function checkRecord(record, name) {
  const { file, sha256, num_bytes: size } = record ?? {};
  const named = isText(file) && !file.startsWith(".") && !/[/\\\0]/.test(file);
  if (!named || !/^[0-9a-f]{64}$/.test(sha256) || !Number.isInteger(size))
    throw new InputError(`${name}: file '${file}' leaves the folder or has no hash`, "do not use this bundle");
}

function checkArtifact({ file, kind, format, precision, inputs, steps, frontend }, name) {
  const input = Array.isArray(inputs) && inputs.length === 1 && isText(inputs[0]?.name) && inputs[0].shape;
  const good = [kind, format, precision].every(isText) && Array.isArray(input) && input.length === 4;
  if (!good || !Array.isArray(steps) || !(frontend === null || frontend === undefined || isObject(frontend)))
    throw new InputError(`${name}: artifact '${file}': kind, format, precision, inputs or steps broken`, AGAIN);
}

/**
 * Those that ONNX Runtime reads, of the bundle's own input size, which these applications prepare images for: those of a
 * further one are called "onnx@320x320".
 *
 * @param {object} manifest  @returns {object[]}
 */
export function readableArtifacts(manifest) {
  return manifest.artifacts.filter(
    ({ kind, format }) => (format === "onnx" || format === "ort") && !kind.includes("@"),
  );
}

/** The same without those that were optimised for one machine. @param {object} manifest  @returns {object[]} */
export function portableArtifacts(manifest) {
  return readableArtifacts(manifest).filter(({ machine }) => !machine);
}

/** @throws {InputError} the network gives neither classes nor boxes  @param {object} manifest */
export function requireAnswers({ spec }) {
  if (spec.task === "classify" || spec.task === "detect") return;
  const gives = `${spec.name}: gives ${spec.outputs.join(", ")}, not classes and not boxes`;
  throw new InputError(gives, "take a bundle of a classifier or of a detector");
}
