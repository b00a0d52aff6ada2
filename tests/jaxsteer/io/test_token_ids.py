"""Ids of tokens: every one has a row in the embedding, and what ends a reply survives an export."""

import json
import shutil

import numpy as np
import pytest
from published import add_tokenizer
from tiny import identical, run
from tokenizers import AddedToken

from jaxsteer import Model, make_batch
from jaxsteer.io import load_config, load_model, load_tokenizer, save_hf
from jaxsteer.models.families import FAMILIES

ROWS = 97  # of the tiny Llama


@pytest.fixture
def words(golden, write_gguf):
    """A tokenizer of ten tokens, of which the first ends a text."""
    folder = golden / "tiny_llama"
    return load_tokenizer(write_gguf(folder, load_config(folder), name="words.gguf"))


@pytest.fixture
def folder(golden, tmp_path, words):
    """A tiny model with this tokenizer, and weights that must not be read."""
    folder = shutil.copytree(golden / "tiny_llama", tmp_path / "model")
    words.save_pretrained(folder)
    return folder


def write(folder, name, **fields):
    path = folder / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | fields))


def grow(folder, words, *tokens):
    words.add_special_tokens({"additional_special_tokens": [AddedToken(token) for token in tokens]})
    words.save_pretrained(folder)


def test_ids_beyond_the_embedding_are_refused_before_the_weights_are_read(folder, words):
    grow(folder, words, *(f"<filler {i}>" for i in range(ROWS - 10)))
    assert len(load_model(folder).tokenizer) == ROWS
    grow(folder, words, "<|im_start|>", "<|im_end|>")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{folder}: this tokenizer has ids up to 98, .* 97 rows") as error:
        load_model(folder)
    assert "'<|im_start|>' (97), '<|im_end|>' (98). Use the tokenizer that belongs to these" in str(error.value)


def test_another_models_tokenizer_is_refused(golden, folder, words):
    grow(folder, words, *(f"<filler {i}>" for i in range(ROWS)))
    with pytest.raises(ValueError, match=rf"{folder}: this tokenizer has ids up to 106, .* and 5 more\. Use"):
        load_model(golden / "tiny_llama", tokenizer=folder)


def test_a_gguf_file_with_more_tokens_than_rows_is_refused(golden, write_gguf, monkeypatch):
    def many(writer):
        add_tokenizer(writer)
        for value in ("tokens", "token_type"):
            stored = writer.kv_data[0][f"tokenizer.ggml.{value}"]
            stored.value += [f"<{i}>" if value == "tokens" else 4 for i in range(ROWS)]

    monkeypatch.setitem(write_gguf.__globals__, "add_tokenizer", many)
    path = write_gguf(golden / "tiny_llama", load_config(golden / "tiny_llama"))
    with pytest.raises(ValueError, match=r"tiny\.gguf: this tokenizer has ids up to 106, .* 97 rows"):
        load_model(path)


def test_a_token_for_images_needs_no_row(folder, words):
    """The text-only Gemma 3 models have it beyond their embedding."""
    grow(folder, words, *(f"<filler {i}>" for i in range(ROWS - 10)), "<image_soft_token>")
    assert load_model(folder).tokenizer.convert_tokens_to_ids("<image_soft_token>") == ROWS


def test_a_token_beyond_the_vocabulary_makes_its_row_nan(golden_llama):
    """What `forward` says of token arrays, which it cannot check."""
    batch = make_batch(np.array([[5, ROWS, 6], [1, 2, 3]]))
    hidden = run(Model(golden_llama.config), golden_llama.base, {}, batch).hidden
    assert np.isnan(hidden).any(axis=(1, 2)).tolist() == [True, False]


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("ids", [ROWS, [2, 500], -1])
def test_stop_tokens_beyond_the_embedding_are_refused(golden, tmp_path, name, ids):
    folder = shutil.copytree(golden / "tiny_llama", tmp_path / "model")
    (folder / "generation_config.json").unlink()
    write(folder, name, eos_token_id=ids)
    (folder / "model.safetensors").unlink()
    last = ids[-1] if isinstance(ids, list) else ids
    with pytest.raises(ValueError, match=rf"{folder}: the token {last} ends a reply \(eos_token_id\), .* 97 rows"):
        load_model(folder)


def same(ours, theirs):
    """Whether two models are the same but for their names."""
    assert (ours.config, ours.family, ours.fingerprint) == (theirs.config, theirs.family, theirs.fingerprint)
    assert (ours.stop_tokens, ours.generation) == (theirs.stop_tokens, theirs.generation)
    identical(ours.base, theirs.base)
    if theirs.tokenizer is None:
        assert ours.tokenizer is None
        return
    text = " ab 1<tool>c<eos>\n"
    assert len(ours.tokenizer) == len(theirs.tokenizer)
    assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text)
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template
    assert ours.tokenizer.special_tokens_map == theirs.tokenizer.special_tokens_map
    assert ours.tokenizer.model_max_length == theirs.tokenizer.model_max_length


def exported(model, folder):
    save_hf(folder, model.config, model.base, model.family, model.tokenizer, generation=model.generation)
    return load_model(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_load_export_load_is_the_same_model(family_files, tmp_path, family):
    transformers = pytest.importorskip("transformers")
    folder, file = family_files(family)
    (folder / "generation_config.json").unlink(missing_ok=True)
    write(folder, "generation_config.json", eos_token_id=[7, 3], temperature=0.6, do_sample=True, top_p=0.9)
    write(folder, "config.json", bos_token_id=5, pad_token_id=6, eos_token_id=7)
    model = load_model(folder)
    again = exported(model, tmp_path / "once")
    same(again, model)
    assert again.stop_tokens == (7, 3)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "once")
    assert (theirs.eos_token_id, theirs.temperature, theirs.top_p, theirs.do_sample) == ([7, 3], 0.6, 0.9, True)
    said = transformers.AutoConfig.from_pretrained(tmp_path / "once")
    assert (said.eos_token_id, said.bos_token_id, said.pad_token_id) == ([7, 3], 5, 6)
    assert str(said.to_dict()["dtype"]) == "float32"

    from_gguf = load_model(file)
    assert from_gguf.stop_tokens == (0,)
    same(exported(from_gguf, tmp_path / "gguf"), from_gguf)


def test_pieces_and_their_settings_survive_an_export(golden, write_gguf, tmp_path):
    config = load_config(golden / "tiny_llama")
    changes = {"tokenizer": "pieces", "name": "pieces.gguf"}
    path = write_gguf(golden / "tiny_llama", config, **changes)
    with pytest.raises(ValueError, match=r"ids up to 263, .* has 97 rows"):
        load_model(path)
    tokenizer = load_tokenizer(path)
    save_hf(tmp_path / "out", *wide(config), "llama", tokenizer)
    again = load_model(tmp_path / "out")
    assert again.tokenizer.encode("ab abé") == tokenizer.encode("ab abé")
    assert again.generation == {"bos_token_id": 1, "eos_token_id": 2}


def wide(config):
    """The config with a row for every byte, and weights."""
    import dataclasses

    import jax

    from jaxsteer.models.transformer import init_base

    config = dataclasses.replace(config, vocab_size=320)
    shapes = jax.eval_shape(lambda: init_base(config, jax.random.key(0)))
    return config, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def test_settings_that_are_not_said_come_from_the_config_then_from_the_tokenizer(folder):
    (folder / "generation_config.json").unlink(missing_ok=True)
    write(folder, "config.json", eos_token_id=None, bos_token_id=4, pad_token_id=None)
    model = load_model(folder)
    assert model.generation == {"bos_token_id": 4, "eos_token_id": 0}
    write(folder, "config.json", eos_token_id=[3, 4, 3])
    assert load_model(folder).stop_tokens == (3, 4)
    write(folder, "generation_config.json", eos_token_id=None, _from_model_config=True, top_k=5)
    assert load_model(folder).generation == {"bos_token_id": 4, "eos_token_id": [3, 4], "top_k": 5}
