"""Which tokens a slot steers."""

import jax
import numpy as np
import pytest
from tiny import KINDS, close, layouts, random_steering, rows, run, slot_of, turn

from jaxsteer import Model, Positions, Slot, make_batch
from jaxsteer.batches import select
from jaxsteer.interventions import LoReFT

# Two turns: prompt a, reply b, question c, reply d; then an example of its own without a reply, then padding.
SEGMENTS = [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0]
WEIGHTS = [0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0]
SELECTED = {
    "prompt": [1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0],
    "completion": [0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0],
    "last": [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0],
    "first:2+last:2": [1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0],
    "first:1+last:2": [1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0],
    "first:3": [1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0],
    "last:3": [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
    "last:1": [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
}


@pytest.mark.parametrize("kind", SELECTED)
def test_selected_tokens(kind):
    batch = make_batch(np.arange(14)[None], np.array([SEGMENTS]), np.array([WEIGHTS], np.float32))
    got = select(Positions.parse(kind), batch)
    np.testing.assert_array_equal(np.asarray(got[0], int), SELECTED[kind])


def test_all_tokens_need_no_mask():
    assert select(Positions(), make_batch(np.ones((1, 3), int))) is None


@pytest.mark.parametrize("length", range(1, 18))
def test_first_and_last_never_meet(length):
    """Each selects at most half of the prompt, whether they are in one slot or in two."""
    batch = make_batch(np.ones((1, 18), int), None, np.arange(18)[None] >= length)
    first, last, both = (select(Positions.parse(kind), batch) for kind in ("first:7", "last:7", "first:7+last:7"))
    assert np.sum(first) == np.sum(last) == min(7, length // 2)
    assert not np.any(first & last)
    np.testing.assert_array_equal(first | last, both)


def test_only_selected_tokens_are_steered(tiny_config, tiny_base):
    """At the steered layer, a shift changes the selected tokens and no others."""
    batch, _ = layouts(tiny_config.vocab_size)["packed"]
    plan = tuple(
        slot_of("fixed", tiny_config, slot=kind, sites=("block",), layers=(3,), positions=Positions.parse(kind))
        for kind in KINDS
    )
    steering = random_steering(plan, tiny_config, scale=1.0)
    tap = lambda kind: run(Model(tiny_config, plan), tiny_base, turn(steering, kind), batch, capture=("block",)).taps
    for slot in plan:
        moved = np.any(np.asarray(tap(slot.name)["block"][3] != tap("nothing")["block"][3]), axis=-1)
        mask = select(slot.positions, batch)
        np.testing.assert_array_equal(moved, np.ones_like(moved) if mask is None else mask, err_msg=slot.name)


def test_loss_weights_do_not_decide_what_is_steered(tiny_config, tiny_base):
    """Loss on the prompt, random, zero or negative weights: the same hidden states, bit for bit."""
    kinds = ("prompt", "completion", "last", "first:2+last:2")
    batch, _ = layouts(tiny_config.vocab_size)["packed"]
    plan = tuple(
        slot_of("fixed", tiny_config, slot=kind, sites=("block",), positions=Positions.parse(kind)) for kind in kinds
    )
    model, steering = Model(tiny_config, plan), random_steering(plan, tiny_config, scale=1.0)
    draw = np.random.default_rng(0)
    weightings = [np.ones_like, np.zeros_like, np.negative, lambda w: draw.normal(size=w.shape).astype(w.dtype)]
    for change in weightings:
        other = batch._replace(weights=change(np.asarray(batch.weights)))
        for kind in kinds:
            alone = turn(steering, kind)
            want, got = (run(model, tiny_base, alone, each).hidden for each in (batch, other))
            np.testing.assert_array_equal(got, want, err_msg=kind)


def test_untied_positions_with_the_same_parameters_are_tied_ones(tiny_config, tiny_base):
    """ReFT's two slots, at the first and the last tokens, for prompts longer and shorter than 14 tokens."""
    slot = lambda name, kind: Slot(name, LoReFT(), ("block", "mlp"), positions=Positions.parse(kind))
    tied = (slot("both", "first:7+last:7"),)
    untied = (slot("first", "first:7"), slot("last", "last:7"))
    p = random_steering(tied, tiny_config)["both"]
    draw = np.random.default_rng(0)
    example = lambda prompt, length: (draw.integers(3, 61, length), np.arange(length) >= prompt)
    batch, _ = rows([(0, [(0, example(17, 20))]), (1, [(1, example(9, 11)), (2, example(1, 4))])], 20)
    see = lambda plan, steering: run(Model(tiny_config, plan), tiny_base, steering, batch).hidden
    want = see(tied, {"both": p})
    close(see(untied, {"first": p, "last": p}), want, 1e-5)
    assert np.abs(want - see(tied, {"both": jax.tree.map(np.zeros_like, p)})).max() > 1e-2
