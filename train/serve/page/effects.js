// Tokens coloured by what steering did to them, the map of layers and tokens, and the chosen token's panel.

import { element, segments } from "./dom.js";
import { change, largest, short, visible } from "./figures.js";
import { HeatMap } from "./heatmap.js";
import { TokenPanel } from "./token.js";

/** What tokens may be coloured by: [value, name on the control, name in the legend]. */
const COLOURS = [
  ["shift", "Shift", "mean shift over layers, ‖h′ − h‖ / ‖h‖"],
  ["change", "Probability", "change of log-probability, nats"],
];

export class EffectsView {
  #drawn = null; // the effects that the elements show
  #by = "shift";
  #chosen = null;
  #tokens = [];
  #body = element("div", { className: "effects-body" });
  #state = element("p", { className: "hint state" });
  #legend;
  #text;
  #readout;
  #map;
  #panel;
  #number;

  constructor(number) {
    this.root = element("section", {
      className: "effects card", id: `effects-${number}`, "aria-label": "What steering did",
    }, this.#state, this.#body);
    this.#number = number;
  }

  /** Show the effects of an answer, or that they are on their way. */
  update(answer) {
    const { effectsState, effectsError, effects, state } = answer;
    this.root.classList.toggle("waiting", effectsState === "waiting");
    this.#state.hidden = effectsState === "done";
    this.#state.classList.toggle("error", effectsState === "error");
    this.#state.textContent = {
      none: state === "running" ? "Measured when the answer is complete." : "There is no answer to measure.",
      waiting: "Measuring …",
      error: effectsError,
    }[effectsState] ?? "";
    if (effects !== this.#drawn) this.#build(effects);
  }

  /** Draw what needs a width again, after the view was hidden. */
  draw() {
    this.#map?.draw();
  }

  #build(effects) {
    this.#drawn = effects;
    this.#map?.close();
    this.#map = null;
    this.#body.replaceChildren();
    if (!effects?.tokens.length) return;
    this.#legend = element("div", { className: "legend" });
    this.#readout = element("p", { className: "readout" });
    this.#panel = new TokenPanel(effects);
    this.#map = new HeatMap(effects, {
      point: (token, layer) => this.#point(token, layer),
      choose: (token) => this.#choose(token, false),
    });
    this.#text = this.#tokenList(effects);
    const colours = segments("Colour tokens by", `colour-${this.#number}`, COLOURS, this.#by, (by) => {
      this.#by = by;
      this.#colour();
    });
    this.#body.append(
      element("div", { className: "effects-main" },
        element("div", { className: "effects-head" }, colours, this.#legend),
        this.#text, this.#map.root,
        element("div", { className: "map-foot" }, this.#readout, element("div", { className: "legend" },
          ...scale("0", largest(effects.shift), "Colour scale of the map")))),
      this.#panel.root);
    this.#colour();
    this.#choose(firstAnswered(effects), false);
    this.#map.draw();
  }

  /** All tokens as a list box: one tab stop, arrow keys move. */
  #tokenList({ tokens }) {
    this.#tokens = tokens.map((token, index) => element("span", {
      className: "token", role: "option", id: `token-${this.#number}-${index}`, "aria-selected": "false",
      "aria-label": spoken(token), onclick: () => this.#choose(index, true),
      onpointerenter: () => this.#point(index, null), onpointerleave: () => this.#point(null, null),
    }, shown(token.text)));
    const parts = ["prompt", "answer"].map((part) => [part, this.#tokens.filter((_, i) => tokens[i].part === part)]);
    return element("div", {
      className: "tokens", role: "listbox", tabIndex: 0, "aria-label": "Tokens of prompt and answer",
      onkeydown: (event) => this.#key(event),
    }, ...parts.filter(([, spans]) => spans.length).map(([part, spans]) => {
      const name = part === "prompt" ? "Prompt" : "Answer";
      return element("div", { role: "group", "aria-label": name },
        element("span", { className: "part", "aria-hidden": "true" }, name), element("div", { className: "run" }, ...spans));
    }));
  }

  #key(event) {
    const last = this.#tokens.length - 1;
    const target = {
      ArrowRight: this.#chosen + 1, ArrowLeft: this.#chosen - 1, ArrowDown: this.#chosen + 1, ArrowUp: this.#chosen - 1,
      Home: 0, End: last, Enter: this.#chosen, " ": this.#chosen,
    }[event.key];
    if (target === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.#choose(Math.min(Math.max(target, 0), last), true);
    if (event.key === "Enter" || event.key === " ") this.#panel.reveal();
  }

  #choose(index, scroll) {
    this.#tokens[this.#chosen]?.setAttribute("aria-selected", "false");
    this.#chosen = index;
    const token = this.#tokens[index];
    token.setAttribute("aria-selected", "true");
    this.#text.setAttribute("aria-activedescendant", token.id);
    if (scroll) token.scrollIntoView({ block: "nearest" });
    this.#map.chosen = index;
    this.#panel.show(index);
    this.#point(null, null);
  }

  /** Say what is under the pointer, or else which token is chosen. */
  #point(index, layer) {
    const at = index ?? this.#chosen;
    const { tokens, shift } = this.#drawn;
    const value = layer === null ? tokens[at].shift : shift[layer][at];
    this.#readout.replaceChildren(
      element("code", {}, visible(tokens[at].text)),
      ` token ${at}${layer === null ? ", mean of layers" : `, layer ${layer}`}: shift `,
      element("strong", {}, short(value)));
  }

  #colour() {
    const { tokens } = this.#drawn;
    const values = tokens.map((token) => (this.#by === "shift" ? token.shift : change(token)));
    const limit = Math.max(...values.map((value) => Math.abs(value ?? 0))) || 1;
    values.forEach((value, index) => {
      const share = (value ?? 0) / limit;
      const span = this.#tokens[index];
      span.style.setProperty("--share", `${(Math.abs(share) * 100).toFixed(1)}%`);
      span.classList.toggle("negative", share < 0);
    });
    const signed = this.#by === "change";
    const [, , name] = COLOURS.find(([by]) => by === this.#by);
    this.#legend.replaceChildren(
      ...scale(signed ? short(-limit) : "0", limit, `Colour scale: ${name}`, signed ? "ramp signed" : "ramp"),
      element("span", { className: "what" }, name));
  }
}

/** A scale of colours between two numbers. */
const scale = (low, high, label, className = "ramp") => [
  element("span", {}, low), element("span", { className, role: "img", "aria-label": label }), element("span", {}, short(high)),
];

/** A token's text as it stands in the text; line ends get a sign. */
const shown = (text) => (text || "∅").replaceAll("\n", "↵\n");

const spoken = (token) => `${token.text.trim() ? token.text : visible(token.text)}, shift ${short(token.shift)}`;

/** The first token that the model wrote, or the last of the prompt. */
function firstAnswered({ tokens }) {
  const found = tokens.findIndex((token) => token.part === "answer");
  return found < 0 ? tokens.length - 1 : found;
}
