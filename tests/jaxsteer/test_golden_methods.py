"""PiSSA, LoFiT and JoLA against their published formulas on PyTorch (tests/golden/make_methods.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close

from jaxsteer.interventions import JoLA, LoFiT, LoFiTScale, PiSSA, jola, strongest_heads
from jaxsteer.types import Context

LAYER = jnp.zeros((), jnp.int32)
STEP = jnp.zeros((), jnp.int32)


@pytest.fixture(scope="module")
def methods(golden):
    return np.load(golden / "methods.npz")


def read(methods, case):
    prefix = f"{case}/"
    return {key.removeprefix(prefix): jnp.asarray(methods[key]) for key in methods.files if key.startswith(prefix)}


def check(case, leaves, function):
    """Output and gradients, in all leaves, of function(leaves) -> (y, what the method adds to the loss)."""

    def loss(leaves):
        y, added = function(leaves)
        return jnp.sum(case["cotangent"] * y) + added, y

    grads, y = jax.grad(loss, has_aux=True)({name: case[name] for name in leaves})
    close(y, case["y"], 1e-5)
    close(grads, {name: case[f"grad/{name}"] for name in leaves}, 1e-5)


def at_heads(method, p, keys=None):
    """The method at the heads p["z"] of each layer; in training where each layer has a key."""
    one = lambda p, key: method.apply(p, p["z"], p["z"], Context(LAYER, key=key, train=key is not None))
    return jax.vmap(one)(p, keys)


def test_pissa_starts_from_the_best_approximation(methods):
    case, method = read(methods, "pissa"), PiSSA(rank=4, alpha=6.0)
    start = method.from_kernel(case, case["weight"].T)
    # The factors have signs of their own, their product does not.
    close(method.scale * start["B0"] @ start["A0"], case["product"], 1e-5)
    close((start["A"], start["B"]), (start["A0"], start["B0"]), 0)


def test_pissa_beside_the_whole_base_is_pissa_beside_the_residual(methods):
    case, method = read(methods, "pissa"), PiSSA(rank=4, alpha=6.0)
    kernel = case["weight"].T
    start = method.from_kernel(case, kernel)
    check(
        case,
        ("x", "A", "B"),
        lambda leaves: (method.apply(start | leaves, leaves["x"], leaves["x"] @ kernel, Context(LAYER, kernel)), 0.0),
    )
    merged, _ = method.fold(start | {name: case[name] for name in "AB"}, kernel, None)
    close(merged.T, case["merged"], 1e-5)


def test_lofit_scales_heads_and_penalises_the_scales(methods):
    case, method = read(methods, "lofit_scale"), LoFiTScale(l1=0.05)
    close(method.penalty(case, STEP), case["penalty"], 1e-5)
    check(case, ("z", "A"), lambda leaves: (at_heads(method, leaves), method.penalty(leaves, STEP)))


def test_lofit_shifts_the_heads_of_the_largest_scales(methods):
    case, scales = read(methods, "lofit"), read(methods, "lofit_scale")["A"]
    constant = {"selected": strongest_heads(scales, 5)}
    close(constant["selected"], case["selected"], 0)
    check(case, ("z", "v"), lambda leaves: (at_heads(LoFiT(), leaves | constant), 0.0))


JOLA = ("z", "A", "v", "log_g1", "log_g2")


def test_jola_in_evaluation(methods):
    case = read(methods, "jola/eval")
    close(jola.gate(case["log_g1"], None), case["gates"][:, 0], 1e-5)
    close(jola.gate(case["log_g2"], None), case["gates"][:, 1], 1e-5)
    check(case, JOLA, lambda leaves: (at_heads(JoLA(), leaves), 0.0))


def test_jola_in_training_with_given_draws(methods, monkeypatch):
    case = read(methods, "jola/train")
    close(jola.gate(case["log_g1"], case["u"][:, 0]), case["gates"][:, 0], 1e-5)
    close(jola.gate(case["log_g2"], case["u"][:, 1]), case["gates"][:, 1], 1e-5)
    monkeypatch.setattr(jola, "uniform_noise", lambda key, logits: key)  # the draws come as keys
    check(case, JOLA, lambda leaves: (at_heads(JoLA(), leaves, keys=case["u"]), 0.0))


@pytest.mark.parametrize("step", [0, 1, 50, 1000])
def test_jola_penalty_of_open_gates(step, methods):
    case = read(methods, f"jola/penalty_{step}")
    logits = {name: case[name] for name in ("log_g1", "log_g2")}
    value, grads = jax.value_and_grad(JoLA().penalty)(logits, jnp.array(step, jnp.int32))
    close(value, case["penalty"], 1e-5)
    close(grads, {name: case[f"grad/{name}"] for name in logits}, 1e-5)
