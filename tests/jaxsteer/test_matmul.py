"""The product whose gradients a CPU computes fast: the same numbers as JAX's own, in every transformation."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close

from jaxsteer import matmul as module
from jaxsteer.matmul import matmul
from jaxsteer.models.layers import Projection


def arrays(*shapes):
    draw = np.random.default_rng(0)
    return [jnp.asarray(draw.standard_normal(shape), jnp.float32) for shape in shapes]


SHAPES = {
    "matrices": ((5, 3), (3, 7)),
    "one for all": ((2, 5, 3), (3, 7)),
    "stacks": ((2, 5, 3), (2, 3, 7)),
    "wide": ((5, 9), (9, 2)),  # the gradient is the smaller operand
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_values_and_derivatives_are_those_of_jax(shapes):
    a, b, a_dot, b_dot = arrays(*shapes, *shapes)
    of = lambda product: lambda a, b: jnp.sum(jnp.sin(product(a, b)))

    def derivatives(product):
        f = of(product)
        along = lambda a, b: jax.jvp(f, (a, b), (a_dot, b_dot))[1]
        return {
            "value": product(a, b),
            "grad": jax.grad(f, (0, 1))(a, b),
            "jvp": along(a, b),
            "forward over forward": jax.jvp(along, (a, b), (a_dot, b_dot))[1],
            "forward over reverse": jax.jvp(jax.grad(f, (0, 1)), (a, b), (a_dot, b_dot))[1],
            "reverse over reverse": jax.grad(lambda a, b: jnp.sum(jax.grad(f)(a, b) ** 2), (0, 1))(a, b),
        }

    close(jax.jit(derivatives, static_argnums=0)(matmul), derivatives(jnp.matmul), 2e-5)


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (1, 2)])
def test_vmapped_inside_and_outside_of_grad(axes):
    a, b = arrays((4, 5, 3), (4, 3, 7))
    given = [x[0] if axis is None else jnp.moveaxis(x, 0, axis) for x, axis in zip((a, b), axes, strict=True)]

    def gradients(product):
        loss = lambda a, b: jnp.sum(jnp.sin(product(a, b)))
        outside = jax.grad(lambda a, b: jnp.sum(jax.vmap(loss, axes)(a, b)), (0, 1))(*given)
        return outside, jax.vmap(jax.grad(loss, (0, 1)), axes)(*given)

    close(gradients(matmul), gradients(jnp.matmul), 2e-5)


def test_half_precision_with_sums_in_fp32():
    a, b = (x.astype(jnp.bfloat16) for x in arrays((2, 5, 3), (2, 3, 7)))
    loss = lambda product: lambda a, b: jnp.sum(jnp.sin(product(a, b)))
    ours = lambda a, b: matmul(a, b, jnp.float32)
    theirs = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)
    assert ours(a, b).dtype == jnp.float32
    got, want = jax.grad(loss(ours), (0, 1))(a, b), jax.grad(loss(theirs), (0, 1))(a, b)
    assert [leaf.dtype for leaf in got] == [jnp.bfloat16] * 2
    close(got, want, 1e-2)


@pytest.mark.cpu
def test_the_large_operand_is_never_transposed_for_the_gradient_of_a_narrow_one():
    z, b = arrays((64, 4), (4, 96))
    text = jax.jit(jax.grad(lambda b, z: jnp.sum(matmul(z, b) ** 2))).lower(b, z).as_text()
    transposed = [line.split("->")[-1].strip() for line in text.splitlines() if "stablehlo.transpose" in line]
    assert transposed == ["tensor<4x64xf32>"]


def test_axes_that_a_mesh_may_split_are_kept_apart(monkeypatch):
    monkeypatch.setattr(module, "current_platform", lambda: "tpu")
    text = str(jax.make_jaxpr(matmul)(*arrays((2, 8, 4), (4, 96))))
    assert "dot_general" in text
    assert "reshape" not in text


@pytest.mark.cpu
def test_the_models_projections_are_such_products():
    layer, steer = Projection(6, bias=False, site="mlp.up"), SimpleNamespace(projection=lambda *rest: rest[-1]())
    (x,) = arrays((2, 5, 4))
    weights = layer.init(jax.random.key(0), x, steer)
    text = str(jax.make_jaxpr(lambda weights: layer.apply(weights, x, steer))(weights))
    assert " matmul[" in text
    assert "dot_general" not in text
