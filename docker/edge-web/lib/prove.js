/** Whether a device computes what the original network said: preprocessing and artifacts against golden.npz. */

import { InputError, networkInput, normalise, resizeImage, softmax, topK } from "./preprocess.js";

export const GOLDEN_FILE = "golden.npz";
const FP64 = "output_fp64.";
const FP32 = "output_fp32.";

// The limits of `cspdeploy verify`, with its reasons. The noise floor is the distance between the original's FP32 and
// FP64 outputs, at least one unit in the last place; another FP32 engine lands within 16 of it. FP16 rounds 2^13 times
// as coarsely, and four times that is the limit, never above 1e-2.
const FP32_FLOOR = 2 ** -23;
const FP32_NOISE_FACTOR = 16;
const FP16_NOISE_FACTOR = 4 * 2 ** 13;
const FP16_LIMIT = 1e-2;
// INT8: every tensor in 8 bits brings the noise of its step, 1/255 of a range of eight times its typical value; the
// noises add up as independent ones do, at most to 12 dB of signal over noise.
const INT8_STEPS = 255;
const INT8_CREST = 8;
const INT8_LIMIT = 0.25;
// Softmax in float32 rounds to 6e-8 of each term; a thousand classes add up to far less than this.
const PROBABILITY_LIMIT = 1e-5;
const PROBABILITIES = "probabilities";
const CLASSES = "classes";
// INT8 may change the first class of one image in twenty; the others may on near ties only: two best classes closer
// than four times the typical error that the limit allows.
const INT8_AGREEMENT = 0.95;
const TIE_FACTOR = 4;

/** Of `actual` against `exact`, both flat. @returns {number} NaN where a value is not finite */
export function relativeL2(actual, exact) {
  let noise = 0;
  let signal = 0;
  for (let i = 0; i < exact.length; i++) {
    noise += (actual[i] - exact[i]) ** 2;
    signal += exact[i] ** 2;
  }
  return signal === 0 ? (noise === 0 ? 0 : Infinity) : Math.sqrt(noise / signal);
}

/**
 * @param {object} artifact of the manifest  @param {number} floor of the output's noise
 * @returns {number} largest relative L2 that it may have; NaN where an INT8 file's manifest does not say of how many
 *   tensors in 8 bits it follows
 */
export function limitFor(artifact, floor) {
  return precisionLimit(artifact, Math.max(floor, FP32_FLOOR)) + pixelChange(artifact);
}

function precisionLimit(artifact, floor) {
  const fp16 = Math.min(FP16_NOISE_FACTOR * floor, FP16_LIMIT);
  if (artifact.precision === "fp32") return Math.min(FP32_NOISE_FACTOR * floor, FP16_LIMIT);
  if (artifact.precision === "fp16") return fp16;
  const count = facts(artifact, "num_quantised").findLast((value) => Number.isInteger(value) && value > 0) ?? NaN;
  const one = INT8_CREST / (INT8_STEPS * Math.sqrt(12));
  return Math.min(Math.max(one * Math.sqrt(count), fp16), INT8_LIMIT);
}

/** What the pixels of a graph's own resize move its outputs by, as measured at export; never above what FP16 may. */
function pixelChange(artifact) {
  if (!artifact.frontend?.resize) return 0;
  const found = facts(artifact, "output_change").filter((value) => Number.isFinite(value) && value >= 0);
  return Math.min(Math.max(0, ...found), FP16_LIMIT);
}

function facts(artifact, name) {
  return (artifact.steps ?? []).map((step) => step.facts?.[name]);
}

/**
 * Images as RGB, the inputs made from them, and the original's outputs.
 *
 * @param {Map<string, {shape: number[], data: ArrayLike<number>}>} arrays of golden.npz  @param {object} manifest
 * @throws {InputError} an array is missing or empty
 */
export function openGolden(arrays, manifest) {
  const names = manifest.spec.outputs;
  for (const name of ["images", "input", ...names.flatMap((output) => [FP64 + output, FP32 + output])]) {
    if (!arrays.get(name)?.data.length)
      throw new InputError(`${GOLDEN_FILE}: no array '${name}'`, "export the bundle again");
  }
  const {
    shape: [count, height, width, channels = 1],
    data,
  } = arrays.get("images");
  const images = Array.from({ length: count }, (_, i) => {
    const stored = row(data, count, i);
    const rgb =
      channels === 3 ? stored : Uint8Array.from({ length: stored.length * 3 }, (_, at) => stored[Math.floor(at / 3)]);
    return { width, height, data: rgb };
  });
  return { images, input: arrays.get("input").data, arrays, names };
}

/** As `python -m cspdeploy.edge selftest --json` spells it. */
export function verdict(passed) {
  return passed ? "pass" : "fail";
}

function row(data, count, index) {
  const size = data.length / count;
  return data.subarray(index * size, (index + 1) * size);
}

/** Byte for byte: the same integers, and float32 arithmetic in the same order. */
export function checkPreprocessing({ images, input }, contract) {
  let different = 0;
  let largest = 0;
  images.forEach((image, index) => {
    const planes = normalise(resizeImage(image, contract), contract);
    const expected = row(input, images.length, index);
    if (planes.length !== expected.length) different += expected.length;
    else
      expected.forEach((value, i) => {
        if (Object.is(value, planes[i])) return;
        different += 1;
        largest = Math.max(largest, Math.abs(value - planes[i]));
      });
  });
  const of = `of ${input.length} values of ${images.length} images`;
  const detail = different
    ? `${different} ${of} differ, by up to ${largest.toPrecision(2)}`
    : `all ${of} are those of the export`;
  return {
    check: "preprocess",
    artifact: "",
    verdict: verdict(different === 0),
    reason: detail,
    num_images: images.length,
  };
}

/**
 * Run an artifact on all golden images and judge what it says.
 *
 * @param {import("./engine.js").Engine} engine  @param {object} manifest  @param {ReturnType<typeof openGolden>} golden
 */
export async function checkArtifact(engine, manifest, golden) {
  const { artifact } = engine;
  const outputs = [];
  const times = [];
  for (const [index, image] of golden.images.entries()) {
    const input = artifact.frontend
      ? networkInput(image, manifest.spec.preprocess, artifact.frontend)
      : goldenInput(golden, index, manifest.spec.preprocess);
    const start = performance.now();
    outputs.push(await engine.run(input));
    times.push(performance.now() - start);
  }
  const p50 = times.sort((a, b) => a - b)[Math.floor(times.length / 2)];
  const { passed, detail: reason, ...numbers } = judge(outputs, artifact, golden, manifest.spec.task === "classify");
  const timed = { num_images: golden.images.length, p50_ms: Number(p50.toFixed(3)) };
  return { check: "golden", artifact: artifact.kind, verdict: verdict(passed), reason, ...numbers, ...timed };
}

function goldenInput({ images, input }, index, contract) {
  const { height_px: height, width_px: width } = contract;
  return { type: "float32", dims: [1, 3, height, width], data: row(input, images.length, index) };
}

/**
 * @param {Record<string, {data: ArrayLike<number>}>[]} outputs one entry an image
 * @returns {{passed: boolean, detail: string, rel_l2: number | null, limit: number, top1_agreement: number | null}}
 */
export function judge(outputs, artifact, { arrays, names, images }, classify) {
  const details = [];
  const numbers = { rel_l2: null, limit: 0, top1_agreement: null };
  let passed = true;
  for (const name of names) {
    const exact = arrays.get(FP64 + name).data;
    const got = outputs.map((output) => output[name]?.data ?? []);
    if (got.some((data) => data.length * images.length !== exact.length)) {
      return { passed: false, detail: `output '${name}' is missing or of another shape`, ...numbers };
    }
    const actual = Float64Array.from(got.flatMap((data) => Array.from(data)));
    const limit = limitFor(artifact, Math.max(relativeL2(arrays.get(FP32 + name).data, exact), FP32_FLOOR));
    const distance = relativeL2(actual, exact);
    if (Number.isNaN(limit)) {
      const detail = "its manifest does not say how many tensors are in 8 bits: export the bundle again";
      return { passed: false, detail, ...numbers };
    }
    passed &&= distance <= limit; // false for NaN
    details.push(`${name}: relative L2 ${distance.toExponential(1)}, limit ${limit.toExponential(1)}`);
    Object.assign(numbers, { rel_l2: Number.isFinite(distance) ? distance : null, limit });
    if (classify) {
      const decided = judgeDecisions(actual, exact, images.length, limit, artifact.precision);
      passed &&= decided.passed;
      details.push(`top-1 ${decided.same}/${images.length}`);
      numbers.top1_agreement = decided.same / images.length;
    }
  }
  const k = artifact.frontend?.top_k;
  if (k) {
    const wrong = outputs.map((output) => wrongTopK(output, output[names[0]].data, k)).find(Boolean);
    passed &&= !wrong;
    details.push(wrong ? `top-k: ${wrong}` : "top-k");
  }
  return { passed, detail: details.join(", "), ...numbers };
}

/** Why the graph's own top-k of one image is not that of its scores, or empty. */
function wrongTopK(output, logits, k) {
  const probabilities = Array.from(output[PROBABILITIES]?.data ?? []);
  const found = Array.from(output[CLASSES]?.data ?? [], Number);
  if (probabilities.length !== k || found.length !== k) return `${found.length} classes, expected ${k}`;
  // By their scores and not by their numbers: of equal scores either may be first.
  const expected = topK(logits, k);
  const right = new Set(found).size === k && found.every((index, i) => logits[index] === logits[expected[i]]);
  if (!right) return "other classes than the largest scores";
  const exact = softmax(logits);
  const near = probabilities.every((value, i) => Math.abs(value - exact[found[i]]) <= PROBABILITY_LIMIT); // not NaN
  return near ? "" : "other probabilities than the softmax of the scores";
}

function judgeDecisions(actual, exact, count, limit, precision) {
  const typical = limit * Math.sqrt(exact.reduce((sum, value) => sum + value * value, 0) / exact.length);
  let changed = 0;
  let clear = 0;
  for (let i = 0; i < count; i++) {
    const wanted = row(exact, count, i);
    const [best, second] = topK(wanted, 2);
    if (topK(row(actual, count, i), 1)[0] === best) continue;
    changed += 1;
    if (second === undefined || wanted[best] - wanted[second] > TIE_FACTOR * typical) clear += 1;
  }
  const allowed = precision === "int8" ? Math.max(1, Math.floor((1 - INT8_AGREEMENT) * count + 1e-9)) : count;
  return { same: count - changed, passed: clear === 0 && changed <= allowed };
}
