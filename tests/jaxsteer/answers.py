"""Groups of answers to a few prompts, and losses written from their papers in fp64."""

from dataclasses import dataclass

import jax
import numpy as np

from jaxsteer.groups import Group, shared_length, stack_groups
from jaxsteer.inference import score_tokens


@dataclass(frozen=True)
class Text:
    """Tokens of a prompt and an answer."""

    prompt: tuple
    answer: tuple
    source: str = "here"

    @property
    def ids(self):
        return np.array(self.prompt + self.answer, np.int32)

    @property
    def completion(self):
        return np.arange(len(self.ids)) >= len(self.prompt)

    @property
    def weights(self):
        return self.completion.astype(np.float32)

    @property
    def prompt_length(self):
        return len(self.prompt)


def groups(vocab, *, count=5, members=2, seed=0, shared=True):
    """Groups of answers of 1 to 4 tokens to prompts of 3 to 8."""
    draw = np.random.default_rng(seed)
    some = lambda low, high: tuple(draw.integers(3, vocab, draw.integers(low, high)).tolist())
    made = []
    for _ in range(count):
        prompt = some(3, 9)
        texts = tuple(Text(prompt, some(1, 5)) for _ in range(members))
        made.append(Group(texts, shared_length(texts) if shared else 0))
    return made


def in_rows(made, per_row, length, *, trunks=True):
    """The groups, some in each row."""
    rows = [made[i : i + per_row] for i in range(0, len(made), per_row)]
    return stack_groups(rows, length, trunks=trunks)


def alone(model, base, steering, text):
    """fp64 log-probabilities of the tokens of an answer, computed by itself."""
    batch = stack_groups([[Group((text,))]], len(text.ids), trunks=False).batch
    scores = score_tokens(model, base, steering, batch).log_probability
    return np.asarray(scores, np.float64)[0, len(text.prompt) :]


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def leaves(tree):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
