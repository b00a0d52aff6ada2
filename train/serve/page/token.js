// The chosen token: its shift in each layer, its probability, and the likeliest tokens before and after steering.

import { drawing, element } from "./dom.js";
import { change, nats, percent, short, visible } from "./figures.js";

const CHART = { width: 288, height: 84 };

export class TokenPanel {
  #effects;

  constructor(effects) {
    this.#effects = effects;
    this.root = element("aside", { className: "token-panel", "aria-label": "The chosen token" });
  }

  /** Scroll it into view, where it stands below the tokens. */
  reveal() {
    this.root.scrollIntoView({ block: "nearest" });
  }

  show(index) {
    const token = this.#effects.tokens[index];
    this.root.replaceChildren(
      element("header", {}, element("code", { className: "chosen" }, visible(token.text)),
        element("span", { className: "hint" }, `${token.part} token ${index}, id ${token.id}`)),
      this.#layers(index),
      probabilities(token),
      tops(token));
  }

  #layers(index) {
    const shifts = this.#effects.shift.map((row) => row[index]);
    const peak = Math.max(...shifts);
    const strongest = shifts.indexOf(peak);
    const text = peak > 0 ? `up to ${short(peak)}, at layer ${strongest}` : "none";
    return element("section", {}, element("h3", {}, "Shift by layer ", element("span", { className: "hint" }, text)),
      chart(shifts, peak, `Shift by layer: ${text}`));
  }
}

/** Bars from layer 0 on the left, the strongest as high as the chart. */
function chart(values, peak, label) {
  const step = CHART.width / values.length;
  const bars = values.map((value, layer) => {
    const height = peak > 0 ? (value / peak) * CHART.height : 0;
    const box = { x: layer * step + step * 0.1, y: CHART.height - height, width: step * 0.8, height };
    const area = { x: layer * step, y: 0, width: step, height: CHART.height, class: "area" };
    const title = drawing("title", {}, `layer ${layer}: ${short(value)}`);
    return drawing("g", {}, title, drawing("rect", area), drawing("rect", { ...box, class: "column" }));
  });
  return element("div", { className: "chart" },
    drawing("svg", {
      viewBox: `0 0 ${CHART.width} ${CHART.height}`, preserveAspectRatio: "none", role: "img", "aria-label": label,
    }, ...bars),
    element("div", { className: "ends", "aria-hidden": "true" },
      element("span", {}, "0"), element("span", {}, "layer"), element("span", {}, `${values.length - 1}`)));
}

function probabilities(token) {
  const moved = change(token);
  if (moved === null) {
    return element("p", { className: "hint" }, "Nothing comes before the first token, so no probability is given to it.");
  }
  const cell = (name, log, className) => element("div", { className }, element("dt", {}, name),
    element("dd", {}, percent(log), element("span", { className: "hint" }, `log p ${nats(log)}`)));
  return element("section", {}, element("h3", {}, "Probability of this token ",
    element("span", { className: "hint" }, `${moved > 0 ? "+" : ""}${short(moved)} nats`)),
  element("dl", { className: "both" }, cell("Base", token.log_probability_base, "base"),
    cell("Steered", token.log_probability, "steered")));
}

function tops(token) {
  if (!token.top?.length) return "";
  return element("section", {}, element("h3", {}, "Likeliest tokens here"),
    element("div", { className: "both" }, topList("Base", token.top_base, token, "base"),
      topList("Steered", token.top, token, "steered")));
}

function topList(name, top, token, className) {
  return element("div", { className }, element("h4", {}, name), element("ol", { className: "tops", "aria-label": `${name}, likeliest tokens` },
    ...top.map((each) => {
      const item = element("li", { className: each.text === token.text ? "this" : "" },
        element("code", {}, visible(each.text)), element("span", {}, percent(each.log_probability)));
      item.style.setProperty("--p", `${Math.exp(each.log_probability) * 100}%`);
      return item;
    })));
}
