"""Drawing the next tokens: how requests ask for it, logits of the last hidden states, greedy and random draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.models.transformer import Network, capped, logits_of, output_embedding
from jaxsteer.ranges import Natural, NonNegative, Range, check_ranges
from jaxsteer.sharding import current_mesh, current_platform
from jaxsteer.types import Array, PyTree

NO_TOKEN = -1
"""Pads the stop tokens of a row."""
TOP = 20
"""Programs report this many of the likeliest tokens, of which each request gets as many as it asks for."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults decode greedily.

    temperature  0 = greedy (the most likely token); otherwise the logits are divided by it
    top_k        sample from the k most likely tokens only; 0 = all
    top_p        nucleus sampling: the smallest set of most likely tokens with at least this total probability; 1 = all
    """

    temperature: NonNegative = 0.0
    top_k: Natural = 0
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0

    def __post_init__(self) -> None:
        """Reject settings that define no distribution."""
        check_ranges(self, "sampling: ")


GREEDY = Sampling()


class Settings(NamedTuple):
    """What each row's request asks for, [B] unless noted. Arrays, not constants: new settings compile nothing.

    prompt_length  int32, tokens before the first completion token, as in `Batch`
    seed           uint32 [B, 2], high and low half of the request's 64-bit seed
    limit          int32, maximum number of new tokens
    temperature    fp32, 0 = greedy
    top_k          int32, 0 = all
    top_p          fp32, 1 = all
    stop_tokens    int32 [B, S], padded with NO_TOKEN
    strength       fp32 [B, number of slots], of each slot of the plan, in its order
    top            int32, number of likeliest tokens to report
    adapter        int32, the index of an adapter in stacked steering; None without one
    """

    prompt_length: Array
    seed: Array
    limit: Array
    temperature: Array
    top_k: Array
    top_p: Array
    stop_tokens: Array
    strength: Array
    top: Array
    adapter: Array | None = None


class Top(NamedTuple):
    """The most likely tokens at each step or position, likeliest first; of equal ones, the lower id first.

    tokens             int32 [..., K]
    log_probabilities  fp32 [..., K], natural logarithm; of the model's own distribution, before temperature
    """

    tokens: Array
    log_probabilities: Array


class Drawing(NamedTuple):
    """What a program that draws is compiled to do.

    sampling  draw at random where the temperature is above 0
    top       find the likeliest tokens where they are asked for
    """

    sampling: bool
    top: bool


class Draw(NamedTuple):
    """The next token of each row, [B] unless noted.

    token            int32
    log_probability  fp32, of that token
    margin           fp32, lead of the largest logit
    top              the likeliest tokens [B, K]; None if nobody may ask
    """

    token: Array
    log_probability: Array
    margin: Array
    top: Top | None


def next_logits(base: PyTree, hidden: Array, softcap: float | None) -> Array:
    """Logits [B, V] of the last hidden states [B, D], see `logits_of`."""
    head = output_embedding(base)
    if current_platform() != "cpu" or current_mesh() is not None:
        return logits_of(hidden, head, softcap)
    # A CPU computes the product in this order in two thirds of the time; without the barrier, XLA turns it around.
    wide = np.promote_types(hidden.dtype, np.float32)
    product = jnp.einsum("vd,bd->vb", head, hidden, preferred_element_type=wide)
    return capped(jax.lax.optimization_barrier(product).T, softcap)


def _tokens_of(logits: Array) -> Array:
    """The token of each column, int32 [1, V]."""
    return jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]


def likeliest(logits: Array) -> tuple[Array, Array]:
    """The first token with the largest logit, int32 [B], and that logit [B], which is NaN if any of the row's is."""
    highest = jnp.max(logits, axis=-1)
    last = jnp.int32(logits.shape[-1] - 1)  # where the largest is NaN, no logit is equal to it
    return jnp.min(jnp.where(logits == highest[:, None], _tokens_of(logits), last), axis=-1), highest


def restrict(logits: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
    """Logits / temperature, -inf outside top-k and then outside top-p of what top-k leaves; settings per row.

    Args:
        logits: [B, V].
        temperature: [B], above 0.
        top_k: int32 [B], 0 = all. Tokens as likely as the k-th are kept.
        top_p: [B], 1 = all.

    Returns:
        The logits of the distribution to sample from, [B, V]. Nothing is sorted while no row uses top-k or top-p.
    """
    vocab = logits.shape[-1]
    column = lambda setting: setting.astype(logits.dtype)[:, None]

    def mask(logits: Array) -> Array:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        count = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
        kth = jnp.take_along_axis(ranked, count[:, None] - 1, axis=-1)
        probability = jax.nn.softmax(jnp.where(ranked < kth, -jnp.inf, ranked), axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # total probability of the tokens ranked above
        inside = (before < column(top_p)) | (column(top_p) >= 1)
        nucleus = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits < jnp.maximum(kth, nucleus), -jnp.inf, logits)

    logits = logits / column(temperature)
    return jax.lax.cond(jnp.any((top_k > 0) | (top_p < 1)), mask, lambda logits: logits, logits)


def sample(logits: Array, sampling: Sampling, key: Array) -> Array:
    """Draw a token from logits [B, V] -> int32 [B]. Temperature first, then top-k, then top-p of what is left."""
    if sampling.temperature == 0:
        return likeliest(logits)[0]
    rows = len(logits)
    allowed = restrict(
        logits,
        jnp.full(rows, sampling.temperature, jnp.float32),
        jnp.full(rows, sampling.top_k, jnp.int32),
        jnp.full(rows, sampling.top_p, jnp.float32),
    )
    return jax.random.categorical(key, allowed, axis=-1).astype(jnp.int32)


def is_stop(token: Array, settings: Settings) -> Array:
    """Whether each row's token is one of its stop tokens, bool [B]."""
    return jnp.any(token[:, None] == settings.stop_tokens, axis=1)


def draw_tokens(network: Network, hidden: Array, settings: Settings, drawn: Array, drawing: Drawing) -> Draw:
    """Draw the next token of each row.

    Args:
        network: the model and its weights.
        hidden: last hidden states [B, D].
        settings: what each row asks for.
        drawn: int32 [B], the index of the token in its answer.
        drawing: what any row may ask for (static).
    """
    logits = next_logits(network.base, hidden, network.model.config.final_softcap)
    best, highest = likeliest(logits)
    others = jnp.where(_tokens_of(logits) == best[:, None], -jnp.inf, logits)
    margin, token, at_token = highest - jnp.max(others, axis=-1), best, highest
    if drawing.sampling:
        token = _sample(logits, best, settings, drawn)
        at_token = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    log_total = log_total_of(logits, highest)
    log_probability = at_token - highest - log_total
    top = _top_if(jnp.any(settings.top > 0), logits, highest, log_total) if drawing.top else None
    return Draw(token, log_probability.astype(jnp.float32), margin.astype(jnp.float32), top)


def log_total_of(logits: Array, highest: Array) -> Array:
    """log Σ exp(z − max z) of logits z [B, V], given max z [B]."""
    return jnp.log(jnp.sum(jnp.exp(logits - highest[:, None]), axis=-1))


def likeliest_tokens(logits: Array, highest: Array, log_total: Array, count: int) -> Top:
    """The K = `count` likeliest tokens, or all where there are fewer.

    Args:
        logits: [B, V].
        highest: the largest of each row, [B].
        log_total: [B], from `log_total_of`.
        count: K (static).
    """
    values, tokens = jax.lax.top_k(logits, min(count, logits.shape[-1]))
    # With `values[:, 0]` as the highest, XLA would no longer see the k largest in this, and sort all logits.
    return Top(tokens.astype(jnp.int32), (values - highest[:, None] - log_total[:, None]).astype(jnp.float32))


def no_top(shape: tuple[int, ...], vocab_size: int, count: int = TOP) -> Top:
    """Zeros in place of the K = `count` likeliest tokens, [*shape, K]."""
    shape = (*shape, min(count, vocab_size))
    return Top(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


def _top_if(asked: Array, logits: Array, highest: Array, log_total: Array) -> Top:
    """The TOP likeliest tokens if `asked`, bool []; zeros without looking for them otherwise."""
    find = lambda: likeliest_tokens(logits, highest, log_total, TOP)
    return jax.lax.cond(asked, find, lambda: no_top(logits.shape[:1], logits.shape[-1]))


def _sample(logits: Array, best: Array, settings: Settings, drawn: Array) -> Array:
    """Sample where the temperature is above 0, if it is anywhere.

    A row's draw depends on its seed and the token's index alone.
    """
    greedy = settings.temperature == 0

    def draw(row: Array, seed: Array, index: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), index)
        return jax.random.categorical(key, row).astype(jnp.int32)

    def draws() -> Array:
        choice = lambda setting, anything: jnp.where(greedy, anything, setting)
        allowed = restrict(
            logits, choice(settings.temperature, 1), choice(settings.top_k, 0), choice(settings.top_p, 1)
        )
        return jnp.where(greedy, best, jax.vmap(draw)(allowed, settings.seed, drawn))

    return jax.lax.cond(jnp.all(greedy), lambda: best, draws)
