// Numbers and tokens as text.

const minus = (text) => text.replace("-", "−");

/** Three significant digits. */
export function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 0.001 || size >= 1e5) return minus(value.toExponential(1));
  return minus(size >= 100 ? value.toFixed(0) : value.toPrecision(3));
}

/** exp(log p) in percent. */
export function percent(log) {
  const share = 100 * Math.exp(log);
  if (share > 0 && share < 0.01) return "< 0.01 %";
  return `${share >= 99.95 ? share.toFixed(0) : share >= 10 ? share.toFixed(1) : share.toFixed(2)} %`;
}

/** log p in nats. */
export const nats = (log) => minus(log.toFixed(2));

/** log p after steering less log p before; null for the first token, which nothing predicts. */
export const change = (token) =>
  token.log_probability === null ? null : token.log_probability - token.log_probability_base;

/** A token's text in which blanks can be seen. */
export const visible = (text) =>
  (text || "∅").replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");

/** The largest of a table of numbers. */
export const largest = (rows) => Math.max(...rows.map((row) => Math.max(...row)));
