// The live map of the tiles of a job.

import { jobPath, request } from "./api.js";
import { byId, coalesced, cssColor, onColorScheme, pause, setText, shown, throttled } from "./dom.js";
import { count } from "./format.js";
import { COMPUTING, FAILED, MISSING, Part, STATES, isTileEvent, paint, parseTile } from "./tiles.js";

/** Milliseconds between two pictures at least: thousands of events may come at once. */
const REDRAW = 100;
/** Milliseconds between two requests for all tiles at least. */
const REFETCH = 3000;
/** Milliseconds until the text says which tile the cursor is on: not every one on the way. */
const SETTLE = 150;
const LARGEST_CELL = 40;
const SMALLEST_MARK = 7;
/** Where no more than so many tiles are in a state, each of them is drawn large enough to be seen. */
const FEW = 500;
const SMALLEST_FEW = 4;

function rgb(hex) {
  const number = Number.parseInt(hex.slice(1), 16);
  return [number >> 16, (number >> 8) & 255, number & 255];
}

/** "images 48 to 63" of a block. */
function images(block, edge, all) {
  return `${count(block * edge)} to ${count(Math.min((block + 1) * edge, all) - 1)}`;
}

/** A part of the map: a canvas with a cursor. */
class PartView {
  constructor(name, onCursor, signal) {
    this.name = name;
    this.canvas = byId(`${name}-tiles`);
    this.figure = byId(`${name}-tiles-figure`);
    this.part = null;
    this.cursor = null;
    this.onCursor = onCursor;
    this.redraw = throttled(() => this.draw(), REDRAW, signal);
    new ResizeObserver(this.redraw).observe(this.figure);
    onColorScheme(this.redraw, signal);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => {
      if (document.activeElement !== this.canvas) this.move(null);
    });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("focus", () => {
      if (!this.cursor) this.move({ row: 0, col: 0 });
    });
    this.canvas.addEventListener("blur", () => this.move(null));
  }

  show(part) {
    this.part = part;
    this.figure.hidden = part.rows === 0;
    this.redraw();
  }

  point(event) {
    if (!this.part) return;
    const box = this.canvas.getBoundingClientRect();
    const block = (at, size, blocks) => Math.min(blocks - 1, Math.max(0, Math.floor((at / size) * blocks)));
    this.move({
      row: block(event.clientY - box.top, box.height, this.part.rows),
      col: block(event.clientX - box.left, box.width, this.part.cols),
    });
  }

  key(event) {
    if (!this.part || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = event.shiftKey ? 10 : 1;
    const { rows, cols } = this.part;
    let { row, col } = this.cursor ?? { row: 0, col: 0 };
    if (event.key === "ArrowUp") row -= step;
    else if (event.key === "ArrowDown") row += step;
    else if (event.key === "ArrowLeft") col -= step;
    else if (event.key === "ArrowRight") col += step;
    else if (event.key === "Home") col = 0;
    else if (event.key === "End") col = cols - 1;
    else return;
    event.preventDefault();
    this.move({ row: Math.min(rows - 1, Math.max(0, row)), col: Math.min(cols - 1, Math.max(0, col)) });
  }

  move(cursor) {
    this.cursor = cursor;
    this.onCursor(this);
    this.redraw();
  }

  /** Whether a point of the canvas stands for several tiles. */
  get aggregated() {
    return this.part !== null && (this.canvas.width < this.part.cols || this.canvas.height < this.part.rows);
  }

  draw() {
    const { part, canvas, figure } = this;
    if (!part || part.rows === 0) return;
    const ratio = window.devicePixelRatio;
    const wide = Math.min(figure.clientWidth, LARGEST_CELL * part.cols);
    const high = Math.max(Math.min((wide * part.rows) / part.cols, wide), SMALLEST_MARK);
    const [width, height] = [Math.round(wide * ratio), Math.round(high * ratio)];
    if (width === 0) return;
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    // Exactly a pixel of the canvas for each of the screen.
    canvas.style.width = `${width / ratio}px`;
    canvas.style.height = `${height / ratio}px`;
    const context = canvas.getContext("2d");
    const colors = STATES.map((state) => rgb(cssColor(canvas, `--tile-${state}`)));
    context.putImageData(paint(part, width, height, colors, rgb(cssColor(canvas, "--tile-line"))), 0, 0);
    for (const state of [MISSING, COMPUTING]) this.drawFew(context, ratio, state);
    this.drawFailed(context, ratio);
    this.drawCursor(context, ratio);
  }

  /** The square of a tile on the canvas, in pixels, and at least `least` wide. */
  square(row, col, least) {
    const { canvas, part } = this;
    const width = canvas.width / part.cols;
    const height = canvas.height / part.rows;
    const [w, h] = [Math.max(width, least), Math.max(height, least)];
    return { x: (col + 0.5) * width - w / 2, y: (row + 0.5) * height - h / 2, w, h };
  }

  /** The last missing tiles of thousands are what one looks for. */
  drawFew(context, ratio, state) {
    const { part, canvas } = this;
    const least = SMALLEST_FEW * ratio;
    if (part.counts[state] > FEW || Math.min(canvas.width / part.cols, canvas.height / part.rows) >= least) return;
    context.fillStyle = cssColor(canvas, `--tile-${STATES[state]}`);
    part.forEach(state, (row, col) => {
      const { x, y, w, h } = this.square(row, col, least);
      context.fillRect(x, y, w, h);
    });
  }

  /** A cross on every failed tile: colour alone is not enough, and one of many is small. */
  drawFailed(context, ratio) {
    const { part, canvas } = this;
    context.fillStyle = cssColor(canvas, "--tile-failed");
    context.strokeStyle = cssColor(canvas, "--tile-mark");
    context.lineWidth = Math.max(1, 1.5 * ratio);
    part.forEach(FAILED, (row, col) => {
      const { x, y, w, h } = this.square(row, col, SMALLEST_MARK * ratio);
      const margin = Math.min(w, h) / 4;
      context.fillRect(x, y, w, h);
      context.beginPath();
      context.moveTo(x + margin, y + margin);
      context.lineTo(x + w - margin, y + h - margin);
      context.moveTo(x + w - margin, y + margin);
      context.lineTo(x + margin, y + h - margin);
      context.stroke();
    });
  }

  drawCursor(context, ratio) {
    if (!this.cursor) return;
    const { x, y, w, h } = this.square(this.cursor.row, this.cursor.col, SMALLEST_MARK * ratio);
    // Dark and light, to be seen on every colour.
    context.lineWidth = 4 * ratio;
    context.strokeStyle = cssColor(this.canvas, "--surface");
    context.strokeRect(x, y, w, h);
    context.lineWidth = 2 * ratio;
    context.strokeStyle = cssColor(this.canvas, "--text");
    context.strokeRect(x, y, w, h);
  }
}

/** The panel of the tiles of a job. */
export function tilesPanel(id, signal) {
  let job = null;
  let pointed = null;
  /** Events that came while all tiles were being fetched; the answer may be older than they are. */
  let meanwhile = null;
  let stale = true;
  let settle = 0;

  const views = ["gram", "cross"].map((name) => new PartView(name, onCursor, signal));
  const redraw = throttled(showTexts, REDRAW, signal);

  function onCursor(view) {
    if (view.cursor) pointed = view;
    else if (pointed === view) pointed = null;
    clearTimeout(settle);
    settle = setTimeout(showTile, SETTLE);
  }

  function describe({ name, part, cursor: { row, col } }) {
    const mirrored = name === "gram" && row > col ? ` (computed as ${col}, ${row})` : "";
    const state = STATES[part.get(row, col)];
    const where = `images ${images(row, job.tile, name === "cross" ? job.test : job.train)}`;
    const against = `× ${images(col, job.tile, job.train)}`;
    return `${name === "cross" ? "test tile" : "tile"} ${row}, ${col}${mirrored}: ${state}, ${where} ${against}`;
  }

  signal.addEventListener("abort", () => clearTimeout(settle));

  function showTile() {
    setText(byId("tile-text"), pointed?.part ? describe(pointed) : "");
  }

  function showTexts() {
    STATES.forEach((state, index) => {
      const total = views.reduce((sum, { part }) => sum + (part?.counts[index] ?? 0), 0);
      setText(byId(`count-${state}`), count(total));
    });
    byId("tiles-aggregated").hidden = !views.some((view) => view.aggregated);
    if (pointed) showTile();
  }

  function apply(kind, data) {
    const tile = parseTile(data.tile);
    const view = views.find(({ name }) => name === tile.part);
    view.part?.apply(kind, tile);
    view.redraw();
  }

  async function fetchPart(view) {
    if (view.name === "cross" && job.blocks[1] === 0) return new Part(view.name, 0, 0, new Uint8Array());
    const response = await request(jobPath(id, `/tiles?part=${view.name}`), { signal });
    const [rows, cols] = [Number(response.headers.get("X-Rows")), Number(response.headers.get("X-Cols"))];
    return new Part(view.name, rows, cols, new Uint8Array(await response.arrayBuffer()));
  }

  const refetch = coalesced(async () => {
    meanwhile = [];
    await shown(byId("tiles-error"), async () => {
      const parts = await Promise.all(views.map(fetchPart));
      stale = false;
      views.forEach((view, i) => view.show(parts[i]));
      meanwhile.forEach(([kind, data]) => apply(kind, data));
      showTexts();
      byId("tiles-panel").hidden = false;
    });
    meanwhile = null;
    await pause(REFETCH, signal);
  });

  return {
    update(fresh) {
      const grown = job?.blocks?.join() !== fresh.blocks?.join();
      job = fresh;
      if (job.blocks && (stale || grown)) refetch();
    },

    event(kind, data) {
      // A tile is stored only once it is in every pass, which one event does not tell.
      if (kind === "WorkerLost" || kind === "state" || (kind === "TileFinished" && job?.passes > 1)) {
        if (job?.blocks) refetch();
      } else if (isTileEvent(kind)) {
        meanwhile?.push([kind, data]);
        apply(kind, data);
        redraw();
      }
    },
  };
}
