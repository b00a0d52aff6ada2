// A map of layers (upwards) and tokens (to the right) on a canvas.

import { element } from "./dom.js";
import { largest } from "./figures.js";

const CELL = { narrowest: 4, widest: 26, lowest: 5, highest: 16, height: 230, named: 12 };
const NAMES = 74; // pixels for the tokens' names below the cells
const NAME_LENGTH = 10;

export class HeatMap {
  #effects;
  #canvas;
  #scroll;
  #axis;
  #act;
  #chosen = 0;
  #layer = 0;
  #cell = { width: 0, height: 0 };
  #ratio = 1; // device pixels in a CSS pixel
  #room = 0; // width that the last drawing had
  #size = new ResizeObserver(() => { if (this.#scroll.clientWidth !== this.#room) this.draw(); });
  #theme = matchMedia("(prefers-color-scheme: dark)");
  #redraw = () => this.draw();

  /** @param act  {point(token, layer), choose(token)}; point gets nulls when the pointer leaves. */
  constructor(effects, act) {
    this.#effects = effects;
    this.#act = act;
    const layers = effects.layers;
    this.#layer = layers - 1;
    this.#canvas = element("canvas", {
      tabIndex: 0, role: "img", onpointermove: (event) => this.#act.point(...this.#under(event)),
      onpointerleave: () => this.#act.point(null, null), onclick: (event) => this.#click(event),
      onkeydown: (event) => this.#key(event),
      "aria-label": `Shift of ${effects.tokens.length} tokens in ${layers} layers; arrow keys choose a token and a layer`,
    });
    this.#scroll = element("div", { className: "map-scroll" }, this.#canvas);
    this.#axis = element("div", { className: "map-axis", "aria-hidden": "true" });
    this.root = element("div", { className: "map" }, element("span", { className: "map-title" }, "Layer"), this.#axis, this.#scroll);
    this.#size.observe(this.#scroll);
    this.#theme.addEventListener("change", this.#redraw);
    document.addEventListener("themechange", this.#redraw);
  }

  set chosen(token) {
    this.#chosen = token;
    this.draw();
  }

  close() {
    this.#size.disconnect();
    this.#theme.removeEventListener("change", this.#redraw);
    document.removeEventListener("themechange", this.#redraw);
  }

  draw() {
    const room = this.#scroll.clientWidth;
    if (!room) return;
    this.#room = room;
    const { layers, tokens, shift } = this.#effects;
    const fit = (value, least, most) => Math.max(least, Math.min(most, value));
    this.#cell = {
      width: fit((room - 2) / tokens.length, CELL.narrowest, CELL.widest),
      height: Math.floor(fit(CELL.height / layers, CELL.lowest, CELL.highest)),
    };
    const named = this.#cell.width >= CELL.named;
    const context = this.#sized(tokens.length * this.#cell.width + 2, layers * this.#cell.height + 2, named ? NAMES : 6);
    const colours = this.#colours();
    const limit = largest(shift) || 1;
    shift.forEach((row, layer) => row.forEach((value, token) => {
      context.fillStyle = colours.heat(value / limit);
      context.fillRect(...this.#box(token, layer));
    }));
    this.#frame(context, colours);
    if (named) this.#names(context, colours);
    this.#layerNumbers();
  }

  /** The canvas at the device's resolution, cleared; its context works in CSS pixels. */
  #sized(width, height, below) {
    const ratio = this.#ratio = devicePixelRatio || 1;
    this.#canvas.width = Math.round(width * ratio);
    this.#canvas.height = Math.round((height + below) * ratio);
    this.#canvas.style.width = `${width}px`;
    this.#canvas.style.height = `${height + below}px`;
    const context = this.#canvas.getContext("2d");
    context.scale(ratio, ratio);
    return context;
  }

  /** x, y, width, height of a cell; layer 0 is at the bottom. */
  #box(token, layer) {
    const { width, height } = this.#cell;
    const edge = (number) => 1 + Math.round(number * width * this.#ratio) / this.#ratio; // no seams between cells
    return [edge(token), 1 + (this.#effects.layers - 1 - layer) * height, edge(token + 1) - edge(token), height];
  }

  /** The chosen token's column, and the line between prompt and answer. */
  #frame(context, colours) {
    const { tokens, layers } = this.#effects;
    const bottom = 1 + layers * this.#cell.height;
    const start = tokens.findIndex((token) => token.part === "answer");
    context.lineWidth = 1;
    if (start > 0) {
      context.strokeStyle = colours.quiet;
      context.setLineDash([3, 3]);
      context.beginPath();
      context.moveTo(1.5 + start * this.#cell.width, 0);
      context.lineTo(1.5 + start * this.#cell.width, bottom + 6);
      context.stroke();
      context.setLineDash([]);
    }
    const [x, , width] = this.#box(this.#chosen, 0);
    context.strokeStyle = colours.ink;
    context.lineWidth = 1.5;
    context.strokeRect(x, 1, width, bottom - 1);
  }

  #names(context, colours) {
    context.font = `11px ${getComputedStyle(this.#canvas).fontFamily}`;
    context.textAlign = "right";
    context.textBaseline = "middle";
    this.#effects.tokens.forEach((token, index) => {
      const [x, , width] = this.#box(index, 0);
      const text = token.text.trim().replaceAll("\n", "↵") || (token.text.includes("\n") ? "↵" : "␣");
      context.save();
      context.translate(x + width / 2, 1 + this.#effects.layers * this.#cell.height + 7);
      context.rotate(-Math.PI / 2);
      context.fillStyle = index === this.#chosen ? colours.ink : colours.quiet;
      context.fillText(text.length > NAME_LENGTH ? `${text.slice(0, NAME_LENGTH - 1)}…` : text, 0, 0);
      context.restore();
    });
  }

  #layerNumbers() {
    const { layers } = this.#effects;
    const step = [1, 2, 5, 10, 20, 50].find((each) => each * this.#cell.height >= 15) ?? 100;
    const numbers = [];
    for (let layer = 0; layer < layers; layer += step) {
      const label = element("span", {}, `${layer}`);
      const [, y, , height] = this.#box(0, layer);
      label.style.setProperty("top", `${y + height / 2}px`);
      numbers.push(label);
    }
    this.#axis.replaceChildren(...numbers);
  }

  /** The page's colours, which follow its theme, as numbers. */
  #colours() {
    const rgb = (name) => {
      this.#axis.style.setProperty("color", `var(${name})`);
      return getComputedStyle(this.#axis).color.match(/[\d.]+/g).slice(0, 3).map(Number);
    };
    const [low, high, ink, quiet] = ["--heat-low", "--heat-high", "--ink", "--quiet"].map(rgb);
    this.#axis.style.removeProperty("color");
    return {
      heat: (share) => `rgb(${low.map((part, i) => Math.round(part + share * (high[i] - part))).join(",")})`,
      ink: `rgb(${ink.join(",")})`,
      quiet: `rgb(${quiet.join(",")})`,
    };
  }

  /** [token, layer] under the pointer, or nulls. */
  #under(event) {
    const { left, top } = this.#canvas.getBoundingClientRect();
    const token = Math.floor((event.clientX - left - 1) / this.#cell.width);
    const layer = this.#effects.layers - 1 - Math.floor((event.clientY - top - 1) / this.#cell.height);
    const inside = token >= 0 && token < this.#effects.tokens.length && layer >= 0 && layer < this.#effects.layers;
    return inside ? [token, layer] : [null, null];
  }

  #click(event) {
    const [token, layer] = this.#under(event);
    if (token === null) return;
    this.#layer = layer;
    this.#act.choose(token);
    this.#act.point(token, layer);
  }

  #key(event) {
    const [right, up] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key] ?? [];
    if (right === undefined) return;
    event.preventDefault();
    const within = (value, count) => Math.min(Math.max(value, 0), count - 1);
    this.#layer = within(this.#layer + up, this.#effects.layers);
    const token = within(this.#chosen + right, this.#effects.tokens.length);
    this.#act.choose(token);
    this.#act.point(token, this.#layer);
    this.#reveal(token);
  }

  /** Scroll the map, not the page, to a token. */
  #reveal(token) {
    const [x, , width] = this.#box(token, 0);
    const { scrollLeft, clientWidth } = this.#scroll;
    if (x < scrollLeft) this.#scroll.scrollLeft = x - width;
    else if (x + width > scrollLeft + clientWidth) this.#scroll.scrollLeft = x + 2 * width - clientWidth;
  }
}
