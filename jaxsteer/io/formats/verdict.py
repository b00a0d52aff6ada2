"""What an export means for the model: leaf by leaf, and on a probe batch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.batches import make_batch
from jaxsteer.io.files import Json
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.transformer import Network, logits_of, output_embedding
from jaxsteer.types import Array, Batch, PyTree

EXACT = 1e-5
"""Largest difference of logits, as a share of the largest logit, that rounding in fp32 explains."""

PROBE_ROWS, PROBE_LENGTH = 4, 32


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
    lost              what the files do not hold of what was exported, a sentence each
    """

    verbatim: bool
    logit_difference: float
    largest_logit: float
    kl: float
    top1: float
    moved: float
    positions: int
    lost: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the difference is rounding."""
        return self.logit_difference <= EXACT * self.largest_logit

    def to_json(self) -> dict[str, Json]:
        """As plain values."""
        return {"exactness": "exact" if self.exact else "approximate", **asdict(self)}

    def __str__(self) -> str:
        """One sentence."""
        scale = f" (of up to {self.largest_logit:.3g}"
        scale += f"; the steering moves them by up to {self.moved:.2g})" if self.moved else ")"
        if self.exact:
            return f"exact: logits differ by at most {self.logit_difference:.1e} on {self.positions} positions{scale}"
        return (
            f"approximate: KL {self.kl:.2e} nats, the same token first at {self.top1:.1%} of {self.positions} "
            f"positions, logits differ by up to {self.logit_difference:.2g}{scale}"
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
    """
    batch = make_batch(jnp.asarray(tokens))
    wanted, got = logits(steered.network, batch), logits(read.network, batch)
    plain = logits(SteeredModel(steered.loaded).network, batch) if steered.plan else wanted
    log_p, log_q = jax.nn.log_softmax(wanted), jax.nn.log_softmax(got)
    return Verdict(
        verbatim=verbatim,
        logit_difference=float(jnp.max(jnp.abs(wanted - got))),
        largest_logit=float(jnp.max(jnp.abs(wanted))),
        kl=float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))),
        top1=float(jnp.mean(jnp.argmax(wanted, -1) == jnp.argmax(got, -1))),
        moved=float(jnp.max(jnp.abs(wanted - plain))),
        positions=int(tokens.size),
    )


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
