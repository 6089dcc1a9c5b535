// What this browser remembers of files on their way, so that the same file is known again
// after a reload: identifier of the upload -> {name, size, modified}.
import { token } from "./api.js";

const KEY = `blobcask:${token}`;

function load() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    return {}; // no storage in this mode of the browser, or not ours
  }
}

function store(known) {
  try {
    if (Object.keys(known).length) localStorage.setItem(KEY, JSON.stringify(known));
    else localStorage.removeItem(KEY);
  } catch {
    // Without it the name and the size must do, and the content is compared at the end.
  }
}

export function remember(id, file) {
  store({ ...load(), [id]: { name: file.name, size: file.size, modified: file.lastModified } });
}

export function recall(id) {
  return load()[id] ?? null;
}

export function forget(id) {
  const known = load();
  delete known[id];
  store(known);
}

export function forgetAll() {
  store({});
}
