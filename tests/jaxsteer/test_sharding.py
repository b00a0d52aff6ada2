"""The table of axes, the shardings that follow from it, and what cannot be split."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from tiny import all_methods

import jaxsteer
from jaxsteer.models.transformer import init_base
from jaxsteer.optim import OptimConfig, make_optimizer
from jaxsteer.params import Params, param_labels, partition
from jaxsteer.sharding import (
    AXES,
    MeshShape,
    base_shardings,
    check_shape,
    constrain,
    default_shape,
    make_mesh,
    optimizer_shardings,
    slices_of,
    spec_of,
    steering_shardings,
)
from jaxsteer.steering import param_specs, steering_shapes

MESH = AbstractMesh((2, 2, 2), AXES)
ROWS = ("data", "fsdp")


def specs(tree):
    return jax.tree.map(lambda leaf: leaf.spec, tree)


def test_base(tiny_config):
    base = jax.eval_shape(partial(init_base, tiny_config), jax.random.key(0))
    got = specs(base_shardings(base, MESH))
    assert got["embed"]["embedding"] == P(None, ("fsdp",))  # 61 tokens are not two equal parts
    attn, mlp = got["blocks"]["attn"], got["blocks"]["mlp"]
    assert attn["q"]["kernel"] == attn["k"]["kernel"] == P(None, ("fsdp",), ("tensor",))
    assert attn["o"]["kernel"] == P(None, ("tensor",), ("fsdp",))
    assert mlp["up"]["kernel"] == mlp["gate"]["kernel"] == P(None, ("fsdp",), ("tensor",))
    assert mlp["down"]["kernel"] == P(None, ("tensor",), ("fsdp",))
    assert got["blocks"]["attn_norm"]["scale"] == P(None, None)


def test_the_optimizer_follows_its_parameters(tiny_config):
    plan = all_methods(tiny_config)
    params = Params(
        jax.eval_shape(partial(init_base, tiny_config), jax.random.key(0)), steering_shapes(plan, tiny_config)
    )
    where = Params(base_shardings(params.base, MESH), steering_shardings(param_specs(plan, tiny_config), MESH))
    assert jax.tree.structure(where) == jax.tree.structure(params)
    labels = param_labels(params, plan, train_base=True)
    (trained, _), (at, _) = partition(params, labels), partition(where, labels)
    tx = make_optimizer(OptimConfig(), labels, 10, plan)
    state = jax.eval_shape(tx.init, trained)
    got = optimizer_shardings(tx, state, trained, at, MESH)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    want = {jax.tree_util.keystr(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(at)}
    moments = [
        (jax.tree_util.keystr(path), leaf.spec)
        for name in ("mu", "nu")
        for _, moment in optax.tree.get_all_with_path(got, name)
        for path, leaf in jax.tree_util.tree_leaves_with_path(moment)
    ]
    assert sorted(moments) == sorted(2 * list(want.items()))
    assert {leaf.spec for _, leaf in optax.tree.get_all_with_path(got, "count")} == {P()}
    assert len(jax.tree.leaves(got)) == len(moments) + len(optax.tree.get_all_with_path(got, "count"))


def test_what_does_not_divide_is_not_split():
    assert spec_of((7, 8), ("rows", "width"), MESH) == P(None, ("fsdp",))
    assert spec_of((4, 3), ("rows", None), MESH) == P(ROWS, None)
    x = jnp.ones((4, 3))
    assert constrain(x, "rows", None) is x  # no mesh


@pytest.mark.parametrize(
    ("devices", "rows", "shape"),
    [
        (1, 8, (1, 1)),
        (8, 8, (1, 8)),
        (8, 4, (1, 4)),
        (8, 6, (1, 2)),
        (64, 64, (4, 16)),
        (48, 96, (3, 16)),
        (8, 7, (1, 1)),
    ],
)
def test_the_default_uses_what_the_rows_can_fill(devices, rows, shape):
    assert default_shape(devices, rows) == MeshShape(*shape)


@pytest.mark.parametrize(
    ("shape", "wrong"),
    [
        ((4, 4, 1), "needs 16 devices; there are 8"),
        ((2, 4, 1), r"12 rows .* data x fsdp = 8; 8 or 16 rows can, or data x fsdp = 4"),
        ((1, 1, 8), r"4 heads .* tensor = 2 is the nearest"),
        ((1, 1, 4), r"2 key/value heads .* tensor = 2 is the nearest"),
        ((1, 2, 2), r"rows of 33 tokens .* rows of 34 can"),
    ],
)
def test_a_mesh_that_cannot_be(shape, wrong):
    with pytest.raises(ValueError, match=wrong):
        check_shape(
            MeshShape(*shape), devices=8, rows=12, heads=4, kv_heads=2, length=33, split_sequence=shape == (1, 2, 2)
        )


def test_an_empty_axis():
    with pytest.raises(ValueError, match="at least 1"):
        MeshShape(0)
    with pytest.raises(ValueError, match="needs 1000000 devices"):
        make_mesh(MeshShape(1_000_000))


class Chip:
    """A device of a topology, as far as a mesh looks at it: one of 2 x 2 chips in one of two slices."""

    platform, device_kind = "tpu", "of a test"

    def __init__(self, number):
        self.id, self.slice_index, self.process_index = number, number // 4, number // 4
        self.coords, self.core_on_chip = (number % 2, number // 2 % 2, 0), 0


def test_data_is_what_crosses_slices():
    chips = [Chip(number) for number in (4, 5, 6, 7, 0, 1, 2, 3)]
    assert slices_of(chips) == 2
    for shape in (MeshShape(2, 4), MeshShape(4, 1, 2), MeshShape(2, 2, 2)):
        grid = make_mesh(shape, chips).devices
        assert grid.shape == (shape.data, shape.fsdp, shape.tensor)
        half = shape.data // 2
        assert {chip.slice_index for chip in grid[:half].flat} == {0}
        assert {chip.slice_index for chip in grid[half:].flat} == {1}
    for shape in (MeshShape(1, 8), MeshShape(2, 2)):
        with pytest.raises(ValueError, match=r"2 slices; .* data 2 x fsdp 4"):
            make_mesh(shape, chips)
    assert default_shape(8, 16, slices=2) == MeshShape(2, 4)
    assert default_shape(64, 64, slices=2) == MeshShape(4, 16)


def test_unused_imports_are_light():
    """Pallas is slow to import; a CPU never needs it."""
    code = "import sys, jaxsteer; print('jax.experimental.pallas' in sys.modules)"
    root = Path(jaxsteer.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "False", done.stderr
