"""Every family against transformers on PyTorch, and what must hold in each: decoding, packing, export, steering."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import close, fast_jit, layouts, loss_and_grads, run, supervised_batch

from jaxsteer import LoRA, Model, NonlinearSteering, Slot, init_steering, make_batch
from jaxsteer.io import load_model, save_hf
from jaxsteer.models.attention import Scores, Span, attention
from jaxsteer.models.config import projections_of
from jaxsteer.models.families import FAMILIES, config_from_hf
from jaxsteer.models.layers import MLP, Attention, layer_inputs, norm_of
from jaxsteer.models.sites import unsteered
from jaxsteer.models.transformer import forward, init_base, init_cache, logits_of, output_embedding, write_scales
from jaxsteer.types import ACTIVATIONS

LORA = Slot("l", LoRA(rank=2), ("mlp.down", "attn.q"))
NAMES = [name for name in FAMILIES if name != "llama"]  # which has files of its own
GROUPED = [f"{name}-{kind}" for name in FAMILIES if name != "gpt2" for kind in ("mha", "mqa")]


@pytest.fixture(scope="module")
def theirs(golden):
    return np.load(golden / "families.npz")


@pytest.fixture(scope="module", params=NAMES)
def loaded(request, golden):
    return request.param, load_model(golden / "families" / request.param)


def test_logits_and_hidden_states(loaded, theirs):
    name, model = loaded
    out = run(Model(model.config), model.base, {}, make_batch(theirs["ids"]), capture=("block",))
    hidden = theirs[f"{name}/hidden"]
    close(out.taps["block"][:-1], hidden[1:-1], 1e-5)
    close(out.hidden, hidden[-1], 1e-5)
    close(
        logits_of(out.hidden, output_embedding(model.base), model.config.final_softcap), theirs[f"{name}/logits"], 1e-5
    )


def test_each_part_of_each_block(loaded, theirs):
    """Norm, rotary angles, attention and MLP by themselves, each from what transformers' own reads."""
    name, model = loaded
    config, batch = model.config, make_batch(theirs["ids"])
    inputs_of = layer_inputs(config, Span(batch.segments, batch.positions))

    @fast_jit
    def parts(layer, weights, h, attn_in, mlp_in):
        inputs = inputs_of(layer)
        norm = norm_of(config).apply({"params": weights["attn_norm"]}, h) if config.pre_norm else h
        attn, _ = Attention(config).apply({"params": weights["attn"]}, attn_in, inputs, None, unsteered())
        return norm, inputs.sin, inputs.cos, attn, MLP(config).apply({"params": weights["mlp"]}, mlp_in, unsteered())

    for layer in range(config.layers):
        read = lambda part, layer=layer: theirs[f"{name}/{part}"][layer]
        weights = jax.tree.map(lambda leaf, layer=layer: leaf[layer], model.base["blocks"])
        norm, sin, cos, attn, mlp = parts(jnp.array(layer), weights, read("hidden"), read("attn_in"), read("mlp_in"))
        close(norm, read("attn_in"), 1e-5)
        close(attn, read("attn"), 1e-5)
        close(mlp, read("mlp"), 1e-5)
        if sin is not None and not (config.unrotated_layers and config.unrotated_layers[layer]):
            half = config.head_dim // 2
            for ours, part in ((sin, "sin"), (cos, "cos")):
                close(ours[0], read(part)[:, :half], 1e-5)
                close(ours[0], read(part)[:, half:], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPED)
def test_every_grouping_of_the_heads(name, golden, theirs):
    """A key/value head for each query head, and one for all."""
    model = load_model(golden / "families" / name)
    assert model.config.kv_heads == (model.config.heads if name.endswith("mha") else 1)
    test_logits_and_hidden_states((name, model), theirs)
    test_decoding_is_the_full_forward((name, model), theirs)
    test_packed_and_padded_are_single((name, model))


def test_decoding_is_the_full_forward(loaded, theirs):
    """Token by token, across the edge of the window."""
    _, model = loaded
    ids = theirs["ids"]
    full = run(Model(model.config), model.base, {}, make_batch(ids)).hidden
    step = fast_jit(lambda base, batch, cache: forward(Model(model.config), base, {}, batch, cache=cache))
    cache, got = init_cache(model.config, 2, 24), []
    for t in range(24):
        batch = make_batch(ids[:, t : t + 1])._replace(positions=jnp.full((2, 1), t, jnp.int32))
        out = step(model.base, batch, cache)
        cache = out.cache
        got.append(out.hidden)
    close(jnp.concatenate(got, axis=1), full, 1e-5)


def test_packed_and_padded_are_single(loaded):
    _, model = loaded
    config = model.config if model.config.window is None else replace(model.config, window=3)
    seen = {}
    for layout, (batch, where) in layouts(config.vocab_size).items():
        out = run(Model(config), model.base, {}, batch)
        seen[layout] = {i: out.hidden[row, part] for i, (row, part) in where.items()}
    close(seen["left"], seen["right"], 1e-5)
    close(seen["packed"], seen["right"], 1e-5)


PLAN = (Slot("s", NonlinearSteering(rank=2), ("block", "mlp", "attn", "mlp.in")), LORA)


def test_every_site_is_there_and_fresh_steering_is_the_identity(loaded, theirs):
    _, model = loaded
    sites = set(ACTIVATIONS) | set(projections_of(model.config))
    batch = make_batch(theirs["ids"])  # as in the tests above, so that the plain model is compiled once
    fresh = init_steering(PLAN, model.config, jax.random.key(0))
    taps = jax.eval_shape(
        lambda base, steering: forward(Model(model.config, PLAN), base, steering, batch, capture=tuple(sites)).taps,
        model.base,
        fresh,
    )
    assert set(taps) == sites
    assert {tap.shape[0] for tap in taps.values()} == {model.config.layers}
    plain = run(Model(model.config), model.base, {}, batch).hidden
    assert np.array_equal(run(Model(model.config, PLAN), model.base, fresh, batch).hidden, plain)


ALIKE = ("mistral", "smollm3", "qwen2", "phi3")  # Llama's block but for windows, rotation, biases or fused files
TRAINED = [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in NAMES]


@pytest.mark.parametrize("loaded", TRAINED, indirect=True)
def test_steering_trains(loaded):
    _, model = loaded
    batch = supervised_batch(model.config.vocab_size)
    fresh = init_steering(PLAN, model.config, jax.random.key(0))
    loss, grads = loss_and_grads(Model(model.config, PLAN), model.base, fresh, batch)
    stepped = jax.tree.map(lambda p, g: p - 0.03 * g, fresh, grads)
    again, _ = loss_and_grads(Model(model.config, PLAN), model.base, stepped, batch)
    assert again < loss


def test_what_a_post_norm_puts_on_writes(golden):
    """LoRA writes diag(1 + scale) B to the stream."""
    model = load_model(golden / "families" / "gemma2")
    (factors,) = {site: f for site, f in write_scales(model.config, model.base).items() if site == "mlp.down"}.values()
    scale = model.base["blocks"]["mlp"]["post_norm"]["scale"]
    close(factors, 1 + scale, 1e-6)
    assert write_scales(load_model(golden / "families" / "qwen3").config, {}) == {}


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_bit_for_bit(name, golden, tmp_path):
    first = load_model(golden / "families" / name)
    save_hf(tmp_path / name, first.config, first.base, first.family)
    again = load_model(tmp_path / name)
    assert again.config == first.config
    theirs, ours = (load_file(f / name / "model.safetensors") for f in (golden / "families", tmp_path))
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_exported_config_as_it_reads_its_own(name, golden, tmp_path):
    transformers = pytest.importorskip("transformers")
    first = load_model(golden / "families" / name)
    save_hf(tmp_path, first.config, first.base, first.family)
    one, other = (transformers.AutoConfig.from_pretrained(f).to_dict() for f in (golden / "families" / name, tmp_path))
    said = {key: value for key, value in json.loads((tmp_path / "config.json").read_text()).items() if key in one}
    unlike = {key for key in said if key in other and one[key] != other[key]}
    assert unlike <= {
        "use_bidirectional_attention",
        "dtype",
        "_name_or_path",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }


COUNTS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-4b": 4_022_468_096,
    "gemma-2-9b": 9_241_705_984,
    "phi-3-mini": 3_821_079_552,
    "smollm2-135m": 134_515_008,
    "gpt2": 124_439_808,
}
PUBLISHED = {
    "llama-3.1-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, {"rms_norm_eps": 1e-5}),
    "llama-3.1-70b": ("llama", 128256, 8192, 28672, 80, 64, 8, {"rms_norm_eps": 1e-5}),
    "mistral-7b-v0.1": ("mistral", 32000, 4096, 14336, 32, 32, 8, {"sliding_window": 4096}),
    "qwen2.5-7b": ("qwen2", 152064, 3584, 18944, 28, 28, 4, {"use_sliding_window": False, "sliding_window": 131072}),
    "qwen3-4b": ("qwen3", 151936, 2560, 9728, 36, 32, 8, {"head_dim": 128, "tie_word_embeddings": True}),
    "phi-3-mini": ("phi3", 32064, 3072, 8192, 32, 32, 32, {"sliding_window": 2047}),
    "smollm2-135m": ("llama", 49152, 576, 1536, 30, 9, 3, {"tie_word_embeddings": True}),
    "gemma-2-9b": ("gemma2", 256000, 3584, 14336, 42, 16, 8, {"head_dim": 256, "query_pre_attn_scalar": 256}),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    if name == "gpt2":
        raw = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_ctx": 1024}
    else:
        family, vocab, width, mlp, layers, heads, kv_heads, more = PUBLISHED[name]
        raw = {
            "model_type": family,
            "vocab_size": vocab,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
        } | more
    _, config = config_from_hf(raw, "config.json")
    base = jax.eval_shape(lambda key: init_base(config, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(base)) == COUNTS[name]
    if name == "gemma-2-9b":
        assert config.local_layers == (True, False) * 21
        assert config.query_scale == 256**-0.5


def test_kernels_agree_on_every_feature():
    """Soft-cap, scale and a window that a traced flag switches, values and gradients."""
    B, T, N, K, H = 2, 256, 4, 2, 16
    draw = np.random.default_rng(0)
    q, k, v, out = (jnp.asarray(draw.standard_normal((B, T, n, H)), jnp.float32) for n in (N, K, K, N))
    segments = jnp.asarray(np.repeat([[1, 2]], T // 2, axis=1).repeat(B, axis=0), jnp.int32)
    positions = jnp.tile(jnp.arange(T // 2, dtype=jnp.int32), (B, 2))

    def value(kernel, qkv, local):
        scores = Scores(scale=0.5, softcap=3.0, window=40, local=local)
        return jnp.sum(out * attention(*qkv, Span(segments, positions), kernel=kernel, scores=scores))

    both = fast_jit(jax.value_and_grad(value, argnums=1), static_argnums=0)
    for local in (True, False):
        want = both("rows", (q, k, v), jnp.array(local))
        for kernel in ("dense", "chunked", "splash"):
            close(both(kernel, (q, k, v), jnp.array(local)), want, 1e-4)
