/** A bundle's manifest and files, read with suspicion: nothing is opened before its hash is known to be right. */

import { createHash } from "node:crypto";
import { createReadStream, lstatSync, readFileSync, readdirSync } from "node:fs";
import { basename, join } from "node:path";

import { MANIFEST_FILE, parseManifest, readableArtifacts } from "../edge-web/lib/manifest.js";
import { InputError } from "../edge-web/lib/preprocess.js";

/** They have no hash: the manifest itself, what holds timings, and what is made of the manifest. */
const UNHASHED = new Set([MANIFEST_FILE, "report.html", "timings.json", "manifest.sig"]);

/**
 * @param {string} folder
 * @returns {object} manifest.json; `checkFiles` looks at the files that it names
 * @throws {InputError} not a bundle, of another version, incomplete, a name that leaves the folder
 */
export function readManifest(folder) {
  const path = join(folder, MANIFEST_FILE);
  let text;
  try {
    text = readFileSync(path, "utf8");
  } catch (error) {
    const why = error.code === "ENOENT" ? "no such file" : error.code;
    throw new InputError(`${path}: ${why}, expected a bundle's manifest`, "name a folder that cspdeploy export made");
  }
  return parseManifest(text, path);
}

function records(manifest) {
  return [...manifest.artifacts, ...manifest.files];
}

/** @throws {InputError} a file is missing or of another size, or the folder holds what the manifest does not name */
export function checkFiles(folder, manifest) {
  for (const record of records(manifest)) checkRecord(folder, record);
  refuseUnlisted(folder, manifest);
}

function checkRecord(folder, { file, num_bytes: size }) {
  const path = join(folder, file);
  const found = lstatSync(path, { throwIfNoEntry: false });
  if (!found) throw new InputError(`${path}: missing, named in the manifest`, "copy the whole bundle again");
  if (!found.isFile()) throw new InputError(`${path}: is no plain file`, "do not use this bundle");
  if (found.size !== size)
    throw new InputError(`${path}: ${found.size} bytes, the manifest says ${size}`, "copy the whole bundle again");
}

/** A file without a hash beside an ONNX file may be weights that it reads. Hidden ones are a desktop's. */
function refuseUnlisted(folder, manifest) {
  const known = new Set([...UNHASHED, ...records(manifest).map((record) => record.file)]);
  const strange = readdirSync(folder).filter((name) => !known.has(name) && !name.startsWith("."));
  if (strange.length) {
    throw new InputError(
      `${folder}: ${strange.sort().slice(0, 3).join(", ")}: in the folder, but not in its ${MANIFEST_FILE}`,
      "move it out of the bundle's folder",
    );
  }
}

/**
 * @param {string} folder  @param {object} manifest  @param {string[]} [only] names of files; all without
 * @throws {InputError} a file is not the one of the manifest
 */
export async function checkHashes(folder, manifest, only) {
  for (const { file, sha256 } of records(manifest)) {
    if (only && !only.includes(file)) continue;
    const hash = createHash("sha256");
    for await (const part of createReadStream(join(folder, file))) hash.update(part);
    if (hash.digest("hex") !== sha256) {
      throw new InputError(`${join(folder, file)}: SHA-256 differs from the manifest's`, "copy the whole bundle again");
    }
  }
}

/**
 * @param {object} manifest  @param {string} kind "onnx", "onnx-fp16", "onnx-int8", ...
 * @throws {InputError} it has no such artifact, or not one that ONNX Runtime reads, or one of a further input size
 */
export function findArtifact(manifest, kind, folder) {
  const readable = readableArtifacts(manifest);
  const found = readable.find((artifact) => artifact.kind === kind);
  if (found) return found;
  const kinds = readable.map((artifact) => artifact.kind);
  const fix = kinds.length ? `--artifact ${kinds[0]}` : "export the bundle again";
  throw new InputError(
    `${basename(folder)}: no artifact '${kind}' for ONNX Runtime, it has ${kinds.join(", ") || "none"}`,
    fix,
  );
}
