"""Oracle shifts: what they are, what their replay gives back, and what it must not be confused with."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, fast_jit, layouts, random_steering, run, slot_of

from jaxsteer import LoRA, Model, Slot, fold_weights
from jaxsteer.io import load_model
from jaxsteer.models.config import projections_of
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.transformer import Network, logits_of, output_embedding
from jaxsteer.theory.oracle import Replay, block_inputs, blocks_on, oracle_steering, replayed

shifts_of = fast_jit(oracle_steering, static_argnames=("layers", "site"))
outputs = fast_jit(lambda network, batch, capture=("block",): network(batch, capture), static_argnums=2)


def fine_tuned(config, base, *, merged=True, seed=1):
    """The base with a LoRA that moves its logits a lot, merged or not."""
    plan = (Slot("l", LoRA(rank=2), projections_of(config)),)
    steering = random_steering(plan, config, seed, scale=0.1)
    if not merged:
        return Network(Model(config, plan), base, steering)
    return Network(Model(config), fold_weights(plan, base, steering)[0], {})


def logits(network, out):
    return logits_of(out.hidden, output_embedding(network.base), network.model.config.final_softcap)


@pytest.fixture(scope="module")
def base(tiny_config, tiny_base):
    return Network(Model(tiny_config), tiny_base, {})


@pytest.fixture(scope="module")
def tuned(tiny_config, tiny_base):
    return fine_tuned(tiny_config, tiny_base)


@pytest.fixture(scope="module")
def batch(tiny_config):
    return layouts(tiny_config.vocab_size)["packed"][0]


def test_the_increments_at_every_block_give_the_fine_tuned_logits(base, tuned, batch):
    shifts = shifts_of(base, tuned, batch)
    told, got, plain = (outputs(n, batch) for n in (tuned, replayed(base, shifts), base))
    real = np.asarray(batch.segments > 0)
    a, b, c = (np.asarray(logits(base, out))[real] for out in (told, got, plain))
    np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4)
    assert np.abs(c - a).max() > 0.5
    # The plain differences, at every block, count what came from below again.
    differences = told.taps["block"] - plain.taps["block"]
    twice = np.asarray(logits(base, outputs(replayed(base, differences), batch)))[real]
    assert np.abs(twice - a).max() > 0.1


def test_increments_are_what_each_block_misses_on_the_fine_tuned_stream(base, tuned, batch):
    told = outputs(tuned, batch).taps["block"]
    alone = fast_jit(lambda n, b, x: blocks_on(n, b, x, ("block",)))(base, batch, block_inputs(tuned, batch))["block"]
    close(shifts_of(base, tuned, batch), told - alone, 1e-4)


def test_at_one_layer_it_is_the_plain_difference(base, tuned, batch):
    told, plain = (outputs(n, batch).taps["block"] for n in (tuned, base))
    for layer in (0, 2):
        shifts = shifts_of(base, tuned, batch, (layer,))
        close(shifts[0], told[layer] - plain[layer], 1e-4)
        close(outputs(replayed(base, shifts, (layer,)), batch).taps["block"][layer], told[layer], 1e-4)


def test_some_layers_meet_the_fine_tuned_stream_there(base, tuned, batch):
    shifts = shifts_of(base, tuned, batch, (1, 3))
    assert shifts.shape[0] == 2
    got = outputs(replayed(base, shifts, (1, 3)), batch).taps["block"]
    told = outputs(tuned, batch).taps["block"]
    close(got[jnp.array([1, 3])], told[jnp.array([1, 3])], 1e-4)
    assert np.abs(got[2] - told[2]).max() > 1e-2


@pytest.mark.parametrize("site", ["attn.q", "attn.heads", "attn", "mlp.in", "mlp"])
def test_at_other_sites(site, base, tuned, batch):
    """The site has the fine-tuned values, at every layer."""
    shifts = shifts_of(base, tuned, batch, None, site)
    close(
        outputs(replayed(base, shifts, site=site), batch, (site,)).taps[site],
        outputs(tuned, batch, (site,)).taps[site],
        1e-4,
    )


def test_a_merged_update_and_a_plan_are_the_same_oracle(tiny_config, tiny_base, base, tuned, batch):
    loose = fine_tuned(tiny_config, tiny_base, merged=False)
    close(shifts_of(base, loose, batch), shifts_of(base, tuned, batch), 1e-4)


def test_a_steered_network_is_replayed_on_top_of_its_steering(tiny_config, tiny_base, tuned, batch):
    plan = (slot_of("nonlinear", tiny_config, layers=(1, 2), sites=("block",)),)
    network = Network(Model(tiny_config, plan), tiny_base, random_steering(plan, tiny_config))
    shifts = shifts_of(network, tuned, batch)
    close(outputs(replayed(network, shifts), batch).hidden, outputs(tuned, batch).hidden, 1e-4)


def test_the_oracle_of_a_model_and_itself_is_nothing(base, batch):
    assert not np.any(shifts_of(base, base, batch))
    close(run(base.model, base.base, {}, batch).hidden, outputs(base, batch).hidden, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, golden):
    """Packed rows; a fine-tuned embedding too, which the first block's shift makes up for."""
    loaded = load_model(golden / ("tiny_llama" if name == "llama" else f"families/{name}"))
    config = loaded.config
    base, tuned = Network(Model(config), loaded.base, {}), fine_tuned(config, loaded.base)
    moved = {"embed": jax.tree.map(lambda leaf: leaf * 1.2, tuned.base["embed"])}
    tuned = replace(tuned, base=tuned.base | moved)
    batch = layouts(config.vocab_size)["packed"][0]
    for site in ("block", "mlp", "attn"):
        shifts = shifts_of(base, tuned, batch, None, site)
        got, told = (outputs(n, batch, (site,)) for n in (replayed(base, shifts, site=site), tuned))
        close(got.taps[site], told.taps[site], 1e-4)
        if site == "block":
            close(got.hidden, told.hidden, 1e-4)


def test_what_cannot_be_replayed_is_refused(base, tuned, batch, tiny_config):
    wider = Network(Model(replace(tiny_config, width=48)), tuned.base, {})
    with pytest.raises(ValueError, match="width is 32 in one and 48 in the other"):
        oracle_steering(base, wider, batch)
    with pytest.raises(ValueError, match=r"has a site 'mlp.router'.*attn.heads"):
        oracle_steering(base, tuned, batch, site="mlp.router")
    with pytest.raises(ValueError, match=r"layers \[2, 9\].*0 to 3"):
        oracle_steering(base, tuned, batch, (2, 9))
    with pytest.raises(ValueError, match="a replay holds one batch's shifts"):
        Replay().param_specs(None)
    with pytest.raises(ValueError, match="already has a slot 'oracle'"):
        replayed(replayed(base, jnp.zeros(1)), jnp.zeros(1))
