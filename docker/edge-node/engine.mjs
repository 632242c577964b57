/** An artifact, open in onnxruntime-node on the CPU. */

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

import { Engine } from "../edge-web/lib/engine.js";
import { InputError } from "../edge-web/lib/preprocess.js";

/** @returns {string} version of onnxruntime-node; empty where it is not here */
export function engineVersion() {
  try {
    return createRequire(import.meta.url)("onnxruntime-node/package.json").version;
  } catch {
    return "";
  }
}

/**
 * @param {string} folder  @param {object} artifact of the manifest  @returns {Promise<Engine>}
 * @throws {InputError} the engine does not open the file: too new for it, or broken
 */
export async function openEngine(folder, artifact) {
  const { default: ort } = await import("onnxruntime-node");
  try {
    // From bytes: a file cannot name other files for its weights then.
    const bytes = readFileSync(join(folder, artifact.file));
    const session = await ort.InferenceSession.create(bytes, { executionProviders: ["cpu"], logSeverityLevel: 3 });
    return new Engine(ort, session, artifact);
  } catch (error) {
    const why = String(error.message).split("\n")[0];
    const wants = artifact.opset ? `opset ${artifact.opset}` : artifact.format;
    throw new InputError(
      `${artifact.file} (${wants}): onnxruntime-node ${engineVersion()} does not open it: ${why}`,
      "update onnxruntime-node, or export with a lower --opset",
    );
  }
}
