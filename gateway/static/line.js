// Whether the server can be reached. All transfers that lost it wait here together, and
// begin again when one small question was answered.
import { Lost } from "./api.js";

const LONGEST_S = 30;

/** `probe` asks the server something small; `changed` is called when the state changes. */
export class Line {
  #probe;
  #changed;
  #outage = null; // a promise, while there is one
  #hurry = () => {};
  until = 0; // when the next attempt is made (ms since 1970)

  constructor(probe, changed) {
    this.#probe = probe;
    this.#changed = changed;
    addEventListener("online", () => this.now());
  }

  get down() {
    return this.#outage !== null;
  }

  /** Resolves when the server answers again, after at least `seconds`. */
  back(seconds) {
    this.#outage ??= this.#watch(seconds);
    return this.#outage;
  }

  /** Try at once. */
  now() {
    this.#hurry();
  }

  async #watch(seconds) {
    let pause = Math.max(1, seconds);
    for (;;) {
      await this.#pause(pause);
      try {
        await this.#probe();
        break;
      } catch (error) {
        if (!(error instanceof Lost)) break; // an answer, of whatever kind
        pause = Math.max(error.seconds, Math.min(LONGEST_S, pause * 2));
      }
    }
    this.#outage = null;
    this.#changed();
  }

  #pause(seconds) {
    // Spread, so that a server that comes back is not met by everybody at once.
    const ms = seconds * 1000 * (0.8 + 0.4 * Math.random());
    this.until = Date.now() + ms;
    this.#changed();
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.#hurry = () => {
        clearTimeout(timer);
        this.until = 0;
        resolve();
      };
    });
  }
}
