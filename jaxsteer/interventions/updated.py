"""The product with a kernel that has a low-rank update in it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxsteer.matmul import matmul
from jaxsteer.types import Array


@jax.custom_jvp
def updated_product(x: Array, kernel: Array, a: Array, b: Array) -> Array:
    """x (W + (B A)ᵀ), as one product with the updated kernel.

    Its derivatives with respect to A and B are products with R columns; the gradient of the updated kernel, which
    differentiating the formula would give, is as large as the kernel.

    Args:
        x: [..., in].
        kernel: W [in, out].
        a: A [R, in].
        b: B [out, R].

    Returns:
        [..., out].
    """
    return jnp.einsum("...d,df->...f", x, kernel + jnp.einsum("rd,fr->df", a, b))


@partial(updated_product.defjvp, symbolic_zeros=True)
def _updated_product_jvp(primals: tuple[Array, ...], tangents: tuple) -> tuple[Array, Array]:
    x, kernel, a, b = primals
    x_dot, kernel_dot, a_dot, b_dot = tangents
    updated = kernel + jnp.einsum("rd,fr->df", a, b)
    y = jnp.einsum("...d,df->...f", x, updated)
    out = jnp.zeros_like(y)
    if type(x_dot) is not SymbolicZero:
        out += jnp.einsum("...d,df->...f", x_dot, updated)
    if type(kernel_dot) is not SymbolicZero:
        out += jnp.einsum("...d,df->...f", x, kernel_dot)
    if type(a_dot) is not SymbolicZero:
        out += matmul(jnp.einsum("...d,rd->...r", x, a_dot), b.T)
    if type(b_dot) is not SymbolicZero:
        out += matmul(jnp.einsum("...d,rd->...r", x, a), b_dot.T)
    return y, out
