// Pairs per second over the time of an attempt, as a small chart.

import { byId, cssColor, onColorScheme, setText, throttled } from "./dom.js";
import { compact, duration } from "./format.js";

const REDRAW = 500;
const BINS = 60;

/** Pairs by time in at most BINS bins of equal width, which doubles when the time outgrows them. */
export class Rates {
  constructor() {
    this.start = null;
    this.width = 1;
    this.pairs = [];
  }

  /** Add pairs that were finished at a time in seconds. */
  add(time, pairs) {
    this.start ??= time;
    while (time - this.start >= this.width * BINS) this.double();
    const bin = Math.max(0, Math.floor((time - this.start) / this.width));
    while (this.pairs.length <= bin) this.pairs.push(0);
    this.pairs[bin] += pairs;
  }

  double() {
    this.width *= 2;
    const half = Math.ceil(this.pairs.length / 2);
    this.pairs = Array.from({ length: half }, (_, i) => this.pairs[2 * i] + (this.pairs[2 * i + 1] ?? 0));
  }

  /** Pairs per second of each bin but the last, which is not over. */
  rates() {
    return this.pairs.slice(0, -1).map((pairs) => pairs / this.width);
  }
}

/** The panel of the throughput. */
export function throughputPanel(_id, signal) {
  const canvas = byId("throughput");
  let rates = new Rates();
  const redraw = throttled(draw, REDRAW, signal);
  new ResizeObserver(redraw).observe(canvas);
  onColorScheme(redraw, signal);

  function draw() {
    const ratio = window.devicePixelRatio;
    const width = (canvas.width = Math.round(canvas.clientWidth * ratio));
    const height = (canvas.height = Math.round(canvas.clientHeight * ratio));
    const heights = rates.rates();
    if (heights.length === 0) return;
    const most = Math.max(...heights);
    const context = canvas.getContext("2d");
    context.fillStyle = cssColor(canvas, "--tile-stored");
    const step = width / Math.max(heights.length, BINS / 4);
    heights.forEach((rate, i) => {
      const left = Math.round(i * step);
      const top = most > 0 ? Math.round(height * (1 - rate / most)) : height;
      context.fillRect(left, top, Math.max(1, Math.round((i + 1) * step) - left - Math.round(ratio)), height - top);
    });
    const span = duration(heights.length * rates.width);
    setText(byId("throughput-text"), `The last ${span}; the highest bar is ${compact(most)} pairs per second.`);
  }

  return {
    event(kind, data) {
      if (kind !== "TileFinished") return;
      rates.add(Date.parse(data.time) / 1000, data.pairs);
      redraw();
    },

    restart() {
      rates = new Rates();
    },
  };
}
