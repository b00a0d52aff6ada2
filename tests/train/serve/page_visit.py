"""The page as tests use it: a server of a tiny model, and what a visitor does."""

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from tiny import random_steering, slot_of
from tiny_model import TINY
from tiny_server import serving
from tiny_tokenizer import tiny_tokenizer

from jaxsteer.io import save_hf, save_steering
from jaxsteer.models.transformer import init_base
from train.serve.app import make_app
from train.serving.engine import CLIENTS, Engine, EngineSettings
from train.serving.models import open_roster

SIZES = EngineSettings(replace(CLIENTS, rows=4, max_prompt=384, max_new_tokens=128, chunk=2), queue=8)
CONFIG = replace(TINY, max_length=512)
PLAN = (
    slot_of("linear", CONFIG, slot="up", sites=("block",)),
    slot_of("lora", CONFIG, slot="low", sites=("attn.q",)),
)
A, Z = 67, 92
"""Ids of the letters in the tiny tokenizer."""


class Letters(NamedTuple):
    """A server: its address, and its engine."""

    url: str
    engine: Engine


@contextmanager
def letters_server(folder):
    """A server of a tiny model that writes letters, and of a steering file with two slots."""
    base = init_base(CONFIG, jax.random.key(3))
    likely = jnp.full((CONFIG.vocab_size, 1), 2.0).at[A : Z + 1].set(40.0)
    base = base | {"embed": {"embedding": base["embed"]["embedding"] * likely}}
    save_hf(folder / "tiny", CONFIG, base, "llama", tiny_tokenizer())
    path, notes = folder / "letters.safetensors", {"template": "{prompt}", "chat": True, "max_new_tokens": 8}
    steering = random_steering(PLAN, CONFIG, scale=0.5)
    save_steering(path, steering, PLAN, model_name=str(folder / "tiny"), config=CONFIG, notes=notes)
    with Engine(open_roster({"letters": str(path)}), SIZES) as engine:
        engine.start()
        with serving(make_app(engine)) as url:
            yield Letters(url, engine)


CONTRASTS = """() => {
  const linear = (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const scale = (text) => text.startsWith("color(") ? 1 : 255;
  const parts = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((part) => part / scale(text));
  const luminance = (text) => {
    const [r, g, b] = parts(text).map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  return [...document.querySelectorAll(".token")].map((token) => {
    const style = getComputedStyle(token);
    const [a, b] = [luminance(style.color), luminance(style.backgroundColor)];
    return Math.max(a, b) / Math.min(a, b);
  });
}"""
"""WCAG's contrast between text and ground of each token."""

NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea, canvas, [role]")]
  .filter((each) => !["alert", "status"].includes(each.getAttribute("role")))
  .filter((each) => !(each.getAttribute("aria-label") || each.getAttribute("aria-labelledby") || each.labels?.length
    || each.textContent.trim()))
  .map((each) => each.outerHTML)"""
"""Elements that a screen reader could not name."""

TWICE = """() => {
  const ids = [...document.querySelectorAll("[id]")].map((each) => each.id);
  return ids.filter((id, i) => ids.indexOf(id) !== i);
}"""
"""Ids that more than one element has."""


@dataclass
class Visit:
    """An open page, and what went wrong on it.

    page      of Playwright
    faults    messages on the console and exceptions
    origins   of all requests
    requests  [(path, body)] of those with a body
    """

    page: object
    faults: list[str] = field(default_factory=list)
    origins: set[str] = field(default_factory=set)
    requests: list = field(default_factory=list)

    def saw(self, request):
        """Note a request."""
        _, _, host, path = request.url.split("/", 3)
        self.origins.add(host)
        if request.post_data:
            self.requests.append((path, json.loads(request.post_data)))

    def send(self, text):
        """Send a message, and wait until both answers are there."""
        self.page.get_by_role("textbox", name="Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")
        self.answered()

    def bodies(self, path):
        """What was sent to a path of the API, in order."""
        return [body for sent_to, body in self.requests if sent_to.endswith(path)]

    def answered(self):
        """Wait until no answer is running."""
        self.page.wait_for_selector("#stop", state="hidden")
        self.page.locator(".answer[aria-busy=true]").first.wait_for(state="detached")

    def answers(self):
        """The texts of the last turn: base, steered."""
        turn = self.page.get_by_role("article").last
        return [
            turn.get_by_label(f"{name} answer", exact=True).locator(".text").inner_text()
            for name in ("Base", "Steered")
        ]

    def strength(self, dial, value):
        """Set a dial; the page gets the events of a drag and of its end (input, change)."""
        self.page.get_by_role("slider", name=dial, exact=True).fill(f"{value}")

    def again(self):
        """Ask the steered model again, and wait for its answer."""
        self.page.get_by_role("button", name=re.compile("^Answer (again|at)")).last.click()
        self.answered()

    def effects(self):
        """Wait for the tokens of the last turn's effects."""
        tokens = self.page.get_by_role("listbox", name="Tokens of prompt and answer").last
        tokens.get_by_role("option").first.wait_for()
        return tokens


def fails(visit, url, status, message, **headers):
    """Let requests to a URL fail with an error of the server; the browser's own complaint about it is expected."""
    body = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}})
    visit.page.route(url, lambda route: route.fulfill(status=status, body=body, headers=headers))


def streams(visit, url, *pieces):
    """Let a request be answered with a stream of these texts."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": {}}]
    body = "".join(f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks) + "data: [DONE]\r\n\r\n"
    visit.page.route(url, lambda route: route.fulfill(content_type="text/event-stream", body=body))
