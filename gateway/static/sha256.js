// A worker: the SHA-256 of a file, of any length. Browsers hash only what is whole in memory,
// and that not on every page.
"use strict";

const STEP_BYTES = 4 * 1024 * 1024; // a multiple of a block

// The first 32 bits of the fractional parts of the cube and square roots of the first primes
// (FIPS 180-4): computed, since 72 numbers are easily mistyped.
const [ROUND, START] = (() => {
  const primes = [];
  for (let n = 2; primes.length < 64; n++) if (primes.every((p) => n % p)) primes.push(n);
  const fraction = (power) => (p) => ((p ** power % 1) * 2 ** 32) | 0;
  return [primes.map(fraction(1 / 3)), primes.slice(0, 8).map(fraction(1 / 2))];
})();

function digest(state, bytes, length) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, length);
  const w = new Int32Array(64);
  for (let at = 0; at < length; at += 64) {
    for (let i = 0; i < 16; i++) w[i] = view.getInt32(at + i * 4);
    for (let i = 16; i < 64; i++) {
      const x = w[i - 15];
      const y = w[i - 2];
      const s0 = ((x >>> 7) | (x << 25)) ^ ((x >>> 18) | (x << 14)) ^ (x >>> 3);
      const s1 = ((y >>> 17) | (y << 15)) ^ ((y >>> 19) | (y << 13)) ^ (y >>> 10);
      w[i] = (w[i - 16] + s0 + w[i - 7] + s1) | 0;
    }
    let [a, b, c, d, e, f, g, h] = state;
    for (let i = 0; i < 64; i++) {
      const s1 = ((e >>> 6) | (e << 26)) ^ ((e >>> 11) | (e << 21)) ^ ((e >>> 25) | (e << 7));
      const t1 = (h + s1 + ((e & f) ^ (~e & g)) + ROUND[i] + w[i]) | 0;
      const s0 = ((a >>> 2) | (a << 30)) ^ ((a >>> 13) | (a << 19)) ^ ((a >>> 22) | (a << 10));
      const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      h = g;
      g = f;
      f = e;
      e = (d + t1) | 0;
      d = c;
      c = b;
      b = a;
      a = (t1 + t2) | 0;
    }
    state[0] += a;
    state[1] += b;
    state[2] += c;
    state[3] += d;
    state[4] += e;
    state[5] += f;
    state[6] += g;
    state[7] += h;
  }
}

/** The last block or two: what is left, a one bit, zeros, the length in bits. */
function ending(rest, size) {
  const bytes = new Uint8Array(rest.length < 56 ? 64 : 128);
  bytes.set(rest);
  bytes[rest.length] = 0x80;
  const view = new DataView(bytes.buffer);
  view.setUint32(bytes.length - 8, Math.floor(size / 2 ** 29));
  view.setUint32(bytes.length - 4, (size * 8) >>> 0);
  return bytes;
}

onmessage = async ({ data: file }) => {
  try {
    const state = new Int32Array(START);
    let rest = new Uint8Array(0);
    for (let at = 0; at < file.size; at += STEP_BYTES) {
      const bytes = new Uint8Array(await file.slice(at, at + STEP_BYTES).arrayBuffer());
      const whole = bytes.length - (bytes.length % 64);
      digest(state, bytes, whole);
      rest = bytes.subarray(whole); // not empty in the last step only
    }
    const last = ending(rest, file.size);
    digest(state, last, last.length);
    postMessage([...new Uint32Array(state)].map((n) => n.toString(16).padStart(8, "0")).join(""));
  } catch {
    postMessage(null);
  }
};
