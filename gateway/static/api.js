// Talking to the server. Addresses are relative to the page, whatever prefix a proxy adds.

export const token = document.documentElement.dataset.token;
const base = new URL(`../api/v1/uploads/${token}/`, location.href);

// Without a byte leaving for so long the connection is taken for dead: networks of phones
// change without a word.
const QUIET_MS = 45_000;
// After the last byte the server copies and syncs; of a large file that takes minutes.
const ANSWER_MS = 20 * 60_000;
const NOT_NOW = new Set([408, 423, 425, 429, 502, 503, 504]);

/** No answer, or none now: worth another try after `seconds` (0: the usual pause). */
export class Lost extends Error {
  constructor(seconds = 0) {
    super("lost");
    this.seconds = seconds;
  }
}

/** The person, or the end of the upload, ended this; nothing is to be reported. */
export class Stopped extends Error {}

/** An answer that trying again will not change; `code` is stable. */
export class Problem extends Error {
  constructor(status, body) {
    super(body.code);
    this.status = status;
    this.body = body;
  }
}

export function address(path, query = "") {
  const url = new URL(path, base);
  url.search = query;
  return url;
}

/** The signed URL of a slot as seen from this page: only its query matters, not its host. */
export function signed(path, absolute, extra = {}) {
  const url = address(path, new URL(absolute, location.href).search);
  for (const [name, value] of Object.entries(extra)) url.searchParams.set(name, value);
  return url;
}

/** A small request; resolves to {status, body}, rejects with Lost. */
export async function ask(url, method = "GET", headers = {}) {
  let response;
  try {
    response = await fetch(url, { method, headers, cache: "no-store" });
  } catch {
    throw new Lost();
  }
  if (NOT_NOW.has(response.status)) throw new Lost(seconds(response.headers.get("Retry-After")));
  const body = await response.json().catch(() => ({}));
  return { status: response.status, body };
}

/**
 * A request with a body whose progress matters, ended by `control.stop()`.
 * Resolves to {status, body, header(name)}; rejects with Lost or Stopped.
 */
export function transmit(control, method, url, headers, body, progress = () => {}) {
  return new Promise((resolve, reject) => {
    if (control.stopped) return reject(new Stopped());
    const request = new XMLHttpRequest();
    let clock;
    const settle = (act, value) => {
      clearTimeout(clock);
      control.abort = null;
      act(value);
    };
    const wait = (ms) => {
      clearTimeout(clock);
      clock = setTimeout(() => {
        settle(reject, new Lost());
        request.abort();
      }, ms);
    };
    control.abort = () => {
      settle(reject, new Stopped());
      request.abort();
    };
    request.open(method, url);
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.responseType = "json";
    request.upload.onprogress = (event) => {
      wait(QUIET_MS);
      progress(event.loaded);
    };
    request.upload.onload = () => wait(ANSWER_MS);
    request.onerror = () => settle(reject, new Lost());
    request.onload = () => {
      if (NOT_NOW.has(request.status))
        return settle(reject, new Lost(seconds(request.getResponseHeader("Retry-After"))));
      settle(resolve, {
        status: request.status,
        body: request.response ?? {},
        header: (name) => request.getResponseHeader(name),
      });
    };
    wait(body ? QUIET_MS : ANSWER_MS);
    request.send(body);
  });
}

/** What stops one transfer: made anew for each. */
export class Control {
  stopped = false;
  abort = null;

  stop() {
    this.stopped = true;
    this.abort?.();
  }
}

function seconds(text) {
  const count = Number(text);
  return count > 0 && count < 3600 ? count : 0;
}
