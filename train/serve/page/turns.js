// One turn on the page: the message, the two answers, and what steering did.

import { element, icon } from "./dom.js";
import { strengthText } from "./conversation.js";
import { EffectsView } from "./effects.js";

const ENDINGS = { length: "token limit", stop: "complete", stopped: "stopped" };

export class TurnView {
  #turn;
  #base;
  #steered;
  #effects;
  #variants;
  #listed = "";
  #again;
  #baseAgain;
  #toggle;
  #act;
  #open = true;

  /** @param act  {again(), baseAgain(), show(turn, index), effects(turn, answer)}: what the buttons do. */
  constructor(turn, number, act) {
    this.#turn = turn;
    this.#act = act;
    this.#base = new AnswerView("Base");
    this.#steered = new AnswerView("Steered");
    this.#effects = new EffectsView(number);
    this.#again = element("button", { type: "button", className: "small again", onclick: act.again },
      icon("again"), element("span", {}, "Answer again"));
    this.#baseAgain = element("button", { type: "button", className: "small again", onclick: act.baseAgain },
      icon("again"), element("span", {}, "Answer again"));
    this.#base.foot.append(this.#baseAgain);
    this.#variants = element("div", { className: "variants", role: "group", "aria-label": "Steered answers" });
    this.#toggle = element("button", {
      type: "button", className: "quiet small toggle", "aria-expanded": "true", "aria-controls": this.#effects.root.id,
      onclick: () => { this.open = !this.#open; },
    }, icon("open"), element("span", {}, "What steering did"));
    this.#steered.root.classList.add("steered");
    this.#steered.foot.append(this.#variants, this.#again);
    const answers = turn.steered.length ? [this.#base.root, this.#steered.root] : [this.#base.root];
    this.root = element("article", { className: "turn", "aria-label": `Message ${number}` },
      element("p", { className: "asked" }, turn.text),
      element("div", { className: answers.length > 1 ? "answers" : "answers single" }, ...answers),
      ...(turn.steered.length ? [this.#toggle, this.#effects.root] : []));
  }

  /** Whether the effects are shown; fetches them where that was not done yet. */
  set open(open) {
    this.#open = open;
    this.#toggle.setAttribute("aria-expanded", open);
    this.#effects.root.hidden = !open;
    this.#wantEffects();
    this.#effects.draw();
  }

  /**
   * Show the turn as it is now.
   *
   * @param {boolean} last  Whether no turn follows; only then the steered model may be asked again.
   * @param controls  What would be asked for now: {adapter, strength}.
   */
  update(last, { adapter, strength }) {
    const { base, steered, shown } = this.#turn;
    this.#base.update(base);
    this.#baseAgain.hidden = !last || !["error", "stopped"].includes(base.state);
    if (!steered.length) return;
    const answer = steered[shown];
    const { model, steering_strength } = answer.request.body;
    this.#steered.update(answer, `${model} ${strengthText(steering_strength)}`);
    this.#again.hidden = !last;
    this.#showAgain(adapter && adapter.id !== model ? `Answer with ${adapter.id}`
      : strengthText(strength) !== strengthText(steering_strength) ? `Answer at ${strengthText(strength)}` : null);
    this.#showVariants(steered, shown);
    this.#toggle.hidden = answer.state === "error" && !answer.text;
    this.#effects.root.hidden = this.#toggle.hidden || !this.#open;
    this.#wantEffects();
    this.#effects.update(answer);
  }

  /** The button is plain while the answer is what the controls would give. */
  #showAgain(moved) {
    this.#again.classList.toggle("primary", moved !== null);
    const text = moved ?? "Answer again";
    if (this.#again.lastChild.textContent !== text) this.#again.lastChild.textContent = text;
  }

  #showVariants(steered, shown) {
    const requests = steered.map((answer) => answer.request.body);
    const several = requests.some(({ model }) => model !== requests[0].model);
    const names = requests.map(({ model, steering_strength }) =>
      `${several ? `${model} ` : ""}${strengthText(steering_strength)}`);
    const state = JSON.stringify([names, shown]);
    if (state === this.#listed) return; // as it is, so that a click is not lost
    this.#listed = state;
    this.#variants.hidden = steered.length < 2;
    const focused = this.#variants.contains(document.activeElement);
    this.#variants.replaceChildren(...names.map((name, index) => element("button", {
      type: "button", className: "chip", "aria-pressed": `${index === shown}`,
      onclick: () => this.#act.show(this.#turn, index),
    }, name)));
    if (focused) this.#variants.children[shown].focus();
  }

  #wantEffects() {
    const answer = this.#turn.steered[this.#turn.shown];
    const complete = answer && (answer.state === "done" || (answer.state === "stopped" && answer.text));
    if (this.#open && complete && answer.effectsState === "none") this.#act.effects(this.#turn, answer);
  }
}

class AnswerView {
  #text = document.createTextNode("");
  #name;
  #facts;
  #error;

  constructor(title) {
    this.#name = element("span", { className: "name" });
    this.#facts = element("span", { className: "facts" });
    this.#error = element("p", { className: "error", role: "alert", hidden: true });
    this.foot = element("footer", {}, this.#facts);
    this.root = element("section", { className: "answer", "aria-label": `${title} answer` },
      element("header", {}, element("h2", {}, title), this.#name),
      element("div", { className: "text" }, this.#text), this.#error, this.foot);
  }

  update(answer, name = answer.request.body.model) {
    const running = answer.state === "running";
    if (this.#text.data !== answer.text) this.#text.data = answer.text;
    this.#name.textContent = name;
    this.root.classList.toggle("running", running);
    this.root.setAttribute("aria-busy", running);
    this.root.classList.toggle("nothing", !running && !answer.text && answer.state !== "error");
    this.#error.hidden = answer.state !== "error";
    this.#error.textContent = answer.state === "error" ? answer.error : "";
    this.#facts.textContent = running ? "" : facts(answer);
  }
}

function facts({ state, finish, tokens, seconds, first }) {
  if (state === "error") return "";
  const parts = [ENDINGS[state === "stopped" ? state : finish] ?? finish];
  if (tokens) parts.unshift(tokens === 1 ? "1 token" : `${tokens} tokens`);
  if (tokens > 1 && seconds > first) parts.push(`${((tokens - 1) / (seconds - first)).toFixed(1)} tokens/s`);
  return parts.join(", ");
}
