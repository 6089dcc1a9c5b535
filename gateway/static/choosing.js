// The ways files come to the page: picker, camera, dropping, pasting.
import { say } from "./words.js";

// What systems leave in folders, and nobody means to send.
const LITTER = new Set([".DS_Store", "Thumbs.db", "desktop.ini"]);
const WALKED_MAX = 2000;

const at = (id) => document.getElementById(id);

/** Calls `choose(files, notices)` whenever files come; `open()` tells whether they may. */
export function listen(choose, open) {
  for (const id of ["picker", "camera"]) {
    const picker = at(id);
    if (!picker) continue;
    picker.onchange = () => {
      const files = [...picker.files];
      picker.value = ""; // choosing the same file again must be noticed
      choose(files, []);
    };
    if (picker.files.length) picker.onchange(); // chosen before this script ran
  }
  if (at("photo")) at("photo").hidden = !matchMedia("(any-pointer: coarse)").matches;
  listenToDrops(choose, open);
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length || !open()) return;
    event.preventDefault();
    choose(files.map(named), []);
  });
}

function listenToDrops(choose, open) {
  let depth = 0; // enter and leave come for every element under the pointer
  const over = (change) => (event) => {
    event.preventDefault();
    depth = change === null ? 0 : Math.max(0, depth + change);
    at("drop")?.classList.toggle("over", depth > 0);
  };
  addEventListener("dragenter", over(1));
  addEventListener("dragleave", over(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", async (event) => {
    over(null)(event);
    if (!open()) return;
    const { files, notices } = await unpack(event.dataTransfer);
    choose(files, notices);
  });
}

/** Pasted pictures are all called alike. */
function named(file) {
  if (!/^image\.\w+$/.test(file.name)) return file;
  const extension = file.name.split(".").pop();
  const time = new Date().toISOString().slice(0, 19).replace(/[:T]/g, "-");
  return new File([file], say("pasted.name", { time, extension }), {
    type: file.type,
    lastModified: file.lastModified,
  });
}

/** The files of a drop, those in its folders too. */
async function unpack(transfer) {
  // All entries first: the transfer is empty after the first pause.
  const items = [...transfer.items].filter((item) => item.kind === "file");
  const dropped = items.map((item) => ({ entry: item.webkitGetAsEntry?.(), file: item.getAsFile() }));
  const files = [];
  const notices = [];
  for (const { entry, file } of dropped) {
    if (!entry?.isDirectory) {
      if (file) files.push(file);
      continue;
    }
    const before = files.length;
    try {
      await walk(entry, files);
      if (files.length === before) notices.push(say("choose.empty_folder", { name: entry.name }));
    } catch {
      notices.push(say("choose.unreadable", { name: entry.name }));
    }
  }
  return { files, notices };
}

async function walk(folder, files) {
  const reader = folder.createReader();
  for (;;) {
    // Some browsers give a hundred at a time, and nothing at the end.
    const entries = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!entries.length) return;
    for (const entry of entries) {
      if (files.length >= WALKED_MAX) return;
      if (entry.isDirectory) await walk(entry, files);
      else if (!LITTER.has(entry.name))
        files.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
    }
  }
}
