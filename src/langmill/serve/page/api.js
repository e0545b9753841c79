// Requests to the server that sent this page, and to no other.
import { memory } from "./dom.js";
import { t } from "./strings.js";

export class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const session = (() => { try { return sessionStorage; } catch { return null; } })();
let key = memory.get("key", session);

export const apiKey = {
  get: () => key,
  set(value) { key = value; memory.set("key", value, session); },
};

async function send(path, { method = "GET", body, signal } = {}) {
  const headers = { Accept: "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(t("unreachable"));
  }
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Problem(told?.error?.message ?? t("failed", { status: response.status }), response.status);
  }
  return response;
}

export async function call(path, options) {
  const response = await send(path, options);
  return response.status === 204 ? null : response.json();
}

export async function file(path) {
  const response = await send(path);
  return { blob: await response.blob(), name: /filename="([^"]+)"/.exec(response.headers.get("content-disposition"))[1] };
}

// The objects of a stream of server-sent events; an error among them is thrown.
export async function* events(path, body, signal) {
  const response = await send(path, { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem(t("broken"));
    }
    if (part.done) return;
    const whole = (rest + part.value).split("\n\n");
    rest = whole.pop();
    for (const event of whole) {
      if (!event.startsWith("data: ")) continue; // a comment: still alive
      const told = JSON.parse(event.slice(6));
      if (told.error) throw new Problem(told.error.message);
      yield told;
    }
  }
}
