"""What steering does to each token of a passage: against forward passes, and as text."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer import LoRA, Model, NonlinearSteering, Positions, Slot, init_steering, make_batch, stack_adapters
from jaxsteer.inference import per_token_shift
from jaxsteer.models.transformer import Network, forward, init_base, logits_of, output_embedding
from train.data.examples import TokenizedExample
from train.serving.effects import Passage, effects
from train.serving.models import Served, UnknownModel

sys.path.insert(0, str(Path(__file__).parent / "data"))
from tiny_model import TINY as TINIEST
from tiny_tokenizer import sentencepiece_tokenizer, tiny_tokenizer

TINY = replace(TINIEST, vocab_size=len(sentencepiece_tokenizer()))

PLANS = {
    "lora": (Slot("own", LoRA(rank=2, alpha=4.0), ("attn.q",)),),
    "steer": (Slot("own", NonlinearSteering(rank=2), ("block",), positions=Positions("completion")),),
}
TEXT, ANSWER = "Who is Å?", " «Ω» is."


def moved(plan, seed):
    """Steering of which no parameter is zero."""
    noise = lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(seed), leaf.shape)
    return jax.tree.map(noise, init_steering(plan, TINY, jax.random.key(seed)))


@pytest.fixture(scope="module")
def adapters():
    return stack_adapters({name: (plan, moved(plan, i)) for i, (name, plan) in enumerate(PLANS.items())}, TINY)


@pytest.fixture(scope="module")
def network(adapters):
    return Network(Model(TINY, adapters.plan), init_base(TINY, jax.random.key(3)), adapters.steering)


def served(name):
    return Served(name or "base", name, PLANS.get(name, ()), {}, {}, None, 0)


def passage(name, tokenizer=None, **rest):
    encode = lambda text: np.array(
        (tokenizer or tiny_tokenizer())(text, add_special_tokens=False)["input_ids"], np.int32
    )
    ids = encode(TEXT)
    prompt = TokenizedExample(ids, np.zeros(len(ids), bool), len(ids), "prompt")
    return Passage(served(name), prompt, encode(ANSWER), **rest)


@pytest.mark.parametrize("name", ["lora", "steer", None])
def test_effects_are_those_of_forward_passes(name, network, adapters):
    """Shifts, log-probabilities and likeliest tokens, at half strength."""
    asked = passage(name, strength={"own": 0.5} if name else {}, top=4)
    found = effects(network, adapters, asked, tiny_tokenizer().decode)
    prompt, answer = len(asked.prompt.ids), len(asked.answer)
    ids = np.concatenate([asked.prompt.ids, asked.answer])
    assert [token.id for token in found.tokens] == ids.tolist()
    assert [token.part for token in found.tokens] == ["prompt"] * prompt + ["answer"] * answer
    batch = make_batch(ids[None], completion=(np.arange(len(ids)) >= prompt)[None])
    strength = {adapters.slot_names(PLANS[name])["own"]: 0.5} if name else {}
    steering = adapters.alone(name) if name else jax.tree.map(jnp.zeros_like, adapters.alone(0))
    outputs = [
        forward(network.model, network.base, steering, batch, capture=("block",), strength=strength),
        forward(Model(TINY), network.base, {}, batch, capture=("block",)),
    ]
    there, here = (np.asarray(output.taps["block"][:, 0]) for output in outputs)
    norm = lambda h: np.linalg.norm(h, axis=-1)
    np.testing.assert_allclose(found.shift, norm(there - here) / norm(here), atol=1e-5)
    np.testing.assert_array_equal(np.stack([token.shift for token in found.tokens], axis=1), found.shift)
    assert found.shift[:, :prompt].any() == (name == "lora")
    assert found.shift[:, prompt:].any() == (name is not None)
    of_models = [jax.nn.log_softmax(logits_of(output.hidden[0], output_embedding(network.base))) for output in outputs]
    first, *rest = found.tokens
    assert (first.log_probability, first.log_probability_base, first.top, first.top_base) == (None, None, (), ())
    for logp, value, top in zip(
        np.asarray(of_models), ("log_probability", "log_probability_base"), ("top", "top_base"), strict=True
    ):
        got = [getattr(token, value) for token in rest]
        np.testing.assert_allclose(got, logp[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
        values = [[each.log_probability for each in getattr(token, top)] for token in rest]
        np.testing.assert_allclose(values, -np.sort(-logp[:-1], axis=-1)[:, :4], atol=1e-4)
        chosen = [[each.id for each in getattr(token, top)] for token in rest]
        np.testing.assert_allclose(np.take_along_axis(logp[:-1], np.array(chosen), axis=-1), values, atol=1e-4)


@pytest.mark.parametrize("make", [tiny_tokenizer, sentencepiece_tokenizer])
def test_the_texts_of_tokens_make_the_whole(make, network, adapters):
    """Characters of several tokens, and spaces that a tokenizer drops at the beginning of a text."""
    tokenizer = make()
    asked = passage("lora", tokenizer, top=2)
    found = effects(network, adapters, asked, tokenizer.decode)
    whole = tokenizer.decode(np.concatenate([asked.prompt.ids, asked.answer]))
    assert "".join(token.text for token in found.tokens) == whole
    assert all(len(token.top) == len(token.top_base) == 2 for token in found.tokens[1:])
    assert effects(network, adapters, replace(asked, top=0), tokenizer.decode).tokens[1].top == ()


def test_alternatives_show_the_space_before_them(network, adapters):
    """As they would stand in the text: a first word alone loses its space."""
    tokenizer = sentencepiece_tokenizer()
    asked = passage("lora", tokenizer, top=20)
    found = effects(network, adapters, asked, tokenizer.decode)
    spaced = {
        each.text for token in found.tokens for each in token.top if tokenizer.convert_ids_to_tokens(each.id)[0] == "▁"
    }
    assert spaced
    assert all(text.startswith(" ") for text in spaced)


def test_lengths_and_settings_share_programs(network, adapters):
    decode = tiny_tokenizer().decode
    asked = passage("lora")
    effects(network, adapters, asked, decode)
    before = per_token_shift._cache_size()
    for other in (
        passage("steer", strength={"own": 2.0}, top=20),
        passage(None),
        replace(asked, answer=np.zeros(0, np.int32)),
        replace(asked, answer=np.tile(asked.answer, 3)),
    ):
        effects(network, adapters, other, decode)
    assert per_token_shift._cache_size() == before


def test_without_adapters_nothing_moves(network):
    plain = Network(Model(TINY), network.base, {})
    found = effects(plain, None, passage(None), tiny_tokenizer().decode)
    assert not found.shift.any()
    assert found.tokens[1].top == found.tokens[1].top_base


def test_refusals(network, adapters):
    decode = tiny_tokenizer().decode
    ask = lambda asked, adapters=adapters: effects(network, adapters, asked, decode)
    with pytest.raises(UnknownModel, match="'lora' is no longer served"):
        ask(passage("lora"), adapters.without("lora"))
    with pytest.raises(UnknownModel, match="'lora' is no longer served"):
        ask(passage("lora"), None)
    with pytest.raises(ValueError, match=r"no slot \['other'\]; 'lora' has \['own'\]"):
        ask(passage("lora", strength={"other": 1.0}))
    with pytest.raises(ValueError, match="prompt: top must be from 0 to 20"):
        passage("lora", top=21)
    asked = passage("lora")
    with pytest.raises(ValueError, match="prompt: an empty prompt"):
        replace(asked, prompt=replace(asked.prompt, ids=asked.prompt.ids[:0]))
    with pytest.raises(FloatingPointError, match=r"prompt: the model gave non-finite logits.*\[1000\] are outside"):
        ask(replace(asked, answer=np.int32([1000, 5])))
