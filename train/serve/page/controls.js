// The side panel: which adapter, how strong, and how answers are drawn.

import { at, element } from "./dom.js";
import { strengthText } from "./conversation.js";

export class Controls {
  models = [];
  #strengths = {}; // of the adapter's slots
  #moved;

  /** @param moved  called when a dial came to rest, or another adapter was chosen. */
  constructor(moved) {
    this.#moved = moved;
    at("adapter").addEventListener("change", () => { this.#choose(); this.#moved(); });
    at("reset").addEventListener("click", () => { this.#setAll(1); this.#moved(); });
    at("settings").addEventListener("submit", (event) => event.preventDefault());
    for (const radio of this.#modes) radio.addEventListener("change", () => this.#showMode());
    at("sampling").addEventListener("input", () => this.#showSampling());
    this.#showMode();
    this.#showSampling();
  }

  /** The list of /v1/models; the adapter stays chosen where it is still served. */
  setModels(models) {
    if (JSON.stringify(models) === JSON.stringify(this.models)) return;
    this.models = models;
    const before = at("adapter").value;
    const names = models.filter((model) => model.steering).map((model) => model.id);
    at("adapter").replaceChildren(...(names.length ? names : [""]).map((name) =>
      element("option", { value: name }, name || "None served")));
    at("adapter").disabled = names.length === 0;
    if (names.includes(before)) at("adapter").value = before;
    else this.#choose();
    at("served").textContent = this.base ?? "";
  }

  get base() {
    return (this.models.find((model) => !model.parent && !model.steering) ?? this.models[0])?.id;
  }

  /** The chosen adapter's entry of /v1/models, or null. */
  get adapter() {
    return this.models.find((model) => model.steering && model.id === at("adapter").value) ?? null;
  }

  /** One number where all slots have the same strength, otherwise a number for each. */
  get strength() {
    const values = Object.values(this.#strengths);
    return values.every((value) => value === values[0]) ? (values[0] ?? 1) : { ...this.#strengths };
  }

  get auto() {
    return at("auto").checked;
  }

  get #modes() {
    return document.querySelectorAll("input[name=mode]");
  }

  /** Whether all numbers are allowed; the first that is not shows why. */
  check() {
    if (!at("settings").checkValidity()) at("sampling").open = true;
    return at("settings").reportValidity();
  }

  /** All settings as plain values. */
  snapshot() {
    const seed = at("seed").value;
    return {
      base: this.base,
      adapter: this.adapter?.id ?? null,
      strength: this.strength,
      mode: document.querySelector("input[name=mode]:checked").value,
      system: at("system").value.trim(),
      template: at("template").value || "{prompt}",
      sampling: {
        temperature: Number(at("temperature").value),
        top_p: Number(at("top-p").value),
        max_tokens: Number(at("max-tokens").value),
        ...(seed !== "" && { seed: Number(seed) }),
      },
    };
  }

  /** Take over what an adapter was trained with. */
  #choose() {
    const steering = this.adapter?.steering;
    at("adapter-about").textContent = steering
      ? steering.slots.map(aboutSlot).join("; ")
      : "Start the server with a steering file to compare: jaxsteer serve FILE.";
    this.#drawDials(steering?.slots ?? [], steering?.strength);
    at("auto").disabled = at("reset").disabled = !steering;
    if (!steering) return;
    document.querySelector(`input[name=mode][value=${steering.chat ? "chat" : "completion"}]`).checked = true;
    at("template").value = steering.template ?? "{prompt}";
    if (steering.max_new_tokens) at("max-tokens").value = steering.max_new_tokens;
    this.#showMode();
    this.#showSampling();
  }

  #drawDials(slots, strength = 1) {
    this.#strengths = Object.fromEntries(slots.map((slot) => [slot.name, strength]));
    const dials = slots.map((slot) => this.#dial(slot.name, slot.name, (value) => {
      this.#strengths[slot.name] = value;
    }));
    if (slots.length > 1) dials.unshift(this.#dial("", "All slots", (value) => this.#fill(value)));
    dials[0]?.append(scale());
    at("dials").replaceChildren(...dials);
    this.#showStrength();
  }

  /** A slider with its number; `slot` is "" for that of all slots. */
  #dial(slot, label, set) {
    const input = element("input", {
      type: "range", min: 0, max: 2, step: 0.05, value: 1, id: `dial-${slot}`,
      oninput: () => { set(Number(input.value)); this.#showStrength(); },
      onchange: () => this.#moved(),
    });
    input.dataset.slot = slot;
    const output = element("output", { htmlFor: input.id, "aria-live": "off" });
    return element("div", { className: slot ? "dial" : "dial all" },
      element("label", { htmlFor: input.id }, label), output, input);
  }

  #fill(value) {
    for (const name of Object.keys(this.#strengths)) this.#strengths[name] = value;
  }

  #setAll(value) {
    this.#fill(value);
    this.#showStrength();
  }

  #showStrength() {
    const shared = this.strength;
    for (const dial of at("dials").children) {
      const input = dial.querySelector("input");
      const value = input.dataset.slot ? this.#strengths[input.dataset.slot] : shared;
      const mixed = typeof value !== "number";
      if (!mixed) input.value = value;
      input.style.setProperty("--at", `${input.value * 50}%`);
      dial.classList.toggle("mixed", mixed);
      dial.querySelector("output").textContent = mixed ? "mixed" : value.toFixed(2);
      input.setAttribute("aria-valuetext", mixed ? "mixed" : `${value.toFixed(2)} times the trained strength`);
    }
    at("sheet-label").textContent = this.adapter ? strengthText(shared) : "";
    at("dials").dispatchEvent(new CustomEvent("strength", { bubbles: true }));
  }

  #showMode() {
    const { mode } = this.snapshot();
    at("system-field").hidden = mode !== "chat";
    at("message").placeholder = mode === "chat" ? "Message both models" : "Text for both models to continue";
  }

  #showSampling() {
    const { temperature, max_tokens } = this.snapshot().sampling;
    at("sampling-about").textContent = `temperature ${temperature}, ${max_tokens} tokens`;
  }
}

/** What the ends and the middle of a dial mean. */
const scale = () => element("div", { className: "ticks", "aria-hidden": "true" },
  element("span", {}, "0 base"), element("span", {}, "1 as trained"), element("span", {}, "2"));

function aboutSlot({ method, sites, layers, positions }) {
  const where = Array.isArray(sites) ? sites.join(", ") : sites;
  const which = positions && positions !== "all" ? `, ${describe(positions)} tokens` : "";
  return `${method} at ${where}${layers == null ? "" : `, ${aboutLayers(layers)}`}${which}`;
}

function aboutLayers(layers) {
  if (!Array.isArray(layers)) return layers === "all" ? "all layers" : `layers ${describe(layers)}`;
  if (layers.length === 1) return `layer ${layers[0]}`;
  const together = layers.every((layer, i) => i === 0 || layer === layers[i - 1] + 1);
  return `layers\u00a0${together ? `${layers[0]}–${layers.at(-1)}` : layers.join(", ")}`;
}

const describe = (value) => (typeof value === "string" ? value : JSON.stringify(value));
