"""LoRA adapters and control vectors as GGUF files, of ours and of other programs, whole and damaged."""

from functools import partial

import gguf
import numpy as np
import pytest
from exported import family_model, read_again, refusals, same_updates, steered_of, written
from published import names_of
from tiny import identical, run

from jaxsteer import make_batch
from jaxsteer.io.formats import FORMATS, Given, WriteOptions
from jaxsteer.io.formats.updates import updates_of
from jaxsteer.io.gguf_file import open_gguf
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.transformer import logits_of, output_embedding

LORA, CONTROL, REPENG = (FORMATS[name] for name in ("gguf-lora", "gguf-control", "repeng"))
NONE, PLAIN = Given(), WriteOptions()


@pytest.fixture(scope="module")
def family(golden):
    """(name) -> a tiny model of that family."""
    return partial(family_model, golden)


@pytest.fixture(scope="module")
def llama(family):
    return family("llama")


def round_trip(format, model, folder):
    """What was to be written, and what is read again."""
    reduced = written(format, model, folder)
    assert next(name for name, row in FORMATS.items() if row.recognises(folder)) == format.name
    read = read_again(format, folder, model)
    assert read.plan == reduced.plan
    identical(read.steering, reduced.steering)
    return reduced, read


def test_factors_of_one_alpha_are_stored_as_they_are(llama, tmp_path):
    model = steered_of(
        llama, "lora(rank=2, alpha=6) @ attn.q,mlp.down", "lora(rank=3, alpha=6) @ attn.v name=v layers=1"
    )
    _, read = round_trip(LORA, model, tmp_path / "out")
    same_updates(read, model)
    assert {slot.method.rank for slot in read.plan} == {2, 3}
    for place, update in updates_of(model).items():
        np.testing.assert_array_equal(updates_of(read)[place].a, update.a)
        np.testing.assert_array_equal(updates_of(read)[place].b, update.b)
    file = open_gguf(tmp_path / "out" / "adapter.gguf")
    assert file.metadata["adapter.lora.alpha"] == 6.0
    # llama.cpp has the two of a rotary pair next to each other: rows 0 and 6 of a head of 12 come first.
    b = file.tensors["blk.0.attn_q.weight.lora_b"].read()
    np.testing.assert_array_equal(b[:2], model.steering["lora"]["attn.q"]["B"][0][np.array([0, 6])])


def test_the_rarer_alpha_goes_into_b(llama, tmp_path):
    model = steered_of(llama, "lora(rank=2, alpha=6) @ attn.q,mlp.down", "lora(rank=2, alpha=3) @ attn.v name=v")
    _, read = round_trip(LORA, model, tmp_path / "out")
    same_updates(read, model)
    b = open_gguf(tmp_path / "out" / "adapter.gguf").tensors["blk.1.attn_v.weight.lora_b"].read()
    np.testing.assert_array_equal(b, model.steering["v"]["attn.v"]["B"][1] / 2)


def test_a_scale_of_zero_is_not_llama_cpps_scale_of_one(llama, tmp_path):
    model = steered_of(llama, "lora(rank=2, alpha=0) @ attn.q")
    _, read = round_trip(LORA, model, tmp_path / "out")
    same_updates(read, model)


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_of_every_family(name, family, tmp_path):
    loaded = family(name)
    sites = "attn.q,attn.v,attn.o,mlp.up,mlp.down" + (",mlp.gate" if loaded.config.gated else "")
    model = steered_of(loaded, f"lora(rank=2, alpha=4) @ {sites}", "lora(rank=3, alpha=5) @ attn.k name=k layers=1")
    _, read = round_trip(LORA, model, tmp_path / "out")
    same_updates(read, model)
    known = names_of({"mistral": "llama"}.get(name, name)).mapping.values()
    stored = {tensor[:-14] for tensor in open_gguf(tmp_path / "out" / "adapter.gguf").tensors}  # .weight.lora_a
    assert stored <= {entry[1] for entry in known}


def test_affine_steering_becomes_lora(llama, tmp_path):
    model = steered_of(llama, "linear(rank=2) @ mlp")
    _, read = round_trip(LORA, model, tmp_path / "out")
    same_updates(read, model)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dora(rank=2) @ attn.q", ["DoRA"]),
        ("nonlinear(rank=2) @ block", ["not affine", "hf-steered"]),
        ("fixed @ block", ["--to gguf"]),
        ("lora(rank=2) @ attn.q positions=last", ["last"]),
    ],
)
def test_what_is_no_lora_is_refused(text, words, llama):
    reasons = " ".join(refusals(LORA, llama, text))
    assert all(word in reasons for word in words), reasons


def test_vectors_are_added_up_and_stored_by_block(llama, tmp_path):
    model = steered_of(llama, "fixed @ block layers=1-2", "fixed @ mlp layers=1 name=m")
    _, read = round_trip(CONTROL, model, tmp_path / "out")
    v, m = model.steering["fixed"]["block"]["v"], model.steering["m"]["mlp"]["v"]
    np.testing.assert_array_equal(read.steering["control"]["block"]["v"], np.stack([v[0] + m[0], v[1]]))
    assert read.plan[0].layers == (1, 2)
    file = open_gguf(tmp_path / "out" / "control.gguf")
    assert sorted(file.tensors) == ["direction.1", "direction.2"]
    assert file.metadata["controlvector.model_hint"] == "llama"
    assert file.metadata["controlvector.layer_count"] == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fixed @ block", ["layer 0", "--to gguf"]),
        ("fixed @ attn layers=1", ["after blocks only"]),
        ("linear(rank=2) @ block layers=1", ["no fixed vector", "hf-steered"]),
        ("fixed @ block layers=1 positions=last", ["last"]),
        ("lora(rank=2) @ attn.q layers=1", ["after blocks only"]),
    ],
)
def test_what_is_no_control_vector_is_refused(text, words, llama):
    reasons = " ".join(refusals(CONTROL, llama, text))
    assert all(word in reasons for word in words), reasons


def as_repeng(path, vectors, hint="llama"):
    """A file with the keys and tensors of repeng's `export_gguf`."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for name, vector in vectors.items():
        writer.add_tensor(name, np.asarray(vector, np.float32))
    return saved(writer, path)


def as_peft(path, tensors, arch="llama", **keys):
    """A file with the keys of llama.cpp's converter of PEFT adapters."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    for key, value in {"adapter.type": "lora", "adapter.lora.alpha": 4.0, **keys}.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.asarray(tensor, np.float32))
    return saved(writer, path)


def saved(writer, path):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_repengs_vectors_need_their_strength(llama, tmp_path):
    path = as_repeng(tmp_path / "happy.gguf", {"direction.2": np.ones(48), "direction.1": np.arange(48)})
    assert [name for name, row in FORMATS.items() if row.recognises(path)] == ["repeng"]
    with pytest.raises(ValueError, match="which model it is for: --model, nor the factor of its vectors: --strength"):
        REPENG.read(path, None, NONE)
    read = REPENG.read(path, llama, Given(strength=1.5))
    np.testing.assert_array_equal(read.steering["control"]["block"]["v"], [1.5 * np.arange(48), np.full(48, 1.5)])
    assert read.plan[0].layers == (1, 2)


@pytest.mark.parametrize(
    ("vectors", "hint", "words"),
    [
        ({"direction.3": np.ones(48)}, "llama", ["direction.3", "direction.1 to direction.2"]),
        ({"direction.-1": np.ones(48)}, "llama", ["direction.-1"]),
        ({"direction.1": np.ones(47)}, "llama", ["[47]", "48"]),
        ({"direction.1": np.ones(48)}, "gemma2", ["'gemma2'", "llama"]),
        ({"direction.1": np.ones(48), "direction.01": np.ones(48)}, "llama", ["two directions"]),
        ({}, "llama", ["no vectors"]),
    ],
)
def test_vectors_of_another_model_are_refused(vectors, hint, words, llama, tmp_path):
    path = as_repeng(tmp_path / "x.gguf", vectors, hint)
    with pytest.raises(ValueError, match=r"x\.gguf: ") as error:
        REPENG.read(path, llama, Given(strength=1.0))
    assert all(word in str(error.value) for word in words), error.value


NAME = "blk.0.ffn_up.weight.lora_"
A, B = np.ones((2, 48)), np.ones((80, 2))


def test_an_adapter_of_llama_cpps_converter(llama, tmp_path):
    path = as_peft(tmp_path / "x.gguf", {f"{NAME}b": B, f"{NAME}a": A})
    assert [name for name, row in FORMATS.items() if row.recognises(path)] == ["gguf-lora"]
    (slot,) = LORA.read(path, llama, NONE).plan
    assert (slot.sites, slot.layers, slot.method.rank, slot.method.alpha) == (("mlp.up",), (0,), 2, 4.0)
    whole = as_peft(tmp_path / "y.gguf", {f"{NAME}b": B, f"{NAME}a": A}, **{"adapter.lora.alpha": 0.0})
    assert LORA.read(whole, llama, NONE).plan[0].method.scale == 1.0


@pytest.mark.parametrize(
    ("tensors", "keys", "words"),
    [
        ({f"{NAME}a": A}, {}, [f"{NAME}b", "missing"]),
        ({f"{NAME}a": A, f"{NAME}b": B[:, :1]}, {}, ["[2, 48]", "[80, 1]", "[80, rank]"]),
        ({f"{NAME}a": A[:, 1:], f"{NAME}b": B}, {}, ["[2, 47]", "[rank, 48]"]),
        ({f"{NAME}a": A[0], f"{NAME}b": B}, {}, ["[48]"]),
        ({"token_embd.weight.lora_a": A, "token_embd.weight.lora_b": B}, {}, ["token_embd.weight.lora_a"]),
        ({f"{NAME}a": A, f"{NAME}b": B}, {"arch": "qwen2"}, ["'qwen2'", "'llama'"]),
        ({f"{NAME}a": A, f"{NAME}b": B}, {"adapter.alora.invocation": "x"}, ["adapter.alora.invocation"]),
        ({f"{NAME}a": A, f"{NAME}b": B}, {"adapter.lora.alpha": float("nan")}, ["alpha is nan"]),
        ({f"{NAME}a": A, f"{NAME}b": B}, {"adapter.lora.alpha": "2"}, ["alpha is '2'"]),
        ({f"{NAME}a": A, f"{NAME}b": B}, {"adapter.type": "dora"}, ["this is no LoRA"]),
        ({}, {}, ["no factors"]),
    ],
)
def test_damaged_adapters_are_refused(tensors, keys, words, llama, tmp_path):
    path = as_peft(tmp_path / "x.gguf", tensors, **keys)
    with pytest.raises(ValueError, match=r"x\.gguf: ") as error:
        LORA.read(path, llama, NONE)
    assert all(word in str(error.value) for word in words), error.value


def test_a_base_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="--model"):
        LORA.read(as_peft(tmp_path / "x.gguf", {f"{NAME}a": A, f"{NAME}b": B}), None, NONE)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("kind", ["lora", "control"])
def test_damage_is_refused_or_harmless(kind, seed, llama, tmp_path):
    draw = np.random.default_rng(seed)
    if kind == "lora":
        path, format = as_peft(tmp_path / "x.gguf", {f"{NAME}a": A, f"{NAME}b": B}), LORA
    else:
        path, format = as_repeng(tmp_path / "x.gguf", {"direction.1": np.ones(48)}), REPENG
    data = bytearray(path.read_bytes())
    head = len(data) if seed % 2 else 300  # half of them in the header
    for at in draw.integers(0, head, draw.integers(1, 6)):
        data[at] = draw.integers(0, 256)
    path.write_bytes(data[: draw.integers(1, len(data))] if seed % 5 == 0 else data)
    format.recognises(path)
    try:
        read = format.read(path, llama, Given(strength=1.0))
    except ValueError:
        return
    assert read.plan


@pytest.mark.parametrize(
    ("name", "file", "format", "given"),
    [("lora", "adapter.gguf", LORA, NONE), ("control", "control.gguf", REPENG, Given(strength=1.0))],
)
def test_files_of_others_mean_what_llama_cpp_computes(name, file, format, given, llama, golden):
    answers = np.load(golden / "interop" / "llama" / "answers.npz")
    read = format.read(golden / "interop" / "llama" / file, llama, given)
    hidden = run(read.model, read.base, read.steering, make_batch(answers["tokens"])).hidden
    ours = np.asarray(logits_of(hidden, output_embedding(read.base)))
    np.testing.assert_allclose(ours, answers[f"{name}/logits"], rtol=0, atol=1e-5)
    assert np.abs(answers[f"{name}/logits"] - answers["base/logits"]).max() > 0.1
