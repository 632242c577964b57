/** Image files to RGB, upright, as cspdeploy decodes them with Pillow. */

import { readFileSync } from "node:fs";

import { InputError, MAX_IMAGE_PIXELS } from "../edge-web/lib/preprocess.js";

/** No others: an SVG or a PDF is a program, not a picture. */
const FORMATS = new Set(["gif", "jpeg", "png", "tiff", "webp"]);

/**
 * First frame, EXIF rotation applied, grey replicated to three channels, transparency dropped (the colour under it
 * stays), colour profiles ignored, 16 bits cut to 8.
 *
 * @param {string} path  @returns {Promise<import("../edge-web/lib/preprocess.js").RgbImage>}
 * @throws {InputError} no such file, not an image, truncated, more than 100 megapixels
 */
export async function decodeImage(path) {
  const bytes = readBytes(path);
  const { default: sharp } = await import("sharp");
  const refuse = (why) => new InputError(`${path}: ${why}`, `name an image file: ${[...FORMATS].join(", ")}`);
  // ignoreIcc: Pillow does not convert colours either. failOn: a truncated file is refused, not filled with grey.
  const image = sharp(bytes, { failOn: "truncated", ignoreIcc: true, limitInputPixels: MAX_IMAGE_PIXELS, pages: 1 });
  let format;
  let space;
  try {
    ({ format, space } = await image.metadata());
  } catch (error) {
    throw refuse(
      /pixel limit/.test(error.message) ? `more than ${MAX_IMAGE_PIXELS} pixels` : "not an image that libvips can read",
    );
  }
  if (!FORMATS.has(format)) throw refuse(`a file of format ${format}`);
  // libvips goes through colour profiles where Pillow multiplies: 19 steps apart in the mean.
  if (space === "cmyk") throw refuse("CMYK colours, expected RGB or grey");
  try {
    const { data, info } = await image
      .rotate()
      .removeAlpha()
      .toColourspace("srgb")
      .raw()
      .toBuffer({ resolveWithObject: true });
    return { width: info.width, height: info.height, data: info.channels === 3 ? data : replicate(data, info) };
  } catch (error) {
    throw refuse(`broken image (${error.message.split("\n")[0]})`);
  }
}

function readBytes(path) {
  try {
    const bytes = readFileSync(path);
    if (bytes.length) return bytes;
  } catch (error) {
    throw new InputError(`${path}: ${error.code === "ENOENT" ? "no such file" : error.code}`, "name an image file");
  }
  throw new InputError(`${path}: empty file (0 bytes), expected an image`, "name an image file");
}

function replicate(data, { width, height, channels }) {
  const rgb = new Uint8Array(width * height * 3);
  for (let i = 0; i < width * height; i++) rgb.fill(data[i * channels], i * 3, i * 3 + 3);
  return rgb;
}
