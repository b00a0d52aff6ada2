"""The sizes of updates, against the maps themselves."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_model import TINY

from jaxsteer.interventions import (
    DiReFT,
    DoRA,
    FixedVector,
    JoLA,
    LinearSteering,
    LoFiT,
    LoRA,
    LoReFT,
    NonlinearSteering,
    PiSSA,
)
from jaxsteer.models.config import site_dims
from jaxsteer.types import Context
from train.report.updates import parts_of

METHODS = {
    "block": [
        NonlinearSteering(rank=2, alpha=3.0, activation="tanh"),
        LoReFT(rank=2, activation="silu"),
        DiReFT(rank=2),
    ],
    "mlp.down": [LoRA(rank=2, alpha=6.0), DoRA(rank=2), PiSSA(rank=2)],
    "attn.heads": [JoLA(), LoFiT(), FixedVector()],
}
PARTS = {
    NonlinearSteering: {"‖linear part‖"},
    LoReFT: {"‖linear part‖", "‖shift‖"},
    DiReFT: {"‖linear part‖", "‖shift‖"},
    LoRA: {"‖s B A‖"},
    DoRA: {"‖s B A‖", "‖m‖"},
    PiSSA: {"‖s B A‖"},
    JoLA: {"‖scale‖", "‖shift‖"},
    LoFiT: {"‖shift‖"},
    FixedVector: {"‖shift‖"},
}


@pytest.mark.parametrize(("site", "method"), [(site, each) for site in METHODS for each in METHODS[site]], ids=str)
def test_the_size_of_an_update_is_that_of_its_map(site, method):
    """Against the map itself, from unit vectors through the method (with the identity for its activation)."""
    dims, key = site_dims(TINY, site), jax.random.key(1)
    specs = method.param_specs(dims)
    keys = jax.random.split(key, len(specs))
    params = {name: jax.random.normal(k, (2, *spec.shape)) for (name, spec), k in zip(specs.items(), keys, strict=True)}
    found = {part.what.split(",")[0]: part.norms for part in parts_of(method, params)}
    assert set(found) == PARTS[type(method)]
    if method.kind == "weight":
        expected = {"‖s B A‖": [np.linalg.norm(method.delta(one)) for one in layers(params)]}
        if isinstance(method, DoRA):
            expected["‖m‖"] = [np.linalg.norm(one["m"]) for one in layers(params)]
    else:
        plain = linear(method)
        context = Context(layer=np.int32(0))
        apply = lambda one, y: np.asarray(plain.apply(one, y, y, context) - y, np.float64)
        zero = np.zeros((1, 1, *dims.y), np.float32)
        shift = [apply(one, zero) for one in layers(params)]
        units = np.eye(int(np.prod(dims.y)), dtype=np.float32).reshape(-1, 1, *dims.y)
        map_ = [np.linalg.norm(apply(one, units) - at) for one, at in zip(layers(params), shift, strict=True)]
        expected = {"‖linear part‖": map_, "‖scale‖": map_, "‖shift‖": [np.linalg.norm(at) for at in shift]}
    for what, norms in found.items():
        np.testing.assert_allclose(norms, expected[what], rtol=1e-4)


def layers(params):
    return [{name: leaf[n] for name, leaf in params.items()} for n in range(2)]


def linear(method):
    if isinstance(method, NonlinearSteering):
        return LinearSteering(method.rank, method.alpha)
    return replace(method, activation="none") if hasattr(method, "activation") else method
