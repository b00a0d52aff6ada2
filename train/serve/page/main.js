// Ties the controls, the conversation and the views together.

import { get, hasKey, onUnauthorized } from "./api.js";
import { Controls } from "./controls.js";
import { Conversation, curlCommand, exported } from "./conversation.js";
import { at, element } from "./dom.js";
import { TurnView } from "./turns.js";

const controls = new Controls(moved);
const conversation = new Conversation(changed);
let views = new Map(); // turn -> TurnView

const act = {
  again: () => again(),
  baseAgain: () => { if (controls.check()) conversation.baseAgain(controls.snapshot()); },
  effects: (turn, answer) => conversation.effects(turn, answer),
  show: (turn, index) => {
    turn.shown = index;
    changed(turn);
  },
};

function changed(turn, answer) {
  const view = views.get(turn);
  if (!view && conversation.turns.includes(turn)) addView(turn);
  const follow = atBottom();
  views.get(turn)?.update(turn === conversation.last, controls); // none if cleared meanwhile
  if (follow && answer?.state === "running") scrollTo({ top: document.body.scrollHeight });
  showState();
}

function addView(turn) {
  for (const [, earlier] of views) earlier.open = false;
  const view = new TurnView(turn, views.size + 1, act);
  const before = [...views.keys()].at(-1);
  views.set(turn, view);
  at("conversation").append(view.root);
  if (before) views.get(before).update(false, controls);
  view.update(true, controls);
  scrollTo({ top: document.body.scrollHeight });
}

function showState() {
  const { busy, turns } = conversation;
  at("send").hidden = busy;
  at("stop").hidden = !busy;
  at("empty").hidden = turns.length > 0;
  for (const id of ["clear", "curl", "export"]) at(id).disabled = turns.length === 0;
  const status = turns.length === 0 ? "" : busy ? "Answering" : "Answers complete";
  if (at("status").textContent !== status) at("status").textContent = status;
}

/** Whether the page's end is on the screen: then it stays there while answers grow. */
function atBottom() {
  return innerHeight + scrollY >= document.body.scrollHeight - 80;
}

function send() {
  const text = at("message").value;
  if (!text.trim() || conversation.busy || !controls.base || !controls.check()) return;
  at("message").value = "";
  fitMessage();
  closeSheet();
  conversation.send(text, controls.snapshot());
}

function again() {
  if (conversation.last && controls.adapter && controls.check()) conversation.again(controls.snapshot());
}

/** A dial came to rest. */
function moved() {
  if (conversation.last) views.get(conversation.last).update(true, controls);
  if (controls.auto && conversation.last?.steered.length) again();
}

function stop() {
  conversation.stop();
  at("message").focus();
}

async function loadModels() {
  try {
    controls.setModels((await get("v1/models")).data);
    notice("");
  } catch (error) {
    notice(error.message);
  }
}

function notice(text) {
  at("notice").hidden = !text;
  at("notice").replaceChildren(text, ...(text
    ? [element("button", { type: "button", className: "small", onclick: loadModels }, "Try again")] : []));
}

function fitMessage() {
  const field = at("message");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, innerHeight * 0.4)}px`;
}

function keyFor(message) {
  const dialog = at("key-dialog");
  at("key-about").textContent = message;
  at("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    at("key-form").onsubmit = () => resolve(at("key").value.trim() || null);
    dialog.oncancel = () => resolve(null);
    at("key-cancel").onclick = () => { dialog.close(); resolve(null); };
  });
}

async function copyCurl() {
  const { base, steered, shown } = conversation.last;
  const command = curlCommand((steered[shown] ?? base).request, hasKey());
  try {
    await navigator.clipboard.writeText(command);
    confirmOn("curl", "Copied");
  } catch {
    at("text").value = command;
    at("text-dialog").showModal();
    at("text").select();
  }
}

function confirmOn(id, text) {
  const label = at(id).querySelector(".label");
  const before = label.dataset.text ??= label.textContent;
  label.textContent = at("status").textContent = text;
  setTimeout(() => { label.textContent = before; }, 1500);
}

function save() {
  const text = JSON.stringify(exported(conversation, controls), null, 1);
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = element("a", { href: url, download: `jaxsteer-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

function clear() {
  conversation.clear();
  views = new Map();
  at("conversation").replaceChildren();
  showState();
  at("message").focus();
}

const isDark = () => {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

function flipTheme() {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("jaxsteer.theme", theme);
  document.dispatchEvent(new Event("themechange"));
  showTheme();
}

const showTheme = () => at("theme").setAttribute("aria-pressed", isDark());

function closeSheet() {
  document.body.classList.remove("sheet");
  at("sheet").setAttribute("aria-expanded", "false");
}

function flipSheet() {
  const open = document.body.classList.toggle("sheet");
  at("sheet").setAttribute("aria-expanded", open);
}

at("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
at("message").addEventListener("input", fitMessage);
at("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (conversation.busy) stop();
  else if (document.body.classList.contains("sheet")) { closeSheet(); at("sheet").focus(); }
});
at("dials").addEventListener("strength", () => {
  if (conversation.last) views.get(conversation.last)?.update(true, controls);
});
at("stop").addEventListener("click", stop);
at("clear").addEventListener("click", clear);
at("curl").addEventListener("click", copyCurl);
at("export").addEventListener("click", save);
at("theme").addEventListener("click", flipTheme);
at("sheet").addEventListener("click", flipSheet);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
addEventListener("focus", loadModels); // adapters come and go while the server runs
onUnauthorized(keyFor);
showTheme();
loadModels();
