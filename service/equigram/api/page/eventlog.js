// What happened in a job, newest first.

import { byId, element, setText, throttled } from "./dom.js";
import { clock, count, duration, plural } from "./format.js";
import { isTileEvent } from "./tiles.js";

const KEPT = 200;
const REDRAW = 250;

/** An event as a sentence, by its kind; tiles that started and finished are summarised instead. */
const SENTENCES = {
  Note: ({ text }) => text,
  Progress: ({ what, done, total, detail }) => {
    const number = total ? `${count(done)} of ${count(total)}` : count(done);
    return `${what}: ${number}${detail ? `, ${detail}` : ""}`;
  },
  ComputationStarted: ({ tiles, missing_tiles, workers, host }) =>
    `Computing ${count(missing_tiles)} of ${plural(tiles, "tile")} with ${plural(workers, "worker")}, driver: ${host}`,
  ComputationEnded: ({ tiles, pairs, seconds, error }) =>
    error
      ? `Computation ended: ${error}`
      : `Computation ended: ${plural(tiles, "tile")}, ${plural(pairs, "pair")} in ${duration(seconds)}`,
  WorkerStarted: ({ worker, place, processor }) => `Worker ${worker} is ready: ${place}, ${processor}`,
  WorkerLost: ({ worker, reason, tiles }) => `Worker ${worker} lost: ${reason}; ${plural(tiles, "tile")} for others`,
  WorkerReleased: ({ worker }) => `Worker ${worker} released`,
  TileFailed: ({ tile, worker, reason, failures, pause }) =>
    `${tile} failed on worker ${worker} for the ${ordinal(failures)} time, again in ${duration(pause)}: ${reason}`,
  state: ({ state }) => `The job is now ${state}`,
};

/** Kinds that a person should see as something wrong. */
const TROUBLE = new Set(["TileFailed", "WorkerLost"]);

function ordinal(number) {
  const ending = { one: "st", two: "nd", few: "rd", other: "th" };
  return `${number}${ending[new Intl.PluralRules("en", { type: "ordinal" }).select(number)]}`;
}

/** Consecutive events of tiles that went well, as one entry. */
class TilesEntry {
  constructor(time) {
    this.kind = "tiles";
    this.time = time;
    this.TileStarted = this.TileCopied = this.TileFinished = 0;
    this.pairs = 0;
  }

  add(kind, data) {
    this[kind]++;
    this.time = data.time;
    if (kind === "TileFinished") this.pairs += data.pairs;
  }

  get text() {
    const said = [];
    if (this.TileFinished) said.push(`${plural(this.TileFinished, "tile")} finished, ${plural(this.pairs, "pair")}`);
    if (this.TileStarted) said.push(`${plural(this.TileStarted, "tile")} started`);
    if (this.TileCopied) said.push(`${plural(this.TileCopied, "late tile")} given to a second worker`);
    return said.join("; ");
  }
}

/** The panel of the events. */
export function eventsPanel(_id, signal) {
  const entries = []; // oldest first
  const notesOnly = byId("notes-only");
  const redraw = throttled(draw, REDRAW, signal);
  notesOnly.addEventListener("change", draw);

  function add(entry) {
    entries.push(entry);
    if (entries.length > 2 * KEPT) entries.splice(0, KEPT);
  }

  function draw() {
    const seen = entries.filter(({ kind }) => !notesOnly.checked || kind === "Note").slice(-KEPT).reverse();
    const list = byId("events");
    seen.forEach((entry, i) => {
      const line = list.children[i] ?? list.appendChild(element("li", {}, element("time"), element("span")));
      const [time, text] = line.children;
      line.className = TROUBLE.has(entry.kind) ? "trouble" : entry.kind === "Note" ? "note" : "";
      setText(time, clock(entry.time));
      setText(text, entry.text);
    });
    while (list.children.length > seen.length) list.lastElementChild.remove();
    byId("events-empty").hidden = seen.length > 0;
  }

  return {
    event(kind, data) {
      if (kind === "Progress" && data.what === "pairs") return; // follows every tile, and says no more than it
      const last = entries.at(-1);
      if (isTileEvent(kind) && kind !== "TileFailed") {
        if (last?.kind !== "tiles") add(new TilesEntry(data.time));
        entries.at(-1).add(kind, data);
      } else if (kind === "Progress" && last?.kind === "Progress" && last.what === data.what) {
        Object.assign(last, { time: data.time, text: SENTENCES.Progress(data) });
      } else if (kind in SENTENCES) {
        const time = data.time ?? new Date().toISOString();
        add({ kind, time, text: SENTENCES[kind](data), what: data.what });
      }
      redraw();
    },
  };
}
