// Server-sent events by fetch, because EventSource cannot send the token.

import { ServiceError, request } from "./api.js";
import { pause } from "./dom.js";

const FIRST_WAIT = 1000;
const LONGEST_WAIT = 30000;
/** The service sends a comment every 15 seconds: after three times that the connection is dead. */
const SILENCE = 45000;

/**
 * Parses a stream of server-sent events that arrives in pieces, and calls back with each message as {id, event, data}.
 * Lines end with LF or CRLF, which is all that the service sends.
 */
export class Parser {
  constructor(onMessage) {
    this.onMessage = onMessage;
    this.rest = "";
    this.clear();
  }

  clear() {
    this.id = null;
    this.event = "message";
    this.data = [];
  }

  feed(text) {
    const lines = (this.rest + text).split("\n");
    this.rest = lines.pop();
    for (const line of lines) this.line(line.endsWith("\r") ? line.slice(0, -1) : line);
  }

  line(line) {
    if (line === "") {
      if (this.data.length > 0) this.onMessage({ id: this.id, event: this.event, data: this.data.join("\n") });
      this.clear();
      return;
    }
    const colon = line.indexOf(":");
    if (colon === 0) return; // a comment
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") this.data.push(value);
    else if (field === "event") this.event = value;
    else if (field === "id") this.id = value;
  }
}

/** Whether asking once more for the same gets the same answer. */
function isFinal(error) {
  return error instanceof ServiceError && error.status >= 400 && error.status < 500 && error.status !== 429;
}

/**
 * Follow a stream until the signal aborts, and connect again where it broke off.
 *
 * @param path the stream.
 * @param onMessage called with (kind, data, id), data being parsed JSON.
 * @param onConnection called with null when connected, else with seconds until the next try.
 * @returns when the signal aborted. Raises ServiceError where trying again is no use.
 */
export async function follow(path, onMessage, onConnection, signal) {
  let last = null;
  let wait = FIRST_WAIT;
  while (!signal.aborted) {
    try {
      await readOnce(
        path,
        last,
        ({ id, event, data }) => {
          last = id ?? last;
          wait = FIRST_WAIT;
          onMessage(event, JSON.parse(data), id);
        },
        () => onConnection(null),
        signal,
      );
    } catch (error) {
      if (signal.aborted) return;
      if (isFinal(error)) throw error;
    }
    if (signal.aborted) return;
    onConnection(wait / 1000);
    await pause(wait, signal);
    wait = Math.min(2 * wait, LONGEST_WAIT);
  }
}

async function readOnce(path, last, onMessage, onOpen, signal) {
  const watch = new AbortController();
  const either = AbortSignal.any([signal, watch.signal]);
  const headers = { Accept: "text/event-stream", ...(last === null ? {} : { "Last-Event-ID": last }) };
  let timer = setTimeout(() => watch.abort(), SILENCE);
  try {
    const response = await request(path, { headers, signal: either });
    onOpen();
    const parser = new Parser(onMessage);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(() => watch.abort(), SILENCE);
      parser.feed(value);
    }
  } finally {
    clearTimeout(timer);
  }
}
