/** A photograph, decoded by the browser. */

import { InputError, MAX_IMAGE_PIXELS } from "./preprocess.js";

/**
 * To RGB, upright, without conversion of colours.
 *
 * @param {Blob} file  @returns {Promise<{image: import("./preprocess.js").RgbImage, transparent: boolean}>}
 * transparent: a canvas stores colours multiplied by their opacity, so that those under transparent pixels are lost
 * @throws {InputError} not an image, or more than 100 megapixels
 */
export async function decodePhoto(file) {
  const name = file.name ?? "image";
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, options);
  } catch {
    throw new InputError(`${name}: not an image that this browser can read`, "choose a JPEG, PNG or WebP file");
  }
  const { width, height } = bitmap;
  if (width * height > MAX_IMAGE_PIXELS) {
    bitmap.close();
    throw new InputError(
      `${name}: ${width}x${height} px, expected at most ${MAX_IMAGE_PIXELS} pixels`,
      "shrink the image",
    );
  }
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data: rgba } = context.getImageData(0, 0, width, height);
  const data = new Uint8Array(width * height * 3);
  let transparent = false;
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    data[to] = rgba[from];
    data[to + 1] = rgba[from + 1];
    data[to + 2] = rgba[from + 2];
    transparent ||= rgba[from + 3] !== 255;
  }
  return { image: { width, height, data }, transparent };
}
