// What is shown of the list and of the whole; decides nothing.
import * as words from "./words.js";
import { say } from "./words.js";

const at = (id) => document.getElementById(id);
const NOTICES_MAX = 5;

export function notify(lines) {
  const shown = lines.slice(0, NOTICES_MAX);
  const more = lines.length - shown.length;
  if (more) shown.push(say("choose.more", { count: more }));
  at("notice").replaceChildren(...shown.map((line) => make("p", "", line)));
  at("notice").hidden = shown.length === 0;
}

/** Told to those who listen to the page instead of looking at it. */
export function tell(line) {
  at("said").textContent = line;
}

/** Gives a row its item in the list; `acts` are what its buttons do. */
export function add(row, acts) {
  const item = make("li");
  row.item = item;
  row.bar = Object.assign(make("progress"), { max: 1, value: 0 });
  row.bar.setAttribute("aria-label", say("row.progress", { name: row.name }));
  row.text = make("span", "state");
  row.buttons = {};
  const box = make("span", "acts");
  for (const act of ["pause", "resume", "again", "find", "remove"]) {
    const button = make("button", act, say(`row.${act}`));
    button.type = "button";
    button.setAttribute("aria-label", say(`row.${act}_named`, { name: row.name }));
    button.onclick = () => acts[act](row);
    row.buttons[act] = button;
    box.append(button);
  }
  item.append(make("span", "name", row.name), row.text, box, row.bar);
  append(row);
}

/** Put a row at the end of the list. */
export function append(row) {
  at("files").append(row.item);
}

export function remove(row) {
  row.item.remove();
}

/** A row as it is; `elsewhere` is what another window has sent of it, or null. */
export function show(row, elsewhere) {
  const { state } = row;
  const sent = elsewhere ?? row.sent;
  const values = {
    size: words.size(row.size),
    sent: words.size(Math.min(sent, row.size)),
    percent: words.percent(sent, row.size),
  };
  row.item.className = state;
  row.text.textContent =
    state === "failed" ? row.reason :
    state === "saved" ? say("row.stored", values) :
    state === "unfinished" ? say(elsewhere === null ? "row.unfinished" : "row.elsewhere", values) :
    state !== "sending" ? say(`row.${state}`, values) :
    row.size && sent >= row.size ? say("row.storing") :
    sent ? say("row.sending", values) : say("row.starting");
  row.bar.hidden = state === "saved" || (state === "failed" && !row.partialId);
  row.bar.value = row.size ? Math.min(1, sent / row.size) : 0;
  const can = {
    pause: state === "sending" || state === "waiting",
    resume: state === "paused",
    again: (state === "failed" && row.file && !row.refused) || state === "retrying",
    find: state === "unfinished" && elsewhere === null,
    remove: elsewhere === null && !row.removing,
  };
  for (const [act, button] of Object.entries(row.buttons)) toggle(button, Boolean(can[act]));
}

/** A hidden button must not take the focus with it. */
function toggle(button, shown) {
  if (button.hidden === !shown) return;
  const focused = document.activeElement === button;
  button.hidden = !shown;
  if (focused && !shown)
    [...button.parentElement.children].find((other) => !other.hidden)?.focus();
}

/** The whole: the line below the list, and its buttons. */
export function showAll({ text, pace, sent, all, busy, held, full, canFinish, counting, any }) {
  at("bar").hidden = !any;
  at("drop").classList.toggle("full", full);
  at("drop").classList.toggle("more", any);
  at("overall").textContent = text;
  at("pace").textContent = pace;
  at("pace").hidden = !pace;
  at("total").hidden = !busy;
  at("total").value = all ? Math.min(1, sent / all) : 0;
  at("hold").hidden = !(busy || held);
  at("hold").textContent = say(busy ? "open.pause" : "open.resume");
  at("wait").hidden = !counting;
  at("done").disabled = !canFinish;
}

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}
