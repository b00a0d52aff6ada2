"""The first-order equivalence for a gated MLP in closed form: the shift that each update makes (arXiv 2603.00425).

    y = W_d m,  m = σ(a_g) ⊙ a_u,  a_g = W_g x,  a_u = W_u x

    down      δy = ΔW_d m
    gate      δy = W_d (σ'(a_g) ⊙ a_u ⊙ ΔW_g x)
    up        δy = W_d (σ(a_g) ⊙ ΔW_u x)
    pre-MLP   δy = W_d J(x) δx,  J(x) δx = σ'(a_g) ⊙ a_u ⊙ W_g δx + σ(a_g) ⊙ W_u δx
    post-MLP  δy = what the steering adds

Weights are those of one layer of the base tree, {"gate" | "up" | "down": {"kernel": [in, out], "bias": [out] if any}};
updates have the same structure and may leave out what does not change. Each shift equals a `jax.jvp` of `gated_mlp`. In
families with a norm behind the MLP, y is the site `mlp.down`, in front of the norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsteer.interventions.low_rank import ACTIVATION_FUNCTIONS
from jaxsteer.models.layers import ACTIVATIONS, over_last_axis
from jaxsteer.types import Array, PyTree

Weights = Mapping[str, Mapping[str, Array]]
"""Kernels and biases of one MLP, or an update of them."""


def layer_mlp(base: PyTree, layer: int) -> dict[str, Any]:
    """The MLP's weights of one layer of a base tree.

    Raises:
        ValueError: the MLP has no gate.
    """
    if "gate" not in base["blocks"]["mlp"]:
        raise ValueError("this model's MLP has no gate; the closed forms are for gated MLPs only")
    stacked = {name: base["blocks"]["mlp"][name] for name in ("gate", "up", "down")}
    return jax.tree.map(lambda leaf: leaf[layer], stacked)


def gated_mlp(weights: Weights, x: Array, activation: str) -> Array:
    """y = W_d (σ(W_g x) ⊙ W_u x): x [..., D] -> y [..., D], with a model's activation (`ModelConfig.activation`)."""
    return _project(weights["down"], _gated(weights, x, activation))


def down_shift(weights: Weights, delta: Weights, x: Array, activation: str) -> Array:
    """ΔW_d m: the shift of y under an update of the down projection; exact."""
    return _project(delta["down"], _gated(weights, x, activation))


def gate_shift(weights: Weights, delta: Weights, x: Array, activation: str) -> Array:
    """W_d (σ'(a_g) ⊙ a_u ⊙ ΔW_g x): the shift of y under an update of the gate, to first order."""
    gate, up = _project(weights["gate"], x), _project(weights["up"], x)
    return _times(weights["down"], SLOPES[activation](gate) * up * _project(delta["gate"], x))


def up_shift(weights: Weights, delta: Weights, x: Array, activation: str) -> Array:
    """W_d (σ(a_g) ⊙ ΔW_u x): the shift of y under an update of the up projection; exact."""
    return _times(weights["down"], ACTIVATIONS[activation](_project(weights["gate"], x)) * _project(delta["up"], x))


def mlp_shift(weights: Weights, delta: Weights, x: Array, activation: str) -> Array:
    """The shift of y under an update of any of the MLP's weights, to first order: the sum of `down`, `gate` and `up`.

    Raises:
        ValueError: an update of something else.
    """
    terms = {"down": down_shift, "gate": gate_shift, "up": up_shift}
    if unknown := sorted(set(delta) - set(terms)):
        raise ValueError(f"an update of a gated MLP may have gate, up and down, not {', '.join(unknown)}")
    return sum((terms[name](weights, delta, x, activation) for name in delta), jnp.zeros_like(x))


def pre_mlp_shift(weights: Weights, dx: Array, x: Array, activation: str) -> Array:
    """W_d J(x) δx: the shift of y under steering in front of the MLP that moves x by δx, to first order."""
    gate, up = _project(weights["gate"], x), _project(weights["up"], x)
    inner = SLOPES[activation](gate) * up * _times(weights["gate"], dx)
    return _times(weights["down"], inner + ACTIVATIONS[activation](gate) * _times(weights["up"], dx))


def adapter_shift(
    p: Mapping[str, Array], delta: Mapping[str, Array], y: Array, activation: str, alpha: float = 1.0
) -> Array:
    """α (ΔU act(D y) + U (act'(D y) ⊙ ΔD y)): the change of what low-rank steering adds to y when (D, U) change.

    Post-MLP, with y the MLP's output, this is the shift itself; pre-MLP it is the δx of `pre_mlp_shift`. At U = 0,
    where training starts, the second term vanishes.

    Args:
        p: {"D": [R, D], "U": [D, R]}.
        delta: the change of p, with the same structure.
        y: what the steering reads, [..., D].
        activation: of the steering: silu, relu, gelu or tanh.
        alpha: factor of the steering.
    """
    read = jnp.einsum("...d,rd->...r", y, p["D"])
    read_change = SLOPES[activation](read) * jnp.einsum("...d,rd->...r", y, delta["D"])
    write_change = jnp.einsum("...r,dr->...d", ACTIVATION_FUNCTIONS[activation](read), delta["U"])
    return alpha * (write_change + jnp.einsum("...r,dr->...d", read_change, p["U"]))


def _silu_slope(a: Array) -> Array:
    s = jax.nn.sigmoid(a)
    return s * (1 + a * (1 - s))


def _gelu_slope(a: Array) -> Array:
    return jax.scipy.stats.norm.cdf(a) + a * jax.scipy.stats.norm.pdf(a)


def _gelu_tanh_slope(a: Array) -> Array:
    c = math.sqrt(2 / math.pi)
    t = jnp.tanh(c * (a + 0.044715 * a**3))
    return (1 + t) / 2 + a / 2 * (1 - t * t) * c * (1 + 3 * 0.044715 * a * a)


SLOPES: dict[str, Callable[[Array], Array]] = {
    "silu": _silu_slope,
    "gelu_tanh": _gelu_tanh_slope,
    "gelu": _gelu_slope,
    "relu": lambda a: (a > 0).astype(a.dtype),
    "tanh": lambda a: 1 - jnp.square(jnp.tanh(a)),
}
"""Derivatives of the activations of MLPs and of steering."""


def _gated(weights: Weights, x: Array, activation: str) -> Array:
    return ACTIVATIONS[activation](_project(weights["gate"], x)) * _project(weights["up"], x)


def _times(weights: Mapping[str, Array], x: Array) -> Array:
    return jnp.einsum("...i,io->...o", x, weights["kernel"])


def _project(weights: Mapping[str, Array], x: Array) -> Array:
    y = _times(weights, x)
    return y + over_last_axis(weights["bias"], y.ndim) if "bias" in weights else y
