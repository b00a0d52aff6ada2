"""Steering files: what is saved comes back bit for bit, and whatever is damaged or altered is refused by name."""

import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import identical, random_steering, sites_of

from jaxsteer.interventions import METHODS, FixedVector, LoRA
from jaxsteer.io import config_from_json, config_to_json, fingerprint, load_steering, save_steering
from jaxsteer.models.config import ModelConfig, RopeScaling
from jaxsteer.steering import init_steering
from jaxsteer.types import Positions, Slot

CONFIG = ModelConfig(97, 48, 3, 4, 2, 12, 80, rope_scaling=RopeScaling("llama3", 8.0))
PLAN = (
    Slot("steer", FixedVector(), ("block", "mlp"), (0, 2), Positions.parse("first:2+last:1")),
    Slot("lora", LoRA(rank=3), ("attn.q", "mlp.down")),
)


@pytest.fixture
def saved(tmp_path):
    steering = jax.tree.map(lambda leaf: leaf + 0.25, init_steering(PLAN, CONFIG, jax.random.key(0), jnp.float32))
    path = tmp_path / "runs" / "steer.safetensors"
    save_steering(path, steering, PLAN, model_name="tiny", config=CONFIG, notes={"task": "boolq", "steps": 7})
    return path, steering


def rewrite(path, metadata=(), tensors=()):
    """Replace entries of the metadata and tensors (None removes one), in a file of version 1: without digests."""
    with safe_open(path, "np") as file:
        entries = {k: v for k, v in file.metadata().items() if not k.endswith("_sha256")}
    del entries["base_sample"]
    kept = {k: v for k, v in (load_file(path) | dict(tensors)).items() if v is not None}
    save_file(kept, path, entries | {"format_version": "1"} | dict(metadata))


def test_same_bits_come_back(saved):
    path, steering = saved
    found = load_steering(path)
    found.check(CONFIG)
    found.check(dataclasses.replace(CONFIG, max_length=4096))
    assert found.plan == PLAN
    assert jax.tree.structure(found.steering) == jax.tree.structure(steering)
    jax.tree.map(np.testing.assert_array_equal, found.steering, steering)
    assert (found.model_name, found.config, found.fingerprint) == ("tiny", CONFIG, fingerprint(CONFIG))
    assert found.notes == {"task": "boolq", "steps": 7}
    assert found.versions["jax"] == jax.__version__
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_saved(tmp_path, name):
    (*_, site) = sites_of(METHODS[name](), CONFIG)
    plan = (Slot("s", METHODS[name](), (site,), (0, 2)),)
    steering = random_steering(plan, CONFIG)
    save_steering(tmp_path / "s.safetensors", steering, plan, model_name="m", config=CONFIG)
    found = load_steering(tmp_path / "s.safetensors")
    assert found.plan == plan
    identical(found.steering, steering)


def test_bfloat16_is_kept(tmp_path):
    steering = init_steering(PLAN, CONFIG, jax.random.key(0), jnp.bfloat16)
    save_steering(tmp_path / "s.safetensors", steering, PLAN, model_name="m", config=CONFIG)
    found = load_steering(tmp_path / "s.safetensors").steering
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(np.testing.assert_array_equal, found, steering)


def test_another_model_is_refused_with_the_reason(saved):
    other = dataclasses.replace(CONFIG, width=64, layers=4)
    with pytest.raises(ValueError, match=r"steer\.safetensors: made for tiny") as error:
        load_steering(saved[0]).check(other)
    assert "width 64 here, 48 in the file; layers 4 here, 3 in the file" in str(error.value)
    assert "heads" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 300, 3000])
def test_truncated(saved, keep):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"steer\.safetensors: not a complete safetensors file"):
        load_steering(path)


def test_tensors_that_do_not_fit_the_plan_are_all_named(saved):
    path, steering = saved
    name = next(iter(steering["steer"]["block"]))
    first = next(iter(steering["lora"]["attn.q"]))
    rewrite(
        path,
        tensors={
            f"steer/block/{name}": None,
            "steer/mlp/extra": np.ones(3, np.float32),
            f"lora/attn.q/{first}": np.ones((3, 2, 2), np.float32),
        },
    )
    with pytest.raises(ValueError, match=f"steer/block/{name} is missing") as error:
        load_steering(path)
    assert "steer/mlp/extra is not in the plan" in str(error.value)
    assert f"lora/attn.q/{first} has shape [3, 2, 2], expected" in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"format": "else"}, "not a steering file"),
        ({"format_version": "99"}, "steering format 99, this version of jaxsteer reads 1, 2, 3"),
        ({"plan": "[{"}, "the metadata cannot be read"),
        ({"plan": "[{}]"}, "the metadata cannot be read"),
        ({"plan": "3"}, "the metadata cannot be read"),
        ({"config": json.dumps({"vocab_size": 3})}, "the metadata cannot be read"),
        ({"config": json.dumps(config_to_json(CONFIG) | {"later": 1})}, "later"),
        ({"fingerprint": "0" * 16}, "fingerprint"),
    ],
)
def test_metadata_that_cannot_be_followed(saved, metadata, words):
    rewrite(saved[0], metadata)
    with pytest.raises(ValueError, match=r"steer\.safetensors: ") as error:
        load_steering(saved[0])
    assert words in str(error.value)


def test_files_without_digests_still_load(saved):
    path, steering = saved
    rewrite(path)
    with safe_open(path, "np") as file:
        assert not [key for key in file.metadata() if "sha256" in key]
    identical(load_steering(path).steering, steering)


def flipped(data, bit):
    """The bytes with one bit changed."""
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def tensor_spans(data):
    """{name: (first, last) byte in the file} of the tensors."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    return {name: [8 + length + at for at in entry["data_offsets"]] for name, entry in header.items()}


def test_a_flipped_bit_in_a_tensor_is_named(saved):
    path, _ = saved
    data = path.read_bytes()
    for name, (begin, end) in tensor_spans(data).items():
        for bit in (8 * begin, 4 * (begin + end), 8 * end - 1):
            path.write_bytes(flipped(data, bit))
            with pytest.raises(ValueError, match=rf"steer\.safetensors: {name} is damaged"):
                load_steering(path)


def test_a_flipped_bit_in_the_metadata_is_noticed(saved):
    path, _ = saved
    data = path.read_bytes()
    for text in (b"boolq", b"rope_scaling", b"positions", b'"tiny"'):
        path.write_bytes(flipped(data, 8 * (data.index(text) + 1)))
        with pytest.raises(ValueError, match=r"steer\.safetensors: the metadata is damaged"):
            load_steering(path)


def test_a_flipped_bit_anywhere_in_the_header_is_noticed(saved):
    """The header's length, then its JSON: names, types, shapes, offsets, metadata, digests, padding."""
    path, _ = saved
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    draw = np.random.default_rng(0)
    for bit in [*range(64), *(8 * byte + int(draw.integers(8)) for byte in range(8, 8 + length))]:
        path.write_bytes(flipped(data, bit))
        with pytest.raises(ValueError, match=r"steer\.safetensors: "):
            load_steering(path)


def test_integer_tensors_are_refused(saved):
    path, steering = saved
    name = next(iter(steering["steer"]["block"]))
    rewrite(path, tensors={f"steer/block/{name}": np.ones((2, 48), np.int32)})
    with pytest.raises(ValueError, match=f"steer/block/{name} is stored as I32"):
        load_steering(path)


def test_steering_that_does_not_fit_is_not_written(tmp_path):
    steering = init_steering(PLAN, CONFIG, jax.random.key(0))
    del steering["lora"]["mlp.down"]
    with pytest.raises(ValueError, match=r"not written: .*lora/mlp\.down/\w+ is missing"):
        save_steering(tmp_path / "s.safetensors", steering, PLAN, model_name="m", config=CONFIG)
    assert not list(tmp_path.iterdir())


def test_fingerprint_is_stable():
    # A constant: files written today must be recognised by later versions.
    assert fingerprint(ModelConfig(97, 48, 3, 4, 2, 12, 80)) == "d6a69f23a9c437da"
    assert fingerprint(dataclasses.replace(CONFIG, max_length=1)) == fingerprint(CONFIG)
    assert fingerprint(dataclasses.replace(CONFIG, rope_theta=5e5)) != fingerprint(CONFIG)
    assert config_from_json(json.loads(json.dumps(config_to_json(CONFIG)))) == CONFIG
