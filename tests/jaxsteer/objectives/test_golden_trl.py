"""Losses and gradients against TRL's own trainers (tests/golden/make_trl.py): rows padded there, packed here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import Text, in_rows
from tiny import close, fast_jit

from jaxsteer import LoRA, Model, Slot
from jaxsteer.groups import Group, shared_length
from jaxsteer.objectives import Grpo, Judged, Kto, Pairs, Preference, Rollouts, policy_log_probabilities

PLAN = (Slot("lora", LoRA(rank=4, alpha=6.0), ("mlp.down",)),)
BETA = 0.3
LEVEL = 3
NAME = "base_model.model.model.layers.{}.mlp.down_proj.lora_{}.default.weight"


@pytest.fixture(scope="module")
def trl(golden):
    return np.load(golden / "trl.npz")


@pytest.fixture(scope="module")
def policy(golden, golden_llama):
    """The model and the LoRA of the policy; the reference is the base."""
    return Model(golden_llama.config, PLAN), leaves(np.load(golden / "reference.npz"), "peft/lora/param")


def leaves(numbers, prefix):
    stack = lambda param: jnp.stack([numbers[f"{prefix}/{NAME.format(i, param)}"] for i in range(3)])
    return {"lora": {"mlp.down": {param: stack(param) for param in ("A", "B")}}}


def texts(trl, answers):
    own = lambda ids: tuple(int(i) for i in ids if i)
    prompts = [own(ids) for ids in trl["prompts"]]
    return [Text(prompt, own(ids)) for prompt, ids in zip(prompts, trl[answers], strict=True)]


def singles(some):
    """Examples by themselves, three in each row."""
    return in_rows([Group((text,)) for text in some], 3, 48, trunks=False)


def known(llama, batch):
    """The reference's log-probabilities."""
    return fast_jit(policy_log_probabilities, static_argnums=0)(Model(llama.config), llama.base, {}, batch)


def spread(values, batch):
    """[examples][tokens] over the tokens that count of rows [B, T], in the order of the examples."""
    out = np.zeros(batch.weights.shape, np.float32)
    out[batch.weights != 0] = np.concatenate(values)
    return jnp.asarray(out)


def check(objective, policy, llama, inputs, wanted):
    """The loss and its gradient as a training step computes them; returns the facts."""
    model, steering = policy
    whole = jax.tree.map(lambda field: jnp.asarray(field)[None], inputs)

    def loss(steering):
        ready = objective.prepare(model, llama.base, jax.lax.stop_gradient(steering), whole, None)
        micro = jax.tree.map(lambda field: field[0], ready)
        summed = objective(model, llama.base, steering, micro, None, None, train=True)
        return summed.loss / objective.total(ready), summed.facts

    (value, facts), grads = fast_jit(jax.value_and_grad(loss, has_aux=True))(steering)
    close(value, wanted[0], 1e-5)
    close(grads, wanted[1], 2e-5)
    return {name: float(fact.total / fact.number) for name, fact in facts.items()}


@pytest.mark.parametrize(
    ("case", "objective", "kind"),
    [
        ("sigmoid", Preference(beta=BETA), ""),
        ("simpo", Preference("simpo", beta=2.0, margin=0.5), ""),
        ("ipo", Preference("ipo", beta=BETA / LEVEL), "level_"),
    ],
)
def test_preferences(case, objective, kind, trl, policy, golden_llama):
    """TRL's IPO has means over tokens: of n tokens each, (Δ/n − 1/2β)² = (Δ − 1/(2 β/n))² / n²."""
    both = zip(texts(trl, f"{kind}chosen"), texts(trl, f"{kind}rejected"), strict=True)
    grouped = in_rows([Group(pair, shared_length(pair)) for pair in both], 2, 48)
    sign = np.array([0, 1, -1], np.float32)[grouped.member]
    inputs = Pairs(grouped.batch, grouped.group, sign, known(golden_llama, grouped.batch))
    factor = LEVEL**2 if kind else 1
    wanted = factor * trl[f"{case}/loss"], jax.tree.map(lambda g: factor * g, leaves(trl, f"{case}/grad"))
    check(objective, policy, golden_llama, inputs, wanted)


@pytest.mark.parametrize("case", ["kto", "kto_turned"])
def test_kto(case, trl, policy, golden_llama):
    """The reference point is 0 in the first case, and above in the second, where B has the other sign."""
    model, steering = policy
    if case == "kto_turned":
        steering = {"lora": {"mlp.down": {**steering["lora"]["mlp.down"], "B": -steering["lora"]["mlp.down"]["B"]}}}
    some = [*texts(trl, "chosen"), *texts(trl, "rejected")]
    away = [Text(own.prompt, other.answer) for own, other in zip(some, some[1:] + some[:1], strict=True)]
    batch, mismatched = (singles(each).batch for each in (some, away))
    desirable = spread([[1 if i < 4 else -1] * len(text.answer) for i, text in enumerate(some)], batch)
    inputs = Judged(
        batch, desirable, known(golden_llama, batch), mismatched, known(golden_llama, mismatched), 0 * desirable
    )
    wanted = trl[f"{case}/loss"], leaves(trl, f"{case}/grad")
    facts = check(Kto(BETA, 1.5, 0.5), (model, steering), golden_llama, inputs, wanted)
    np.testing.assert_allclose(facts["reference_point"], trl[f"{case}/point"], rtol=1e-5)


@pytest.mark.parametrize(("case", "average"), [("grpo", "answers"), ("dapo", "tokens"), ("dr_grpo", "constant")])
def test_grpo(case, average, trl, policy, golden_llama):
    some = [*texts(trl, "chosen"), *texts(trl, "rejected")]
    batch = singles(some).batch
    lengths = np.array([len(text.answer) for text in some])
    objective = Grpo(0.05, 0.1, beta=0.2, average=average, max_tokens=8, on_policy=False)
    advantages = spread([[gain] * n for gain, n in zip(trl["advantages"], lengths, strict=True)], batch)
    old = spread([row[:n] for row, n in zip(trl["old"], lengths, strict=True)], batch)
    divisor = jnp.zeros(old.shape).at[0, 0].set(objective.divisor(lengths))
    inputs = Rollouts(batch, advantages, old, known(golden_llama, batch), divisor)
    wanted = trl[f"{case}/loss"], leaves(trl, f"{case}/grad")
    facts = check(objective, policy, golden_llama, inputs, wanted)
    assert trl[f"{case}/clipped"].all()  # below and above
    np.testing.assert_allclose(facts["clip_share"], trl[f"{case}/clipped"].sum(), rtol=1e-6)
