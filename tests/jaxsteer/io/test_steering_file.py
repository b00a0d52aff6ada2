"""Steering files: what is saved comes back bit for bit, and whatever is damaged or altered is refused by name."""

import dataclasses
import hashlib
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
from jaxsteer.io import (
    WeightSample,
    config_from_json,
    config_to_json,
    derived_notes,
    fingerprint,
    load_steering,
    save_steering,
)
from jaxsteer.io.provenance import training_settings
from jaxsteer.io.sample import Block
from jaxsteer.models.config import ModelConfig, RopeScaling
from jaxsteer.steering import init_steering, keep_kind
from jaxsteer.types import Positions, Slot

CONFIG = ModelConfig(97, 48, 3, 4, 2, 12, 80, rope_scaling=RopeScaling("llama3", 8.0))
PLAN = (
    Slot("steer", FixedVector(), ("block", "mlp"), (0, 2), Positions.parse("first:2+last:1")),
    Slot("lora", LoRA(rank=3), ("attn.q", "mlp.down")),
)


VALUES = np.linspace(-1, 1, 32, dtype=np.float32)


def sampled(values=VALUES, form="F32"):
    """A sample of one matrix."""
    block = Block("blocks/attn/q/kernel", 1, (0, 3), form, np.asarray(values, np.float32))
    return WeightSample(f"{form} {values.tolist()}", {form: 1}, (block,))


SAMPLE = sampled()


@pytest.fixture
def saved(tmp_path):
    steering = jax.tree.map(lambda leaf: leaf + 0.25, init_steering(PLAN, CONFIG, jax.random.key(0), jnp.float32))
    path = tmp_path / "runs" / "steer.safetensors"
    notes = {"task": "boolq", "steps": 7}
    save_steering(path, steering, PLAN, model_name="tiny", config=CONFIG, notes=notes, sample=SAMPLE)
    return path, steering


def rewrite(path, metadata=(), tensors=()):
    """Replace entries of the metadata and tensors (None removes one), in a file of version 1: no digests, no sample."""
    with safe_open(path, "np") as file:
        entries = {k: v for k, v in file.metadata().items() if not k.endswith("_sha256") and k != "base_sample"}
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
    assert found.sample.to_json() == SAMPLE.to_json()
    assert found.check_weights(SAMPLE) == ""
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


def test_other_weights_of_the_same_config_are_refused(saved):
    file = load_steering(saved[0])
    other = sampled(VALUES + np.float32(1e-3))
    with pytest.raises(ValueError, match=r"steer\.safetensors: made for tiny, which is another model") as error:
        file.check_weights(other)
    assert "1 of 1 sampled parts of the weights differ by more than rounding (blocks/attn/q/kernel)" in str(error.value)
    assert "steers another model" in file.check_weights(other, other_base=True)
    rounded = sampled(VALUES.astype(jnp.bfloat16), "BF16")
    assert "consistent with tiny: the weights are stored as BF16 here, as F32 there" in file.check_weights(rounded)
    assert "is unknown: the weights are stored as Q6_K here" in file.check_weights(sampled(VALUES, "Q6_K"))


@pytest.mark.parametrize("version", ["1", "2"])
def test_older_files_load_and_say_that_their_base_cannot_be_checked(saved, version):
    path, steering = saved
    entries = {"format_version": version}
    rewrite(path, entries)
    if version == "2":
        with safe_open(path, "np") as old:
            entries = old.metadata()
        digests = {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in load_file(path).items()}
        entries["tensor_sha256"] = json.dumps(digests)
        text = json.dumps(entries, sort_keys=True)
        rewrite(path, entries | {"metadata_sha256": hashlib.sha256(text.encode()).hexdigest()})
    file = load_steering(path)
    identical(file.steering, steering)
    assert "whether the weights are those of tiny cannot be checked" in file.check_weights(SAMPLE)


def test_notes_stay_true_of_steering_made_from_other_steering(saved, tmp_path):
    path, steering = saved
    notes = {"template": "Q: {prompt}", "config": {"task": {"type": "JsonlTask"}, "seed": 3}}
    save_steering(path, steering, PLAN, model_name="tiny", config=CONFIG, notes=notes, sample=SAMPLE)
    trained = load_steering(path)
    assert [step["by"] for step in trained.provenance] == ["training"]
    kept = keep_kind(PLAN, steering, "weight")
    notes = derived_notes("keep_kind", trained, kind="weight")
    save_steering(path, kept, PLAN, model_name="tiny", config=CONFIG, notes=notes, sample=SAMPLE)
    # Merged: what is left belongs to another model, and says what became of the rest.
    rest = {"steer": steering["steer"]}
    notes = derived_notes("fold_weights", load_steering(path), into="merged/")
    save_steering(path, rest, PLAN[:1], model_name="merged/", config=CONFIG, notes=notes)
    file = load_steering(path)
    assert "config" not in file.notes  # these are not the settings of this steering
    assert file.notes["template"] == "Q: {prompt}"
    first, second, third = file.provenance
    assert (first["by"], first["model"], first["config"]["seed"]) == ("training", "tiny", 3)
    assert [slot["name"] for slot in first["plan"]] == ["steer", "lora"]
    assert (second["by"], second["kind"]) == ("keep_kind", "weight")
    assert (third["by"], third["into"]) == ("fold_weights", "merged/")
    assert derived_notes("distill", None, of="runs/full")["provenance"][0]["of"] == "runs/full"
    assert training_settings(file.notes)["seed"] == 3


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


def test_a_flipped_bit_anywhere_in_the_file_is_noticed(saved):
    """Every region: the length, names, metadata with the sample, digests, padding, and each tensor."""
    path, _ = saved
    data = path.read_bytes()
    draw = np.random.default_rng(1)
    regions = [(0, 8), *((at, at + 64) for at in range(8, len(data), 64))]
    for begin, end in regions:
        bit = int(draw.integers(8 * begin, 8 * min(end, len(data))))
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
