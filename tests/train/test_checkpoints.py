"""Checkpoints: the same bits come back, misfits are named, the right steps are kept."""

import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from saved_trees import abstract, assert_same, run, small

from train.run.checkpoints import check_reachable, open_checkpoints

ROOT = Path(__file__).parents[2]
DTYPES = ["bool", "int8", "uint32", "float16", "bfloat16", "float32", "float8_e4m3fn", "complex64"]


def steering(seed=0):
    up, down = jax.random.split(jax.random.key(seed))
    block = {"up": jax.random.normal(up, (3, 4, 8)), "down": jax.random.normal(down, (3, 8, 4))}
    return {"late": {"block": block}, "none": {"attn": {"v": jnp.zeros((0, 8))}}, "frozen": None}


def optimizer_state(tree):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
        _, state = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)
    keys = {"key": jax.random.key(7), "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3)}
    return {
        "optax": state,
        **keys,
        "no_keys": keys["keys"][:0],
        "steps": 3,
        "rate": 0.1,
        "on": True,
        "empty": (),
    }


def everything():
    return {
        "steering": steering(),
        "optimizer": optimizer_state(steering()),
        "base": {"w": None, "b": jnp.ones(5, jnp.bfloat16)},
        "nothing": {},
    }


# ---- what is saved comes back


def test_round_trip_is_bitwise(tmp_path):
    trees, meta = everything(), {"config": {"lr": 0.1, "layers": [1, 2]}, "data": {"row": 17}}
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(abstract(trees)) is None
        checkpoints.save(5, trees, meta, {"loss": math.nan})
        meta["data"]["row"] = 18
    with open_checkpoints(tmp_path) as checkpoints:
        for like in (trees, abstract(trees)):
            found = checkpoints.restore_latest(like)
            assert (found.step, found.skipped, found.meta["data"]["row"]) == (5, [], 17)
            assert_same(found.trees, trees)
        part = checkpoints.restore(5, {"steering": abstract(trees["steering"])})
        assert list(part.trees) == ["steering"]


@pytest.mark.parametrize("host", [False, True])
def test_every_dtype_with_its_odd_values(tmp_path, host):
    raw = np.arange(256, dtype=np.uint8)
    tree = {name: (raw % 2 if name == "bool" else raw).view(jnp.dtype(name)) for name in DTYPES}
    if host:
        tree |= {"int64": raw.view(np.int64), "float64": raw.view(np.float64), "scalar": np.float32(3)}
    else:
        tree = jax.tree.map(jnp.asarray, tree)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"t": tree}, {})
        assert_same(checkpoints.restore(1, {"t": tree}).trees["t"], tree)


@pytest.mark.parametrize("size", [64, 1500])
def test_saved_bits_survive_donation_and_changes_in_place(tmp_path, size):
    add = jax.jit(lambda x, y: x + y, donate_argnums=0)
    x, host = jnp.zeros((size, size)), np.zeros((size, size))
    with open_checkpoints(tmp_path, keep_latest=9) as checkpoints:
        for step in range(1, 4):
            x, host[:] = add(x, 1.0), step
            checkpoints.save(step, {"t": {"x": x, "host": host}}, {})
            x, host[:] = add(add(x, 5.0), -5.0), -1
        for step in range(1, 4):
            found = checkpoints.restore(step, {"t": {"x": abstract(x), "host": host}}).trees["t"]
            assert np.all(np.asarray(found["x"]) == step)
            assert np.all(found["host"] == step)


# ---- misfits


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"x": np.zeros(4, np.float32)}, r"not in the checkpoint \[\], only in the checkpoint \['n'\]"),
        ({"x": jnp.zeros(4), "n": 1, "y": 2}, r"not in the checkpoint \['y'\]"),
        (
            {"x": jnp.zeros(4, jnp.bfloat16), "n": 1},
            r"t/x: the checkpoint has float32 \[4\], requested bfloat16",
        ),
        ({"x": jnp.zeros(5), "n": 1}, r"float32 \[4\], requested float32 \[5\]"),
        ({"x": jax.random.key(0), "n": 1}, r"requested key<fry>"),
        ({"x": jnp.zeros(4), "n": 1.0}, r"python int \[\], requested python float"),
        ({"x": None, "n": 1}, r"only in the checkpoint \['x'\]"),
    ],
)
def test_a_misfit_is_an_error_and_never_a_cast(tmp_path, like, message):
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"t": {"x": jnp.ones(4), "n": 1}}, {})
        for restore in (
            lambda: checkpoints.restore(2, {"t": like}),
            lambda: checkpoints.restore_latest({"t": like}),
        ):
            with pytest.raises(ValueError, match=message):
                restore()
        with pytest.raises(ValueError, match=r"has no tree \['u'\], only \['t'\]"):
            checkpoints.restore_latest({"u": like})
        with pytest.raises(ValueError, match=r"no checkpoint of step 3; available: \[1, 2\]"):
            checkpoints.restore(3, {"t": like})


@pytest.mark.parametrize(
    ("trees", "meta", "message"),
    [
        ({"t": {"x": "text"}}, {}, "t/x: a str cannot be checkpointed"),
        ({"t": {"x": np.array([None])}}, {}, "t/x: a ndarray cannot"),
        ({"record": {}}, {}, "tree name 'record' is reserved"),
        ({"t": {"a": {"b": 1}, "a/b": 2}}, {}, "two leaves of a tree have the path 'a/b'"),
        ({"t": {}}, {"odd": object()}, "meta cannot be written as JSON"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path, trees, meta, message):
    with open_checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=message):
            checkpoints.save(1, trees, meta)
        assert checkpoints.steps() == []


def test_bad_settings(tmp_path):
    for settings in ({"keep_latest": 0}, {"best_mode": "most"}):
        with pytest.raises(ValueError, match=str(tmp_path)):
            open_checkpoints(tmp_path, **settings)


# ---- which steps are there


def test_a_step_that_exists(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, small(10), {"at": 10})
        checkpoints.save(13, small(13), {})
        assert checkpoints.steps() == [10, 13]
        checkpoints.save(13, small(13), {})  # the same: nothing is lost
        with pytest.raises(ValueError, match="step 13 exists already with other content"):
            checkpoints.save(13, small(14), {})
        with pytest.raises(ValueError, match="cannot save step 12, step 13 exists already"):
            checkpoints.save(12, small(12), {})
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, small(10), {"at": 10})
        with pytest.raises(ValueError, match="with other content"):
            checkpoints.save(10, small(10), {"at": 11})
        assert_same(checkpoints.restore(13, abstract(small(0))).trees, small(13))


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("min", [3.0, 1.0, 2.0, math.nan, 2.5, 4.0], 2),
        ("max", [3.0, 5.0, 2.0, math.nan, 2.5, 4.0], 2),
        ("max", [3.0, 5.0, 5.0, None, None, None], 3),
        ("min", [3.0, math.inf, math.nan, None, math.nan, None], 1),
    ],
)
def test_the_best_is_kept_beside_the_latest(tmp_path, mode, values, best, reopened):
    settings = {"best_metric": "loss", "best_mode": mode}
    checkpoints = open_checkpoints(tmp_path, **settings)
    assert checkpoints.best_step() is None
    assert checkpoints.restore_best(small(0)) is None
    for step, value in enumerate(values, start=1):
        checkpoints.save(step, small(step), {}, None if value is None else {"loss": value, "other": 0.0})
        if reopened:
            checkpoints.close()
            checkpoints = open_checkpoints(tmp_path, **settings)
    with checkpoints:
        assert checkpoints.steps() == [best, 5, 6]
        assert checkpoints.best_step() == best
        assert_same(checkpoints.restore_best(abstract(small(0))).trees, small(best))


def test_the_latest_only_where_no_metric_is_named(tmp_path):
    with open_checkpoints(tmp_path, keep_latest=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, small(step), {}, {"loss": float(step)})
        checkpoints.wait()
        assert checkpoints.steps() == [3]
        with pytest.raises(ValueError, match="without best_metric"):
            checkpoints.best_step()


MESH = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from train.run.checkpoints import open_checkpoints

mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
place = lambda *spec: NamedSharding(mesh, P(*spec))
plain = {"x": jax.random.normal(jax.random.key(0), (64, 6)), "keys": jax.random.split(jax.random.key(1), 4)}
placed = jax.device_put(plain, {"x": place("fsdp"), "keys": place("data")})
want = {"x": place(("data", "fsdp"), None), "keys": place("data")}
like = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=want[k]) for k, v in plain.items()}
with open_checkpoints(sys.argv[1]) as checkpoints:
    for step, tree in ((1, plain), (2, placed)):
        checkpoints.save(step, {"t": tree}, {})
        found = checkpoints.restore(step, {"t": like}).trees["t"]
        for name in found:
            assert found[name].sharding.is_equivalent_to(want[name], found[name].ndim), found[name].sharding
            words = lambda x: jax.random.key_data(x) if name == "keys" else x
            np.testing.assert_array_equal(words(found[name]), words(plain[name]))
        back = checkpoints.restore(step, {"t": plain}).trees["t"]["x"]
        assert back.sharding == plain["x"].sharding
"""


def test_restores_onto_a_mesh_and_back(tmp_path):
    done = run(MESH, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


TWO = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
wait = {"heartbeat_timeout_seconds": 20, "shutdown_timeout_seconds": 20}
jax.distributed.initialize(f"localhost:{port}", 2, index, **wait)
import jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from train.run.checkpoints import open_checkpoints

mesh = Mesh(np.array(jax.devices()), ("fsdp",))
host = np.arange(4 * 6, dtype=np.float32).reshape(4, 6)
def put(array, *spec):
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P(*spec)), lambda i: array[i])
tree = {"x": put(host, "fsdp"), "y": put(host[:, :4], None, "fsdp"), "r": put(host), "n": 3}
with open_checkpoints(folder, best_metric="loss") as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, {"t": tree}, {"at": step}, {"loss": 1.0})
    checkpoints.wait()
    if index == 0:
        from pathlib import Path
        for file in Path(folder, "2", "t").rglob("d/*"):
            file.write_bytes(file.read_bytes()[:-3] + b"abc")
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    found = checkpoints.restore_latest({"t": tree})
    assert (found.step, len(found.skipped)) == (1, 1), found
    for name in "xyr":
        assert found.trees["t"][name].sharding == tree[name].sharding
        for a, b in zip(found.trees["t"][name].addressable_shards, tree[name].addressable_shards):
            np.testing.assert_array_equal(a.data, b.data)
    checkpoints.save(2, {"t": tree}, {"at": 20}, {"loss": 0.5})
    checkpoints.wait()
    assert checkpoints.restore_best({"t": tree}).meta == {"at": 20}
"""


@pytest.mark.slow
def test_two_processes_save_and_restore_together(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    commands = [[sys.executable, "-c", TWO, str(tmp_path), str(port), str(index)] for index in range(2)]
    both = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    for process in both:
        try:
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 0, errors[-3000:]


def test_an_empty_address_is_not_the_default():
    with pytest.raises(ValueError, match="empty address"):
        check_reachable("")
