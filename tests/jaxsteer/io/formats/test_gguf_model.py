"""Whole models as GGUF files: what is written is what is read again, for every family and type of weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from published import SAYABLE
from tiny import identical, random_steering
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxsteer import parse_plan
from jaxsteer.io import SteeredModel, load_model, save_hf
from jaxsteer.io.formats import FORMATS, Given, WriteOptions
from jaxsteer.io.formats.verdict import unlike
from jaxsteer.io.gguf_config import refuse_config
from jaxsteer.io.gguf_file import open_gguf
from jaxsteer.io.gguf_tokenizer import vocabulary_to_gguf
from jaxsteer.io.gguf_write import KINDS
from jaxsteer.io.llama_cpp import PRE_TOKENIZERS
from jaxsteer.models.config import ModelConfig, RopeScaling
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.transformer import init_base

GGUF = FORMATS["gguf"]
GOLDEN = Path(__file__).resolve().parents[3] / "golden"


def written(steered, folder, **options):
    """The model as it was to be written, and as it is read again."""
    folder.mkdir()
    reduced = GGUF.reduce(steered, WriteOptions(**options))
    GGUF.write(reduced, folder, WriteOptions(**options))
    return reduced, GGUF.read(folder, None, Given())


def refusals(text, family, config, **options):
    return GGUF.refuse(parse_plan((text,), config), FAMILIES[family], config, WriteOptions(**options))


@pytest.fixture(scope="module")
def wide():
    """A random Llama whose rows 32 divides."""
    config = ModelConfig(64, 64, 2, 4, 2, 16, 96, tied_head=True)
    return SteeredModel(replace(load_model_of("llama"), config=config, base=random_base(config)))


def random_base(config):
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_base(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(draw.standard_normal(leaf.shape, np.float32)), shapes)


def load_model_of(family, folder=None):
    """A tiny model of a family, changed where no GGUF file can say what it has."""
    source = GOLDEN / "tiny_llama" if family == "llama" else GOLDEN / "families" / family
    if folder is None:
        return load_model(source)
    raw = json.loads((shutil.copytree(source, folder / "hf") / "config.json").read_text())
    (folder / "hf" / "config.json").write_text(json.dumps(raw | SAYABLE.get(family, {})))
    return load_model(folder / "hf")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back(family, tmp_path):
    loaded = load_model_of(family, tmp_path)
    assert GGUF.refuse((), FAMILIES[family], loaded.config, WriteOptions()) == []
    reduced, read = written(SteeredModel(loaded), tmp_path / "out")
    assert GGUF.recognises(tmp_path / "out")
    assert GGUF.recognises(tmp_path / "out" / "model.gguf")
    assert (read.loaded.config, read.loaded.family) == (loaded.config, family)
    assert read.loaded.tokenizer is None
    assert read.loaded.stop_tokens == loaded.stop_tokens
    identical(read.base, reduced.base)
    if loaded.config.norm_plus_one:  # 1 + scale is stored, up to 3 here
        for theirs, ours in zip(jax.tree.leaves(read.base), jax.tree.leaves(loaded.base), strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=0, atol=2.5e-7)
    else:
        identical(read.base, loaded.base)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_gguf_package(wide, kind, tmp_path):
    reduced, read = written(wide, tmp_path / "out", dtype=kind)
    identical(read.base, reduced.base)
    assert open_gguf(tmp_path / "out" / "model.gguf").tensors["blk.1.ffn_down.weight"].form == kind
    target = GGMLQuantizationType[kind]
    kernel = np.ascontiguousarray(np.asarray(wide.base["blocks"]["mlp"]["down"]["kernel"][1]).T)
    expected = dequantize(quantize(kernel, target), target).T
    np.testing.assert_array_equal(read.base["blocks"]["mlp"]["down"]["kernel"][1], expected)
    np.testing.assert_array_equal(read.base["final_norm"]["scale"], wide.base["final_norm"]["scale"])


def test_a_bf16_base_is_written_in_bf16(wide, tmp_path):
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), wide.base)
    _, read = written(replace(wide, loaded=replace(wide.loaded, base=half)), tmp_path / "out")
    assert open_gguf(tmp_path / "out" / "model.gguf").tensors["blk.0.attn_q.weight"].form == "BF16"
    assert unlike(half, read.base) == []


def test_rows_that_are_no_whole_blocks_become_f16_as_llama_cpp_does(tmp_path):
    reduced, _ = written(SteeredModel(load_model_of("qwen2", tmp_path)), tmp_path / "out", dtype="Q8_0")
    tensors = open_gguf(tmp_path / "out" / "model.gguf").tensors
    assert (tensors["blk.0.ffn_up.weight"].form, tensors["blk.0.ffn_down.weight"].form) == ("Q8_0", "F16")
    assert tensors["blk.0.attn_q.bias"].form == "F32"
    assert any("4 matrices are F16" in sentence for sentence in reduced.lost)


def test_values_that_a_type_cannot_hold_are_refused(wide):
    large = jax.tree.map(lambda leaf: leaf * 1e8, wide.base)
    with pytest.raises(ValueError, match="has values that F16 cannot hold; write F32 or BF16"):
        GGUF.reduce(replace(wide, loaded=replace(wide.loaded, base=large)), WriteOptions(dtype="float16"))


def test_steering_is_merged_biases_included(wide, tmp_path):
    plan = parse_plan(("fixed @ block", "lora(rank=2) @ attn.q"), wide.loaded.config)
    steered = replace(wide, plan=plan, steering=random_steering(plan, wide.loaded.config))
    _, read = written(steered, tmp_path / "out")
    assert (read.plan, read.loaded.config.mlp_bias, read.loaded.config.attn_bias) == ((), True, False)
    np.testing.assert_array_equal(read.base["blocks"]["mlp"]["down"]["bias"], steered.steering["fixed"]["block"]["v"])


def test_a_window_that_llama_cpp_passes_over_is_said(tmp_path):
    reduced = GGUF.reduce(SteeredModel(load_model_of("mistral", tmp_path)), WriteOptions())
    assert "does not compute the sliding window" in reduced.lost[0]
    assert "7 tokens" in reduced.lost[0]


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3", {"attn_bias": True}, ["attn_bias", "qwen3"]),
        ("smollm3", {"mlp_bias": True}, ["mlp_bias", "smollm3"]),
        ("smollm3", {"unrotated_layers": (True, False, False, False)}, ["unrotated_layers"]),
        ("gemma2", {"query_scale": 0.5}, ["query_scale is 0.5", "0.25"]),
        ("gemma2", {"final_softcap": None}, ["final_softcap is None", "30.0"]),
        ("gemma3", {"attn_softcap": 5.0}, ["attn_softcap", "gemma3"]),
        ("gemma3", {"window": None, "local_layers": (), "local_rope_theta": None}, ["needs a sliding window"]),
        ("qwen2", {"rope_scaling": RopeScaling("llama3", 8.0), "rope_theta": 5e5}, ["llama3 scaling"]),
        ("qwen2", {"norm_eps": 1 / 3}, ["norm_eps"]),
        ("qwen2", {"window": 7}, ["window is 7", "None"]),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(family, changes, words, tmp_path):
    config = replace(load_model_of(family, tmp_path).config, **changes)
    reasons = " ".join(refuse_config(FAMILIES[family], config))
    assert all(word in reasons for word in words), reasons


def test_local_layers_of_any_pattern_come_back(tmp_path):
    loaded = load_model_of("gemma2", tmp_path)
    for flags in ((), (True, True, False, True), (False, True, True, False), (True, True, True, False)):
        assert refuse_config(FAMILIES["gemma2"], replace(loaded.config, local_layers=flags)) == []


def test_plans_that_weights_do_not_take_are_refused_by_slot():
    config = load_model_of("llama").config
    assert "not affine" in refusals("nonlinear(rank=2) @ block", "llama", config)[0]
    assert "last" in refusals("fixed @ block positions=last", "llama", config)[0]
    assert "'Q4_K' cannot be written" in refusals("fixed @ block", "llama", config, dtype="Q4_K")[0]
    qwen = load_model_of("qwen2").config
    assert "--to gguf-control" in refusals("fixed @ block", "qwen2", replace(qwen, window=None, local_layers=()))[0]


TEXTS = ("hello 12345 world's\n\n x", "<|end|>a <|end|>", "Ünïcode 中文 🙂", "")


def byte_level(known):
    """A tokenizer.json as published models with this way of splitting have it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "he", "ll", "Ġw", "hell", "12"]
    merges = [("h", "e"), ("l", "l"), ("Ġ", "w"), ("he", "ll"), ("1", "2")]
    made = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=known.whole_first, fuse_unk=False)
    )
    if known.nfc:
        made.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(Regex(split), "isolated") for split in known.splits]
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    return made


def pieces(*, prefix):
    """A tokenizer.json as those that are made from SentencePiece's files."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdlhex\n", "▁h", "ab", "▁ab", "he"]
    scored = ["▁h", "ab", "▁ab", "he"]
    merges = [(t[:cut], t[cut:]) for t in scored for cut in range(1, len(t)) if t[:cut] in tokens and t[cut:] in tokens]
    made = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("▁")] if prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made


def with_tokenizer(folder, made, config, **options):
    """A model folder with this tokenizer, loaded."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|end|>", chat_template="{{ messages[0]['content'] }}<|end|>", **options
    )
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    config = replace(config, vocab_size=len(tokenizer) + 3)
    save_hf(folder, config, random_base(config), "llama", tokenizer, stop_tokens=[len(tokenizer) - 2])
    return load_model(folder)


def same_tokenizer(loaded, tmp_path):
    """Write and read a model; its tokenizer, template and stop tokens must be the same."""
    _, read = written(SteeredModel(loaded), tmp_path / "out")
    ours, theirs = loaded.tokenizer, read.loaded.tokenizer
    for text in (*TEXTS, "a<tool>b <tool> c"):
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert theirs.chat_template == ours.chat_template
    assert read.loaded.stop_tokens == loaded.stop_tokens
    tokens = open_gguf(tmp_path / "out" / "model.gguf").metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == loaded.config.vocab_size
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    return read


@pytest.mark.parametrize("name", ["llama-bpe", "smaug-bpe", "qwen2", "tekken", "smollm", "gpt-2"])
def test_a_byte_level_tokenizer_of_a_folder(name, wide, tmp_path):
    loaded = with_tokenizer(tmp_path / "hf", byte_level(PRE_TOKENIZERS[name]), wide.loaded.config)
    read = same_tokenizer(loaded, tmp_path)
    assert read.loaded.vocabulary["tokenizer.ggml.pre"] == name
    # Of a GGUF file all pairs are copied.
    assert vocabulary_to_gguf(read.loaded) == read.loaded.vocabulary


@pytest.mark.parametrize("prefix", [False, True])
def test_pieces_of_a_folder(prefix, wide, tmp_path):
    made = pieces(prefix=prefix)
    loaded = with_tokenizer(tmp_path / "hf", made, wide.loaded.config, unk_token="<unk>", bos_token="<s>")
    read = same_tokenizer(loaded, tmp_path)
    assert read.loaded.vocabulary["tokenizer.ggml.model"] == "llama"


def test_a_tokenizer_that_no_name_describes_is_refused(wide, tmp_path):
    known = replace(PRE_TOKENIZERS["gpt-2"], splits=(r"\w+|\W",))
    loaded = with_tokenizer(tmp_path / "hf", byte_level(known), wide.loaded.config)
    with pytest.raises(ValueError, match=r"no name that is known here.*\(--to hf\)"):
        GGUF.reduce(SteeredModel(loaded), WriteOptions())


def test_what_is_no_model_is_not_recognised(tmp_path, golden):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    assert not GGUF.recognises(tmp_path / "x.gguf")
    assert not GGUF.recognises(tmp_path)
    assert not GGUF.recognises(golden / "tiny_llama")
