// The upload page: fills the slots of an upload, then completes it.
//
// A row is one file in the list. Its states:
//   waiting -> sending -> (checking ->) saved
//   sending -> retrying -> sending      the connection was lost; goes on by itself
//   waiting | sending -> paused -> waiting
//   unfinished -> waiting               begun earlier or elsewhere; the file must be chosen
//   any -> failed                       with a reason; `refused` ones lie in their slot
// Large files, and whatever was interrupted, go by tus; small ones by one PUT into a slot that
// must be free. What the server tells (`info`) is the truth; rows are brought in line with it.
import { address, ask, Control, Lost, Problem, signed, Stopped, transmit } from "./api.js";
import * as choosing from "./choosing.js";
import { Line } from "./line.js";
import * as memory from "./memory.js";
import { Pace } from "./pace.js";
import * as tus from "./tus.js";
import * as view from "./view.js";
import { Windows } from "./windows.js";
import * as words from "./words.js";
import { say } from "./words.js";

const PARALLEL = 3; // more gain nothing on one connection and make every bar crawl
const SMALL_BYTES = 8 * 1024 * 1024; // what is sent anew rather than taken up again
const LOSSES_MAX = 8; // in a row without a byte of progress, while the server answers others
const RESTARTS_MAX = 3;
const WATCHED_EVERY_MS = 4000;
const COUNTDOWN_S = 5; // to notice a wrong file; nothing can be taken back afterwards

const at = (id) => document.getElementById(id);
const rows = [];
const emptied = new Map(); // index of a slot -> when this window emptied it
const pace = new Pace();
const line = new Line(refresh, () => show());
const windows = new Windows(
  () => inState("sending", "retrying").filter((row) => row.partialId).map((row) => [row.partialId, row.sent]),
  () => quietly(refresh()),
);
let info = null;
let completing = false;
let finished = false;
let wanted = null; // the unfinished row whose file is being looked for
let countdown = null; // {left, timer} while the page is about to complete by itself

const inState = (...states) => rows.filter((row) => states.includes(row.state));
const limit = Number(document.documentElement.dataset.limit);

/** For what needs no result: being closed or offline is shown elsewhere. */
function quietly(promise) {
  promise.catch((error) => {
    if (!(error instanceof Lost || error instanceof Stopped)) throw error;
  });
}

// --- the state of the server

/** Fetch it; rejects with Lost, and with Stopped when the upload is over. */
async function refresh() {
  const asked = performance.now();
  const { status, body } = await ask(address("info"));
  if (finished) throw new Stopped();
  if (status !== 200 || body.status !== "pending") {
    await close();
    throw new Stopped();
  }
  info = body;
  mergeFiles(asked);
  mergePartials(asked);
  if (!isFull()) stopCountdown();
  show();
}

/** `asked`: what happened here since is not in the answer yet. */
function mergeFiles(asked) {
  for (const held of info.files) {
    if (emptied.get(held.index) > asked) continue;
    const inSlot = rows.find((row) => row.index === held.index && settled(row));
    if (inSlot && inSlot.name === held.filename) Object.assign(inSlot, { size: held.size_bytes });
    else if (inSlot) drop(inSlot);
    const row = rows.find((other) => other.index === held.index);
    if (!row) add({ index: held.index, name: held.filename, size: held.size_bytes, state: "saved" });
    else if (finishedElsewhere(row, held)) stored(row);
  }
  const filled = new Set(info.files.map((held) => held.index));
  for (const row of rows.filter(settled))
    if (!filled.has(row.index) && !(row.savedAt > asked)) drop(row); // by another window
}

const settled = (row) => row.state === "saved" || row.refused;

/** Whether the slot holds what this window only watches. */
const finishedElsewhere = (row, held) => row.state === "unfinished" && alike(row, held);
const alike = (row, held) => row.name === held.filename && row.size === held.size_bytes;

function mergePartials(asked) {
  for (const held of info.partials) {
    const row = rows.find((other) => other.partialId === held.partial_id);
    if (!row) {
      if (emptied.get(held.index) > asked) continue;
      const { partial_id: partialId, index, filename: name, size_bytes: size, offset_bytes: sent } = held;
      add({ partialId, index, name, size, sent, state: "unfinished" });
    } else if (row.state === "unfinished" || row.state === "paused") {
      Object.assign(row, { index: held.index, sent: held.offset_bytes });
    }
  }
  const present = new Set(info.partials.map((held) => held.partial_id));
  for (const row of inState("unfinished")) if (!present.has(row.partialId)) drop(row);
}

/** The first slot that nobody fills or waits for; null when there is none. */
function freeIndex() {
  const taken = new Set([...info.files, ...info.partials].map((held) => held.index));
  for (const row of rows) taken.add(row.index);
  for (let index = 0; index < info.max_files; index++) if (!taken.has(index)) return index;
  return null;
}

/** Give a row a slot, the one it had if that is still free. Slots are in the order of the list. */
async function choosePlace(row) {
  const others = () => [...info.files, ...info.partials].some((held) => held.index === row.index);
  if (row.index !== null && !others()) return;
  row.index = freeIndex();
  if (row.index !== null) return;
  await refresh(); // what is known may be old
  row.index = freeIndex();
  if (row.index === null) throw new Problem(409, { code: "slots_taken" });
}

// --- choosing

function choose(files, notices) {
  const sought = wanted;
  wanted = null;
  if (!files.length && !notices.length) return;
  stopCountdown();
  let added = [];
  for (const file of files) {
    const row = begunBefore(file, notices) ?? fresh(file, notices);
    if (row) added.push(row);
  }
  if (sought && added.length && !added.includes(sought))
    notices.push(say("choose.other_file", { name: sought.name, size: words.size(sought.size) }));
  view.notify(notices);
  if (added.length) view.tell(say("said.started", { count: added.length, name: added[0].name }));
  pump();
}

/** The unfinished row that this file goes on with, if there is one. */
function begunBefore(file, notices) {
  const row = inState("unfinished").find(
    (each) =>
      each.name === file.name && each.size === file.size && windows.sent(each.partialId) === null,
  );
  if (!row) return null;
  const known = memory.recall(row.partialId);
  if (known && known.modified !== file.lastModified) {
    notices.push(say("choose.changed", { name: file.name }));
    giveUp(row);
  }
  // Another browser began it: only the content can tell that it is the same file.
  Object.assign(row, { file, state: "waiting", unproved: !known });
  return row;
}

function fresh(file, notices) {
  const { name } = file;
  const types = info.allowed_types;
  if (rows.some((row) => row.file && same(row.file, file))) notices.push(say("choose.twice", { name }));
  else if (!typeFits(name, types))
    notices.push(say("choose.type", { name, types: types.map((type) => type.toUpperCase()).join(", ") }));
  else if (limit && file.size > limit)
    notices.push(say("choose.size", { name, size: words.size(file.size), limit: words.size(limit) }));
  else if (rows.length >= info.max_files)
    notices.push(say("choose.too_many", { name, count: info.max_files }));
  else return add({ file, name, size: file.size, state: "waiting" });
  return null;
}

const same = (one, two) =>
  one.name === two.name && one.size === two.size && one.lastModified === two.lastModified;

/** A first look at the name, to spare a long upload; the server judges by the content. */
function typeFits(name, types) {
  const alike = { jpeg: "jpg", tiff: "tif", htm: "html", yml: "yaml" };
  const plain = (text) => alike[text] ?? text;
  const dot = name.lastIndexOf(".");
  if (!types.length || dot < 0) return true;
  const extension = plain(name.slice(dot + 1).toLowerCase());
  return types.some((type) => plain(type) === extension);
}

// --- rows

function add(facts) {
  const row = { index: null, partialId: null, file: null, sent: 0, ...facts };
  Object.assign(row, { reached: row.sent, losses: 0, restarts: 0 });
  view.add(row, { pause, resume: goOn, again: goOn, find, remove });
  rows.push(row);
  return row;
}

function drop(row) {
  const place = rows.indexOf(row);
  if (place < 0) return;
  const focused = row.item.contains(document.activeElement);
  rows.splice(place, 1);
  view.remove(row);
  if (focused) (rows[Math.min(place, rows.length - 1)]?.buttons.remove ?? at("picker")).focus();
}

function fail(row, reason) {
  Object.assign(row, { state: "failed", reason });
  view.tell(say("said.failed", { name: row.name, reason }));
}

function pause(row) {
  row.state = "paused";
  row.control?.stop();
  pace.reset();
  pump();
}

function goOn(row) {
  if (row.state === "retrying") return line.now();
  Object.assign(row, { state: "waiting", losses: 0, restarts: 0 });
  return pump();
}

function holdAll() {
  const busy = inState("sending", "waiting", "retrying");
  view.tell(say(busy.length ? "said.paused" : "said.resumed"));
  for (const row of busy) {
    row.state = "paused";
    row.control?.stop();
  }
  if (!busy.length) for (const row of inState("paused")) row.state = "waiting";
  pace.reset();
  pump();
}

function find(row) {
  wanted = row;
  at("picker").click();
}

// --- sending

function pump() {
  for (const row of rows) {
    if (inState("sending", "checking", "retrying").length >= PARALLEL) break;
    if (row.state === "waiting") send(row);
  }
  show();
}

/** Bring a row into its slot, whatever it takes; ends with it saved, failed or stopped. */
async function send(row) {
  const control = new Control();
  Object.assign(row, { control, state: "sending" });
  for (;;) {
    try {
      await deliver(row);
      if (await proved(row)) return stored(row, true);
    } catch (error) {
      if (row.control !== control || control.stopped || finished) return show();
      const again = await overcome(row, error);
      if (row.control !== control || control.stopped || finished) return show();
      if (row.removing) return removeUnsure(row);
      if (!again) return pump();
      row.state = "sending";
    }
  }
}

async function deliver(row) {
  const { ended } = row;
  row.ended = null;
  await ended;
  if (row.lost && !row.partialId && (await arrivedUnheard(row))) return;
  const whole = row.size <= SMALL_BYTES && !row.lost && !row.partialId;
  if (!row.partialId) await choosePlace(row);
  await (whole || row.size === 0 ? deliverWhole(row) : deliverPieces(row));
}

/** Whether the server has the file, and only its answer was lost. */
async function arrivedUnheard(row) {
  await refresh();
  const held = info.files.find((each) => each.index === row.index && alike(row, each));
  return Boolean(held) && held.checksum_sha256 === (await sha256(row.file));
}

async function deliverWhole(row) {
  const { control, file } = row;
  const url = signed(`files/${row.index}`, info.presigned_urls[row.index], { filename: row.name });
  const headers = {
    "Content-Type": file.type || "application/octet-stream",
    "If-None-Match": "*", // another window may have filled it meanwhile
  };
  const moved = (sent) => progress(row, Math.min(sent, row.size));
  const answer = await transmit(control, "PUT", url, headers, file, moved);
  if (answer.status !== 200) throw new Problem(answer.status, answer.body);
}

async function deliverPieces(row) {
  const { control, file } = row;
  let offset = row.partialId ? await tus.look(control, row.partialId) : await announce(row);
  reached(row, offset);
  while (offset < row.size) {
    offset = await tus.append(control, row.partialId, file, offset, (sent) => progress(row, sent));
    reached(row, offset);
  }
}

/** Claim the slot: from here on other windows keep away from it. */
async function announce(row) {
  const { control, file } = row;
  const id = await tus.begin(control, file, row.index);
  for (const ghost of rows.filter((other) => other.partialId === id)) drop(ghost);
  row.partialId = id;
  memory.remember(id, file);
  windows.tell();
  await refresh();
  if (info.files.some((held) => held.index === row.index)) {
    // Another window was quicker: what it stored must not be replaced.
    await tus.end(control, id);
    throw new Problem(412, { code: "slot_taken" });
  }
  return 0;
}

/** So much is durable: what is lost after that was no vain attempt. */
function reached(row, offset) {
  if (offset > row.reached) row.losses = 0;
  Object.assign(row, { sent: offset, reached: offset });
}

function progress(row, sent) {
  row.sent = sent;
  show();
}

/** After an error: true to try again, false when the row has another state now. */
async function overcome(row, error) {
  if (error instanceof Stopped) return false;
  try {
    if (error instanceof Lost) return await outlast(row, error);
    if (!(error instanceof Problem)) throw error;
    return await cure(row, error);
  } catch (later) {
    if (later instanceof Lost) return overcome(row, later);
    if (later instanceof Stopped) return false;
    throw later;
  }
}

async function outlast(row, lost) {
  row.lost = true;
  if (row.losses++ >= LOSSES_MAX) return refuse(row, { code: "offline" });
  if (!(await readable(row.file))) return refuse(row, { code: "unreadable" });
  row.state = "retrying";
  if (!line.down) view.tell(say("said.lost"));
  pace.reset();
  await line.back(Math.max(lost.seconds, 2 ** (row.losses - 1)));
  view.tell(say("said.back"));
  return true;
}

async function cure(row, { status, body }) {
  const again = row.restarts++ < RESTARTS_MAX;
  if (body.code === "upload_closed") {
    await refresh();
    return false;
  }
  // Browsers repeat a request by themselves when a kept connection turns out to be closed: so
  // it may be this very file that has taken the slot.
  if (again && body.code === "slot_taken" && !row.partialId && (await arrivedUnheard(row))) {
    row.lost = true;
    return true;
  }
  if (again && ["slot_taken", "link_expired"].includes(body.code)) {
    forget(row);
    await refresh();
    return true;
  }
  if (body.code === "partial_taken") {
    Object.assign(row, { file: null, state: "unfinished" });
    await refresh();
    return false;
  }
  // HEAD has no body, so that its status must do.
  if (again && row.partialId && [404, 410].includes(status)) {
    forget(row);
    await refresh();
    return true;
  }
  if (again && [409, 412, 460].includes(status) && row.partialId) return true; // look anew
  if (status === 404) await refresh();
  return refuse(row, body);
}

function refuse(row, body) {
  if (!row.partialId) row.index = null;
  fail(row, words.problem({ ...body, limit: words.size(limit) }));
  return false;
}

function forget(row) {
  if (row.partialId) memory.forget(row.partialId);
  Object.assign(row, { partialId: null, index: null, sent: 0, reached: 0 });
}

/** Begin anew, once the server has ended what was begun. */
function giveUp(row) {
  row.ended = tus.end(new Control(), row.partialId);
  row.ended.catch(() => {}); // told when it is waited for
  vacate(row.index);
  forget(row);
}

/** A file on the disk may be gone while it waits. */
async function readable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
    return true;
  } catch {
    return false;
  }
}

/** Whether what is stored is the chosen file, where its first part came from elsewhere. */
async function proved(row) {
  if (!row.unproved) return true;
  row.state = "checking";
  show();
  const digest = await sha256(row.file);
  await refresh();
  const held = info.files.find((each) => each.index === row.index);
  row.unproved = false;
  if (!held || held.checksum_sha256 === digest) return true;
  await ask(signed(`files/${row.index}`, held.delete_url), "DELETE");
  vacate(row.index);
  forget(row);
  row.state = "sending";
  view.notify([say("choose.not_same", { name: row.name })]);
  await deliver(row);
  return true;
}

function sha256(file) {
  return new Promise((resolve) => {
    const worker = new Worker(new URL("./sha256.js", import.meta.url));
    worker.onmessage = ({ data }) => {
      worker.terminate();
      resolve(data);
    };
    worker.postMessage(file);
  });
}

function stored(row, heard = false) {
  if (row.partialId) memory.forget(row.partialId);
  Object.assign(row, { state: "saved", sent: row.size, partialId: null, savedAt: performance.now() });
  Object.assign(row, { lost: false, unproved: false });
  if (row.removing) return remove(row);
  view.tell(say("said.stored", { name: row.name }));
  if (heard) arrived();
  return undefined;
}

/** After a file of this window has arrived. */
function arrived() {
  windows.tell();
  pump();
  if (isFull()) startCountdown();
}

// --- removing

async function remove(row) {
  stopCountdown();
  if (row.state === "sending" && row.sent >= row.size && !row.partialId) {
    row.removing = true; // all of it is there: the answer decides, then it is removed
    return show();
  }
  const before = row.state;
  if (before === "sending" || before === "retrying") row.state = "paused";
  row.control?.stop();
  try {
    await empty(row, before);
  } catch (error) {
    if (error instanceof Stopped) return undefined;
    row.removing = false;
    view.notify([error instanceof Lost ? say("problem.offline") : words.problem(error.body)]);
    return show();
  }
  vacate(row.index);
  view.tell(say("said.removed", { name: row.name }));
  view.notify([]);
  drop(row);
  windows.tell();
  return pump();
}

/** Whether the server has it is not known. */
function removeUnsure(row) {
  if (row.state === "saved") return undefined; // it is being removed
  Object.assign(row, { state: "paused", lost: true });
  return remove(row);
}

function vacate(index) {
  if (index === null) return;
  emptied.set(index, performance.now());
  info.files = info.files.filter((held) => held.index !== index);
  info.partials = info.partials.filter((held) => held.index !== index);
}

async function empty(row, before) {
  if (row.partialId && before !== "saved") {
    memory.forget(row.partialId);
    return tus.end(new Control(), row.partialId);
  }
  if (!(settled(row) || row.lost)) return undefined; // the server has nothing of it
  await refresh();
  const held = info.files.find((each) => each.index === row.index && each.filename === row.name);
  if (!held) return undefined;
  const { status, body } = await ask(signed(`files/${row.index}`, held.delete_url), "DELETE");
  if (status === 409) await refresh();
  if (status !== 204) throw new Problem(status, body);
  return undefined;
}

// --- completing

const allSaved = () => inState("saved").length === rows.length;
const isFull = () => rows.length === info.max_files && allSaved();

function startCountdown() {
  if (countdown || completing || finished) return;
  view.tell(say("said.countdown", { count: COUNTDOWN_S }));
  countdown = { left: COUNTDOWN_S };
  countdown.timer = setInterval(() => {
    countdown.left--;
    if (countdown.left > 0) return show();
    stopCountdown();
    return complete();
  }, 1000);
  show();
}

function stopCountdown() {
  if (countdown) clearInterval(countdown.timer);
  countdown = null;
}

function waitInstead() {
  stopCountdown();
  view.tell(say("said.waiting"));
  show();
  at("done").focus();
}

async function complete() {
  if (completing || finished) return;
  stopCountdown();
  completing = true;
  show();
  try {
    await refresh();
    // What another window has begun would be thrown away.
    const { status, body } = allSaved() ? await ask(address("complete"), "POST") : {};
    if (!status) view.tell(say("all.unfinished", { count: rows.length - inState("saved").length }));
    else if (status === 200 || status === 409 || status === 404) await close();
    else if (body.code === "files_refused") showRefused(body.reasons);
    else view.notify([words.problem(body)]);
  } catch (error) {
    if (error instanceof Stopped) return;
    if (!(error instanceof Lost)) throw error;
    // Whether it was done only the server knows; when it was, the page closes here.
    view.notify([say("problem.offline")]);
    quietly(line.back(0).then(refresh));
  }
  completing = false;
  if (!finished) show();
}

function showRefused(reasons) {
  for (const { index, reason } of reasons) {
    const row = rows.find((other) => other.index === index);
    const key = reason.startsWith("is ") ? "refused.reason" : "refused.other";
    if (row) Object.assign(row, { state: "failed", refused: true, reason: say(key, { reason }) });
  }
  view.notify([say("complete.refused")]);
}

/** The upload is over: show the page as the server tells it now. */
async function close() {
  if (finished) return;
  finished = true;
  stopCountdown();
  for (const row of rows) row.control?.stop();
  memory.forgetAll();
  windows.tell();
  try {
    const answer = await fetch(location.href, { cache: "no-store" });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (page.documentElement.dataset.token) throw new Error("it is open again");
    document.querySelector("main").replaceWith(page.querySelector("main"));
    document.title = page.title;
  } catch {
    location.reload();
    return;
  }
  scrollTo(0, 0);
  const heading = document.querySelector("h1");
  heading.tabIndex = -1;
  heading.focus();
}

// --- showing

function show() {
  if (finished || !info) return;
  for (const row of rows) view.show(row, row.file ? null : windows.sent(row.partialId));
  const busy = inState("sending", "waiting", "retrying", "checking").length;
  const sum = (of) => rows.reduce((total, row) => total + of(row), 0);
  const sent = sum((row) => (row.state === "saved" ? row.size : row.sent));
  const all = sum((row) => row.size);
  if (inState("sending").length) pace.note(sent, performance.now());
  const saved = inState("saved").length;
  const rest = all - sent - sum((row) => (row.state === "unfinished" ? row.size - row.sent : 0));
  view.showAll({
    text: overall(busy, saved),
    pace: busy && !line.down ? amount(sent, all, rest) : "",
    sent,
    all,
    busy,
    held: inState("paused").length,
    full: rows.length >= info.max_files && !inState("unfinished").length,
    canFinish: !completing && saved > 0 && allSaved(),
    counting: Boolean(countdown),
    any: rows.length > 0,
  });
  lightUp(busy > 0);
}

function overall(busy, saved) {
  const failed = inState("failed").length;
  const unfinished = inState("unfinished");
  const elsewhere = unfinished.filter((row) => windows.sent(row.partialId) !== null).length;
  const left = Math.ceil((line.until - Date.now()) / 1000);
  if (completing) return say("all.completing");
  if (busy && line.down) return left > 0 ? say("all.offline", { seconds: left }) : say("all.trying");
  if (busy) return say("all.sending", { count: busy });
  if (inState("paused").length) return say("all.paused");
  if (failed) return say("all.attention", { count: failed });
  if (elsewhere) return say("all.elsewhere");
  if (unfinished.length) return say("all.unfinished", { count: unfinished.length });
  if (countdown) return say("all.countdown", { count: countdown.left });
  if (!saved) return say("all.none");
  const key = saved === info.max_files ? "all.full" : "all.stored";
  return say(key, { count: saved, most: info.max_files });
}

function amount(sent, all, rest) {
  const parts = [say("all.amount", { sent: words.size(sent), size: words.size(all) })];
  if (pace.speed) {
    parts.push(say("all.speed", { speed: words.speed(pace.speed) }));
    if (rest > 0) parts.push(words.timeLeft(rest / pace.speed));
  }
  return parts.join(" · ");
}

let lamp = null;

/** Keep the screen of a phone on while something is on its way, where the browser allows. */
function lightUp(busy) {
  if (!navigator.wakeLock || document.hidden) return;
  if (busy && !lamp) {
    lamp = navigator.wakeLock.request("screen").catch(() => null);
    lamp.then((lock) => lock?.addEventListener("release", () => (lamp = null)));
  } else if (!busy && lamp) {
    lamp.then((lock) => lock?.release());
    lamp = null;
  }
}

// --- starting

function listen() {
  choosing.listen(choose, () => !finished && !completing);
  at("done").onclick = complete;
  at("wait").onclick = waitInstead;
  at("hold").onclick = holdAll;
  const looked = () => {
    if (document.hidden || finished) return;
    line.now();
    quietly(refresh());
  };
  document.addEventListener("visibilitychange", looked);
  addEventListener("focus", looked);
  addEventListener("pageshow", (event) => event.persisted && looked());
  addEventListener("beforeunload", (event) => {
    if (!finished && inState("sending", "waiting", "retrying", "checking").length) event.preventDefault();
  });
  setInterval(show, 1000); // countdowns, and windows that fell silent
  setInterval(() => {
    // Others may be at it; and what a broken connection left is told with some delay.
    if (!document.hidden && !finished && inState("unfinished").length) quietly(refresh());
  }, WATCHED_EVERY_MS);
}

async function start() {
  const until = at("until");
  const form = { dateStyle: "medium", timeStyle: "short" };
  until.textContent = new Date(until.dateTime).toLocaleString(undefined, form);
  at("plain").remove();
  while (!info) {
    try {
      await refresh();
    } catch (error) {
      if (error instanceof Stopped) return;
      if (!(error instanceof Lost)) throw error;
      at("open").hidden = false;
      at("drop").hidden = true; // what is wanted now is not known yet
      view.notify([say("problem.offline")]);
      await line.back(error.seconds);
    }
  }
  view.notify([]);
  rows.sort((one, two) => one.index - two.index).forEach(view.append);
  listen();
  at("drop").hidden = false;
  at("open").hidden = false;
}

start();
