// How fast it goes, smoothed over some seconds.

const MEMORY_S = 5;
const STEP_S = 0.4; // more often would measure the buffers of the system

export class Pace {
  #last = null;
  #speed = null;
  #known_s = 0;

  /** So many bytes are sent in all, at `now` (ms). */
  note(bytes, now) {
    if (this.#last === null || bytes < this.#last.bytes) {
      this.#last = { bytes, now };
      return;
    }
    const passed = (now - this.#last.now) / 1000;
    if (passed < STEP_S) return;
    const speed = (bytes - this.#last.bytes) / passed;
    const weight = 1 - Math.exp(-passed / MEMORY_S);
    this.#speed = this.#speed === null ? speed : this.#speed + weight * (speed - this.#speed);
    this.#known_s += passed;
    this.#last = { bytes, now };
  }

  /** After a pause the old speed says nothing. */
  reset() {
    this.#last = this.#speed = null;
    this.#known_s = 0;
  }

  /** Bytes a second; null while too little is known. */
  get speed() {
    return this.#known_s >= 2 && this.#speed > 0 ? this.#speed : null;
  }
}
