"""An int8 base: W_df ≈ s_f Q_df for the projections of every block, with one scale per output.

s_f = max_d |W_df| / 127 and Q = round(W / s). A quantised projection has the leaves `kernel` (int8) and `scale`
instead of a float kernel, by which the forward pass recognises it; it multiplies by s after the product,
x W ≈ (x Q) ⊙ s. That is enough for a frozen base: gradients with respect to x pass through, and steering and LoRA
train on top of it.

Source: the row-wise scheme of LLM.int8() (Dettmers et al. 2022) for weights only, without its outliers.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxsteer.types import Array, PyTree

LARGEST = 127


@jax.jit
def quantise_kernel(kernel: Array) -> tuple[Array, Array]:
    """Kernel [..., D, F] -> int8 [..., D, F] and its scales [..., F] in the kernel's dtype."""
    wide = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-2) / LARGEST
    scale = jnp.where(scale > 0, scale, 1.0).astype(kernel.dtype)  # rounded first: Q must fit the stored scale
    ratio = wide / scale.astype(jnp.float32)[..., None, :]
    return jnp.clip(jnp.round(ratio), -LARGEST, LARGEST).astype(jnp.int8), scale


def quantise(base: PyTree) -> PyTree:
    """A base tree with the projections of its blocks in int8; embedding, head, norms and biases are unchanged.

    `jaxsteer.io.load_model(quantised=True)` gives the same without ever holding the float model in memory.
    """

    def visit(tree: PyTree) -> PyTree:
        if not isinstance(tree, Mapping):
            return tree
        if "kernel" in tree and "scale" not in tree:
            kernel, scale = quantise_kernel(tree["kernel"])
            return {**tree, "kernel": kernel, "scale": scale}
        return {name: visit(part) for name, part in tree.items()}

    return {**base, "blocks": visit(base["blocks"])}


def dequantised(weights: Mapping[str, Array]) -> Mapping[str, Array]:
    """The weights of a projection with a float kernel; unchanged if they are not quantised."""
    if "scale" not in weights:
        return weights
    kernel = weights["kernel"].astype(weights["scale"].dtype) * weights["scale"][..., None, :]
    return {name: kernel if name == "kernel" else leaf for name, leaf in weights.items() if name != "scale"}


def is_quantised(base: PyTree) -> bool:
    """Whether a base tree has int8 projections."""
    return any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(base["blocks"]))
