"""Logits, losses and gradients against the paper's reference implementation, peft, pyreft and transformers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import close, fast_jit, identical, run

from jaxsteer import FixedVector, LinearSteering, LoRA, Model, NonlinearSteering, Params, Positions, Slot, make_batch
from jaxsteer.interventions import DiReFT, DoRA, LoReFT, RsLoRA
from jaxsteer.io import load_model
from jaxsteer.models.transformer import forward, logits_of, output_embedding
from jaxsteer.objectives.supervised import cross_entropy
from jaxsteer.objectives.tokens import Targets
from jaxsteer.orthogonality import Orthogonality, joint_overlap, project_orthogonal
from jaxsteer.steering import keep_kind, steering_shapes
from jaxsteer.types import PROJECTIONS, Context

HF_PROJECTIONS = {
    **{f"attn.{name}": f"self_attn.{name}_proj" for name in "qkvo"},
    **{f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
HF_PARAMETERS = {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}
# The reference's hook named `attn` sits on the norm before the MLP.
THEIR_SITE = {"block": "block", "mlp.in": "attn", "mlp": "mlp"}
THEIR_PARAMETER = {"v": "", "D": ".down.weight", "U": ".up.weight"}


def post_block(method, **slot):
    return (Slot("steer", method, ("block",), **slot),)


def weights(method):
    return (Slot("lora", method, PROJECTIONS),)


JOINT = weights(LoRA(rank=4, alpha=8.0)) + post_block(NonlinearSteering(rank=4))

CASES = {
    "steerling/block_silu": post_block(NonlinearSteering(rank=4, alpha=1.5)),
    "steerling/block_linear": post_block(LinearSteering(rank=4)),
    "steerling/block_relu": post_block(NonlinearSteering(rank=3, activation="relu")),
    "steerling/block_gelu": post_block(NonlinearSteering(rank=3, activation="gelu")),
    "steerling/block_tanh": post_block(NonlinearSteering(rank=3, activation="tanh")),
    "steerling/block_last_token": post_block(NonlinearSteering(rank=4), positions=Positions("last")),
    "steerling/block_layers_0_2": post_block(NonlinearSteering(rank=4), layers=(0, 2)),
    "steerling/submodules": (Slot("steer", NonlinearSteering(rank=4), ("mlp.in", "mlp")),),
    "steerling/fixed_block_attn_mlp": (Slot("steer", FixedVector(), ("block", "mlp.in", "mlp")),),
    "peft/lora": weights(LoRA(rank=4, alpha=6.0)),
    "peft/rslora": weights(RsLoRA(rank=4, alpha=6.0)),
    "peft/dora": weights(DoRA(rank=4, alpha=6.0)),
    "joint/all": JOINT,
    "joint/lora_only": JOINT,
    "joint/adapter_only": JOINT,
}


@pytest.fixture(scope="module")
def reference(golden):
    return np.load(golden / "reference.npz")


def their_name(case, site, param, layer):
    if site in PROJECTIONS:
        return f"base_model.model.model.layers.{layer}.{HF_PROJECTIONS[site]}.{HF_PARAMETERS[param]}.default.weight"
    stem = f"layer{layer}_{THEIR_SITE[site]}{THEIR_PARAMETER[param]}"
    return f"adapters.{stem}" if case.startswith("joint/") else stem


def read(reference, case, plan, what, llama):
    """Their parameters or gradients in the layout of the steering pytree."""

    def stack(slot, site, param):
        layers = slot.active_layers(llama.config.layers)
        theirs = jnp.stack([reference[f"{case}/{what}/{their_name(case, site, param, i)}"] for i in layers])
        if (what, param) == ("param", "m"):  # theirs is the magnitude itself, ours its difference from the base's
            group, name = site.split(".")
            theirs -= jnp.linalg.norm(llama.base["blocks"][group][name]["kernel"], axis=1)
        return theirs

    return {
        slot.name: {site: {param: stack(slot, site, param) for param in params} for site, params in sites.items()}
        for slot, sites in zip(plan, steering_shapes(plan, llama.config).values(), strict=True)
    }


def evaluate(llama, plan, steering, reference, wide=False):
    """(loss, logits), and the loss's gradients; in fp64 where wide."""
    # Unsupervised as a batch: `last` is then the end of the row, which is what the reference's "last" means. The
    # loss takes its weights apart from it.
    batch = make_batch(reference["ids"])
    shift = lambda field: np.pad(field[:, 1:], ((0, 0), (0, 1)))
    floats = (llama.base, steering, shift(reference["loss_weights"]))
    if wide:
        floats = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), floats)
    with jax.enable_x64(wide):
        return loss_and_logits(Model(llama.config, plan), *floats, batch, shift(batch.tokens))


@partial(fast_jit, static_argnums=0)
@partial(jax.value_and_grad, argnums=2, has_aux=True)
def loss_and_logits(model, base, steering, weights, batch, tokens):
    hidden = forward(model, base, steering, batch).hidden
    head = output_embedding(base)
    return cross_entropy(hidden, head, Targets(tokens, weights)) / jnp.sum(weights), logits_of(hidden, head)


@pytest.mark.parametrize("case", CASES)
def test_steered_logits_loss_and_gradients(case, reference, golden_llama):
    steering = read(reference, case, CASES[case], "param", golden_llama)
    # Large factors and a large scale: one ulp of the weights moves these logits by 2e-5, so fp32 could not tell.
    wide = case == "peft/rslora"
    (value, logits), grads = evaluate(golden_llama, CASES[case], steering, reference, wide)
    close(logits, reference[f"{case}/logits"], 1e-5)
    close(value, reference[f"{case}/loss"], 1e-5)
    close(grads, read(reference, case, CASES[case], "grad", golden_llama), 1e-5)
    # The case steers at all: its logits are not the base model's.
    assert np.abs(reference[f"{case}/logits"] - reference["base/logits"]).max() > 1e-3


@pytest.mark.parametrize(
    ("case", "kind", "kept"), [("joint/lora_only", "weight", "lora"), ("joint/adapter_only", "activation", "steer")]
)
def test_one_kind_of_a_joint_plan_is_the_reference_without_the_other(case, kind, kept, reference, golden_llama):
    joint = read(reference, "joint/all", JOINT, "param", golden_llama)
    (value, logits), grads = evaluate(golden_llama, JOINT, keep_kind(JOINT, joint, kind), reference)
    close(logits, reference[f"{case}/logits"], 1e-5)
    close(value, reference[f"{case}/loss"], 1e-5)
    close(grads[kept], read(reference, case, JOINT, "grad", golden_llama)[kept], 1e-5)


def test_joint_overlap(reference, golden_llama):
    joint = read(reference, "joint/all", JOINT, "param", golden_llama)
    want = jnp.stack([reference[f"joint/overlap/layer{i}"] for i in range(3)])
    close(joint_overlap(JOINT, joint), want, 1e-5)


def test_projection_leaves_of_the_adapter_what_the_reference_leaves(reference, golden_llama):
    params = Params({}, read(reference, "joint/all", JOINT, "param", golden_llama))
    tx = project_orthogonal(optax.set_to_zero(), JOINT, Orthogonality("projection"))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    got = optax.apply_updates(params, updates).steering
    want = jnp.stack([reference[f"joint/projected/layer{i}_block.down.weight"] for i in range(3)])
    close(got["steer"]["block"]["D"], want, 1e-5)
    identical(got["lora"], params.steering["lora"])
    identical(got["steer"]["block"]["U"], params.steering["steer"]["block"]["U"])


REFT = {
    "loreft": LoReFT(rank=4),
    "loreft_silu": LoReFT(rank=4, activation="silu"),
    "direft": DiReFT(rank=4),
    "noreft": LoReFT(rank=4, constrained=False),
    # Their source is a vector: ours with W = 0.
    "consreft": LoReFT(rank=4),
    "lobireft": DiReFT(rank=4),
}


def reft_params(theirs):
    source = theirs.get("learned_source")
    free = theirs.get("proj_layer.weight")
    return {
        "R": theirs["rotate_layer"].T if free is None else free,
        "W": theirs["learned_source.weight"] if source is None else jnp.zeros((4, 48)),
        # A bias of the projection is subtracted from the source's: W h + b − (R h + c).
        "b": theirs["learned_source.bias"] - theirs.get("proj_layer.bias", 0) if source is None else source,
    }


@pytest.mark.parametrize("case", REFT)
def test_reft_output_and_gradients(case, reference):
    def theirs(what):
        return {
            key.split("/")[-1]: reference[key] for key in reference.files if key.startswith(f"pyreft/{case}/{what}")
        }

    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def value(p, h):
        y = REFT[case].apply(p, h, h, Context(jnp.zeros((), jnp.int32)))
        return jnp.sum(reference[f"pyreft/{case}/cotangent"] * y), y

    (_, y), (grads, dx) = value(reft_params(theirs("param")), jnp.asarray(reference[f"pyreft/{case}/x"]))
    close(y, reference[f"pyreft/{case}/y"], 1e-5)
    close(dx, reference[f"pyreft/{case}/dx"], 1e-5)
    # pyreft does not give the gradient of a rotation: it parametrises it.
    names = {"learned_source.weight": "W", "learned_source.bias": "b", "learned_source": "b", "proj_layer.weight": "R"}
    want = {names[name]: grad for name, grad in theirs("grad").items() if name in names}
    close({name: grads[name] for name in want}, want, 1e-5)


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
