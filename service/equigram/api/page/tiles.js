// The states of all tiles of a job, and how they become pixels. No elements here.

export const MISSING = 0;
export const COMPUTING = 1;
export const STORED = 2;
export const FAILED = 3;

/** Names of the states, by the byte that the service sends for each. */
export const STATES = ["missing", "computing", "stored", "failed"];

const AFTER = { TileStarted: COMPUTING, TileCopied: COMPUTING, TileFinished: STORED, TileFailed: FAILED };

/** Whether an event is of a tile. */
export const isTileEvent = (kind) => kind in AFTER;

/** "gram[0, 1]" → {part: "gram", row: 0, col: 1}. */
export function parseTile(text) {
  const [, part, row, col] = /^(gram|cross)\[(\d+), (\d+)\]$/.exec(text);
  return { part, row: Number(row), col: Number(col) };
}

/** The tiles of one of the two matrices: a byte each, row by row; of `gram` both triangles. */
export class Part {
  constructor(name, rows, cols, states) {
    this.name = name;
    this.rows = rows;
    this.cols = cols;
    this.states = states;
    this.counts = [0, 0, 0, 0];
    for (let row = 0; row < rows; row++) {
      for (let col = name === "gram" ? row : 0; col < cols; col++) this.counts[this.get(row, col)]++;
    }
  }

  get(row, col) {
    return this.states[row * this.cols + col];
  }

  set(row, col, state) {
    this.counts[this.get(row, col)]--;
    this.counts[state]++;
    this.states[row * this.cols + col] = state;
    if (this.name === "gram") this.states[col * this.cols + row] = state;
  }

  /** Call back with (row, col) of every tile in a state, of `gram` in both triangles. */
  forEach(state, callback) {
    for (let at = this.states.indexOf(state); at >= 0; at = this.states.indexOf(state, at + 1)) {
      callback(Math.floor(at / this.cols), at % this.cols);
    }
  }

  /** Follow an event. What is stored stays so: the events of the whole attempt are told again to who comes late. */
  apply(kind, { row, col }) {
    if (row < this.rows && col < this.cols && this.get(row, col) !== STORED) this.set(row, col, AFTER[kind]);
  }
}

/**
 * Which blocks the pixels along an axis show: pixel p those from `from[p]` to `to[p]`, and `gap[p]` says that it is the
 * line after a block. Where there are more pixels than blocks it is one block each.
 */
export function bands(pixels, blocks) {
  const from = new Uint32Array(pixels);
  const to = new Uint32Array(pixels);
  const gap = new Uint8Array(pixels);
  const edge = (pixel) => Math.floor((pixel * blocks) / pixels);
  const lines = pixels >= LINES_FROM * blocks;
  for (let pixel = 0; pixel < pixels; pixel++) {
    from[pixel] = edge(pixel);
    to[pixel] = Math.max(from[pixel] + 1, edge(pixel + 1));
    gap[pixel] = lines && edge(pixel + 1) !== from[pixel] ? 1 : 0;
  }
  return { from, to, gap };
}

/** Pixels of a tile from which on there are lines between them. */
const LINES_FROM = 5;

/** A pixel with a tile that is not stored gets no more of the colour of stored ones than this. */
const MOST_OF_STORED = 0.4;

const pack = ([red, green, blue]) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;

/** Colours from the missing ones to the stored ones. */
function ramp(colors, steps) {
  const [missing, stored] = [colors[MISSING], colors[STORED]];
  return Uint32Array.from({ length: steps + 1 }, (_, step) =>
    pack(missing.map((low, i) => Math.round(low + ((stored[i] - low) * step) / steps))),
  );
}

/**
 * Paint a part: `colors` are [red, green, blue] by state, `line` that of the lines between tiles.
 *
 * A pixel of several tiles has the colour of failed ones if there is one, else that of computing ones, else a mixture
 * of missing and stored by their shares: the last missing tiles of many are seen.
 */
export function paint(part, width, height, colors, line) {
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const rows = bands(height, part.rows);
  const cols = bands(width, part.cols);
  const flat = colors.map(pack);
  const steps = 100;
  const shades = ramp(colors, steps);
  const gap = pack(line);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      if (rows.gap[y] || cols.gap[x]) {
        pixels[at] = gap;
        continue;
      }
      let stored = 0;
      let worst = STORED;
      for (let row = rows.from[y]; row < rows.to[y]; row++) {
        for (let col = cols.from[x]; col < cols.to[x]; col++) {
          const state = part.get(row, col);
          if (state === STORED) stored++;
          else if (worst === STORED || state > worst) worst = state;
        }
      }
      if (worst !== MISSING) {
        pixels[at] = flat[worst];
      } else {
        const share = stored / ((rows.to[y] - rows.from[y]) * (cols.to[x] - cols.from[x]));
        pixels[at] = shades[Math.floor(share * MOST_OF_STORED * steps)];
      }
    }
  }
  return image;
}
