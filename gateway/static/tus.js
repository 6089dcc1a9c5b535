// Resumable uploads by tus 1.0 (tus.io): the little of a client that this page needs.
import { address, Problem, transmit } from "./api.js";

const VERSION = { "Tus-Resumable": "1.0.0" };
// One piece, at most. A pause or a lost connection cuts a piece anywhere and keeps what came,
// so this only bounds what a proxy that collects bodies must hold.
export const PIECE_BYTES = 64 * 1024 * 1024;

/** Announce a file for slot `index`; resolves to the identifier of its upload. */
export async function begin(control, file, index) {
  const metadata = { index: String(index), filename: file.name };
  if (file.type) metadata.filetype = file.type;
  const coded = Object.entries(metadata).map(([key, text]) => `${key} ${base64(text)}`);
  const headers = { ...VERSION, "Upload-Length": file.size, "Upload-Metadata": coded.join(",") };
  const answer = await transmit(control, "POST", address("tus/"), headers, null);
  if (answer.status !== 201) throw new Problem(answer.status, answer.body);
  return new URL(answer.header("Location"), location.href).pathname.split("/").pop();
}

/** How much of it the server has, in bytes. */
export async function look(control, id) {
  const answer = await transmit(control, "HEAD", address(`tus/${id}`), VERSION, null);
  if (answer.status !== 200) throw new Problem(answer.status, answer.body);
  return Number(answer.header("Upload-Offset"));
}

/** Send the piece that begins at `offset`; resolves to where the next one begins. */
export async function append(control, id, file, offset, progress) {
  const piece = file.slice(offset, offset + PIECE_BYTES);
  const headers = {
    ...VERSION,
    "Content-Type": "application/offset+octet-stream",
    "Upload-Offset": offset,
  };
  const moved = (sent) => progress(offset + Math.min(sent, piece.size));
  const answer = await transmit(control, "PATCH", address(`tus/${id}`), headers, piece, moved);
  if (answer.status !== 204) throw new Problem(answer.status, answer.body);
  return Number(answer.header("Upload-Offset"));
}

/** Give it up; fine when it is gone already. */
export async function end(control, id) {
  const answer = await transmit(control, "DELETE", address(`tus/${id}`), VERSION, null);
  if (![204, 404, 410].includes(answer.status)) throw new Problem(answer.status, answer.body);
}

function base64(text) {
  return btoa(String.fromCharCode(...new TextEncoder().encode(text)));
}
