/** Proof on the device: files, preprocessing, and every artifact against the original network's own outputs. */

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { inflateRawSync } from "node:zlib";

import { readNpz } from "../edge-web/lib/npz.js";
import { InputError } from "../edge-web/lib/preprocess.js";
import { GOLDEN_FILE, checkArtifact, checkPreprocessing, openGolden } from "../edge-web/lib/prove.js";
import { checkHashes } from "./bundle.mjs";

/** @param {string} folder  @param {object} manifest  @throws {InputError} not a golden file */
export async function readGolden(folder, manifest) {
  if (!manifest.files.some((record) => record.file === GOLDEN_FILE)) {
    throw new InputError(`${folder}: no ${GOLDEN_FILE} in its manifest`, "export the bundle again");
  }
  const path = join(folder, GOLDEN_FILE);
  const inflate = async (packed, size) => inflateRawSync(packed, { maxOutputLength: Math.max(1, size) });
  return openGolden(await readNpz(readFileSync(path), path, inflate), manifest);
}

/**
 * @param {string} folder  @param {object} manifest of `readManifest`  @param {object[]} artifacts to prove
 * @returns {Promise<{check: string, artifact: string, verdict: "pass" | "fail", reason: string}[]>} one row a check
 * @throws {InputError} a file is not the one of the manifest: nothing is opened then
 */
export async function selftest(folder, manifest, artifacts) {
  await checkHashes(folder, manifest);
  const count = manifest.artifacts.length + manifest.files.length;
  const rows = [
    { check: "files", artifact: "", verdict: "pass", reason: `${count} of them are those of the manifest` },
  ];
  const golden = await readGolden(folder, manifest);
  rows.push(checkPreprocessing(golden, manifest.spec.preprocess));
  const { openEngine } = await import("./engine.mjs");
  for (const artifact of artifacts)
    rows.push(await checkArtifact(await openEngine(folder, artifact), manifest, golden));
  return rows;
}
