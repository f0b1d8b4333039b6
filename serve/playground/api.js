// Calls of the HTTP API that served the page. The key lives in this module alone: a reload forgets it.

let key = "";

export function useKey(text) {
  key = text.trim();
}

// An answer that is a problem (RFC 9457), or none at all (status 0).
export class Refusal extends Error {
  constructor(status, problem) {
    super(problem.detail || `The server answered ${status}.`);
    this.status = status;
    this.errors = Array.isArray(problem.errors) ? problem.errors : [];
  }
}

// {answer, milliseconds}, or a Refusal. An aborted call throws the browser's AbortError.
export async function ask(method, path, body, signal) {
  const started = performance.now();
  const response = await send(method, path, body, signal);
  const text = await response.text();
  const milliseconds = performance.now() - started;
  let answer;
  try {
    answer = read(text);
  } catch {
    throw new Refusal(response.status, {detail: `The server answered ${response.status} without JSON.`});
  }
  if (!response.ok) throw new Refusal(response.status, answer);
  return {answer, milliseconds};
}

async function send(method, path, body, signal) {
  const headers = {Accept: "application/json"};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const content = body === undefined ? undefined : JSON.stringify(body);
  try {
    return await fetch(path, {method, headers, body: content, signal, cache: "no-store", credentials: "omit"});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, {detail: `No answer: ${error.message}`});
  }
}

// JSON with whole numbers beyond 2^53 kept digit by digit, as item ids may be such; JSON.stringify writes them back.
export function read(text) {
  return JSON.parse(text, (_name, value, context) => {
    const inexact = Number.isInteger(value) && !Number.isSafeInteger(value) && /^-?\d+$/.test(context?.source ?? "");
    return inexact && JSON.rawJSON ? JSON.rawJSON(context.source) : value;
  });
}

export function idText(itemId) {
  return typeof itemId === "object" ? itemId.rawJSON : String(itemId);
}
