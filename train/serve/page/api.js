// The server's HTTP interface: JSON, server-sent events, errors, and the API key.

const KEY = "jaxsteer.key";

let askForKey = async () => false;

/** What to do when the server wants another key: `ask(message)` resolves to the key, or to null for none. */
export function onUnauthorized(ask) {
  let asking = null; // several requests are refused at once, and one question is enough
  askForKey = (message) => {
    asking ??= ask(message).finally(() => { asking = null; });
    return asking;
  };
}

/** Whether requests carry a key. */
export const hasKey = () => sessionStorage.getItem(KEY) !== null;

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.name = "ServerError";
    this.status = status;
  }
}

/** The answer to a GET. */
export const get = async (path) => (await request(path)).json();

/** The answer to a POST of JSON. */
export const post = async (path, body, signal) => (await request(path, body, signal)).json();

/**
 * Text of a completion or a chat answer as it comes: {text, finish, usage}, each null where it did not change.
 */
export async function* stream(path, body, signal) {
  let finish = null;
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  for await (const event of events(await request(path, asked, signal))) {
    if (event.error) throw new ServerError(event.error.message);
    const choice = event.choices?.[0];
    finish = choice?.finish_reason ?? finish;
    yield { text: choice?.delta?.content ?? choice?.text ?? null, finish, usage: event.usage ?? null };
  }
  if (finish === null) throw new ServerError("The server ended the connection before the answer was complete.");
}

async function request(path, body, signal) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await fetchFrom(path, body, key, signal);
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401) throw error;
    if (sessionStorage.getItem(KEY) !== key) continue; // another request brought a key meanwhile
    const given = await askForKey(error.message);
    if (!given) throw error;
    sessionStorage.setItem(KEY, given);
  }
}

async function fetchFrom(path, body, key, signal) {
  const headers = { ...(body && { "content-type": "application/json" }), ...(key && { authorization: `Bearer ${key}` }) };
  try {
    return await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError("The server cannot be reached. Is `jaxsteer serve` still running?");
  }
}

async function errorOf(response) {
  let message = `The server answered ${response.status} ${response.statusText}.`;
  try {
    message = (await response.json()).error.message ?? message;
  } catch {
    // Not an error object of this server: a proxy's page, say.
  }
  const wait = response.headers.get("retry-after");
  if (response.status === 429 && wait) message += ` Try again in ${wait} s.`;
  return new ServerError(message, response.status);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await read(reader);
    if (done) return;
    const blocks = (rest + value).split(/\r\n\r\n|\n\n|\r\r/);
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r\n|\n|\r/).filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection to the server broke off.");
  }
}
