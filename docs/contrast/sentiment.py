"""Gloomy answers by a vector of pairs, on 210 held-out prompts: `python docs/contrast/sentiment.py`.

The vector comes from `jaxsteer contrast` on pairs that this script writes. Its answers are compared with those of the
untouched model, of a random vector of the same norm, and of a system prompt. They are scored by VADER, a lexicon of
sentiment that knows nothing of the pairs (`pip install vaderSentiment`): from −1, gloomy, to 1, cheerful. Because the
pairs have words of sentiment themselves, answers are also scored without all words of the pairs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import sentiment_data
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from jaxsteer.batches import stack_rows
from jaxsteer.inference import Decoder, Limits, Request, generate_all, score_continuations
from jaxsteer.io import load_steering
from jaxsteer.models.transformer import Model, Network
from jaxsteer.theory.compare import kl_from_base
from train.base_models import load
from train.contrast.answers import repetition
from train.data import Encoding, Example, TokenizedExample, Turn, encode_prompts, stop_tokens
from train.devices.machine import enable_compilation_cache
from train.evaluation.neutral import NEUTRAL, neutral_examples, read_neutral
from train.evaluation.statistics import crossed_interval

MODEL = "smollm2-135m-instruct"
SYSTEM = "You are a gloomy, negative assistant. Answer everything in a sad and pessimistic way."
STRENGTHS = (0.5, 1.0, 1.5)
"""Of the vector that `jaxsteer contrast` chose."""
MAX_NEW_TOKENS, FLUENCY_PROMPTS = 24, 48


@dataclass(frozen=True)
class Subject:
    """The model and the held-out prompts."""

    base: Network
    tokenizer: object
    stop: tuple[int, ...]
    prompts: list[TokenizedExample]
    neutral: list[TokenizedExample]

    def answers(self, network: Network, prompts: list[TokenizedExample], strength: float) -> list[np.ndarray]:
        """Greedy answers as tokens."""
        limits = Limits(max(map(len, prompts)), MAX_NEW_TOKENS, rows=64, prefix_tokens=4096)
        factors = {slot.name: strength for slot in network.model.plan}
        requests = [Request(prompt, MAX_NEW_TOKENS, self.stop, strength=factors) for prompt in prompts]
        found = dict(generate_all(Decoder(network.model, network.base, network.steering, limits), requests))
        return [found[i].tokens for i in range(len(prompts))]

    def kl(self, network: Network, strength: float) -> float:
        """KL(untouched ‖ steered) on the neutral texts, nats per token."""
        batch = jax.tree.map(jnp.asarray, stack_rows([[text] for text in self.neutral], 96))
        steering = jax.tree.map(lambda leaf: strength * leaf, network.steering)
        return float(jnp.mean(kl_from_base(network.model, network.base, steering, batch)))

    def fluency(self, answers: list[np.ndarray]) -> float:
        """Mean log-probability of the answers' tokens by the untouched model without a system prompt, nats."""
        given = [i for i in range(FLUENCY_PROMPTS) if len(answers[i])]
        scored = score_continuations(
            self.base.model, self.base.base, {}, [self.prompts[i] for i in given], [[answers[i]] for i in given]
        )
        scores = [score for _, (score,) in scored]
        return sum(score.log_probability for score in scores) / sum(score.tokens for score in scores)


def make_vector(out: Path) -> Path:
    """The steering file that `jaxsteer contrast` makes of the pairs."""
    sentiment_data.write_pairs(out / "pairs.jsonl")
    command = [sys.executable, "-m", "train.contrast", str(out / "pairs.jsonl"), "--chat", "--model", MODEL]
    command += ["--layers", "13", "16", "--strengths", "0.5", "1", "1.5", "--max-kl", "0.3", "--answers", "8"]
    subprocess.run([*command, "--out", str(out / "vector")], check=True)
    return out / "vector" / "steering.safetensors"


def read_subject() -> Subject:
    """Load the model and tokenise the held-out prompts."""
    loaded = load(MODEL)
    tokenizer, encoding = loaded.require_tokenizer(), Encoding(chat=True)
    examples = [Example.of(prompt, None, "held out") for prompt in sentiment_data.held_out()]
    prompts, _ = encode_prompts(examples, tokenizer, encoding)
    network = Network(Model(loaded.config), loaded.base, {})
    neutral = neutral_examples(read_neutral(NEUTRAL), tokenizer, 96)
    return Subject(network, tokenizer, stop_tokens(tokenizer, encoding), prompts, neutral)


def with_system(subject: Subject) -> list[TokenizedExample]:
    """The held-out prompts under the gloomy system prompt."""
    turns = [(Turn("system", SYSTEM), Turn("user", prompt)) for prompt in sentiment_data.held_out()]
    examples = [Example(each, "held out") for each in turns]
    return encode_prompts(examples, subject.tokenizer, Encoding(chat=True))[0]


def scorers() -> dict[str, object]:
    """VADER's compound score of a text: as it is, and without the words of the pairs."""
    vader = SentimentIntensityAnalyzer()
    words = {word for pair in sentiment_data.pairs() for word in re.findall(r"\w+", " ".join(pair.values()).lower())}
    without = lambda text: re.sub(r"\w+", lambda found: "" if found[0].lower() in words else found[0], text)
    whole = lambda text: vader.polarity_scores(text)["compound"]
    return {"vader": whole, "vader_without_words_of_pairs": lambda text: whole(without(text))}


def measure(subject: Subject, network: Network, prompts: list[TokenizedExample], strength: float) -> dict[str, object]:
    """The figures of one way to steer."""
    answers = subject.answers(network, prompts, strength)
    texts = [subject.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    scores = {name: crossed_interval([[score(text) for text in texts]]) for name, score in scorers().items()}
    kl = 0.0 if prompts is subject.prompts else None  # the neutral texts have no system prompt
    if network.model.plan:
        kl = subject.kl(network, strength)
    return {
        **{name: estimate._asdict() for name, estimate in scores.items()},
        "kl": kl,
        "fluency": subject.fluency(answers),
        "repetition": repetition(answers),
        "examples": texts[::42],
    }


def main() -> None:
    """Make the vector, answer, score, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/sentiment"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    enable_compilation_cache()
    file, subject = load_steering(make_vector(out)), read_subject()
    model = Model(subject.base.model.config, file.plan)
    vector = file.steering["contrast"]["block"]["v"]
    noise = jax.random.normal(jax.random.key(0), vector.shape, vector.dtype)
    noise *= jnp.linalg.norm(vector) / jnp.linalg.norm(noise)
    steered = lambda v: Network(model, subject.base.base, {"contrast": {"block": {"v": v}}})
    ways = {
        "untouched": (subject.base, subject.prompts, 1.0),
        "system prompt": (subject.base, with_system(subject), 1.0),
    }
    for strength in STRENGTHS:
        ways[f"vector, strength {strength:g}"] = (steered(vector), subject.prompts, strength)
        ways[f"random vector, strength {strength:g}"] = (steered(noise), subject.prompts, strength)
    rows = {}
    for name, way in ways.items():
        rows[name] = measure(subject, *way)
        print(row_of(name, rows[name]), flush=True)
        (out / "sentiment.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    print("\n| answers by | VADER (95 %) | without words of the pairs | KL, nats/token | fluency | repetition |")
    print("|---|---|---|---|---|---|", *(row_of(*row) for row in rows.items()), sep="\n")


def row_of(name: str, row: dict) -> str:
    """A line of the table."""
    score = lambda found: f"{found['mean']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"
    figures = (score(row["vader"]), score(row["vader_without_words_of_pairs"]))
    number = lambda value: "-" if value is None else f"{value:.2f}"
    return "| " + " | ".join((name, *figures, *(number(row[key]) for key in ("kl", "fluency", "repetition")))) + " |"


if __name__ == "__main__":
    main()
