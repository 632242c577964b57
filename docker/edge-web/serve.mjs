#!/usr/bin/env node
/** A folder on http://127.0.0.1, with the headers and types that the page needs. `node serve.mjs [dist] [port]` */

import { createReadStream, statSync } from "node:fs";
import { createServer } from "node:http";
import { extname, join, resolve, sep } from "node:path";

const TYPES = {
  ".css": "text/css",
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript",
  ".json": "application/json",
  ".mjs": "text/javascript",
  ".svg": "image/svg+xml",
  ".wasm": "application/wasm",
};
// Only a page that is isolated in this way is given threads.
const HEADERS = {
  "Cache-Control": "no-cache",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Opener-Policy": "same-origin",
  "X-Content-Type-Options": "nosniff",
};

const [folder = "dist", port = "8080"] = process.argv.slice(2);
const root = resolve(folder);

function refuse(message, fix) {
  process.stderr.write(`error: ${message}\nfix: ${fix}\n`);
  process.exit(2);
}

if (!/^\d{1,5}$/.test(port) || Number(port) > 65535) refuse(`port ${port}: expected 0 to 65535`, "node serve.mjs dist 8080");
if (!statSync(join(root, "index.html"), { throwIfNoEntry: false })?.isFile())
  refuse(`${folder}: holds no index.html`, "node build.mjs BUNDLE");

/** @returns {string | null} a plain file below the folder */
function locate(url) {
  try {
    const path = decodeURIComponent(new URL(url, "http://localhost").pathname);
    const file = join(root, path.endsWith("/") ? `${path}index.html` : path);
    return file.startsWith(root + sep) && statSync(file).isFile() ? file : null;
  } catch {
    return null;
  }
}

const server = createServer((request, response) => {
  const file = ["GET", "HEAD"].includes(request.method) ? locate(request.url) : null;
  if (!file) {
    response.writeHead(404, HEADERS).end("not found\n");
    return;
  }
  response.writeHead(200, {
    ...HEADERS,
    "Content-Type": TYPES[extname(file)] ?? "application/octet-stream",
    "Content-Length": statSync(file).size,
  });
  if (request.method === "HEAD") response.end();
  else
    createReadStream(file)
      .on("error", () => response.destroy())
      .pipe(response);
});
server.on("error", ({ code }) => refuse(`port ${port}: ${code}`, "name another port: node serve.mjs dist 8081"));
server.listen(Number(port), "127.0.0.1", () => {
  process.stdout.write(`http://127.0.0.1:${server.address().port}/\n`);
});
