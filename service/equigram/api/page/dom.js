// Small helpers for elements and for what repeats itself. Data become text nodes and attributes, never markup.

/** The element with an id. */
export const byId = (id) => document.getElementById(id);

/** A new element; attributes that are null or false are left out. */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** Set a text only where it changed: selections stay, and live regions are not read out again. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Give a select these options, [value, text] each, and keep what was chosen where it is still there. */
export function setOptions(select, options) {
  const values = Array.from(select.options, ({ value }) => value);
  if (options.map(([value]) => value).join("\n") === values.join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
  if (options.some(([value]) => value === chosen)) select.value = chosen;
}

/** Show a state of a job as colour, sign and word. */
export function setState(node, state) {
  node.dataset.state = state;
  setText(node, state);
}

/** Say something to those who listen to the page. */
export function announce(text) {
  byId("announcer").textContent = text;
}

/**
 * Await a task and show its error as a sentence in `place`, which is emptied if it succeeds. Errors of pages that were
 * left are nobody's concern, and a missing token is asked for elsewhere.
 */
export async function shown(place, task) {
  try {
    await task();
    place.hidden = true;
  } catch (error) {
    if (error.name === "AbortError" || error.status === 401) return;
    setText(place, error.message);
    place.hidden = false;
  }
}

/** Resolve after some time, or at once when the signal aborts. */
export function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    if (signal.aborted) return resolve();
    const done = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, milliseconds);
    signal.addEventListener("abort", done);
  });
}

function visible(signal) {
  return new Promise((resolve) => {
    const check = () => {
      if (document.hidden && !signal.aborted) return;
      document.removeEventListener("visibilitychange", check);
      signal.removeEventListener("abort", check);
      resolve();
    };
    document.addEventListener("visibilitychange", check);
    signal.addEventListener("abort", check);
    check();
  });
}

/** Run a task again and again, with a pause between, while somebody sees the page. */
export async function repeat(task, milliseconds, signal) {
  while (!signal.aborted) {
    await task();
    await pause(milliseconds, signal);
    await visible(signal);
  }
}

/** A function that runs a task, never twice at a time: calls meanwhile make it run once more in the end. */
export function coalesced(task) {
  let running = null;
  let again = false;
  const run = async () => {
    try {
      while (again) {
        again = false;
        await task();
      }
    } finally {
      running = null;
    }
  };
  return () => {
    again = true;
    running ??= run();
    return running;
  };
}

/** A function that runs a task in the next frame, once in some milliseconds and a fifth of the time at most. */
export function throttled(task, milliseconds, signal) {
  let waiting = false;
  let next = 0;
  return () => {
    if (waiting) return;
    waiting = true;
    setTimeout(
      () =>
        requestAnimationFrame(() => {
          waiting = false;
          if (signal.aborted) return;
          const start = performance.now();
          task();
          const took = performance.now() - start;
          next = start + Math.max(milliseconds, 5 * took);
        }),
      Math.max(0, next - performance.now()),
    );
  };
}

/** Call back with every change between dark and light: canvases do not follow style sheets by themselves. */
export function onColorScheme(callback, signal) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", callback, { signal });
}

/** The value of a custom property where a node is. */
export const cssColor = (node, name) => getComputedStyle(node).getPropertyValue(name).trim();
