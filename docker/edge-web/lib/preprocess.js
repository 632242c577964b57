/**
 * From the pixels of an image to the network's input, and from its outputs to classes: the contract that a bundle's
 * manifest.json states, in plain JavaScript for Node.js and browsers alike. Equal to cspdeploy's own preprocessing to
 * the last bit.
 *
 * @typedef {import("./resample.js").RgbImage} RgbImage
 * @typedef {{height_px: number, width_px: number, resize: "crop" | "stretch" | "letterbox", crop_pct: number,
 *   interpolation: "bilinear" | "bicubic" | "nearest", channel_order: "rgb" | "bgr", mean: number[], std: number[]}}
 *   Contract  `spec.preprocess` of manifest.json
 */

import { resize } from "./resample.js";

/** A 100-megapixel picture is 300 MB as RGB; larger ones are taken for decompression bombs. */
export const MAX_IMAGE_PIXELS = 100_000_000;
const MAX_SIDE_PX = 8192;
/** Darknet pads its floats with 0.5; this is the nearest byte. */
const LETTERBOX_GREY = 128;

/** What a user did wrong or a file lacks, told in one line, and what to do about it. */
export class InputError extends Error {
  /** @param {string} message what, got, expected  @param {string} fix a command or an edit */
  constructor(message, fix) {
    super(message);
    this.name = "InputError";
    this.fix = fix;
  }
}

/** Python's round() for numbers from 0 up: halves go to the even neighbour. */
function roundHalfEven(value) {
  const below = Math.floor(value);
  const rest = value - below;
  if (rest !== 0.5) return rest < 0.5 ? below : below + 1;
  return below % 2 === 0 ? below : below + 1;
}

/** @param {Contract} contract  @throws {InputError} a field is missing, unknown or out of range */
export function checkContract(contract) {
  const refuse = (field, expected) => {
    const got = JSON.stringify(contract?.[field]);
    throw new InputError(
      `manifest.json: preprocess.${field}: got ${got}, expected ${expected}`,
      "export the bundle again",
    );
  };
  for (const field of ["height_px", "width_px"]) {
    const side = contract?.[field];
    if (!Number.isInteger(side) || side < 1 || side > MAX_SIDE_PX) refuse(field, `1 to ${MAX_SIDE_PX}`);
  }
  const choices = {
    resize: ["crop", "stretch", "letterbox"],
    interpolation: ["bilinear", "bicubic", "nearest"],
    channel_order: ["rgb", "bgr"],
  };
  for (const [field, allowed] of Object.entries(choices)) {
    if (!allowed.includes(contract[field])) refuse(field, `one of ${allowed.join(", ")}`);
  }
  if (!(contract.crop_pct > 0 && contract.crop_pct <= 1)) refuse("crop_pct", "a number in (0, 1]");
  for (const field of ["mean", "std"]) {
    const values = contract[field];
    const good = Array.isArray(values) && values.length === 3 && values.every(Number.isFinite);
    if (!good || (field === "std" && Math.min(...values) <= 0)) refuse(field, "three numbers");
  }
}

function crop(image, left, top, width, height) {
  const data = new Uint8Array(width * height * 3);
  for (let y = 0; y < height; y++) {
    const from = ((top + y) * image.width + left) * 3;
    data.set(image.data.subarray(from, from + width * 3), y * width * 3);
  }
  return { width, height, data };
}

/**
 * Where a contract puts an image: the size that it is scaled to, and where the network's window lies in that; negative
 * where a border stays beside it.
 *
 * @param {{width: number, height: number}} image  @param {Contract} contract
 * @returns {{scaledWidth: number, scaledHeight: number, left: number, top: number}}
 * @throws {InputError} so thin that it would have more than 100 megapixels
 */
export function fitImage(image, contract) {
  const { width_px: width, height_px: height, crop_pct: part } = contract;
  if (contract.resize === "stretch") return { scaledWidth: width, scaledHeight: height, left: 0, top: 0 };
  if (contract.resize === "letterbox") {
    // Darknet's letterbox_image: the longer side fits, the rest is grey.
    const wide = width * image.height < height * image.width;
    const scaledWidth = wide ? width : Math.max(1, Math.floor((image.width * height) / image.height));
    const scaledHeight = wide ? Math.max(1, Math.floor((image.height * width) / image.width)) : height;
    const left = 0 - Math.floor((width - scaledWidth) / 2);
    return { scaledWidth, scaledHeight, left, top: 0 - Math.floor((height - scaledHeight) / 2) };
  }
  const scale = Math.max(Math.trunc(width / part) / image.width, Math.trunc(height / part) / image.height);
  const scaledWidth = Math.max(width, roundHalfEven(image.width * scale));
  const scaledHeight = Math.max(height, roundHalfEven(image.height * scale));
  if (scaledWidth * scaledHeight > MAX_IMAGE_PIXELS) {
    const sizes = `${image.width}x${image.height} px: too thin, scaled it has ${scaledWidth}x${scaledHeight} px`;
    throw new InputError(`image of ${sizes}`, "crop the image");
  }
  // Rounds as torchvision's CenterCrop does, so that published accuracies hold.
  const [left, top] = [roundHalfEven((scaledWidth - width) / 2), roundHalfEven((scaledHeight - height) / 2)];
  return { scaledWidth, scaledHeight, left, top };
}

/** On grey, where the image does not reach. */
function letterbox(small, { left, top }, { width_px: width, height_px: height }) {
  const data = new Uint8Array(width * height * 3).fill(LETTERBOX_GREY);
  const bytes = small.width * 3;
  for (let y = 0; y < small.height; y++)
    data.set(small.data.subarray(y * bytes, (y + 1) * bytes), ((y - top) * width - left) * 3);
  return { width, height, data };
}

/**
 * Resize and crop to the size of the contract.
 *
 * @param {RgbImage} image  @param {Contract} contract  @returns {RgbImage}
 * @throws {InputError} more than 100 megapixels, or so thin that it would become that large
 */
export function resizeImage(image, contract) {
  if (image.width * image.height > MAX_IMAGE_PIXELS) {
    throw new InputError(
      `image of ${image.width}x${image.height} px: expected at most ${MAX_IMAGE_PIXELS} pixels`,
      "shrink the image",
    );
  }
  const fit = fitImage(image, contract);
  const scaled = resize(image, fit.scaledWidth, fit.scaledHeight, contract.interpolation);
  if (contract.resize === "stretch") return scaled;
  if (contract.resize === "letterbox") return letterbox(scaled, fit, contract);
  return crop(scaled, fit.left, fit.top, contract.width_px, contract.height_px);
}

/**
 * RGB bytes to the network's planes `[3, H, W]`: channel order, /255, mean, std, as one multiply-add in float32.
 *
 * @param {RgbImage} image  @param {Contract} contract  @returns {Float32Array}
 */
export function normalise(image, contract) {
  const area = image.width * image.height;
  const planes = new Float32Array(3 * area);
  for (let plane = 0; plane < 3; plane++) {
    const channel = contract.channel_order === "bgr" ? 2 - plane : plane;
    // Constants are rounded to float32 once, and so is each result: numpy's arithmetic on float32 arrays.
    const gain = Math.fround(1 / (255 * contract.std[plane]));
    const offset = Math.fround(-contract.mean[plane] / contract.std[plane]);
    const values = Float32Array.from({ length: 256 }, (_, byte) => Math.fround(byte * gain) + offset);
    for (let i = 0, from = channel; i < area; i++, from += 3) planes[plane * area + i] = values[image.data[from]];
  }
  return planes;
}

/**
 * The one tensor that an artifact takes: planes `[1, 3, H, W]` float32, or bytes `[1, H, W, 3]` where the graph does
 * the rest itself (`frontend` in the manifest).
 *
 * @param {RgbImage} image  @param {Contract} contract
 * @param {{channel_order: "rgb" | "bgr", resize: boolean} | null} [frontend]
 * @returns {{type: "float32" | "uint8", dims: number[], data: Float32Array | Uint8Array}}
 */
export function networkInput(image, contract, frontend = null) {
  if (!frontend) {
    const data = normalise(resizeImage(image, contract), contract);
    return { type: "float32", dims: [1, 3, contract.height_px, contract.width_px], data };
  }
  const sized = frontend.resize ? image : resizeImage(image, contract);
  const data = Uint8Array.from(sized.data);
  if (frontend.channel_order === "bgr") {
    for (let i = 0; i < data.length; i += 3) [data[i], data[i + 2]] = [data[i + 2], data[i]];
  }
  return { type: "uint8", dims: [1, sized.height, sized.width, 3], data };
}

/** @param {ArrayLike<number>} logits of one image  @returns {Float64Array} probabilities that add up to 1 */
export function softmax(logits) {
  const largest = Array.prototype.reduce.call(logits, (a, b) => Math.max(a, b), -Infinity);
  const exponentials = Float64Array.from(logits, (value) => Math.exp(value - largest));
  const sum = exponentials.reduce((a, b) => a + b, 0);
  return exponentials.map((value) => value / sum);
}

/** @param {ArrayLike<number>} logits  @param {number} k  @returns {number[]} largest first, equal ones by lower index */
export function topK(logits, k) {
  const order = Array.from({ length: logits.length }, (_, index) => index);
  return order.sort((a, b) => logits[b] - logits[a] || a - b).slice(0, k);
}

/**
 * @param {ArrayLike<number>} logits  @param {string[]} labels  @param {number} k
 * @returns {{label: string, index: number, probability: number}[]} likeliest first
 * @throws {InputError} another number of scores than of labels
 */
export function classes(logits, labels, k) {
  if (logits.length !== labels.length)
    throw new InputError(`${logits.length} class scores and ${labels.length} labels`, "export the bundle again");
  const probabilities = softmax(logits);
  return topK(logits, k).map((index) => ({ label: labels[index], index, probability: probabilities[index] }));
}
