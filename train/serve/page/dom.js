// Elements without markup: whatever a model wrote can only ever become text.

const SVG = "http://www.w3.org/2000/svg";

/** The element with an id. */
export const at = (id) => document.getElementById(id);

/**
 * A new element.
 *
 * @param {string} tag
 * @param {object} settings  on… are listeners, `style` holds custom properties, names with a dash and `role` are
 *   attributes, the others properties.
 * @param {...(Node|string|null)} children  Strings become text nodes; null is left out.
 */
export function element(tag, settings = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) made.style.setProperty(key, text);
    else if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** A new SVG element with attributes. */
export function drawing(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** One of the icons in index.html. */
export const icon = (name) =>
  drawing("svg", { class: "icon", "aria-hidden": "true" }, drawing("use", { href: `#icon-${name}` }));

/** Radio buttons that look like one control; `choose` gets the value of the one taken. */
export function segments(label, name, options, chosen, choose) {
  const radios = options.map(([value, text]) =>
    element("label", {}, element("input", {
      type: "radio", name, value, checked: value === chosen, onchange: () => choose(value),
    }), element("span", {}, text)));
  return element("fieldset", { className: "segments small" }, element("legend", { className: "unseen" }, label), ...radios);
}
