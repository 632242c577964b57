/** Proof on the device: files, preprocessing, and every artifact against the original network's own outputs. */

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { inflateRawSync } from "node:zlib";

import { readNpz } from "../edge-web/lib/npz.js";
import { InputError } from "../edge-web/lib/preprocess.js";
import { GOLDEN_FILE, checkArtifact, checkPreprocessing, openGolden } from "../edge-web/lib/prove.js";
import { checkFiles, checkHashes } from "./bundle.mjs";

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
 * What is wrong is a row that fails, never an exception: the other artifacts are still checked.
 *
 * @param {string} folder  @param {object} manifest of `readManifest`  @param {object[]} artifacts to prove
 * @returns {Promise<{check: string, artifact: string, verdict: "pass" | "fail" | "skip", reason: string}[]>} one row a
 *   check
 */
export async function selftest(folder, manifest, artifacts) {
  const count = manifest.artifacts.length + manifest.files.length;
  const rows = [];
  let golden;
  try {
    checkFiles(folder, manifest);
    await checkHashes(folder, manifest);
    rows.push({ check: "files", artifact: "", verdict: "pass", reason: `${count} of them are those of the manifest` });
    golden = await readGolden(folder, manifest);
  } catch (error) {
    rows.push(failure("files", "", error));
    const skipped = { check: "golden", verdict: "skip", reason: "not opened: its bundle is not whole" };
    return [...rows, ...artifacts.map(({ kind: artifact }) => ({ ...skipped, artifact }))];
  }
  rows.push(checkPreprocessing(golden, manifest.spec.preprocess));
  const { openEngine } = await import("./engine.mjs");
  for (const artifact of artifacts) rows.push(await proveArtifact(openEngine, folder, manifest, artifact, golden));
  return rows;
}

async function proveArtifact(openEngine, folder, manifest, artifact, golden) {
  let engine;
  try {
    engine = await openEngine(folder, artifact);
    return await checkArtifact(engine, manifest, golden);
  } catch (error) {
    return { ...failure("golden", artifact.kind, error), finding: "error" };
  } finally {
    await engine?.release();
  }
}

/** Of a package that is missing nothing follows for the bundle: that passes through. */
function failure(check, artifact, error) {
  if (/MODULE_NOT_FOUND$/.test(error.code)) throw error;
  return { check, artifact, verdict: "fail", reason: String(error.message).split("\n")[0] };
}
