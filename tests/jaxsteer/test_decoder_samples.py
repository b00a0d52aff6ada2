"""Several answers to one prompt: it is read once while a queue is drained, and each answer is what it is alone."""

from dataclasses import replace

import numpy as np
import pytest
from decoding import LIMITS, NEW, Prompt

from jaxsteer import Sampling
from jaxsteer.inference import Request, generate_all
from jaxsteer.inference.layouts import make_admission, next_prefill, prefill_batch, repeated

SAMPLED = Sampling(3.0)


@pytest.fixture(scope="module")
def asked(alone):
    """Five requests for each of three prompts, and for copies of these prompts."""
    some = [alone[0][i] for i in (2, 5, 8)]
    make = lambda prompt, i: Request(prompt, NEW, (), SAMPLED, seed=i)
    shared = [make(prompt, 5 * p + i) for p, prompt in enumerate(some) for i in range(5)]
    return shared, [replace(request, prompt=Prompt(**vars(request.prompt))) for request in shared]


def test_answers_are_those_of_separate_prompts(make, asked):
    shared, apart = (
        {i: answer.tokens.tolist() for i, answer in generate_all(make(replace(LIMITS, rows=6)), some)} for some in asked
    )
    assert shared == apart
    assert len({tuple(tokens) for tokens in shared.values()}) > 3


def test_prompts_are_read_once(asked):
    shared, apart = asked
    assert repeated(shared) == (0,) * 5 + (5,) * 5 + (10,) * 5
    assert repeated(apart) == tuple(range(15))
    strong = [*shared[:2], replace(shared[2], strength={"last": 2.0}), replace(shared[3], adapter=1)]
    assert repeated(strong) == (0, 0, 2, 3)

    layout = next_prefill(shared, 16, 15, many=True, same=repeated(shared))
    assert (layout.size, layout.rows[0]) == (15, [0, 5, 10])
    read = prefill_batch(shared, layout)
    assert np.count_nonzero(read.segments) == sum(len(shared[i]) for i in (0, 5, 10))
    many = next_prefill(shared, 256, 15, many=True, same=repeated(shared))
    assert (len(many.rows), many.rows[0]) == (1, [0, 5, 10])  # as few rows as three prompts need, not as fifteen
    admission = make_admission(shared, layout, 16, stop_width=1)
    assert admission.start[:5].tolist() == [0] * 5
    assert admission.start[5:10].tolist() == [len(shared[0])] * 5


def test_requests_wait_if_their_prompt_has_no_room(asked):
    long = [replace(request, prompt=Prompt(*(np.ones(60, int),) * 3, 60)) for request in asked[0][:3]]
    waiting = [long[0], long[0], long[1], long[1], long[0], long[2]]
    layout = next_prefill(waiting, 16, 6, same=repeated(waiting))
    assert (layout.size, layout.rows, layout.same) == (2, [[0]], (0, 0))
