// What was said, and how it is asked for: no elements here.
//
// A turn has one message, the base model's answer, and the steered model's at one or several strengths, of which one
// is shown and becomes the steered model's history.

import { post, stream } from "./api.js";

const KEPT = 8; // steered answers of a turn; the oldest go first
const TOP_TOKENS = 8;

export class Conversation {
  turns = [];
  #running = new Map(); // answer -> AbortController
  #change;

  /** @param change  called with (turn, answer) whenever an answer has more to show. */
  constructor(change) {
    this.#change = change;
  }

  get busy() {
    return this.#running.size > 0;
  }

  get last() {
    return this.turns.at(-1);
  }

  /** Ask both models; `settings` is a snapshot of the controls. */
  send(text, settings) {
    const turn = {
      text, mode: settings.mode, system: settings.mode === "chat" ? settings.system : "",
      sent: settings.template.replaceAll("{prompt}", () => text), base: null, steered: [], shown: 0,
    };
    const asked = [];
    turn.base = newAnswer(this.#request(turn, "base", settings));
    asked.push(turn.base);
    if (settings.adapter) {
      turn.steered.push(newAnswer(this.#request(turn, "steered", settings)));
      asked.push(turn.steered[0]);
    }
    this.turns.push(turn);
    return Promise.all(asked.map((answer) => this.#run(turn, answer)));
  }

  /** Ask the steered model again; an answer to the very same request is replaced, others stay to compare with. */
  again(settings) {
    const turn = this.last;
    for (const answer of turn.steered) this.#running.get(answer)?.abort();
    const made = newAnswer(this.#request(turn, "steered", settings));
    const same = (answer) => JSON.stringify(answer.request) === JSON.stringify(made.request);
    turn.steered = [...turn.steered.filter((answer) => answer.text && answer.state !== "running" && !same(answer)), made].slice(-KEPT);
    turn.shown = turn.steered.length - 1;
    return this.#run(turn, made);
  }

  /** Ask the base model again, after an error or a stop. */
  baseAgain(settings) {
    const turn = this.last;
    turn.base = newAnswer(this.#request(turn, "base", settings));
    return this.#run(turn, turn.base);
  }

  stop() {
    for (const controller of this.#running.values()) controller.abort();
  }

  clear() {
    this.stop();
    this.turns = [];
  }

  /** What steering does to the tokens of a turn's steered answer; fetched once. */
  async effects(turn, answer) {
    const { model, messages, prompt, steering_strength } = answer.request.body;
    answer.effectsState = "waiting";
    this.#change(turn, answer);
    try {
      answer.effects = await post("v1/effects", {
        model, ...(messages ? { messages } : { prompt }), answer: answer.text, steering_strength, top_tokens: TOP_TOKENS,
      });
      answer.effectsState = "done";
    } catch (error) {
      answer.effectsState = "error";
      answer.effectsError = error.message;
    }
    this.#change(turn, answer);
  }

  async #run(turn, answer) {
    const controller = new AbortController();
    this.#running.set(answer, controller);
    this.#change(turn, answer);
    const start = performance.now();
    try {
      for await (const { text, finish, usage } of stream(answer.request.path, answer.request.body, controller.signal)) {
        if (text) {
          answer.first ??= (performance.now() - start) / 1000;
          answer.text += text;
        }
        answer.finish = finish;
        answer.tokens = usage?.completion_tokens ?? answer.tokens;
        this.#change(turn, answer);
      }
      answer.state = "done";
    } catch (error) {
      answer.state = controller.signal.aborted ? "stopped" : "error";
      answer.error = error.message;
    }
    answer.seconds = (performance.now() - start) / 1000;
    this.#running.delete(answer);
    this.#change(turn, answer);
  }

  #request(turn, side, settings) {
    const body = { model: side === "base" ? settings.base : settings.adapter, ...settings.sampling };
    if (side === "steered") body.steering_strength = settings.strength;
    if (turn.mode === "completion") return { path: "v1/completions", body: { ...body, prompt: turn.sent } };
    return { path: "v1/chat/completions", body: { ...body, messages: this.#messages(turn, side) } };
  }

  /** The conversation before a turn as one of the models knows it, and the turn's message. */
  #messages(turn, side) {
    const messages = turn.system ? [{ role: "system", content: turn.system }] : [];
    for (const earlier of this.turns) {
      if (earlier === turn) break;
      const content = (side === "base" ? earlier.base : earlier.steered[earlier.shown])?.text;
      if (earlier.mode !== "chat" || !content) continue;
      messages.push({ role: "user", content: earlier.sent }, { role: "assistant", content });
    }
    return [...messages, { role: "user", content: turn.sent }];
  }
}

const newAnswer = (request) => ({
  request, text: "", state: "running", finish: null, error: null, tokens: null, first: null, seconds: null,
  effects: null, effectsState: "none", effectsError: null,
});

/** A strength as text: ×0.50, or one number for each slot. */
export function strengthText(strength) {
  const numbers = typeof strength === "number" ? [strength] : Object.values(strength);
  return `×${numbers.map((number) => number.toFixed(2)).join(" / ")}`;
}

/** The conversation as an object for a file. */
export function exported(conversation, controls) {
  const plain = ({ request, text, state, finish, error, effects }) => ({
    request: request.body, text, state, finish_reason: finish, ...(error && { error }), ...(effects && { effects }),
  });
  return {
    object: "jaxsteer.conversation",
    created: new Date().toISOString(),
    settings: controls.snapshot(),
    adapter: controls.adapter,
    messages: conversation.turns.map((turn) => ({
      message: turn.text, sent: turn.sent, mode: turn.mode, system: turn.system || null, base: plain(turn.base),
      steered: turn.steered.map(plain), shown: turn.shown,
    })),
  };
}

/** A shell command for a request of this page. */
export function curlCommand({ path, body }, withKey) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [
    `curl ${quoted(new URL(path, document.baseURI).href)}`,
    "-H 'Content-Type: application/json'",
    ...(withKey ? ['-H "Authorization: Bearer $JAXSTEER_API_KEY"'] : []),
    `-d ${quoted(JSON.stringify(body))}`,
  ];
  return lines.join(" \\\n  ");
}
