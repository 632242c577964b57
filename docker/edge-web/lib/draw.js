/** A photograph with its boxes, on a canvas. */

/** Longer side of the canvas: enough for a screen, and little memory for a photograph of 100 megapixels. */
const MAX_SIDE_PX = 1600;
/** Of the circle of hues: neighbouring classes lie far apart, however many there are. */
const GOLDEN_ANGLE = 0.618034 * 360;

/**
 * @param {HTMLCanvasElement} canvas  @param {import("./preprocess.js").RgbImage} image
 * @param {(import("./detect.js").Box & {label: string})[]} boxes in pixels of the image, best first
 */
export function drawBoxes(canvas, image, boxes) {
  const scale = Math.min(1, MAX_SIDE_PX / Math.max(image.width, image.height));
  canvas.width = Math.max(1, Math.round(image.width * scale));
  canvas.height = Math.max(1, Math.round(image.height * scale));
  const context = canvas.getContext("2d");
  context.drawImage(picture(image), 0, 0, canvas.width, canvas.height);
  const line = Math.max(2, Math.round(0.004 * Math.min(canvas.width, canvas.height)));
  const text = Math.max(12, Math.round(0.03 * Math.min(canvas.width, canvas.height)));
  Object.assign(context, { lineWidth: line, font: `${text}px system-ui, sans-serif`, textBaseline: "top" });
  for (const { left, top, right, bottom, label, score, index } of [...boxes].reverse()) {
    const colour = `hsl(${Math.round((index * GOLDEN_ANGLE) % 360)} 90% 45%)`;
    const [x, y] = [left * scale, top * scale];
    context.strokeStyle = colour;
    context.strokeRect(x, y, (right - left) * scale, (bottom - top) * scale);
    const name = `${label} ${score.toFixed(2)}`;
    const above = y >= text + line ? y - text - line : y; // within the box where there is no room above
    context.fillStyle = colour;
    context.fillRect(x - line / 2, above, context.measureText(name).width + 2 * line, text + line);
    context.fillStyle = "#fff";
    context.fillText(name, x + line / 2, above + line / 2);
  }
}

function picture({ width, height, data }) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const rgba = new ImageData(width, height);
  for (let from = 0, to = 0; from < data.length; from += 3, to += 4) {
    rgba.data.set(data.subarray(from, from + 3), to);
    rgba.data[to + 3] = 255;
  }
  canvas.getContext("2d").putImageData(rgba, 0, 0);
  return canvas;
}
