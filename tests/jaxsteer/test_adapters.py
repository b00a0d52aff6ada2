"""Several adapters in one batch: each token as if its own adapter were the only one."""

from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    KINDS,
    TURNS,
    all_methods,
    close,
    fast_jit,
    identical,
    layouts,
    method_of,
    random_steering,
    run,
    turn,
)

from jaxsteer import LoRA, Model, NonlinearSteering, Positions, Slot, stack_adapters
from jaxsteer.interventions import METHODS
from jaxsteer.models.transformer import forward, init_cache
from jaxsteer.types import Batch

pytestmark = pytest.mark.xdist_group("adapters")  # the tests share compiled programs

OTHER = {"rank": 5, "alpha": 3.0, "init_scale": 0.5, "dropout": 0.25, "penalty_start": 0.5, "l1": 0.1}
"""Settings in which adapters that share a slot may differ."""


def other_settings(method):
    return replace(method, **{field.name: OTHER[field.name] for field in fields(method) if field.name in OTHER})


@pytest.fixture(scope="module")
def plans(tiny_config):
    """All methods; the same with other ranks, scales, sites and layers; and only every third of them."""
    plan = all_methods(tiny_config, few=True, kinds=KINDS)
    sites = {slot.name: slot.sites[-1:] for slot in all_methods(tiny_config)}
    other = tuple(
        replace(slot, method=other_settings(slot.method), sites=sites[slot.name], layers=(1, 3)) for slot in plan
    )
    return {"whole": plan, "other": other, "few": plan[::3]}


@pytest.fixture(scope="module")
def own(plans, tiny_config):
    """Each adapter's plan and steering."""
    return {name: (plan, random_steering(plan, tiny_config, i)) for i, (name, plan) in enumerate(plans.items())}


@pytest.fixture(scope="module")
def stacked(own, tiny_config):
    return stack_adapters(own, tiny_config, places=4)


@pytest.fixture(scope="module")
def packed(tiny_config):
    """Rows of which one holds two examples, and the index of an adapter for each token."""
    batch, where = layouts(tiny_config.vocab_size)["packed"]
    index = np.full(batch.tokens.shape, -1, np.int32)
    for example, adapter in {3: 0, 2: 1, 0: 2, 4: 0, 1: 1}.items():
        index[where[example]] = adapter
    return batch, where, index


def see(adapters, base, batch, index=None, name="together", **rest):
    model = Model(adapters.config, adapters.plan)
    steering = turn(adapters.steering, name)
    return run(model, base, steering, batch, capture=("block", "attn.heads"), adapters=index, **rest)


def part_of(output, at):
    row, columns = at
    return output.hidden[row, columns], *(tap[:, row, columns] for tap in output.taps.values())


@pytest.mark.parametrize("name", TURNS)
def test_two_adapters_in_a_row_are_each_alone(name, stacked, packed, tiny_base):
    """Bit for bit as in a batch with one adapter; within rounding as without an axis of adapters."""
    batch, where, index = packed
    together = see(stacked, tiny_base, batch, index, name)
    model = Model(stacked.config, stacked.plan)
    for adapter in range(3):
        same = see(stacked, tiny_base, batch, np.full_like(index, adapter), name)
        alone = run(model, tiny_base, turn(stacked.alone(adapter), name), batch, capture=("block", "attn.heads"))
        for at in where.values():
            if (index[at] == adapter).all():
                identical(part_of(together, at), part_of(same, at))
                close(part_of(together, at), part_of(alone, at), 1e-5)
    if name in ("together", *(slot.name for slot in stacked.plan[::3])):
        zero, one = (see(stacked, tiny_base, batch, np.full_like(index, i), name).hidden for i in (0, 1))
        assert np.abs(zero - one).max() > 1e-3


def test_an_adapter_is_what_it_was_by_itself(own, stacked, packed, tiny_base):
    """Ranks, scales, sites, layers and slots are those of its own plan."""
    batch, _, index = packed
    for i, (plan, steering) in list(enumerate(own.values()))[1:]:
        alone = run(Model(stacked.config, plan), tiny_base, steering, batch).hidden
        together = see(stacked, tiny_base, batch, np.full(len(index), i)).hidden
        close(together, alone, 1e-5)


def test_no_adapter_is_the_base_model(stacked, packed, tiny_base):
    """Bit for bit: an index that is none, a place that is free, and adapters of zeros."""
    batch, _, index = packed
    plain = run(Model(stacked.config), tiny_base, {}, batch, capture=("block", "attn.heads"))
    zeros = replace(stacked, steering=jax.tree.map(jnp.zeros_like, stacked.steering))
    for adapters, none in ((stacked, -1), (stacked, 4), (stacked, 3), (zeros, 0)):
        identical(see(adapters, tiny_base, batch, np.full_like(index, none)), plain)
