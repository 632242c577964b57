/**
 * Pillow's `Image.resize` of 8-bit RGB, equal to the last bit. Source: Pillow's Resample.c (bilinear, bicubic) and
 * Geometry.c (nearest).
 *
 * An image is `{width, height, data}`: `data` holds RGB bytes, row by row, three a pixel.
 *
 * @typedef {{width: number, height: number, data: Uint8Array | Uint8ClampedArray}} RgbImage
 */

/** Of Pillow's fixed-point arithmetic: 32 bits, less 8 of the pixel, less 2 for sums that overshoot. */
const PRECISION_BITS = 32 - 8 - 2;
const BICUBIC_A = -0.5;

const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, weight: bicubic },
};

/** The cubic convolution kernel in the order of operations that Pillow uses: another order rounds otherwise. */
function bicubic(x) {
  const d = Math.abs(x);
  if (d < 1) return ((BICUBIC_A + 2) * d - (BICUBIC_A + 3)) * d * d + 1;
  if (d < 2) return (((d - 5) * d + 8) * d - 4) * BICUBIC_A;
  return 0;
}

/**
 * Which source pixels make each target pixel of one axis, and in what parts (Pillow's `precompute_coeffs` and
 * `normalize_coeffs_8bpc`): normalised in double precision, then rounded to 22 bits.
 */
function coefficients(sourceSize, targetSize, filter) {
  const scale = sourceSize / targetSize;
  const filterScale = Math.max(scale, 1);
  const support = filter.support * filterScale;
  const length = Math.ceil(support) * 2 + 1;
  const starts = new Int32Array(targetSize);
  const counts = new Int32Array(targetSize);
  const weights = new Int32Array(targetSize * length);
  const row = new Float64Array(length);
  const inverse = 1 / filterScale;
  for (let target = 0; target < targetSize; target++) {
    const centre = (target + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - support + 0.5));
    const count = Math.min(sourceSize, Math.trunc(centre + support + 0.5)) - start;
    let sum = 0;
    for (let i = 0; i < count; i++) {
      row[i] = filter.weight((i + start - centre + 0.5) * inverse);
      sum += row[i];
    }
    for (let i = 0; i < count; i++) {
      const part = (sum === 0 ? row[i] : row[i] / sum) * (1 << PRECISION_BITS);
      weights[target * length + i] = Math.trunc(part < 0 ? part - 0.5 : part + 0.5);
    }
    starts[target] = start;
    counts[target] = count;
  }
  return { starts, counts, weights, length };
}

function clip8(sum) {
  const value = sum >> PRECISION_BITS;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

/** One pixel out of a run of pixels that lie `step` bytes apart; `first` to `last`: its weights. */
function mix(source, from, step, weights, first, last, target, to) {
  let red = 1 << (PRECISION_BITS - 1);
  let green = red;
  let blue = red;
  for (let k = first, at = from; k < last; k++, at += step) {
    const weight = weights[k];
    red += source[at] * weight;
    green += source[at + 1] * weight;
    blue += source[at + 2] * weight;
  }
  target[to] = clip8(red);
  target[to + 1] = clip8(green);
  target[to + 2] = clip8(blue);
}

/** Pillow's nearest: positions are summed up in steps of the scale, as there, rather than multiplied. */
function nearestPositions(sourceSize, targetSize) {
  const step = sourceSize / targetSize;
  const positions = new Int32Array(targetSize);
  for (let i = 0, at = step * 0.5; i < targetSize; i++, at += step) {
    positions[i] = Math.min(sourceSize - 1, Math.trunc(at));
  }
  return positions;
}

function resizeNearest(image, width, height) {
  const data = new Uint8Array(width * height * 3);
  const columns = nearestPositions(image.width, width);
  const rows = nearestPositions(image.height, height);
  for (let y = 0, to = 0; y < height; y++) {
    const line = rows[y] * image.width;
    for (let x = 0; x < width; x++, to += 3) {
      const from = (line + columns[x]) * 3;
      data[to] = image.data[from];
      data[to + 1] = image.data[from + 1];
      data[to + 2] = image.data[from + 2];
    }
  }
  return { width, height, data };
}

// Both passes go through memory in its order: a photograph is larger than any cache.

function resizeColumns({ width: from, height, data }, width, filter) {
  const { starts, counts, weights, length } = coefficients(from, width, filter);
  const wide = new Uint8Array(width * height * 3);
  for (let y = 0, to = 0; y < height; y++) {
    for (let x = 0; x < width; x++, to += 3) {
      mix(data, (y * from + starts[x]) * 3, 3, weights, x * length, x * length + counts[x], wide, to);
    }
  }
  return { width, height, data: wide };
}

function resizeRows({ width, height: from, data }, height, filter) {
  const { starts, counts, weights, length } = coefficients(from, height, filter);
  const tall = new Uint8Array(width * height * 3);
  for (let y = 0, to = 0; y < height; y++) {
    for (let x = 0; x < width; x++, to += 3) {
      mix(data, (starts[y] * width + x) * 3, width * 3, weights, y * length, y * length + counts[y], tall, to);
    }
  }
  return { width, height, data: tall };
}

/**
 * `PIL.Image.resize`: the filter widens when it shrinks (antialias), in two passes, each rounded to bytes. A side that
 * keeps its length is not touched. Along the rows first; but as in Pillow 13 (12 and before did not), along the columns
 * first where the height loses more than twice what the width does, which rounds some pixels otherwise.
 *
 * @param {RgbImage} image  @param {number} width  @param {number} height
 * @param {"bilinear" | "bicubic" | "nearest"} interpolation  @returns {RgbImage}
 */
export function resize(image, width, height, interpolation) {
  if (width === image.width && height === image.height) return image;
  if (interpolation === "nearest") return resizeNearest(image, width, height);
  const filter = FILTERS[interpolation];
  if (height === image.height) return resizeColumns(image, width, filter);
  if (width === image.width) return resizeRows(image, height, filter);
  const lost = image.height - height;
  if (lost > 0 && lost > 2 * (image.width - width))
    return resizeColumns(resizeRows(image, height, filter), width, filter);
  return resizeRows(resizeColumns(image, width, filter), height, filter);
}
