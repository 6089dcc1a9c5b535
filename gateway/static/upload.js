// The upload page: fills slots by their signed URLs, then completes the upload.
//
// A row is one file. Its states: waiting -> sending -> saved | failed. Only `saved` rows are
// in a slot of the server; a row keeps its slot's index from its choice to its removal.
"use strict";

const PARALLEL = 3; // more gain nothing on one connection and make every bar crawl

const TEXT = {
  waiting: "Waiting",
  sending: (sent, size) => `${sent} of ${size}`,
  checking: "Storing…",
  saved: (size) => `${size} · stored`,
  remove: "Remove",
  removeNamed: (name) => `Remove ${name}`,
  again: "Try again",
  againNamed: (name) => `Try ${name} again`,
  overallSending: (count) => (count === 1 ? "Uploading 1 file…" : `Uploading ${count} files…`),
  overallSaved: (count, most) =>
    count === most ? "All files are stored." :
      `${count} of ${most} ${most === 1 ? "file" : "files"} stored. Add more, or press Done.`,
  overallNone: "Nothing is stored yet.",
  overallFailed: (count) =>
    count === 1 ? "1 file needs your attention." : `${count} files need your attention.`,
  refused: "Some files cannot be accepted. Please remove them; you may then choose others.",
  completing: "Checking the files…",
  stored: (name) => `${name} is stored.`,
  removed: (name) => `${name} was removed.`,
  refusedType: (name, types) => `“${name}” was not added: only ${types} can be sent here.`,
  refusedSize: (name, size, limit) =>
    `“${name}” was not added: it has ${size}, and at most ${limit} are allowed.`,
  refusedCount: (name, most) =>
    `“${name}” was not added: ${most === 1 ? "only 1 file is" : `at most ${most} files are`} wanted.`,
  refusedFolder: (name) => `“${name}” is a folder. Please choose the files in it.`,
  closed: {
    completed: ["Thank you, the files have arrived", "This is what was received. You can close this page."],
    cancelled: ["This request was cancelled", "No files are wanted any more. If that surprises you, ask whoever sent you the link."],
    expired: ["This link has expired", "Its time is over, and no files were sent. Ask whoever sent it to you for a new one."],
    missing: ["This link leads nowhere", "It is not known here any more. Ask whoever sent it to you for a new one."],
  },
  onward: (host) => `Continue to ${host}`,
  offline: "The connection was lost. What is stored stays stored.",
  problems: {
    too_large: "It is larger than allowed.",
    store_full: "The server has no room for it now. Please try later.",
    invalid_name: (problem) => `Its name cannot be used: it ${problem.reason}. Please rename it.`,
    body_too_slow: "The connection was too slow.",
    digest_mismatch: "It changed on its way. Please try again.",
    size_mismatch: "It did not arrive whole. Please try again.",
    body_truncated: "It did not arrive whole. Please try again.",
    unknown: "The server could not store it. Please try again.",
  },
};

const token = document.documentElement.dataset.token;
const api = new URL(`../api/v1/uploads/${token}/`, location.href);
const at = (id) => document.getElementById(id);
const rows = [];
let info = null;
let completing = false;
let finished = false;

// --- talking to the server

async function ask(path, method = "GET") {
  let response;
  try {
    response = await fetch(new URL(path, api), { method, cache: "no-store" });
  } catch {
    return { status: 0, body: { code: "offline" } };
  }
  const body = await response.json().catch(() => ({}));
  return { status: response.status, body };
}

/** Fetch the state and fresh signed URLs; false when the page cannot go on. */
async function refresh() {
  const { status, body } = await ask("info");
  if (status === 404) return close("missing");
  if (status !== 200) {
    notify([TEXT.offline]);
    return false;
  }
  info = body;
  return info.status === "pending" ? true : close(info.status, info);
}

/** The signed URL of a slot as seen from this page: only its query matters, not its host. */
function signed(path, absolute, extra = {}) {
  const url = new URL(path, api);
  url.search = new URL(absolute, location.href).search;
  for (const [name, value] of Object.entries(extra)) url.searchParams.set(name, value);
  return url;
}

// --- choosing

function choose(chosen) {
  const refusals = [];
  for (const file of chosen) {
    const index = freeIndex();
    const types = info.allowed_types;
    if (index === null) refusals.push(TEXT.refusedCount(file.name, info.max_files));
    else if (!typeFits(file.name, types))
      refusals.push(TEXT.refusedType(file.name, types.map((t) => t.toUpperCase()).join(", ")));
    else if (info.max_size_bytes && file.size > info.max_size_bytes)
      refusals.push(TEXT.refusedSize(file.name, inWords(file.size), inWords(info.max_size_bytes)));
    else addRow({ index, file, name: file.name, size: file.size, state: "waiting", sent: 0 });
  }
  notify(refusals);
  pump();
}

function freeIndex() {
  const used = new Set(rows.map((row) => row.index));
  for (let index = 0; index < info.max_files; index++) if (!used.has(index)) return index;
  return null;
}

/** A first look at the name, to spare a long upload; the server judges by the content. */
function typeFits(name, types) {
  const same = { jpeg: "jpg", tiff: "tif", htm: "html" };
  const plain = (text) => same[text] || text;
  const dot = name.lastIndexOf(".");
  if (!types.length || dot < 0) return true;
  const extension = plain(name.slice(dot + 1).toLowerCase());
  return types.some((type) => plain(type.toLowerCase().replace(/^\./, "")) === extension);
}

// --- sending

function pump() {
  for (const row of rows) {
    if (rows.filter((other) => other.state === "sending").length >= PARALLEL) break;
    if (row.state === "waiting") send(row);
  }
  show();
}

function send(row, again = false) {
  const request = new XMLHttpRequest();
  row.state = "sending";
  row.sent = 0;
  row.request = request;
  request.open("PUT", signed(`files/${row.index}`, info.presigned_urls[row.index], { filename: row.name }));
  request.setRequestHeader("Content-Type", row.file.type || "application/octet-stream");
  request.responseType = "json";
  request.upload.onprogress = (event) => {
    row.sent = event.loaded;
    show();
  };
  request.onload = () => answered(row, request.status, request.response || {}, again);
  request.onerror = () => fail(row, TEXT.offline);
  request.send(row.file);
}

async function answered(row, status, body, again) {
  if (status === 200) {
    row.state = "saved";
    row.size = body.size_bytes;
    if (row.removing) return remove(row);
    say(TEXT.stored(row.name));
    pump();
    return completeWhenFull();
  }
  if (status === 409 || status === 404) {
    if (!(await refresh())) return;
  } else if (status === 410 && !again && (await refresh())) {
    return send(row, true);
  }
  fail(row, words(body));
}

function words(problem) {
  const text = TEXT.problems[problem.code] || TEXT.problems.unknown;
  return typeof text === "function" ? text(problem) : text;
}

function fail(row, reason) {
  row.state = "failed";
  row.reason = reason;
  say(`${row.name}: ${reason}`);
  pump();
}

// --- removing

async function remove(row) {
  if (row.state === "sending") {
    if (row.sent >= row.size) {
      row.removing = true; // all of it is there: the answer decides, then it is removed
      return show();
    }
    row.request.abort();
  } else if (row.state === "saved" || row.inSlot) {
    if (!(await refresh())) return;
    const held = info.files.find((file) => file.index === row.index);
    if (held) {
      const { status, body } = await ask(signed(`files/${row.index}`, held.delete_url), "DELETE");
      if (status !== 204) return status === 409 ? refresh() : notify([words(body)]);
    }
  }
  const place = rows.indexOf(row);
  rows.splice(place, 1);
  row.item.remove();
  say(TEXT.removed(row.name));
  (rows[Math.min(place, rows.length - 1)]?.item.querySelector(".remove") || at("picker")).focus();
  notify([]);
  pump();
}

// --- completing

function completeWhenFull() {
  const saved = rows.filter((row) => row.state === "saved");
  if (saved.length === info.max_files) complete();
}

async function complete() {
  if (completing || finished) return;
  completing = true;
  show();
  const { status, body } = await ask("complete", "POST");
  completing = false;
  if (status === 200) return close("completed", body);
  if (status === 409) {
    if (body.files) return close("completed", body);
    await refresh();
  } else if (body.code === "files_refused") {
    for (const { index, reason } of body.reasons) {
      const row = rows.find((other) => other.index === index);
      if (row) Object.assign(row, { state: "failed", reason, inSlot: true });
    }
    notify([TEXT.refused]);
  } else {
    notify([status === 0 ? TEXT.offline : words(body)]);
  }
  show();
}

/** Show how the upload ended; always false, for `refresh` to pass on. */
function close(state, ended = {}) {
  if (finished) return false;
  finished = true;
  for (const row of rows) row.request?.abort();
  const [verdict, meaning] = TEXT.closed[state] || TEXT.closed.missing;
  at("open").hidden = true;
  document.querySelector(".facts")?.remove();
  document.querySelector(".seal").toggleAttribute("hidden", state !== "completed");
  at("verdict").textContent = verdict;
  at("meaning").textContent = meaning;
  at("receipt").replaceChildren(...(ended.files || []).map(receiptItem));
  if (state === "completed") showOnward(info?.redirect_url);
  at("closed").hidden = false;
  at("closed").focus();
  return false;
}

function receiptItem(file) {
  const item = document.createElement("li");
  const name = make("span", "name", file.filename);
  const size = make("span", "size", ` ${inWords(file.size_bytes)}`);
  item.append(name, size, make("code", "", `SHA-256 ${file.checksum_sha256}`));
  return item;
}

function showOnward(address) {
  if (!address) return;
  const url = new URL(address);
  if (url.protocol !== "https:" && url.protocol !== "http:") return;
  at("onward").href = url.href;
  at("onward").textContent = TEXT.onward(url.host);
  at("onward").hidden = false;
}

// --- showing

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}

function addRow(row) {
  const item = document.createElement("li");
  row.bar = Object.assign(document.createElement("progress"), { max: 1, value: 0 });
  row.bar.setAttribute("aria-label", row.name);
  row.text = make("span", "state", "");
  row.retry = make("button", "again", TEXT.again);
  row.retry.type = "button";
  row.retry.setAttribute("aria-label", TEXT.againNamed(row.name));
  row.retry.onclick = () => {
    row.state = "waiting";
    pump();
  };
  const away = make("button", "remove", TEXT.remove);
  away.type = "button";
  away.setAttribute("aria-label", TEXT.removeNamed(row.name));
  away.onclick = () => remove(row);
  const acts = make("span", "acts", "");
  acts.append(row.retry, away);
  item.append(make("span", "name", row.name), row.text, acts, row.bar);
  row.item = item;
  rows.push(row);
  at("files").append(item);
}

function show() {
  for (const row of rows) {
    row.item.className = row.state;
    row.bar.hidden = row.state !== "sending" && row.state !== "waiting";
    row.bar.value = row.size ? Math.min(1, row.sent / row.size) : 0;
    row.retry.hidden = row.state !== "failed" || !row.file || Boolean(row.inSlot);
    row.text.textContent = rowText(row);
  }
  const inState = (state) => rows.filter((row) => row.state === state);
  const busy = inState("sending").length + inState("waiting").length;
  const saved = inState("saved").length;
  const failed = inState("failed").length;
  at("bar").hidden = rows.length === 0;
  at("drop").classList.toggle("full", freeIndex() === null);
  at("done").disabled = completing || busy > 0 || saved === 0 || failed > 0;
  at("overall").textContent = completing ? TEXT.completing :
    busy ? TEXT.overallSending(busy) :
    failed ? TEXT.overallFailed(failed) :
    saved ? TEXT.overallSaved(saved, info.max_files) : TEXT.overallNone;
  const all = rows.reduce((sum, row) => sum + row.size, 0);
  const sent = rows.reduce((sum, row) => sum + (row.state === "saved" ? row.size : row.sent), 0);
  at("total").hidden = busy === 0;
  at("total").value = all ? Math.min(1, sent / all) : 0;
}

function rowText(row) {
  if (row.state === "waiting") return TEXT.waiting;
  if (row.state === "saved") return TEXT.saved(inWords(row.size));
  if (row.state === "failed") return row.reason;
  return row.sent >= row.size ? TEXT.checking : TEXT.sending(inWords(row.sent), inWords(row.size));
}

function notify(lines) {
  at("notice").replaceChildren(...lines.map((line) => make("p", "", line)));
  at("notice").hidden = lines.length === 0;
}

function say(line) {
  at("said").textContent = line;
}

function inWords(bytes) {
  const units = ["bytes", "KB", "MB", "GB", "TB"];
  let step = 0;
  let amount = bytes;
  for (; amount >= 1024 && step < units.length - 1; step++) amount /= 1024;
  return `${step ? amount.toFixed(1).replace(/\.0$/, "") : bytes} ${units[step]}`;
}

// --- starting

function listen() {
  const picker = at("picker");
  picker.onchange = () => {
    choose([...picker.files]);
    picker.value = ""; // choosing the same file again must be noticed
  };
  at("done").onclick = complete;
  let depth = 0; // enter and leave come for every element under the pointer
  const over = (change) => (event) => {
    event.preventDefault();
    depth = change === null ? 0 : Math.max(0, depth + change);
    at("drop").classList.toggle("over", depth > 0);
  };
  window.addEventListener("dragenter", over(1));
  window.addEventListener("dragleave", over(-1));
  window.addEventListener("dragover", (event) => event.preventDefault());
  window.addEventListener("drop", (event) => {
    over(null)(event);
    if (!finished) drop(event.dataTransfer);
  });
  window.addEventListener("beforeunload", (event) => {
    if (rows.some((row) => row.state === "sending" || row.state === "waiting")) event.preventDefault();
  });
}

function drop(transfer) {
  const folders = [];
  const chosen = [];
  for (const item of transfer.items) {
    if (item.kind !== "file") continue;
    const entry = item.webkitGetAsEntry?.();
    if (entry?.isDirectory) folders.push(entry.name);
    else chosen.push(item.getAsFile());
  }
  choose(chosen);
  if (folders.length) {
    for (const name of folders) at("notice").append(make("p", "", TEXT.refusedFolder(name)));
    at("notice").hidden = false;
  }
}

async function start() {
  const until = at("until");
  if (until) {
    const form = { dateStyle: "medium", timeStyle: "short" };
    until.textContent = new Date(until.dateTime).toLocaleString(undefined, form);
  }
  if (!(await refresh())) return;
  if (info.allowed_types.length)
    at("picker").accept = info.allowed_types.map((type) => `.${type.replace(/^\./, "")}`).join(",");
  for (const held of info.files)
    addRow({ index: held.index, name: held.filename, size: held.size_bytes, state: "saved", sent: 0 });
  at("open").hidden = false;
  listen();
  show();
}

start();
