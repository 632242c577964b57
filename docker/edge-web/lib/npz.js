/** numpy's .npz: a zip file of .npy arrays. Node.js and browsers inflate in ways of their own: one is passed in. */

import { InputError } from "./preprocess.js";

/** As cspdeploy bounds it: no golden file unpacks to more. */
const MAX_BYTES = 2 ** 30;
const END_OF_DIRECTORY = 0x06054b50;
const DIRECTORY_ENTRY = 0x02014b50;
const END_BYTES = 22;
const ENTRY_BYTES = 46;
const STORED = 0;
const DEFLATED = 8;

const DTYPES = { "|u1": Uint8Array, "<f4": Float32Array, "<f8": Float64Array, "<i8": BigInt64Array };

/**
 * @param {Uint8Array} file  @param {string} name as errors call it
 * @param {(packed: Uint8Array, size: number) => Promise<Uint8Array>} inflate raw deflate; refuses more than `size` bytes
 * @returns {Promise<Map<string, {shape: number[], data: Uint8Array | Float32Array | Float64Array | BigInt64Array}>>}
 * @throws {InputError} not such a file, corrupt, or too large
 */
export async function readNpz(file, name, inflate) {
  try {
    const arrays = new Map();
    for (const [entry, bytes] of await unpackAll(file, inflate))
      arrays.set(entry.replace(/\.npy$/, ""), readNpy(bytes));
    return arrays;
  } catch (error) {
    throw new InputError(`${name}: not a golden file (${error.message})`, "copy the whole bundle again");
  }
}

function view(bytes) {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

function text(bytes, start, end) {
  return String.fromCharCode(...bytes.subarray(start, end));
}

async function unpackAll(file, inflate) {
  const zip = view(file);
  let end = file.length - END_BYTES;
  while (end >= 0 && zip.getUint32(end, true) !== END_OF_DIRECTORY) end--;
  if (end < 0) throw new Error("no zip directory");
  const count = zip.getUint16(end + 10, true);
  let at = zip.getUint32(end + 16, true);
  let room = MAX_BYTES;
  const found = [];
  for (let i = 0; i < count; i++) {
    if (zip.getUint32(at, true) !== DIRECTORY_ENTRY) throw new Error("broken zip directory");
    const [nameLength, extraLength, noteLength] = [28, 30, 32].map((field) => zip.getUint16(at + field, true));
    const bytes = await unpack(file, at, room, inflate);
    room -= bytes.length;
    found.push([text(file, at + ENTRY_BYTES, at + ENTRY_BYTES + nameLength), bytes]);
    at += ENTRY_BYTES + nameLength + extraLength + noteLength;
  }
  return found;
}

/** One member. What its header says of its size bounds it, and is not believed beyond that. */
async function unpack(file, at, room, inflate) {
  const zip = view(file);
  const method = zip.getUint16(at + 10, true);
  const [packed, size, header] = [20, 24, 42].map((field) => zip.getUint32(at + field, true));
  if (size > room) throw new Error(`unpacks to more than ${MAX_BYTES} bytes`);
  if (method !== STORED && method !== DEFLATED) throw new Error(`compression method ${method}`);
  const start = header + 30 + zip.getUint16(header + 26, true) + zip.getUint16(header + 28, true);
  const raw = file.subarray(start, start + packed);
  const bytes = method === STORED ? raw : await inflate(raw, size);
  if (bytes.length !== size) throw new Error("truncated");
  return bytes;
}

function readNpy(bytes) {
  if (text(bytes, 0, 6) !== "\x93NUMPY") throw new Error("a member is no array");
  const start = bytes[6] === 1 ? 10 : 12;
  const length = bytes[6] === 1 ? view(bytes).getUint16(8, true) : view(bytes).getUint32(8, true);
  const header = text(bytes, start, start + length);
  const [, dtype] = /'descr': '([^']*)'/.exec(header) ?? [];
  const [, sides] = /'shape': \(([^)]*)\)/.exec(header) ?? [];
  const Type = DTYPES[dtype];
  if (!Type || sides === undefined || !/'fortran_order': False/.test(header))
    throw new Error(`array header ${header.trim()}`);
  const shape = sides
    .split(",")
    .filter((side) => side.trim())
    .map(Number);
  const data = bytes.subarray(start + length);
  const count = shape.reduce((a, b) => a * b, 1);
  if (data.length !== count * Type.BYTES_PER_ELEMENT) throw new Error("an array's size is not that of its header");
  return { shape, data: new Type(Uint8Array.from(data).buffer) }; // copied: typed arrays must be aligned
}
