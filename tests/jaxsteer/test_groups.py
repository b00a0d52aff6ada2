"""Examples that share their prompt in a row are computed as if each stood alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import Text, alone, groups, in_rows
from tiny import KINDS, all_methods, close, every_kind, fast_jit, random_steering

from jaxsteer import Model
from jaxsteer.groups import Group, shared_length, sharing_refusal, stack_groups
from jaxsteer.objectives import policy_log_probabilities
from jaxsteer.objectives.tokens import by_segment

logps = fast_jit(policy_log_probabilities, static_argnums=0)


def sums(model, base, steering, grouped):
    """The log-probability of each answer, by (row, group, member)."""
    values = by_segment(logps(model, base, steering, grouped.batch), grouped.batch)
    batch = grouped.batch
    where = {
        (r, int(grouped.group[r, t]), int(grouped.member[r, t])): int(batch.segments[r, t])
        for r, t in np.argwhere(np.asarray(batch.weights) != 0)
    }
    return {place: float(values[place[0], segment]) for place, segment in where.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_positions(tiny_config, tiny_base, kind):
    slot = next(slot for slot in every_kind("linear", tiny_config) if slot.name == kind)
    model, steering = Model(tiny_config, (slot,)), random_steering((slot,), tiny_config, scale=0.3)
    whole, shared = (in_rows(groups(tiny_config.vocab_size, shared=s), 2, 56, trunks=s) for s in (False, True))
    assert np.count_nonzero(shared.batch.segments) < np.count_nonzero(whole.batch.segments)
    close(sums(model, tiny_base, steering, shared), sums(model, tiny_base, steering, whole), 1e-5)


@pytest.mark.parametrize("kernel", ["rows", "dense", "chunked"])
def test_every_kernel_and_gradients(tiny_config, tiny_base, kernel):
    plan = all_methods(tiny_config, few=True, kinds=KINDS)
    model, steering = Model(tiny_config, plan, attention=kernel), random_steering(plan, tiny_config)
    found = []
    for shared in (True, False):
        grouped = in_rows(groups(tiny_config.vocab_size, members=3, shared=shared), 3, 96, trunks=shared)

        def loss(steering, batch):
            values = policy_log_probabilities(model, tiny_base, steering, batch)
            return jnp.sum(jnp.tanh(by_segment(values, batch)))

        found.append(fast_jit(jax.value_and_grad(loss))(steering, grouped.batch))
    close(*found, 2e-5)


def test_an_answer_is_what_it_is_alone(tiny_config, tiny_base):
    model, made = Model(tiny_config), groups(tiny_config.vocab_size, count=2, members=3)
    found = sums(model, tiny_base, {}, in_rows(made, 2, 64))
    for (_, group, member), value in found.items():
        text = made[group - 1].examples[member - 1]
        np.testing.assert_allclose(value, alone(model, tiny_base, {}, text).sum(), rtol=1e-5)


def test_what_can_be_shared():
    one, other = Text((1, 2, 3), (4,)), Text((1, 2, 3), (5, 6))
    assert shared_length([one, other]) == 2
    assert shared_length([one, Text((1, 9, 3), (4,))]) == 0
    assert shared_length([one, Text((1, 2), (3, 4))]) == 0  # alike as tokens, but not in what is steered
    assert shared_length([Text((1,), (4,)), Text((1,), (5,))]) == 0
    assert Group((one, other), 2).length == 2 + 2 + 3
    assert Group((one, other)).length == 4 + 5
    assert sharing_refusal("rows") == ""
    assert "segments" in sharing_refusal("splash")
    with pytest.raises(ValueError, match=r"row 0 \(from here\): 7 tokens do not fit a row of 6"):
        stack_groups([[Group((one, other), 2)]], 6, trunks=True)


def test_layout():
    grouped = stack_groups([[Group((Text((1, 2, 3), (4,)), Text((1, 2, 3), (5, 6))), 2)]], 8, trunks=True)
    batch = grouped.batch
    assert batch.tokens[0].tolist() == [1, 2, 3, 4, 3, 5, 6, 0]
    assert batch.segments[0].tolist() == [1, 1, 2, 2, 3, 3, 3, 0]
    assert batch.trunks[0].tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 2, 3, 4, 0]
    assert batch.prompt_lengths[0].tolist() == [3] * 7 + [0]
    assert batch.weights[0].tolist() == [0, 0, 0, 1, 0, 1, 1, 0]
    assert grouped.member[0].tolist() == [0, 0, 1, 1, 2, 2, 2, 0]
    assert partial(stack_groups, [[]], 4)(trunks=True).batch.segments.tolist() == [[0] * 4]
