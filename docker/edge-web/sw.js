/** Service worker: the page and its model from the server where it answers, and as they were last seen where not. */

const CACHE = "cspdeploy-page"; // app.js puts into it what was loaded before this worker was there

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method === "GET" && new URL(request.url).origin === self.location.origin)
    event.respondWith(fromServerOrCache(event));
});

async function fromServerOrCache(event) {
  const { request } = event;
  const key = request.url.split(/[?#]/)[0]; // ?artifact= chooses in the page
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    // Hashes of the model are checked in the page, whoever it comes from.
    if (response.ok) event.waitUntil(cache.put(key, response.clone()).catch(() => {}));
    return response;
  } catch (error) {
    const kept = await cache.match(key);
    if (kept) return kept;
    throw error;
  }
}
