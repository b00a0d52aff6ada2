"""Folders that pyreft wrote, against the logits that it computed (make_interop_sources.py)."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from imported import changed, check_answers

from jaxsteer.interventions import FixedVector, LoReFT
from jaxsteer.io import load_model
from jaxsteer.io.formats import FORMATS, Given
from jaxsteer.io.pickles import open_pickle

read = FORMATS["pyreft"].read
POSITIONS = "first:2+last:1"
ACTIVATIONS = {
    "loreft": "none",
    "loreft_tanh": "tanh",
    "noreft": "none",
    "direft": "relu",
    "nodireft": "silu",
    "consreft": None,
    "lobireft": None,
}
NAME = "intkey_layer_{}_comp_block_output_unit_pos_nunit_1#0.bin"
GIVEN = Given(activation="none", positions=POSITIONS)


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "interop" / "pyreft"


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_computes_what_pyreft_computes(folder, golden_llama, case):
    given = Given(activation=ACTIVATIONS[case], positions=POSITIONS)
    (slot,) = check_answers(folder, case, golden_llama, given).plan
    assert (slot.sites, slot.layers, str(slot.positions)) == (("block",), (0, 2), POSITIONS)


def test_leaves_are_those_of_the_files_in_their_dtype(folder, golden_llama):
    leaves = read(folder / "loreft_bf16", golden_llama, GIVEN).steering["loreft"]["block"]
    assert {name: leaf.dtype for name, leaf in leaves.items()} == {
        "W": jnp.bfloat16,
        "b": jnp.bfloat16,
        "R": jnp.float32,
    }
    for at, layer in enumerate((0, 2)):
        tensors = open_pickle(folder / "loreft_bf16" / NAME.format(layer))
        for ours, theirs in (("W", "weight"), ("b", "bias"), ("R", "rotate_layer")):
            expected = tensors[theirs].read()
            np.testing.assert_array_equal(leaves[ours][at], expected.T if ours == "R" else expected)


def test_constants_become_what_they_are(folder, golden_llama):
    assert isinstance(read(folder / "lobireft", golden_llama, GIVEN).plan[0].method, FixedVector)
    method = read(folder / "noreft", golden_llama, GIVEN).plan[0].method
    assert method == LoReFT(rank=4, constrained=False)


def test_what_is_not_stored_is_asked_for_at_once(folder):
    with pytest.raises(ValueError, match=r"give --model .*--positions .*--activation "):
        read(folder / "loreft", None, Given())
    with pytest.raises(ValueError, match=r"give --model .*--positions") as error:
        read(folder / "lobireft", None, Given())
    assert "--activation" not in str(error.value)


def test_a_second_bias_under_an_activation_is_refused(folder, golden_llama):
    with pytest.raises(ValueError, match="second bias"):
        read(folder / "noreft", golden_llama, Given(activation="relu", positions="all"))


@pytest.mark.parametrize("positions", ["f1+l1", "", "first:0", "last:x"])
def test_positions_are_checked(folder, golden_llama, positions):
    with pytest.raises(ValueError, match="positions"):
        read(folder / "loreft", golden_llama, Given(activation="none", positions=positions))


def test_a_model_that_does_not_fit(folder, golden):
    with pytest.raises(ValueError, match="expected"):
        read(folder / "loreft", load_model(golden / "families" / "gemma2"), GIVEN)


def representation(layer, *, component="block_output", unit="pos", units=1, **rest):
    keys = ("partition", "group", "link", "moe", "source", "hidden", "latent")
    return [layer, component, unit, units, 4, None, None, *(rest.get(key) for key in keys)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"representations": [representation(0), representation(0)]}, "has a second intervention"),
        ({"representations": [representation(0), representation(1)]}, "block 1 is not among sorted_keys"),
        ({"representations": [representation(0), representation(2, link=0)]}, "links, groups, subspaces or sources"),
        ({"representations": [representation(0), representation(2, component="mlp_output")]}, "site mlp comes nearest"),
        ({"representations": [representation(0), representation(2, component="query")]}, "only block_output is read"),
        ({"representations": [representation(0), representation(2, unit="h")]}, "expected 1 of pos"),
        ({"representations": [representation(0), representation(2, units=4)]}, "expected 1 of pos"),
        ({"representations": [representation(0)]}, "with an entry for each"),
        ({"representations": [representation(True), representation(2)]}, "is no representation"),
        ({"representations": ...}, "expected representations"),
        ({"representations": [], "intervention_types": [], "sorted_keys": []}, "with an entry for each"),
        ({"sorted_keys": [[], {}]}, "is not among sorted_keys"),
        ({"mode": "serial"}, "mode is 'serial'"),
        ({"intervention_types": ["<class 'os.system'>"] * 2}, "system is no intervention that jaxsteer has"),
        ({"intervention_types": ["<class 'pyvene.VanillaIntervention'>"] * 2}, "VanillaIntervention is no interven"),
        ({"intervention_types": [3, 4]}, "3 is no intervention"),
        ({"intervention_types": ["<class 'pyreft.interventions.DireftIntervention'>"] * 2}, "has no learned_source"),
    ],
)
def test_configs_that_are_not_read(folder, golden_llama, tmp_path, fields, words):
    with pytest.raises(ValueError, match=words):
        read(changed(folder / "loreft", tmp_path / "x", "config.json", **fields), golden_llama, GIVEN)


def test_keys_as_they_were_with_dots(folder, golden_llama, tmp_path):
    target = shutil.copytree(folder / "loreft", tmp_path / "x")
    config = json.loads((target / "config.json").read_text())
    dotted = [f"layer.{layer}.comp.block_output.unit.pos.nunit.1#0" for layer in (0, 2)]
    (target / "config.json").write_text(json.dumps(config | {"sorted_keys": dotted}))
    for layer, key in zip((0, 2), dotted, strict=True):
        (target / NAME.format(layer)).rename(target / f"intkey_{key}.bin")
    steered, expected = (read(path, golden_llama, GIVEN) for path in (target, folder / "loreft"))
    assert steered.plan == expected.plan
    np.testing.assert_array_equal(steered.steering["loreft"]["block"]["R"], expected.steering["loreft"]["block"]["R"])


def test_a_rotation_that_is_none_is_refused(folder, golden_llama, tmp_path):
    target = shutil.copytree(folder / "loreft", tmp_path / "x")
    data = bytearray((target / NAME.format(2)).read_bytes())
    rotation = open_pickle(target / NAME.format(2))["rotate_layer"].read()
    at = data.index(rotation.tobytes() if rotation.flags.c_contiguous else rotation.T.tobytes())
    data[at : at + 4] = np.float32(3).tobytes()
    (target / NAME.format(2)).write_bytes(data)
    with pytest.raises(ValueError, match="not orthonormal"):
        read(target, golden_llama, GIVEN)


def test_only_its_folders_are_recognised(folder, golden):
    recognises = FORMATS["pyreft"].recognises
    assert not any(map(recognises, [golden / "tiny_llama", golden / "none", folder / "answers.npz"]))
