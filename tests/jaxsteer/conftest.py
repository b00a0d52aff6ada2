"""The steered model that the tests of decoding share, and what it answers to one prompt at a time."""

import numpy as np
import pytest
from decoding import LIMITS, NEW, prompts
from tiny import random_steering, rows, slot_of

from jaxsteer import Model, Positions, generate
from jaxsteer.inference import Decoder


@pytest.fixture(scope="session")
def steered(tiny_config):
    """Kinds of positions that count from the prompt's start, from its end, and in the answer."""
    kinds = ("first:2+last:2", "last", "completion")
    plan = tuple(slot_of("linear", tiny_config, slot=k, positions=Positions.parse(k), sites=("block",)) for k in kinds)
    return Model(tiny_config, plan), random_steering(plan, tiny_config)


@pytest.fixture(scope="session")
def alone(steered, tiny_base):
    """Each prompt by itself, and stop tokens that end some answers: at once, in between, never."""
    model, steering = steered

    def ask(prompt):
        batch, _ = rows([(0, [(0, (prompt.ids, prompt.weights))])], 24)
        return generate(model, tiny_base, steering, batch, max_new_tokens=NEW, stop_tokens=())

    asked = prompts(model.config.vocab_size)
    answers = [np.asarray(ask(prompt).tokens[0]) for prompt in asked]
    return asked, (int(answers[1][0]), int(answers[2][3])), answers


@pytest.fixture(scope="session")
def make(steered, tiny_base):
    """Decoders of the steered model; those with the same limits share their programs."""
    model, steering = steered
    return lambda limits=LIMITS: Decoder(model, tiny_base, steering, limits)
