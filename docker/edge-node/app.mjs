#!/usr/bin/env node
/** Classes of images by a cspdeploy bundle, and the proof that the bundle works here. `node app.mjs --help` */

import { createHash } from "node:crypto";
import { readFileSync, realpathSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import { InputError, classes, networkInput } from "../edge-web/lib/preprocess.js";
import { MANIFEST_FILE, checkHashes, findArtifact, readManifest } from "./bundle.mjs";

const HELP = `usage: app.mjs BUNDLE IMAGE... [--artifact onnx] [--top 5] [--json]
       app.mjs selftest BUNDLE [--artifact KIND]... [--json]

BUNDLE is a folder that \`cspdeploy export\` made. --artifact: onnx, onnx-fp16, onnx-int8, ...; selftest: all by default.
Exit 0: done and passed. 1: a check failed. 2: wrong use or bad input. 3: onnxruntime-node or sharp is missing.
`;
const SELFTEST_SCHEMA_VERSION = 1;
const FAILED = 1;
const BAD_INPUT = 2;
const ENGINE_MISSING = 3;
const OPTIONS = {
  artifact: { type: "string", multiple: true },
  top: { type: "string", default: "5" },
  json: { type: "boolean", default: false },
  help: { type: "boolean", short: "h", default: false },
};
const UNTRAINED = "UNTRAINED: random weights, no answer means anything";

function readOptions(args) {
  try {
    return parseArgs({ args, options: OPTIONS, allowPositionals: true });
  } catch (error) {
    throw new InputError(error.message.split(/\.\s|\n/)[0], "node app.mjs --help");
  }
}

/** @param {string[]} args  @param {(text: string) => void} write  @returns {Promise<number>} exit status */
export async function main(args, write) {
  const { values, positionals } = readOptions(args);
  if (values.help) {
    write(HELP);
    return 0;
  }
  if (positionals[0] === "selftest") return proveBundle(positionals.slice(1), values, write);
  return predict(positionals, values, write);
}

async function predict([folder, ...images], { artifact: kinds = ["onnx"], top: topText, json }, write) {
  if (!folder || !images.length)
    throw new InputError("expected a bundle and at least one image", "node app.mjs --help");
  const top = Number(topText);
  if (!Number.isInteger(top) || top < 1)
    throw new InputError(`--top ${topText}: expected a whole number from 1 up`, "--top 5");
  if (kinds.length > 1) throw new InputError("--artifact: given more than once", "give it once");
  const manifest = readManifest(folder);
  if (manifest.spec.task !== "classify") {
    throw new InputError(
      `${manifest.spec.name}: gives ${manifest.spec.outputs.join(", ")}, not classes`,
      "name a bundle of a classifier",
    );
  }
  const artifact = findArtifact(manifest, kinds[0], folder);
  await checkHashes(folder, manifest, [artifact.file]);
  const { decodeImage } = await import("./decode.mjs");
  const { openEngine } = await import("./engine.mjs");
  const decoded = [];
  for (const path of images)
    decoded.push(networkInput(await decodeImage(path), manifest.spec.preprocess, artifact.frontend));
  const engine = await openEngine(folder, artifact);
  const untrained = manifest.spec.provenance.source === "random";
  const results = [];
  for (const [index, image] of images.entries()) {
    const outputs = await engine.run(decoded[index]);
    const logits = outputs[manifest.spec.outputs[0]].data;
    results.push({ image, untrained, predictions: classes(logits, manifest.labels, top) });
  }
  write(json ? `${JSON.stringify(results, null, 2)}\n` : predictionText(results, untrained));
  return 0;
}

function predictionText(results, untrained) {
  const lines = untrained ? [UNTRAINED] : [];
  for (const { image, predictions } of results) {
    lines.push(
      image,
      ...predictions.map(({ label, probability }) => `  ${(100 * probability).toFixed(1).padStart(5)} %  ${label}`),
    );
  }
  return `${lines.join("\n")}\n`;
}

async function proveBundle([folder, ...rest], { artifact: kinds, json }, write) {
  if (!folder || rest.length) throw new InputError("selftest: expected one bundle", "node app.mjs selftest BUNDLE");
  const manifest = readManifest(folder);
  // Those of one machine and engine are proven only where they are asked for.
  const readable = manifest.artifacts
    .filter((item) => item.format === "onnx" && !item.machine)
    .map((item) => item.kind);
  const artifacts = (kinds ?? readable).map((kind) => findArtifact(manifest, kind, folder));
  if (!artifacts.length) throw new InputError(`${folder}: no artifact for ONNX Runtime`, "cspdeploy export makes them");
  const { selftest } = await import("./selftest.mjs");
  const rows = await selftest(folder, manifest, artifacts);
  const failed = rows.some((row) => row.verdict === "fail");
  const untrained = manifest.spec.provenance.source === "random";
  write(json ? await selftestJson(folder, manifest, rows, untrained) : selftestText(rows, untrained));
  return failed ? FAILED : 0;
}

function selftestText(rows, untrained) {
  const lines = rows.map(({ check, artifact, verdict, reason, p50_ms: time }) => {
    const timed = time ? `, ${time.toFixed(1)} ms` : "";
    return `${verdict}  ${artifact || check}: ${reason}${timed}`;
  });
  return `${[...(untrained ? [UNTRAINED] : []), ...lines].join("\n")}\n`;
}

/** The fields of `python -m cspdeploy.edge selftest --json`, so that a fleet of both reads one form. */
async function selftestJson(folder, manifest, rows, untrained) {
  const { engineVersion } = await import("./engine.mjs");
  const runtime = "onnxruntime-node-cpu";
  const report = {
    schema_version: SELFTEST_SCHEMA_VERSION,
    verdict: rows.some((row) => row.verdict === "fail") ? "fail" : "pass",
    bundle: folder,
    model: manifest.spec.name,
    manifest_sha256: createHash("sha256")
      .update(readFileSync(join(folder, MANIFEST_FILE)))
      .digest("hex"),
    untrained,
    checks: rows.map(({ p50_ms: _, ...row }) => (row.artifact ? { ...row, runtime } : row)),
    latency: rows
      .filter((row) => row.p50_ms)
      .map(({ artifact, p50_ms, num_images: num_runs }) => ({ artifact, runtime, p50_ms, batch: 1, num_runs })),
    environment: { "onnxruntime-node": engineVersion(), node: process.versions.node, architecture: process.arch },
  };
  return `${JSON.stringify(report, null, 2)}\n`;
}

function report(error) {
  if (error instanceof InputError) {
    process.stderr.write(`error: ${error.message}\nfix: ${error.fix}\n`);
    return BAD_INPUT;
  }
  if (error.code === "ERR_MODULE_NOT_FOUND" || error.code === "MODULE_NOT_FOUND") {
    process.stderr.write(`error: ${error.message.split("\n")[0]}\nfix: npm ci --ignore-scripts\n`);
    return ENGINE_MISSING;
  }
  throw error;
}

if (process.argv[1] && realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  main(process.argv.slice(2), (text) => process.stdout.write(text)).then(
    (status) => {
      process.exitCode = status;
    },
    (error) => {
      process.exitCode = report(error);
    },
  );
}
