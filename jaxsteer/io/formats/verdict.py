"""What an export means for the model: leaf by leaf, and on a probe batch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.batches import make_batch
from jaxsteer.io.files import Json
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.quantise import is_quantised
from jaxsteer.models.transformer import Network, logits_of, output_embedding
from jaxsteer.types import Array, Batch, PyTree

EXACT = 1e-5
"""Largest difference of logits, as a share of the largest logit, that rounding in fp32 explains."""

PROBE_ROWS, PROBE_LENGTH = 4, 32


class Noise(NamedTuple):
    """What computing in bf16 instead of fp32 changes, as most programs serve; the base changes without steering too.

    kl, top1            KL divergence from the fp32 distribution, nats, and share of positions with the same token first
    base_kl, base_top1  the same for the base model alone
    """

    kl: float
    top1: float
    base_kl: float
    base_top1: float


@dataclass(frozen=True)
class Verdict:
    """How exact an export is, measured with our own forward pass on the files as they were read again.

    verbatim          whether the trained factors stand in the files bit for bit, so that loading gives them back
    logit_difference  largest difference of any logit from the exported model's
    largest_logit     of the exported model
    kl                mean KL divergence from the exported model's next-token distribution, nats
    top1              share of positions at which both predict the same token
    moved             largest change of a logit by the steering, to compare the difference with; 0 for a whole model
    positions         number of positions measured
    bf16              what computing in bf16 changes; None if it was not measured
    lost              what the files do not hold of what was exported, a sentence each
    """

    verbatim: bool
    logit_difference: float
    largest_logit: float
    kl: float
    top1: float
    moved: float
    positions: int
    bf16: Noise | None = None
    lost: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the difference is rounding."""
        return self.logit_difference <= EXACT * self.largest_logit

    def to_json(self) -> dict[str, Json]:
        """As plain values."""
        noise = None if self.bf16 is None else self.bf16._asdict()
        return {"exactness": "exact" if self.exact else "approximate", **asdict(self), "bf16": noise}

    def __str__(self) -> str:
        """In words, a line for each measurement."""
        scale = f" (of up to {self.largest_logit:.3g}"
        scale += f"; the steering moves them by up to {self.moved:.2g})" if self.moved else ")"
        if self.exact:
            text = f"exact: logits differ by at most {self.logit_difference:.1e} on {self.positions} positions{scale}"
        else:
            text = (
                f"approximate: KL {self.kl:.2e} nats, the same token first at {self.top1:.1%} of {self.positions} "
                f"positions, logits differ by up to {self.logit_difference:.2g}{scale}"
            )
        if self.bf16 is None:
            return text
        kl, top1, base_kl, base_top1 = self.bf16
        return (
            f"{text}\ncomputed in bf16: KL {kl:.1e} nats, the same token first at {top1:.1%}; the base alone "
            f"{base_kl:.1e} and {base_top1:.1%}"
        )


def probe_tokens(vocab_size: int) -> np.ndarray:
    """Token ids [PROBE_ROWS, PROBE_LENGTH] for a model of which no text is at hand: at random, always the same."""
    return np.random.default_rng(0).integers(0, vocab_size, (PROBE_ROWS, PROBE_LENGTH), dtype=np.int32)


def judge(steered: SteeredModel, read: SteeredModel, tokens: np.ndarray, *, verbatim: bool) -> Verdict:
    """Compare what was read again with what was exported.

    Args:
        steered: what was exported.
        read: what the files hold.
        tokens: int32 [B, T], the probe.
        verbatim: whether the leaves of `read` are those of `steered`.

    Raises:
        ValueError: a model whose logits are not finite.
    """
    batch, base = make_batch(jnp.asarray(tokens)), SteeredModel(steered.loaded)
    wanted, got = logits(steered.network, batch), logits(read.network, batch)
    for values, which in ((wanted, "the model that is exported"), (got, "what was written")):
        if not jnp.isfinite(values).all():
            raise ValueError(
                f"{which} gives logits that are not finite, so nothing can be said of it; is the steering damaged, or "
                "too large for the type of the weights (--dtype)?"
            )
    plain = logits(base.network, batch) if steered.plan else wanted
    kl, top1 = _distance(wanted, got)
    noise = None
    if not is_quantised(base.base):
        pairs = ((got, read), (plain, base))
        noise = Noise(*(x for exact, model in pairs for x in _distance(exact, logits(_in_bf16(model.network), batch))))
    return Verdict(
        verbatim=verbatim,
        logit_difference=float(jnp.max(jnp.abs(wanted - got))),
        largest_logit=float(jnp.max(jnp.abs(wanted))),
        kl=kl,
        top1=top1,
        moved=float(jnp.max(jnp.abs(wanted - plain))),
        positions=int(tokens.size),
        bf16=noise,
    )


def _distance(wanted: Array, got: Array) -> tuple[float, float]:
    """Mean KL divergence of the distributions with these logits, and share of positions with the same token first."""
    log_p, log_q = jax.nn.log_softmax(wanted), jax.nn.log_softmax(got)
    kl = jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))
    return float(kl), float(jnp.mean(jnp.argmax(wanted, -1) == jnp.argmax(got, -1)))


def _in_bf16(network: Network) -> Network:
    """The network with the base's weights in bf16."""
    return replace(network, base=jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), network.base))


@jax.jit
def logits(network: Network, batch: Batch) -> Array:
    """Logits [B, T, V] in fp32."""
    hidden, softcap = network(batch).hidden, network.model.config.final_softcap
    return logits_of(hidden, output_embedding(network.base), softcap).astype(jnp.float32)


def unlike(one: PyTree, other: PyTree) -> list[str]:
    """The leaves in which two trees differ, a phrase each: missing, another shape, or other values in any bit."""
    flat = lambda tree: {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    left, right = flat(one), flat(other)
    problems = [f"{name} is missing" for name in left if name not in right]
    problems += [f"{name} is new" for name in right if name not in left]
    for name in left.keys() & right.keys():
        here, there = np.asarray(left[name]), np.asarray(right[name])
        if here.shape != there.shape:
            problems.append(f"{name} has shape {list(there.shape)}, expected {list(here.shape)}")
        elif not np.array_equal(here.astype(np.float32), there.astype(np.float32), equal_nan=True):
            problems.append(f"{name} has other values")
    return sorted(problems)
