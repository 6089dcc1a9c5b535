// Words and numbers as people read them.
import phrases, { language } from "./phrases.js";

const plurals = new Intl.PluralRules(language);

/** A phrase with its values filled in; one with plural forms is chosen by `count`. */
export function say(key, values = {}) {
  let phrase = phrases[key];
  if (typeof phrase === "object") phrase = phrase[plurals.select(values.count)] ?? phrase.other;
  return phrase.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** What went wrong, by the stable code of the server's answer. */
export function problem(body) {
  const key = `problem.${body.code}`;
  return say(key in phrases ? key : "problem.unknown", body);
}

/** In steps of 1024, as limits are given; the server counts alike. */
export function size(bytes) {
  const units = ["bytes", "KB", "MB", "GB", "TB"];
  let step = 0;
  let amount = bytes;
  for (; amount >= 1024 && step < units.length - 1; step++) amount /= 1024;
  return `${step ? amount.toFixed(1).replace(/\.0$/, "") : bytes} ${units[step]}`;
}

/** Bytes a second, without decimals that nobody can read so fast. */
export function speed(bytes) {
  const step = bytes < 1024 ** 2 ? 1024 : 1024 ** 2 / 10;
  return size(Math.max(1024, Math.round(bytes / step) * step));
}

/** A whole number; 100 only when nothing is missing. */
export function percent(sent, whole) {
  return whole ? Math.floor((100 * Math.min(sent, whole)) / whole) : 0;
}

/** Seconds in coarse steps, so that the number does not flicker. */
export function timeLeft(seconds) {
  if (seconds < 10) return say("left.seconds", { count: Math.max(1, Math.round(seconds)) });
  if (seconds < 55) return say("left.seconds", { count: Math.round(seconds / 5) * 5 });
  if (seconds < 3300) return say("left.minutes", { count: Math.max(1, Math.round(seconds / 60)) });
  return say("left.hours", { count: Math.max(1, Math.round(seconds / 3600)) });
}
