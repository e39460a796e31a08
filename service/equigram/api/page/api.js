// Requests to the service. Paths are relative to the page, which may lie below a prefix of a proxy.

const TOKEN = "equigram-token";

let unauthorized = () => {};

/** Whom to tell when the service wants a token, or another one. */
export function onUnauthorized(callback) {
  unauthorized = callback;
}

/** The token of this tab; null without one. */
export const token = {
  get: () => sessionStorage.getItem(TOKEN),
  set: (text) => sessionStorage.setItem(TOKEN, text),
  forget: () => sessionStorage.removeItem(TOKEN),
};

/** An answer with a status of 400 or more, or none at all (status 0). */
export class ServiceError extends Error {
  constructor(status, message) {
    super(message);
    this.name = "ServiceError";
    this.status = status;
  }
}

async function errorOf(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The service answered with status ${response.status}.`;
  return new ServiceError(response.status, message);
}

/** The response to a request with the token; raises ServiceError, and AbortError when the signal aborts. */
export async function request(path, { method = "GET", headers = {}, signal } = {}) {
  const held = token.get();
  let response;
  try {
    response = await fetch(path, {
      method,
      signal,
      headers: held ? { ...headers, Authorization: `Bearer ${held}` } : headers,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, "The service cannot be reached; the page keeps trying.");
  }
  if (response.ok) return response;
  const error = await errorOf(response);
  if (error.status === 401) unauthorized(error.message);
  throw error;
}

/** The body of an answer in JSON. */
export async function json(path, options) {
  return (await request(path, options)).json();
}

/** Names as a part of a path each. */
export const segments = (...names) => names.map((name) => `/${encodeURIComponent(name)}`).join("");

/** A path below a job. */
export const jobPath = (id, rest = "") => `jobs${segments(id)}${rest}`;

/** An object URL of a picture, which cannot carry the token by itself; revoked when the signal aborts. */
export async function objectUrl(path, signal) {
  const blob = await (await request(path, { signal })).blob();
  const url = URL.createObjectURL(blob);
  signal.addEventListener("abort", () => URL.revokeObjectURL(url), { once: true });
  return url;
}
