"""Damaged files give a clear error, or load as what they now say; never a crash, a hang, or unbounded memory."""

import json
import os
import shutil
import struct
import tracemalloc

import jax
import malformed
import ml_dtypes
import numpy as np
import pytest
from malformed import working_time
from published import KEYS
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxsteer.interventions import FixedVector
from jaxsteer.io import load_config, load_model, load_steering, load_tokenizer, save_hf, save_steering
from jaxsteer.io.files import DEPTH_LIMIT, parse_json
from jaxsteer.io.gguf_config import ROPE_FACTORS
from jaxsteer.io.gguf_file import open_gguf
from jaxsteer.io.safetensors_file import open_safetensors
from jaxsteer.io.stored import Stored, read_base
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.transformer import init_base
from jaxsteer.steering import init_steering
from jaxsteer.types import Slot

SECONDS = 20  # of CPU time, however busy the machine is; a file takes a hundredth of a second
MEMORY = 8_000_000  # bytes; the files have 30,000 to 190,000
WORDS = 40_000  # letters of an error, which names up to 1000 missing tensors


@pytest.fixture
def sources(golden, tmp_path, write_gguf):
    """{format: [(what is loaded, the file that is damaged)]}: fused tensors and three float types; quantised blocks."""
    phi3 = shutil.copytree(golden / "families" / "phi3", tmp_path / "phi3")
    weights = load_file(phi3 / "model.safetensors")
    kinds = (np.float32, np.float16, ml_dtypes.bfloat16)
    save_file(
        {n: t.astype(kinds[i % 3]) for i, (n, t) in enumerate(sorted(weights.items()))}, phi3 / "model.safetensors"
    )
    gemma3 = shutil.copytree(golden / "families" / "gemma3", tmp_path / "gemma3")
    weights = load_file(gemma3 / "model.safetensors")
    embedding = np.resize(weights["model.embed_tokens.weight"], (264, 32))  # a row for every piece
    save_file(weights | {"model.embed_tokens.weight": embedding}, gemma3 / "model.safetensors")
    raw = json.loads((gemma3 / "config.json").read_text())
    (gemma3 / "config.json").write_text(json.dumps(raw | {"vocab_size": 264}))
    llama = tmp_path / "llama"
    config = ModelConfig(64, 32, 2, 2, 1, 16, 64)
    shapes = jax.eval_shape(lambda: init_base(config, jax.random.key(0)))
    draw = np.random.default_rng(0)
    save_hf(llama, config, jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), shapes), "llama")
    one = write_gguf(llama, config, "Q8_0", factors=[1.0] * 8, name="llama.gguf")
    other = write_gguf(
        gemma3, load_config(gemma3), arch="gemma3", name="gemma3.gguf", tokenizer="pieces", **KEYS["gemma3"]
    )
    return {
        "safetensors": [(folder, folder / "model.safetensors") for folder in (phi3, llama)],
        "gguf": [(file, file) for file in (one, other)],
    }


def stored(arrays):
    """Tensors in memory as if they were in a file."""
    return {n: Stored(a.shape, a.nbytes, lambda index=(), a=a: a[index] if index else a) for n, a in arrays.items()}


def check_what_is_read(form, source, path, model):
    """Compare with the header and bytes that the independent reader finds, and the tree that follows from them."""
    with np.errstate(all="ignore"):
        if form == "gguf":
            metadata, arrays, _ = malformed.read_gguf(path.read_bytes())
            ours = open_gguf(path)
            assert repr(ours.metadata) == repr(metadata)
            tensors = ours.tensors
            arrays_of_model = {name: array for name, array in arrays.items() if name != ROPE_FACTORS}
        else:
            arrays_of_model = arrays = malformed.read_safetensors(path.read_bytes())
            tensors = open_safetensors(path)[0]
        assert set(tensors) == set(arrays)
        for name, array in arrays.items():
            assert tensors[name].shape == array.shape
            np.testing.assert_array_equal(tensors[name].read(), array)
        expected = read_base(
            stored(arrays_of_model), "gguf" if form == "gguf" else "hf", FAMILIES[model.family], model.config, "memory"
        )
        jax.tree.map(np.testing.assert_array_equal, model.base, expected)


def attempt(form, number, source, path, whole):
    """None, or what went wrong."""
    names = malformed.names_in(whole, form)
    spoilt, what = malformed.spoil(whole, form, number)
    path.write_bytes(spoilt)
    tracemalloc.clear_traces()
    try:
        with working_time(SECONDS), np.errstate(all="ignore"):
            try:
                model = load_model(source)
            except ValueError as error:
                model, said = None, str(error)
            peak = tracemalloc.get_traced_memory()[1]
            if model is not None:
                check_what_is_read(form, source, path, model)
            elif path.name not in said and source.name not in said:
                return f"{form} {number} ({what}): the error names no file: {said}"
            elif len(said) > WORDS:
                return f"{form} {number} ({what}): an error of {len(said)} letters"
            elif any(what.startswith(start) for start in malformed.OF_A_TENSOR) and not any(n in said for n in names):
                return f"{form} {number} ({what}): the error names no tensor: {said}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{form} {number} ({what}): {type(error).__name__}: {error}"
    return f"{form} {number} ({what}): {peak} bytes" if peak > MEMORY else None


MORE = ((100, 200), *((at, at + 300) for at in range(200, 2000, 300)))
BLOCKS = [(0, 100), *(pytest.param(block, marks=pytest.mark.slow) for block in MORE)]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_spoilt_files(sources, form, block):
    wholes = [path.read_bytes() for _, path in sources[form]]
    for source, _ in sources[form]:
        load_model(source)  # imports are not measured
    tracemalloc.start()
    try:
        found = [
            attempt(form, number, *sources[form][number // 8 % 2], wholes[number // 8 % 2]) for number in range(*block)
        ]
    finally:
        tracemalloc.stop()
    assert not (wrong := list(filter(None, found))), f"{len(wrong)} of {len(found)}:\n" + "\n".join(wrong)


DEEP = "[" * 5000 + "]" * 5000


def steering_with_metadata(path, **metadata):
    """A steering file, without digests, some of whose metadata is replaced."""
    config = ModelConfig(64, 32, 2, 2, 1, 16, 64)
    plan = (Slot("s", FixedVector(), ("block",)),)
    save_steering(path, init_steering(plan, config, jax.random.key(0)), plan, model_name="m", config=config)
    with safe_open(path, "np") as file:
        entries = {k: v for k, v in file.metadata().items() if not k.endswith("_sha256")}
    save_file(load_file(path), path, entries | {"format_version": "1"} | metadata)


@pytest.mark.parametrize("key", ["plan", "config", "notes", "versions"])
@pytest.mark.parametrize(
    "text",
    [DEEP, DEEP[:5000], '{"a":' * 5000 + "1" + "}" * 5000, "[" * 101 + "]" * 101],
    ids=["lists", "never closed", "objects", "just too deep"],
)
def test_deep_metadata_of_a_steering_file(tmp_path, key, text):
    path = tmp_path / "s.safetensors"
    steering_with_metadata(path, **{key: text})
    with pytest.raises(ValueError, match=rf"s\.safetensors: .*{key} in the metadata: (nested|not valid JSON)"):
        load_steering(path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "text",
    [f'{{"a": {DEEP}}}'.encode(), DEEP[:5000].encode(), b'{"a"', b"\xff{}", b"3"],
    ids=["deep", "never closed", "cut short", "not UTF-8", "no object"],
)
def test_json_of_a_folder(golden, tmp_path, name, text):
    folder = shutil.copytree(golden / "tiny_llama", tmp_path / "model")
    if "index" in name:
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(text)
    with pytest.raises(ValueError, match=rf"{name}: (nested too deeply|not valid JSON|expected a JSON object)"):
        load_model(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_deep_json_of_a_tokenizer(golden, tmp_path, name):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).write_text(f'{{"a": {DEEP}}}')
    with pytest.raises(ValueError, match="transformers cannot read this tokenizer"):
        load_tokenizer(tmp_path)


def test_deep_header_of_a_safetensors_file(tmp_path):
    path = tmp_path / "x.safetensors"
    text = f'{{"a": {DEEP}}}'.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match=r"x\.safetensors: .*the header: nested too deeply"):
        open_safetensors(path)


def test_json_as_deep_as_the_limit_is_read():
    levels = "[" * DEPTH_LIMIT + "1" + "]" * DEPTH_LIMIT
    assert json.dumps(parse_json(levels, "here")) == levels
    with pytest.raises(ValueError, match="here: nested too deeply; at most 100 levels are read"):
        parse_json(f"[{levels}]", "here")


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_spoilt_configs(golden, tmp_path, count):
    """A clear error that names the file, or a config; never another kind of error."""
    folders = [golden / "tiny_llama_rope", *(golden / "families" / name for name in FAMILIES if name != "llama")]
    raws = [json.loads((folder / "config.json").read_text()) for folder in folders]
    path, wrong = tmp_path / "config.json", []
    for number in range(count):
        raw, what = malformed.spoil_config(raws[number % len(raws)], number)
        path.write_text(json.dumps(raw))
        try:
            with working_time(SECONDS):
                load_config(tmp_path)
        except ValueError as error:
            if "config.json: " not in str(error) or len(str(error)) > WORDS:
                wrong.append(f"{number} ({what}): {str(error)[:WORDS]}")
        except Exception as error:
            wrong.append(f"{number} ({what}): {type(error).__name__}: {error}")
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)


def test_a_long_file_whose_header_lies_is_not_read_as_a_header(tmp_path):
    """A file of four gigabytes (sparse on the disk) is long enough for every length that its header could claim."""
    path = tmp_path / "long.gguf"
    start = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q1sI", 1, b"k", 9)
    lies = [struct.pack("<IQ", 0, 1 << 31), struct.pack("<IQ", 8, 1 << 28), struct.pack("<IQQ", 8, 1, 1 << 31)]
    for lie in lies:
        path.write_bytes(start + lie)
        os.truncate(path, 1 << 32)
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"long\.gguf: .*the value of 'k': "):
            open_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, "'a' has shape"),
        ({"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}, "'a' has shape"),
        ({"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}, "'a' has shape '2'"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "'a' has the unknown type ['F32']"),
        ({"shape": [2], "data_offsets": [0, 8]}, "'a' is {"),
        ([], "'a' is []"),
    ],
)
def test_an_entry_that_is_none_is_named(tmp_path, header, words):
    path = tmp_path / "x.safetensors"
    text = json.dumps({"a": header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=r"x\.safetensors") as error:
        open_safetensors(path)
    assert words in str(error.value)


def test_what_is_given_twice_is_refused(tmp_path):
    """JSON readers keep the last of two entries, so a file that was joined wrongly would be read."""
    entry = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    text = f"{{{entry}, {entry}}}".encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match="'a' is given twice"):
        open_safetensors(path)


@pytest.mark.parametrize("value", ["x", -1, [], {}, True, 1.5])
@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("gemma3", "sliding_window_pattern"),
        ("gemma3", "_sliding_window_pattern"),
        ("qwen2", "max_window_layers"),
        ("smollm3", "no_rope_layer_interval"),
        ("smollm3", "no_rope_layers"),
    ],
)
def test_numbers_of_layers_are_checked(golden, tmp_path, family, field, value):
    """Fields that say which layers are local or not rotated; null counts as absent."""
    raw = json.loads((golden / "families" / family / "config.json").read_text())
    raw = {key: other for key, other in raw.items() if key not in ("layer_types", "no_rope_layers", field)}
    path, read = tmp_path / "config.json", lambda: load_config(tmp_path)
    path.write_text(json.dumps(raw))
    absent = read()
    path.write_text(json.dumps(raw | {field: None}))
    assert read() == absent
    path.write_text(json.dumps(raw | {field: value}))
    if field == "no_rope_layers" and value == []:
        assert read() == absent
        return
    with pytest.raises(ValueError, match=rf"config\.json: {field} is "):
        read()
