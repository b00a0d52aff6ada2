"""Spectra and angles, against SciPy's and NumPy's of the whole matrices."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.test_util import check_grads
from tiny import all_methods, close, random_steering

from jaxsteer import LoRA, NonlinearSteering, Slot
from jaxsteer.theory import geometry

DRAW = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_draws(monkeypatch):
    """A test's numbers do not depend on which tests ran before it."""
    monkeypatch.setattr(sys.modules[__name__], "DRAW", np.random.default_rng(0))


def rows(*shape):
    return jnp.asarray(DRAW.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(("r", "s"), [(3, 5), (5, 3), (1, 1)])
def test_angles_are_those_of_scipy(r, s):
    a, b = rows(2, r, 12), rows(2, s, 12)
    b = b.at[1, 0].set(a[1, 0] + 1e-4 * rows(12))  # a small angle, which a cosine in fp32 would lose
    angles = lambda x, y: np.sort(scipy.linalg.subspace_angles(np.asarray(x.T, float), np.asarray(y.T, float)))
    want = [angles(a[i], b[i]) for i in range(2)]
    got = geometry.principal_angles(a, b)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)
    assert got.shape == (2, min(r, s))
    close(geometry.subspace_overlap(a, b), np.mean(np.cos(want) ** 2, axis=1), 1e-5)


def test_extremes_and_chance():
    a = rows(3, 20)
    mixed = jnp.einsum("rs,sd->rd", rows(3, 3), a)
    assert np.max(geometry.principal_angles(a, mixed)) < 1e-5
    apart = jnp.linalg.qr(rows(20, 20))[0]
    close(geometry.principal_angles(apart[:3], apart[3:7]), np.full(3, np.pi / 2), 1e-5)
    many = geometry.subspace_overlap(rows(300, 4, 40), rows(300, 6, 40))
    assert geometry.chance(rows(4, 40), rows(6, 40)) == pytest.approx(0.15)
    np.testing.assert_allclose(np.mean(many), 0.15, atol=0.01)


def test_effective_rank_and_shares():
    close(geometry.effective_rank(jnp.array([[2.0, 2, 2], [1, 0, 0], [0, 0, 0]])), np.array([3.0, 1, 0]), 1e-5)
    values = jnp.array([3.0, 2.0, 1.0])
    close(geometry.captured(values), np.array([9, 13, 14]) / 14, 1e-6)
    assert [int(geometry.directions_for(values, share)) for share in (0.6, 0.9, 13 / 14, 1.0)] == [1, 2, 2, 3]
    with pytest.raises(ValueError, match=r"above 0 and at most 1, got 1.5"):
        geometry.directions_for(values, 1.5)


def test_top_directions_hold_the_most_energy():
    tokens = rows(200, 8) * jnp.geomspace(10, 0.1, 8)[None]
    found = geometry.top_directions(tokens, 2)
    want = np.linalg.svd(np.asarray(tokens))
    close(found.values, want[1][:2], 1e-4)
    close(jnp.abs(found.rows @ want[2][:2].T), np.eye(2), 1e-4)
    with pytest.raises(ValueError, match=r"rank 9: .* between 1 and 8"):
        geometry.top_directions(tokens, 9)


def test_maps_of_a_plan(tiny_config):
    plan = (
        Slot("s", NonlinearSteering(rank=2, alpha=3.0), ("block",), (1, 3)),
        Slot("l", LoRA(rank=2, alpha=5.0), ("mlp.up",)),
    )
    steering = random_steering(plan, tiny_config)
    found = geometry.map_directions(plan, steering)
    s, lo = steering["s"]["block"], steering["l"]["mlp.up"]
    wholes = {("s", "block"): 3 * s["U"] @ s["D"], ("l", "mlp.up"): 2.5 * lo["B"] @ lo["A"]}
    assert set(found) == set(wholes)
    for key, whole in wholes.items():
        inputs, outputs = found[key]
        close(inputs.values, np.linalg.svd(whole, compute_uv=False)[:, :2], 1e-4)
        close(jnp.einsum("lrd,lr,lre->led", inputs.rows, inputs.values, outputs.rows), whole, 1e-4)


def test_what_methods_say_they_read_and_write(tiny_config):
    plan = all_methods(tiny_config, few=False)
    steering = random_steering(plan, tiny_config)
    reads, writes = (geometry.method_directions(plan, steering, side) for side in ("reads", "writes"))
    close(reads["nonlinear", "block", "D"], steering["nonlinear"]["block"]["D"], 0)
    close(writes["lora", "mlp.down", "B"], steering["lora"]["mlp.down"]["B"].swapaxes(1, 2), 0)
    close(writes["fixed", "mlp", "v"], steering["fixed"]["mlp"]["v"][:, None], 0)
    assert not [key for key in (*reads, *writes) if key[1] == "attn.heads"]
    with pytest.raises(ValueError, match="reads or writes, got 'both'"):
        geometry.method_directions(plan, steering, "both")


AXES = np.eye(8, dtype=np.float32)


@pytest.mark.parametrize(
    ("a", "b"),
    [(AXES[:2], AXES[2:4]), (AXES[:2], AXES[:2]), (AXES[:2], AXES[1:3]), (AXES[:3], AXES[1:3])],
    ids=["orthogonal", "equal", "one shared", "inside"],
)
def test_gradients_are_finite_at_right_angles_and_at_none(a, b):
    for measure in (geometry.subspace_overlap, lambda x, y: jnp.sum(geometry.principal_angles(x, y))):
        for arg in (0, 1):
            assert jnp.isfinite(jax.grad(measure, arg)(a, b)).all()


def test_gradient_of_the_overlap_is_its_slope():
    a, b = rows(2, 10), rows(3, 10)
    check_grads(geometry.subspace_overlap, (a, b), order=1, modes=("fwd", "rev"), rtol=1e-2)


def test_gradient_of_an_angle_is_its_slope():
    """Two lines in a plane, one on either side of the change from sines to cosines."""
    turned = lambda angle: geometry.principal_angles(
        AXES[:1], jnp.stack([jnp.cos(angle), jnp.sin(angle)])[None] @ AXES[:2]
    )[0]
    for angle in (0.3, 1.2):
        close(jax.grad(turned)(angle), 1.0, 1e-4)


@pytest.mark.parametrize("values", [[2.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
def test_gradients_of_a_spectrum_are_finite_where_values_are_zero(values):
    values = jnp.array(values)
    for measure in (geometry.effective_rank, lambda values: jnp.sum(geometry.captured(values))):
        assert jnp.isfinite(jax.grad(measure)(values)).all()
