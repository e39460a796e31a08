// A matrix as a picture that can be zoomed; the service paints the window that is looked at.

import { jobPath, request, segments } from "./api.js";
import { byId, coalesced, cssColor, onColorScheme, setOptions, setText, shown, throttled } from "./dom.js";
import { count, value } from "./format.js";

/** Milliseconds without a move until a new picture is asked for. */
const SETTLE = 200;
/** Milliseconds between two pictures of a matrix that fills up. */
const RENEW = 10000;
const MOST_PIXELS = 1024;
/** Entries along an axis at least. */
const FEWEST = 8;
const STEP = 1.5;

/** The window of a matrix that is seen: `scale` is its part of rows and columns, `top` and `left` are its corner. */
export class Window {
  constructor(rows, cols) {
    this.rows = rows;
    this.cols = cols;
    this.whole();
  }

  whole() {
    this.scale = 1;
    this.top = this.left = 0;
  }

  get height() {
    return this.rows * this.scale;
  }

  get width() {
    return this.cols * this.scale;
  }

  /** Show `factor` times as much, while the point at the parts x and y of the window stays where it is. */
  zoom(factor, x = 0.5, y = 0.5) {
    const least = Math.min(1, FEWEST / Math.min(this.rows, this.cols));
    const [row, col] = [this.top + y * this.height, this.left + x * this.width];
    this.scale = Math.min(1, Math.max(least, this.scale * factor));
    this.top = row - y * this.height;
    this.left = col - x * this.width;
    this.clamp();
  }

  /** Move by parts of the window. */
  pan(x, y) {
    this.left += x * this.width;
    this.top += y * this.height;
    this.clamp();
  }

  clamp() {
    this.top = Math.min(this.rows - this.height, Math.max(0, this.top));
    this.left = Math.min(this.cols - this.width, Math.max(0, this.left));
  }

  /** Whole rows and columns that cover it: what a picture is asked for. */
  range() {
    return {
      top: Math.floor(this.top),
      left: Math.floor(this.left),
      bottom: Math.min(this.rows, Math.ceil(this.top + this.height)),
      right: Math.min(this.cols, Math.ceil(this.left + this.width)),
    };
  }
}

/** Call back with moves of one pointer and spreading of two, in parts of the canvas. */
function onGesture(canvas, { pan, zoom }) {
  const pointers = new Map();
  const part = (event) => {
    const box = canvas.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  };
  const spread = () => {
    const [a, b] = [...pointers.values()];
    return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, distance: Math.hypot(a.x - b.x, a.y - b.y) };
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, part(event));
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!pointers.has(event.pointerId)) return;
    const before = pointers.size === 2 ? spread() : pointers.get(event.pointerId);
    pointers.set(event.pointerId, part(event));
    const after = pointers.size === 2 ? spread() : pointers.get(event.pointerId);
    pan(before.x - after.x, before.y - after.y);
    if (pointers.size === 2 && after.distance > 0) zoom(before.distance / after.distance, after.x, after.y);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, (event) => pointers.delete(event.pointerId));
  }
  canvas.addEventListener(
    "wheel",
    (event) => {
      // Else the page could not be scrolled past the picture.
      if (document.activeElement !== canvas && !event.ctrlKey) return;
      event.preventDefault();
      const { x, y } = part(event);
      zoom(Math.exp(Math.sign(event.deltaY) * Math.min(0.4, Math.abs(event.deltaY) / 300)), x, y);
    },
    { passive: false },
  );
}

/** What lies below missing tiles. */
function hatch(context, background, line) {
  const ratio = window.devicePixelRatio;
  const tile = document.createElement("canvas");
  const size = Math.round(8 * ratio);
  tile.width = tile.height = size;
  const brush = tile.getContext("2d");
  brush.fillStyle = background;
  brush.fillRect(0, 0, size, size);
  brush.strokeStyle = line;
  brush.lineWidth = ratio;
  for (const offset of [-size, 0, size]) {
    brush.moveTo(offset, size);
    brush.lineTo(offset + size, 0);
  }
  brush.stroke();
  return context.createPattern(tile, "repeat");
}

/** The panel of the matrices. */
export function gramPanel(id, signal) {
  const canvas = byId("matrix");
  const [part, group, kernel] = ["part", "group", "kernel"].map((name) => byId(`matrix-${name}`));
  let job = null;
  let view = null;
  /** The picture on the screen and the range of the matrix that it covers. */
  let picture = null;
  let finished = 0;
  let renewed = 0;
  let settle = 0;

  const redraw = throttled(draw, 0, signal);
  signal.addEventListener("abort", () => clearTimeout(settle));

  function open() {
    const rows = part.value === "cross" ? job.test : job.train;
    view = new Window(rows, job.train);
    picture = null;
    move();
  }

  /** The window moved: show what there is of it at once, and ask for a picture of it soon. */
  function move() {
    // One finger scrolls the page while the whole matrix is seen, and moves the matrix otherwise.
    canvas.style.touchAction = view.scale === 1 ? "pan-y" : "none";
    redraw();
    clearTimeout(settle);
    settle = setTimeout(load, SETTLE);
  }

  const load = coalesced(() =>
    shown(byId("matrix-error"), async () => {
      const wanted = view;
      const range = view.range();
      const path = jobPath(id, `${segments(part.value, group.value, kernel.value)}/picture.png`);
      const query = new URLSearchParams({
        rows: `${range.top}:${range.bottom}`,
        cols: `${range.left}:${range.right}`,
        pixels: Math.min(MOST_PIXELS, Math.max(canvas.width, canvas.height)),
      });
      const response = await request(`${path}?${query}`, { signal });
      const bitmap = await createImageBitmap(await response.blob());
      if (wanted !== view || signal.aborted) return; // another matrix was chosen, or the job was left
      picture = { bitmap, range };
      renewed = performance.now();
      for (const end of ["Minimum", "Maximum"]) {
        const header = response.headers.get(`X-${end}`);
        setText(byId(`matrix-${end.toLowerCase()}`), value(header === null ? NaN : Number(header)));
      }
      setText(
        byId("matrix-window"),
        `rows ${count(range.top)} to ${count(range.bottom - 1)} of ${count(view.rows)}, ` +
          `columns ${count(range.left)} to ${count(range.right - 1)} of ${count(view.cols)}`,
      );
      redraw();
    }),
  );

  function resize() {
    const ratio = window.devicePixelRatio;
    const wide = canvas.clientWidth;
    const high = wide * Math.min(1, Math.max(0.2, view.rows / view.cols));
    canvas.style.height = `${high}px`;
    const [width, height] = [Math.round(wide * ratio), Math.round(high * ratio)];
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
  }

  function draw() {
    if (!view || canvas.clientWidth === 0) return;
    resize();
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!picture) return;
    const { bitmap, range } = picture;
    const [across, down] = [canvas.width / view.width, canvas.height / view.height];
    const place = [
      (range.left - view.left) * across,
      (range.top - view.top) * down,
      (range.right - range.left) * across,
      (range.bottom - range.top) * down,
    ];
    context.fillStyle = hatch(context, cssColor(canvas, "--tile-missing"), cssColor(canvas, "--hatch"));
    context.fillRect(...place);
    // Entries stay squares however large they are.
    context.imageSmoothingEnabled = place[2] < bitmap.width;
    context.drawImage(bitmap, ...place);
  }

  const zoom = (factor, x, y) => {
    view.zoom(factor, x, y);
    move();
  };
  const pan = (x, y) => {
    view.pan(x, y);
    move();
  };
  const whole = () => {
    view.whole();
    move();
  };

  const KEYS = {
    "+": () => zoom(1 / STEP),
    "=": () => zoom(1 / STEP),
    "-": () => zoom(STEP),
    0: whole,
    ArrowLeft: () => pan(-0.2, 0),
    ArrowRight: () => pan(0.2, 0),
    ArrowUp: () => pan(0, -0.2),
    ArrowDown: () => pan(0, 0.2),
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  onGesture(canvas, { pan, zoom });
  byId("matrix-in").addEventListener("click", () => zoom(1 / STEP));
  byId("matrix-out").addEventListener("click", () => zoom(STEP));
  byId("matrix-all").addEventListener("click", whole);
  for (const select of [part, group, kernel]) select.addEventListener("change", open);
  new ResizeObserver(redraw).observe(canvas.parentElement);
  onColorScheme(redraw, signal);

  return {
    update(fresh) {
      const grown = job?.train !== fresh.train || job?.test !== fresh.test;
      job = fresh;
      const stored = job.counts?.finished ?? 0;
      if (!job.train || stored === 0) return;
      byId("matrix-panel").hidden = false;
      setOptions(group, job.groups.map((name) => [name, name]));
      setOptions(kernel, job.kernels.map((name) => [name, name.toUpperCase()]));
      part.closest("label").hidden = !job.test;
      if (!view || grown) open();
      else if (stored !== finished && performance.now() - renewed > RENEW) load();
      else return;
      finished = stored;
    },
  };
}
