/**
 * From a detector's outputs to boxes in the picture, in plain JavaScript for Node.js and browsers alike. The very boxes
 * of `cspdeploy.core.detection`: numpy's float32 arithmetic, step by step.
 *
 * @typedef {{left: number, top: number, right: number, bottom: number, score: number, index: number}} Box
 * @typedef {{score_threshold: number, iou_threshold: number, max_detections: number}} Suppression
 * @typedef {{output: string, stride_px: number, anchors: number[][], scale_x_y: number, new_coords: boolean}} Head
 * @typedef {{heads: Head[], decode: string, suppression: Suppression}} Detection  `spec.detection` of manifest.json
 * @typedef {Record<string, {dims: number[], data: ArrayLike<number>}>} Outputs  of one image
 */

import { InputError, fitImage } from "./preprocess.js";

const f = Math.fround;
/** A coordinate must be within that, or its box counts as none: of a wild network the square of a side is infinite. */
const FARTHEST_PX = 2 ** 20;
const SMALLEST_AREA = f(1e-12);
const READABLE = ["raw", "decoded", "nms", "ultralytics"];

/** @param {Detection} detection  @throws {InputError} a field is missing or of another type */
export function checkDetection(detection) {
  const good =
    Array.isArray(detection?.heads) &&
    detection.heads.length &&
    detection.heads.every(
      (head) =>
        typeof head?.output === "string" &&
        Number.isInteger(head.stride_px) &&
        head.stride_px > 0 &&
        Number.isFinite(head.scale_x_y) &&
        Array.isArray(head.anchors) &&
        head.anchors.length &&
        head.anchors.every((sides) => Array.isArray(sides) && sides.length === 2 && sides.every((side) => side > 0)),
    );
  const { score_threshold: score, iou_threshold: iou, max_detections: most } = detection?.suppression ?? {};
  if (!good || !(score >= 0 && score < 1) || !(iou > 0 && iou <= 1) || !(Number.isInteger(most) && most > 0))
    throw new InputError("manifest.json: spec.detection broken", "export the bundle again");
}

/**
 * What was asked for, or what the artifact was exported with.
 *
 * @param {Detection} detection  @param {{decode: string, file: string}} artifact  @param {Partial<Suppression>} asked
 * @returns {Detection} with that suppression
 * @throws {InputError} out of range, more than the graph's own suppression leaves, or a contract that is not read here
 */
export function detectionFor(detection, { decode, file }, asked = {}) {
  if (!READABLE.includes(decode)) {
    const why = decode === "trt" ? "its boxes are made by a plugin of TensorRT" : `contract '${decode}'`;
    throw new InputError(`${file}: ${why}, which is not read here`, "cspdeploy export --decode nms");
  }
  const own = detection.suppression;
  const suppression = { ...own, ...asked };
  try {
    checkDetection({ ...detection, suppression });
  } catch {
    const fix = "--score-threshold 0.25 --iou-threshold 0.45 --max-detections 300";
    throw new InputError("score, overlap or number of boxes out of range", fix);
  }
  const lost =
    suppression.score_threshold < own.score_threshold ||
    suppression.iou_threshold !== own.iou_threshold ||
    suppression.max_detections > own.max_detections;
  if (decode === "nms" && lost) {
    const done = `score ${own.score_threshold}, overlap ${own.iou_threshold} and ${own.max_detections} boxes`;
    const fix = "export it with others, or with --decode decoded";
    throw new InputError(`${file}: its graph has suppressed by ${done} already`, fix);
  }
  return { ...detection, suppression };
}

/**
 * @param {Outputs} outputs  @param {Detection} detection  @param {string} decode the contract of the outputs
 * @returns {Box[]} in pixels of the network's input, best first
 * @throws {InputError} outputs of another contract, or scores that are no numbers throughout
 */
export function findBoxes(outputs, detection, decode) {
  const { suppression } = detection;
  const threshold = f(suppression.score_threshold);
  if (decode === "nms") {
    const [{ data: rows }, { data: count }] = [output(outputs, "detections"), output(outputs, "num_detections")];
    const boxes = Array.from({ length: Number(count[0]) }, (_, i) => {
      const [left, top, right, bottom, score, index] = Array.from({ length: 6 }, (_, k) => rows[6 * i + k]);
      return { left, top, right, bottom, score, index };
    });
    return boxes.filter(({ score }) => score > threshold).slice(0, suppression.max_detections);
  }
  const readers = { raw: rawCandidates, decoded: decodedCandidates, ultralytics: ultralyticsCandidates };
  return suppress(readers[decode](outputs, detection, threshold), suppression);
}

function output(outputs, name) {
  const found = outputs[name];
  if (!found) throw new InputError(`output '${name}' is missing`, "export the bundle again");
  // Candidates without a number count as none; where there is no other, the engine has failed.
  if (found.data.length && typeof found.data[0] === "number" && Array.prototype.every.call(found.data, Number.isNaN))
    throw new InputError(`output '${name}' is NaN throughout`, "choose another artifact or engine");
  return found;
}

function decodedCandidates(outputs, _, threshold) {
  const { data: boxes } = output(outputs, "boxes");
  const { data: scores, dims } = output(outputs, "scores");
  const classes = dims[2];
  const found = [];
  for (let at = 0; at < scores.length; at++) {
    if (!(scores[at] > threshold)) continue;
    const row = Math.floor(at / classes);
    found.push(new Candidate(boxes.subarray(4 * row, 4 * row + 4), scores[at], at % classes, row));
  }
  return found;
}

function ultralyticsCandidates(outputs, _, threshold) {
  const { data, dims } = output(outputs, "output0");
  const count = dims[2];
  const found = [];
  for (let at = 4 * count; at < data.length; at++) {
    if (!(data[at] > threshold)) continue;
    const row = at % count;
    const [x, y, width, height] = [0, 1, 2, 3].map((side) => data[side * count + row]);
    const box = around(x, y, f(width / 2), f(height / 2));
    found.push(new Candidate(box, data[at], Math.floor(at / count) - 4, row));
  }
  return found;
}

/** Of one form for all contracts: thousands of them are compared with each other. */
class Candidate {
  /** @param {ArrayLike<number>} box left, top, right, bottom  @param {number} row among all candidates of the image */
  constructor(box, score, index, row) {
    [this.left, this.top, this.right, this.bottom] = box;
    this.score = score;
    this.index = index;
    this.row = row;
  }
}

function around(x, y, halfWidth, halfHeight) {
  return [f(x - halfWidth), f(y - halfHeight), f(x + halfWidth), f(y + halfHeight)];
}

/** Darknet's [yolo], of the cells only whose objectness alone is high enough. */
function rawCandidates(outputs, { heads }, threshold) {
  const found = [];
  let first = 0; // row of the head's first candidate
  for (const head of heads) {
    const { data, dims } = output(outputs, head.output);
    const [, channels, height, width] = dims;
    const area = height * width;
    const perAnchor = channels / head.anchors.length;
    if (!Number.isInteger(perAnchor) || perAnchor < 6)
      throw new InputError(`${head.output}: ${channels} channels do not fit its anchors`, "export the bundle again");
    const active = head.new_coords ? (value) => value : sigmoid;
    head.anchors.forEach((anchor, a) => {
      for (let cell = 0; cell < area; cell++) {
        const at = (channel) => data[(a * perAnchor + channel) * area + cell];
        const object = active(at(4));
        // Of new_coords, class scores may lie a rounding above 1.
        if (!(object > threshold || head.new_coords)) continue;
        let box;
        for (let index = 0; index < perAnchor - 5; index++) {
          const score = f(object * active(at(5 + index)));
          if (!(score > threshold)) continue;
          box ??= decodeBox(head, anchor, [0, 1, 2, 3].map(at), cell % width, Math.floor(cell / width));
          found.push(new Candidate(box, score, index, first + a * area + cell));
        }
      }
    });
    first += head.anchors.length * area;
  }
  return found;
}

function decodeBox(head, anchor, [tx, ty, tw, th], column, row) {
  const back = f(0.5 * (head.scale_x_y - 1));
  const place = (t, cell) => {
    const inside = head.new_coords ? t : sigmoid(t);
    return f(f(f(inside * f(head.scale_x_y)) + f(cell - back)) * head.stride_px);
  };
  const half = (t, side) => f((head.new_coords ? f(f(2 * t) ** 2) : f(Math.exp(t))) * f(f(side) * 0.5));
  return around(place(tx, column), place(ty, row), half(tw, anchor[0]), half(th, anchor[1]));
}

/** Without an overflow on either side. */
function sigmoid(x) {
  const e = f(Math.exp(-Math.abs(x)));
  return f((x >= 0 ? 1 : e) / f(1 + e));
}

/** Class by class: the best box stays, those that overlap it too much go. Of all classes together the best. */
function suppress(candidates, { iou_threshold: iou, max_detections: most }) {
  const near = (box) => [box.left, box.top, box.right, box.bottom].every((side) => Math.abs(side) < FARTHEST_PX);
  const best = (a, b) => b.score - a.score || a.row - b.row || a.index - b.index;
  const limit = f(iou);
  const kept = [];
  const classes = new Map(); // those of `kept`
  for (const box of candidates.filter(near).sort(best)) {
    if (kept.length === most) break;
    if (!classes.has(box.index)) classes.set(box.index, []);
    const better = classes.get(box.index);
    if (better.some((one) => overlap(one, box) > limit)) continue;
    better.push(box);
    const { left, top, right, bottom, score, index } = box;
    kept.push({ left, top, right, bottom, score, index });
  }
  return kept;
}

/** Intersection over union; 0 for boxes without an area. */
export function overlap(a, b) {
  const wide = Math.max(0, f(Math.min(a.right, b.right) - Math.max(a.left, b.left)));
  const high = Math.max(0, f(Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top)));
  const inside = f(wide * high);
  return f(inside / Math.max(f(f(area(a) + area(b)) - inside), SMALLEST_AREA));
}

function area({ left, top, right, bottom }) {
  return f(Math.max(0, f(right - left)) * Math.max(0, f(bottom - top)));
}

/**
 * @param {Box[]} boxes in pixels of the network's input  @param {string[]} labels
 * @param {import("./preprocess.js").Contract} contract  @param {{width: number, height: number}} image as it was given
 * @returns {(Box & {label: string})[]} in pixels of the image, cut at its edges
 * @throws {InputError} a class without a label
 */
export function inPicture(boxes, labels, contract, image) {
  const fit = fitImage(image, contract);
  const along = (value, offset, size, scaled) =>
    Math.min(size, Math.max(0, f(f(value + offset) * f(size / scaled))));
  const x = (value) => along(value, fit.left, image.width, fit.scaledWidth);
  const y = (value) => along(value, fit.top, image.height, fit.scaledHeight);
  return boxes.map(({ left, top, right, bottom, score, index }) => {
    const label = labels[index];
    if (label === undefined)
      throw new InputError(`a box of class ${index} and ${labels.length} labels`, "export the bundle again");
    return { label, index, score, left: x(left), top: y(top), right: x(right), bottom: y(bottom) };
  });
}
