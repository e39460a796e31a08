// Numbers, times and specs as text.

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

export const NOTHING = "–";

/** 12345 → "12,345". */
export const count = (number) => (number == null ? NOTHING : WHOLE.format(number));

/** 1234567 → "1.23M". */
export const compact = (number) => (number == null ? NOTHING : COMPACT.format(number));

/** Part of a whole in percent, rounded down: 100 % means all of it. */
export function percent(part, whole) {
  return whole ? `${Math.floor((100 * part) / whole)}\u00a0%` : NOTHING;
}

/** A value of a matrix or a score with some digits: -0.5 → "−0.5". */
export function value(number, digits = 4) {
  return Number.isFinite(number) ? String(Number(number.toPrecision(digits))).replace("-", "−") : NOTHING;
}

/** 3725 → "1 h 02 min". */
export function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return NOTHING;
  const whole = Math.max(0, Math.round(seconds));
  const two = (number) => String(number).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes} min ${two(whole % 60)} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${two(minutes % 60)} min`;
  return `${Math.floor(hours / 24)} d ${two(hours % 24)} h`;
}

/** Seconds from one ISO time to another, or to now. */
export function secondsBetween(start, end) {
  return start ? ((end ? Date.parse(end) : Date.now()) - Date.parse(start)) / 1000 : null;
}

const parts = (iso) => {
  const time = new Date(iso);
  const two = (number) => String(number).padStart(2, "0");
  return {
    date: `${time.getFullYear()}-${two(time.getMonth() + 1)}-${two(time.getDate())}`,
    minutes: `${two(time.getHours())}:${two(time.getMinutes())}`,
    seconds: two(time.getSeconds()),
  };
};

/** A time where the reader is: "2026-01-31 14:05". */
export function dateTime(iso) {
  if (!iso) return NOTHING;
  const { date, minutes } = parts(iso);
  return `${date} ${minutes}`;
}

/** The same without the date: "14:05:09". */
export function clock(iso) {
  const { minutes, seconds } = parts(iso);
  return `${minutes}:${seconds}`;
}

/** "1 tile", "2 tiles". */
export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

const PLAIN = /^[A-Za-z_./][\w ./:@%+-]*$/;
const RESERVED = /^(true|false|null|yes|no|on|off|~)$|: |:$| $/i;

function scalar(data) {
  if (typeof data === "string") return PLAIN.test(data) && !RESERVED.test(data) ? data : JSON.stringify(data);
  return String(data);
}

const isScalar = (data) => data === null || typeof data !== "object";

/** Data of JSON as YAML that people read: scalars of a list in one line. */
export function yaml(data, indent = "") {
  if (isScalar(data)) return scalar(data);
  if (Array.isArray(data)) {
    if (data.every(isScalar)) return `[${data.map(scalar).join(", ")}]`;
    return data.map((item) => `${indent}- ${yaml(item, `${indent}  `).trimStart()}`).join("\n");
  }
  const entries = Object.entries(data);
  if (entries.length === 0) return "{}";
  return entries
    .map(([key, item]) => {
      const text = yaml(item, `${indent}  `);
      const nested = !isScalar(item) && !text.startsWith("[") && text !== "{}";
      return `${indent}${scalar(key)}:${nested ? `\n${text}` : ` ${text}`}`;
    })
    .join("\n");
}
