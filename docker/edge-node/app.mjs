#!/usr/bin/env node
/** Classes of images, or boxes in them, by a bundle, and the proof that it works here. `node app.mjs --help` */

import { createHash } from "node:crypto";
import { readFileSync, realpathSync } from "node:fs";
import { hostname } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import { detectionFor, findBoxes, inPicture } from "../edge-web/lib/detect.js";
import { MANIFEST_FILE, portableArtifacts, requireAnswers } from "../edge-web/lib/manifest.js";
import { InputError, classes, networkInput } from "../edge-web/lib/preprocess.js";
import { checkFiles, checkHashes, findArtifact, readManifest } from "./bundle.mjs";

const HELP = `usage: app.mjs BUNDLE IMAGE... [--artifact onnx] [--top 5] [--json]
               [--score-threshold S] [--iou-threshold I] [--max-detections N]
       app.mjs selftest BUNDLE [--artifact KIND]... [--json]

BUNDLE is a folder that \`cspdeploy export\` made. --artifact: onnx, onnx-fp16, onnx-int8, ...; selftest: all by default.
--top: classes. Of a detector a line is score, label and left,top,right,bottom in pixels of the picture; thresholds are
those of the export unless given.
Exit 0: done and passed. 1: a check failed. 2: wrong use or bad input. 3: onnxruntime-node or sharp is missing.
`;
const SELFTEST_SCHEMA_VERSION = 1;
const FAILED = 1;
const BAD_INPUT = 2;
const ENGINE_MISSING = 3;
const OPTIONS = {
  artifact: { type: "string", multiple: true },
  top: { type: "string", default: "5" },
  "score-threshold": { type: "string" },
  "iou-threshold": { type: "string" },
  "max-detections": { type: "string" },
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

async function predict([folder, ...images], values, write) {
  const { artifact: kinds = ["onnx"], json } = values;
  if (!folder || !images.length)
    throw new InputError("expected a bundle and at least one image", "node app.mjs --help");
  if (kinds.length > 1) throw new InputError("--artifact: given more than once", "give it once");
  const top = readTop(values.top);
  const manifest = readManifest(folder);
  requireAnswers(manifest);
  const artifact = findArtifact(manifest, kinds[0], folder);
  const detection = readDetection(manifest, artifact, values);
  checkFiles(folder, manifest);
  await checkHashes(folder, manifest, [artifact.file]);
  await import("sharp"); // what is missing is told before anything is opened
  const { openEngine } = await import("./engine.mjs");
  const engine = await openEngine(folder, artifact);
  const untrained = manifest.spec.provenance.source === "random";
  if (untrained && !json) write(`${UNTRAINED}\n`);
  const results = [];
  for (const image of images) {
    const entry = await answer(engine, manifest, image, { top, detection });
    results.push({ image, untrained, ...entry });
    if (entry.error) complain(entry);
    else if (!json) write(detection ? boxesText(image, entry.boxes, detection) : predictionText(image, entry.predictions));
  }
  await engine.release();
  if (json) {
    const told = results.map(({ fix: _, ...entry }) => entry);
    write(`${JSON.stringify(told, null, 2)}\n`);
  }
  return results.some(({ error }) => error) ? BAD_INPUT : 0;
}

function readTop(text) {
  const top = Number(text);
  if (!Number.isInteger(top) || top < 1)
    throw new InputError(`--top ${text}: expected a whole number from 1 up`, "--top 5");
  return top;
}

/** Of a detector, with the thresholds that were given. */
function readDetection({ spec }, artifact, values) {
  const asked = {};
  for (const name of ["score-threshold", "iou-threshold", "max-detections"]) {
    if (values[name] === undefined) continue;
    if (spec.task !== "detect") throw new InputError(`--${name}: ${spec.name} gives no boxes`, `leave --${name} away`);
    const value = values[name].trim() === "" ? NaN : Number(values[name]);
    if (Number.isNaN(value)) throw new InputError(`--${name} ${values[name]}: expected a number`, `--${name} 0.5`);
    asked[name.replace("-", "_")] = value;
  }
  return spec.task === "detect" ? detectionFor(spec.detection, artifact, asked) : undefined;
}

/** One at a time, so that one is in memory; of one that cannot be read the reason, and the others go on. */
async function answer(engine, { spec, labels }, path, { top, detection }) {
  const { decodeImage } = await import("./decode.mjs");
  try {
    const image = await decodeImage(path);
    const outputs = await engine.run(networkInput(image, spec.preprocess, engine.artifact.frontend));
    if (!detection) return { predictions: classes(outputs[spec.outputs[0]]?.data ?? [], labels, top) };
    const boxes = findBoxes(outputs, detection, engine.artifact.decode);
    return { boxes: inPicture(boxes, labels, spec.preprocess, image) };
  } catch (error) {
    if (!(error instanceof InputError)) throw error;
    return { [detection ? "boxes" : "predictions"]: [], error: error.message, fix: error.fix };
  }
}

function boxesText(image, boxes, { suppression }) {
  const lines = boxes.map(({ score, label, left, top, right, bottom }) => {
    const sides = [left, top, right, bottom].map((side) => side.toFixed(0));
    return `  ${score.toFixed(3)}  ${label}  ${sides.join(",")}`;
  });
  if (!lines.length) lines.push(`  no box above ${suppression.score_threshold}`);
  return `${[image, ...lines].join("\n")}\n`;
}

function predictionText(image, predictions) {
  const lines = predictions.map(
    ({ label, probability }) => `  ${(100 * probability).toFixed(1).padStart(5)} %  ${label}`,
  );
  return `${[image, ...lines].join("\n")}\n`;
}

async function proveBundle([folder, ...rest], { artifact: kinds, json }, write) {
  if (!folder || rest.length) throw new InputError("selftest: expected one bundle", "node app.mjs selftest BUNDLE");
  const manifest = readManifest(folder);
  // Those of one machine and engine are proven only where they are asked for.
  const readable = portableArtifacts(manifest)
    .filter(({ format }) => format === "onnx")
    .map(({ kind }) => kind);
  const artifacts = (kinds ?? readable).map((kind) => findArtifact(manifest, kind, folder));
  if (!artifacts.length) throw new InputError(`${folder}: no artifact for ONNX Runtime`, "cspdeploy export makes them");
  const { selftest } = await import("./selftest.mjs");
  const began = new Date();
  const rows = await selftest(folder, manifest, artifacts);
  const failed = rows.some((row) => row.verdict === "fail");
  const untrained = manifest.spec.provenance.source === "random";
  const request = { began, kinds: kinds ?? [] };
  write(json ? await selftestJson(folder, manifest, rows, untrained, request) : selftestText(rows, untrained));
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
async function selftestJson(folder, manifest, rows, untrained, { began, kinds }) {
  const { engineVersion } = await import("./engine.mjs");
  const runtime = "onnxruntime-node-cpu";
  const report = {
    schema_version: SELFTEST_SCHEMA_VERSION,
    verdict: rows.some((row) => row.verdict === "fail") ? "fail" : "pass",
    bundle: folder,
    model: manifest.spec.name,
    time_utc: began.toISOString().replace(/\.\d+Z$/, "+00:00"),
    host: hostname(),
    requested: { artifacts: kinds, runtime, threads: 0 },
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

function complain({ error, fix }) {
  process.stderr.write(`error: ${error}\nfix: ${fix}\n`);
}

/** In one line; with --json also on stdout, so that there is one document whatever happens. */
function report(error, json) {
  const told = { message: String(error.message).split("\n")[0], fix: error.fix, exit_code: BAD_INPUT };
  if (error.code === "ERR_MODULE_NOT_FOUND" || error.code === "MODULE_NOT_FOUND") {
    Object.assign(told, { fix: "npm ci --ignore-scripts", exit_code: ENGINE_MISSING });
  } else if (error.syscall) {
    told.fix = "see that it can be read, and that the disk is not full"; // Node.js itself says which file and what
  } else if (!(error instanceof InputError)) throw error;
  complain({ error: told.message, fix: told.fix });
  if (json) {
    const document = { schema_version: SELFTEST_SCHEMA_VERSION, verdict: "error", error: told };
    process.stdout.write(`${JSON.stringify(document, null, 2)}\n`);
  }
  return told.exit_code;
}

if (process.argv[1] && realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  const args = process.argv.slice(2);
  process.stdout.on("error", ({ code }) => process.exit(code === "EPIPE" ? 0 : BAD_INPUT)); // `| head` has enough
  main(args, (text) => process.stdout.write(text)).then(
    (status) => {
      process.exitCode = status;
    },
    (error) => {
      process.exitCode = report(error, args.includes("--json"));
    },
  );
}
