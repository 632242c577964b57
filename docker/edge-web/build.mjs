#!/usr/bin/env node
/** Puts the page together: its own files, onnxruntime-web out of node_modules, and a bundle. `node build.mjs --help` */

import { createHash } from "node:crypto";
import { copyFileSync, cpSync, existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import { MANIFEST_FILE, parseManifest, portableArtifacts } from "./lib/manifest.js";
import { InputError } from "./lib/preprocess.js";

const HELP = `usage: build.mjs [BUNDLE] [--artifact KIND]... [--output dist]

Without BUNDLE the page holds no model: put or mount one at model/. --artifact: onnx, onnx-fp16, onnx-int8, ...; all
that ONNX Runtime reads by default. Exit 2: wrong use or bad input.
`;
const HERE = dirname(fileURLToPath(import.meta.url));
const PAGE = ["index.html", "style.css", "icon.svg", "app.js", "sw.js", "lib"];
const ENGINE = join(HERE, "node_modules", "onnxruntime-web");
/** WASM for every browser; WebGPU, fetched only when it is chosen. */
const VENDOR = [
  "ort.wasm.min.mjs",
  "ort-wasm-simd-threaded.mjs",
  "ort-wasm-simd-threaded.wasm",
  "ort.webgpu.min.mjs",
  "ort-wasm-simd-threaded.asyncify.mjs",
  "ort-wasm-simd-threaded.asyncify.wasm",
];
const MARKER = "index.html";

function copyRecord(bundle, { file, sha256 }, target) {
  if (!existsSync(join(bundle, file)))
    throw new InputError(`${join(bundle, file)}: missing`, "copy the whole bundle again");
  const bytes = readFileSync(join(bundle, file));
  if (createHash("sha256").update(bytes).digest("hex") !== sha256) {
    throw new InputError(`${join(bundle, file)}: SHA-256 differs from the manifest's`, "copy the whole bundle again");
  }
  writeFileSync(join(target, file), bytes);
}

/** The bundle's manifest with only the artifacts that the page offers, and these files. */
function copyBundle(bundle, kinds, target) {
  const path = join(bundle, MANIFEST_FILE);
  if (!existsSync(path)) throw new InputError(`${path}: no such file`, "name a folder that cspdeploy export made");
  const manifest = parseManifest(readFileSync(path, "utf8"), path);
  const readable = portableArtifacts(manifest);
  const unknown = (kinds ?? []).find((kind) => !readable.some((artifact) => artifact.kind === kind));
  if (unknown || !readable.length) {
    throw new InputError(
      `${bundle}: no artifact '${unknown ?? "onnx"}' for ONNX Runtime, it has ${readable.map(({ kind }) => kind).join(", ") || "none"}`,
      `--artifact ${readable[0]?.kind ?? "onnx"}`,
    );
  }
  manifest.artifacts = readable.filter(({ kind }) => !kinds || kinds.includes(kind));
  mkdirSync(target);
  for (const record of [...manifest.artifacts, ...manifest.files]) copyRecord(bundle, record, target);
  writeFileSync(join(target, MANIFEST_FILE), `${JSON.stringify(manifest, null, 2)}\n`);
}

/** Written beside its place, then renamed: a page is whole or absent. */
function build(bundle, kinds, output) {
  if (existsSync(output) && !existsSync(join(output, MARKER)))
    throw new InputError(`${output}: exists and is not a built page`, "--output another folder");
  if (!existsSync(ENGINE)) throw new InputError(`${ENGINE}: onnxruntime-web is missing`, "npm ci --ignore-scripts");
  const fresh = `${output}.new-${process.pid}`;
  try {
    mkdirSync(join(fresh, "vendor"), { recursive: true });
    for (const name of PAGE) cpSync(join(HERE, name), join(fresh, name), { recursive: true });
    for (const name of VENDOR) copyFileSync(join(ENGINE, "dist", name), join(fresh, "vendor", name));
    if (bundle) copyBundle(bundle, kinds, join(fresh, "model"));
    rmSync(output, { recursive: true, force: true });
    renameSync(fresh, output);
  } finally {
    rmSync(fresh, { recursive: true, force: true });
  }
}

try {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      artifact: { type: "string", multiple: true },
      output: { type: "string", default: "dist" },
      help: { type: "boolean", short: "h" },
    },
  });
  if (values.help) process.stdout.write(HELP);
  else if (positionals.length > 1) throw new InputError("expected one bundle", "node build.mjs --help");
  else build(positionals[0], values.artifact, resolve(values.output));
} catch (error) {
  // Of the file system, a full disk for one, Node.js itself says which file and what.
  const foreseen = error instanceof InputError || error.syscall || String(error.code).startsWith("ERR_PARSE_ARGS");
  if (!foreseen) throw error;
  process.stderr.write(`error: ${error.message.split(/\.\s|\n/)[0]}\nfix: ${error.fix ?? "node build.mjs --help"}\n`);
  process.exitCode = 2;
}
