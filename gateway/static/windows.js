// Other windows of this browser on the same upload: they tell each other what they send and
// that something changed. Windows elsewhere are noticed when this one is looked at again.
import { token } from "./api.js";

const TOLD_EVERY_MS = 1000;
const BELIEVED_MS = 5000; // a window that was closed says nothing more

export class Windows {
  #channel = typeof BroadcastChannel === "function" ? new BroadcastChannel(`blobcask:${token}`) : null;
  #others = new Map(); // identifier of an upload -> {sent, at}

  /** `sending()` is what this window sends: [[identifier, bytes], …]. */
  constructor(sending, changed) {
    if (!this.#channel) return;
    this.#channel.onmessage = ({ data }) => {
      if (data === "changed") return changed();
      for (const [id, sent] of data) this.#others.set(id, { sent, at: Date.now() });
    };
    setInterval(() => {
      const present = sending();
      if (present.length) this.#channel.postMessage(present);
    }, TOLD_EVERY_MS);
  }

  /** Something changed at the server that the others should look at. */
  tell() {
    this.#channel?.postMessage("changed");
  }

  /** How much another window has sent of an upload, null when none is at it. */
  sent(id) {
    const other = this.#others.get(id);
    return other && Date.now() - other.at < BELIEVED_MS ? other.sent : null;
  }
}
