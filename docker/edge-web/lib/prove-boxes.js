/** Whether a device finds the boxes that the original network finds, whatever the contract of the artifact's outputs. */

import { detectionFor, findBoxes, overlap } from "./detect.js";

// Those of `cspdeploy`, core/detection/match.py: "the same box" overlaps by nine tenths, and its score differs by as
// much as INT8 moves scores at most.
const MATCH_IOU = 0.9;
const MATCH_SCORE = 0.1;
// Boxes that may be missing or too many. Python tells near ties one by one and lets FP32 and FP16 lose nothing else;
// here FP16 may have one, where two candidates are nearly equal. A tenth: MOST_LOST of core/detection/decisions.py.
const LOST_SHARE = { fp32: 0, fp16: 0.03, int8: 0.1 };
// How far a score may be off, and how far above its threshold it must be for its box to count: nearer, rounding alone
// decides. FP16 moves them by 0.002, INT8 by 0.1, as measured in core/detection/match.py.
const BORDER = { fp32: 1e-3, fp16: 1e-2, int8: MATCH_SCORE };
// By how much two boxes that a graph leaves may overlap beyond its threshold: ROUNDING of core/detection/rows.py.
const ROUNDING = 0.01;

/** Each of `wanted` with its like in `found`, each once. @returns {[object, object][]} */
function matched(wanted, found) {
  const free = new Set(found);
  const pairs = [];
  for (const box of wanted) {
    const alike = [...free].filter(
      (other) =>
        other.index === box.index &&
        overlap(box, other) >= MATCH_IOU &&
        Math.abs(other.score - box.score) <= MATCH_SCORE,
    );
    if (!alike.length) continue;
    alike.sort((a, b) => overlap(box, b) - overlap(box, a));
    free.delete(alike[0]);
    pairs.push([box, alike[0]]);
  }
  return pairs;
}

/** Whether two boxes of a class overlap by more than the suppression leaves, whoever has done it. */
function overlapping(boxes, { iou_threshold: most }) {
  return boxes.some((box, at) =>
    boxes.slice(0, at).some((other) => other.index === box.index && overlap(box, other) > most + ROUNDING),
  );
}

/**
 * @param {import("./detect.js").Outputs[]} outputs one entry an image  @param {object} artifact of the manifest
 * @param {import("./detect.js").Outputs[]} exact the original's own, in the same order
 * @param {import("./detect.js").Detection} detection
 * @returns {{expected: number, found: number, matched: number, passed: boolean, problem: string}} of boxes clearly above
 *   the threshold; `problem`: what is wrong whichever boxes they are, or empty
 */
export function judgeBoxes(outputs, artifact, exact, detection) {
  const rule = detectionFor(detection, artifact);
  const border = BORDER[artifact.precision];
  const clear = rule.suppression.score_threshold + border;
  const told = { expected: 0, found: 0, matched: 0 };
  const reference = detection.decode === "raw" ? "raw" : "decoded";
  let worst = 0;
  let problem = "";
  outputs.forEach((own, index) => {
    const wanted = findBoxes(exact[index], rule, reference);
    const found = findBoxes(own, rule, artifact.decode);
    if (overlapping(found, rule.suppression)) problem = "boxes are not suppressed";
    const [clearlyWanted, clearlyFound] = [wanted, found].map((boxes) => boxes.filter(({ score }) => score > clear));
    const both = matched(clearlyWanted, found);
    for (const [box, other] of both) worst = Math.max(worst, Math.abs(box.score - other.score));
    told.expected += clearlyWanted.length;
    told.matched += both.length;
    told.found += both.length + clearlyFound.length - matched(clearlyFound, wanted).length;
  });
  if (worst > border) problem ||= `a score is off by ${worst.toPrecision(2)}, at most ${border} is explained`;
  const one = artifact.precision === "fp32" ? 0 : 1;
  const allowed = Math.max(one, Math.floor(LOST_SHARE[artifact.precision] * told.expected));
  const few = told.expected - told.matched <= allowed && told.found - told.matched <= allowed;
  return { ...told, problem, passed: few && !problem };
}
