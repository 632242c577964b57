/** Whether a device computes what the original network said: preprocessing and artifacts against golden.npz. */

import { InputError, networkInput, normalise, resizeImage, softmax, topK } from "./preprocess.js";
import { judgeBoxes } from "./prove-boxes.js";

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
// Of a detector, as core/detection: scores of INT8 may be four times as far off (SCORE_GAIN of decisions.py), and sides
// of its boxes and of those of FP16 count by the score over the threshold, at least this one (judge.py).
const SCORE_GAIN = 4;
const LEAST_THRESHOLD = 0.05;

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
  const { passed, judged = true, detail: reason, ...numbers } =
    manifest.spec.task === "detect"
      ? judgeDetector(outputs, artifact, golden, manifest.spec)
      : judge(outputs, artifact, golden, manifest.spec.task === "classify");
  const timed = { num_images: golden.images.length, p50_ms: Number(p50.toFixed(3)) };
  return { check: "golden", artifact: artifact.kind, verdict: judged ? verdict(passed) : "skip", reason, ...numbers, ...timed };
}

function goldenInput({ images, input }, index, contract) {
  const { height_px: height, width_px: width } = contract;
  return { type: "float32", dims: [1, 3, height, width], data: row(input, images.length, index) };
}

/**
 * @param {Record<string, {data: ArrayLike<number>}>[]} outputs one entry an image
 * @param {ArrayLike<number>} [weights] of a detector's candidates, of all images; by these their boxes count
 * @returns {{passed: boolean, detail: string, rel_l2: number | null, limit: number, top1_agreement: number | null}}
 */
export function judge(outputs, artifact, { arrays, names, images }, classify, weights) {
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
    let limit = limitFor(artifact, Math.max(relativeL2(arrays.get(FP32 + name).data, exact), FP32_FLOOR));
    if (weights && name === "scores" && artifact.precision === "int8") limit = Math.min(SCORE_GAIN * limit, INT8_LIMIT);
    const weighted = (values) =>
      weights && name === "boxes" ? Float64Array.from(values, (value, i) => value * weights[i >> 2]) : values;
    const distance = relativeL2(weighted(actual), weighted(exact));
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

/**
 * As `python -m cspdeploy.edge selftest`: the original's numbers, those of FP16 and INT8 weighted, and its boxes. An
 * untrained network finds nothing that means anything, and only its numbers are judged; where its graph has suppressed
 * them there are none, and it is not judged at all.
 *
 * @param {import("./detect.js").Outputs[]} outputs one entry an image  @param {object} spec of the manifest
 */
export function judgeDetector(outputs, artifact, golden, { detection, provenance }) {
  const untrained = provenance.source === "random";
  const count = golden.images.length;
  const exact = golden.images.map((_, index) =>
    Object.fromEntries(
      golden.names.map((name) => {
        const { shape, data } = golden.arrays.get(FP64 + name);
        return [name, { dims: [1, ...shape.slice(1)], data: Float32Array.from(row(data, count, index)) }];
      }),
    ),
  );
  let boxes;
  try {
    boxes = judgeBoxes(outputs, artifact, exact, detection);
  } catch (error) {
    if (!(error instanceof InputError)) throw error;
    return { passed: false, detail: error.message, rel_l2: null, limit: null, boxes: {} };
  }
  const { passed: sameBoxes, problem, ...counts } = boxes;
  const found = `${counts.matched} of ${counts.expected} boxes, ${counts.found} found${problem && `, ${problem}`}`;
  if (artifact.decode === "nms") {
    const judged = Boolean(problem) || (!untrained && counts.expected + counts.found > 0);
    const passed = judged && sameBoxes;
    const why = untrained ? "the weights are random" : "the original finds none";
    const detail = judged ? found : `not judged: ${why}, and its graph gives no other numbers than boxes`;
    return { passed, judged, detail, rel_l2: null, limit: null, boxes: counts };
  }
  const own = artifact.decode === "ultralytics" ? outputs.map(cornersAndScores) : outputs;
  const weights = artifact.precision === "fp32" ? undefined : weightsOf(golden, detection);
  const numbers = judge(own, artifact, golden, false, weights);
  return {
    ...numbers,
    passed: numbers.passed && (untrained || sameBoxes),
    detail: `${numbers.detail}, ${found}`,
    boxes: counts,
  };
}

/** The outputs "boxes" and "scores" of an image, of its one output `[1, 4 + C, A]`. */
function cornersAndScores({ output0: { dims, data } }) {
  const [, rows, count] = dims;
  const boxes = new Float32Array(4 * count);
  const scores = new Float32Array((rows - 4) * count);
  for (let at = 0; at < count; at++) {
    for (let side = 0; side < 4; side++) {
      const half = Math.fround(data[(2 + (side % 2)) * count + at] / 2);
      boxes[4 * at + side] = data[(side % 2) * count + at] + (side < 2 ? -half : half);
    }
    for (let row = 4; row < rows; row++) scores[(rows - 4) * at + row - 4] = data[row * count + at];
  }
  return { boxes: { dims: [1, count, 4], data: boxes }, scores: { dims: [1, count, rows - 4], data: scores } };
}

/** Of each candidate: its best score over the threshold, at most 1. None where the outputs are the heads' maps. */
function weightsOf({ arrays }, { suppression }) {
  const scores = arrays.get(`${FP64}scores`);
  if (!scores) return undefined;
  const classes = scores.shape.at(-1);
  const threshold = Math.max(suppression.score_threshold, LEAST_THRESHOLD);
  return Float64Array.from({ length: scores.data.length / classes }, (_, at) =>
    Math.min(1, Math.max(...scores.data.subarray(classes * at, classes * (at + 1))) / threshold),
  );
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
