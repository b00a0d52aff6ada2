"""Logits, losses and gradients against the paper's reference implementation, peft and transformers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, fast_jit, run

from jaxsteer import Fixed, Linear, LoRA, Model, Nonlinear, Positions, Slot, make_batch
from jaxsteer.io import load_model
from jaxsteer.models.transformer import forward, output_embedding
from jaxsteer.objective import Targets, cross_entropy, logits_of
from jaxsteer.types import PROJECTIONS

HF_PROJECTIONS = {
    **{f"attn.{name}": f"self_attn.{name}_proj" for name in "qkvo"},
    **{f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
# The reference's hook named `attn` sits on the norm before the MLP.
THEIR_SITE = {"block": "block", "mlp.in": "attn", "mlp": "mlp"}


def post_block(method, **slot):
    return Slot("s", method, ("block",), **slot)


CASES = {
    "steerling/block_silu": post_block(Nonlinear(rank=4, alpha=1.5)),
    "steerling/block_linear": post_block(Linear(rank=4)),
    "steerling/block_relu": post_block(Nonlinear(rank=3, activation="relu")),
    "steerling/block_gelu": post_block(Nonlinear(rank=3, activation="gelu")),
    "steerling/block_tanh": post_block(Nonlinear(rank=3, activation="tanh")),
    "steerling/block_last_token": post_block(Nonlinear(rank=4), positions=Positions("last")),
    "steerling/block_layers_0_2": post_block(Nonlinear(rank=4), layers=(0, 2)),
    "steerling/submodules": Slot("s", Nonlinear(rank=4), ("mlp.in", "mlp")),
    "steerling/fixed_block_attn_mlp": Slot("s", Fixed(), ("block", "mlp.in", "mlp")),
    "peft/lora": Slot("s", LoRA(rank=4, alpha=6.0), PROJECTIONS),
}


@pytest.fixture(scope="module")
def reference(golden):
    return np.load(golden / "reference.npz")


def their_name(method, site, param, layer):
    if isinstance(method, LoRA):
        path = f"base_model.model.model.layers.{layer}.{HF_PROJECTIONS[site]}"
        return f"{path}.lora_{param}.default.weight"
    stem = f"layer{layer}_{THEIR_SITE[site]}"
    return stem if param == "v" else f"{stem}.{ {'D': 'down', 'U': 'up'}[param] }.weight"


def read(reference, case, slot, what, layers):
    """Their parameters or gradients in the layout of the steering pytree."""
    names = {Fixed: ("v",), LoRA: ("A", "B")}.get(type(slot.method), ("D", "U"))
    stack = lambda site, param: jnp.stack(
        [
            jnp.asarray(reference[f"{case}/{what}/{their_name(slot.method, site, param, i)}"])
            for i in slot.active_layers(layers)
        ]
    )
    return {"s": {site: {param: stack(site, param) for param in names} for site in slot.sites}}


@pytest.mark.parametrize("case", CASES)
def test_steered_logits_loss_and_gradients(case, reference, golden_llama):
    slot, base = CASES[case], golden_llama.base
    steering = read(reference, case, slot, "param", 3)
    # Unsupervised as a batch: `last` is then the end of the row, which is what the reference's "last" means. The
    # loss takes its weights apart from it.
    batch = make_batch(reference["ids"])
    weights = jnp.asarray(reference["loss_weights"])
    shift = lambda field: jnp.pad(field[:, 1:], ((0, 0), (0, 1)))
    targets = Targets(shift(batch.tokens), shift(weights))

    @fast_jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(steering):
        hidden = forward(Model(golden_llama.config, (slot,)), base, steering, batch).hidden
        head = output_embedding(base)
        return cross_entropy(hidden, head, targets) / jnp.sum(targets.weights), logits_of(hidden, head)

    (value, logits), grads = loss(steering)
    close(logits, reference[f"{case}/logits"], 1e-5)
    close(value, reference[f"{case}/loss"], 1e-5)
    close(grads, read(reference, case, slot, "grad", 3), 1e-5)
    # The case steers at all: its logits are not the base model's.
    assert np.abs(reference[f"{case}/logits"] - reference["base/logits"]).max() > 1e-3


def test_base_logits_hidden_and_loss(reference, golden_llama):
    batch = make_batch(reference["ids"], None, reference["loss_weights"])
    out = run(Model(golden_llama.config), golden_llama.base, {}, batch, capture=("block",))
    close(logits_of(out.hidden, output_embedding(golden_llama.base)), reference["base/logits"], 1e-5)
    embedded = golden_llama.base["embed"]["embedding"][batch.tokens]
    close(embedded, reference["base/hidden_0"], 1e-5)
    for i in (1, 2):
        close(out.taps["block"][i - 1], reference[f"base/hidden_{i}"], 1e-5)


@pytest.mark.parametrize("name", ["tiny_llama_mha", "tiny_llama_rope"])
def test_other_features_of_the_family(name, golden):
    """As many key/value heads as heads and a tied head; llama3-scaled rotary positions, biases, a free head width."""
    theirs = np.load(golden / "tiny_llama.npz")
    model = load_model(golden / name)
    out = run(Model(model.config), model.base, {}, make_batch(theirs["ids"]), capture=("block",))
    close(logits_of(out.hidden, output_embedding(model.base)), theirs[f"{name}/logits"], 1e-5)
    hidden = theirs[f"{name}/hidden"]
    close(out.taps["block"][:-1], hidden[1:-1], 1e-5)
    close(out.hidden, hidden[-1], 1e-5)
