"""Texts in packed rows: what is read of their streams, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsteer.batches import bucket_length, pack, stack_rows
from jaxsteer.contrast import Reading, read_stream
from jaxsteer.models.transformer import Network, forward, output_embedding
from jaxsteer.objectives.tokens import token_log_probabilities
from jaxsteer.types import Array, Batch
from train.data import TokenizedExample


@dataclass(frozen=True)
class Rows:
    """Texts in batches of one shape.

    batches  of B rows [B, T]
    places   int [n, 3]: batch, row, and place in its row of each text, from 0
    texts    the largest number of texts in a row
    """

    batches: tuple[Batch, ...]
    places: np.ndarray
    texts: int

    @classmethod
    def of(cls, examples: Sequence[TokenizedExample], batch_size: int) -> Rows:
        """Pack texts into rows about as long as two of the longest."""
        length = bucket_length(min(2 * max(map(len, examples)), sum(map(len, examples))))
        rows = pack([len(example) for example in examples], length)
        size = batch_rows(len(rows), batch_size)
        places = np.zeros((len(examples), 3), np.int64)
        for r, row in enumerate(rows):
            for s, i in enumerate(row):
                places[i] = r // size, r % size, s
        batches = in_batches([[examples[i] for i in row] for row in rows], length, size)
        return cls(batches, places, max(map(len, rows)))

    def streams(self, network: Network, reading: Reading) -> Array:
        """What is read of the stream of each text, fp32 [L, n, D]."""
        read = [
            np.asarray(read_stream(network.model, network.base, batch, self.texts, reading)) for batch in self.batches
        ]
        batch, row, place = self.places.T
        return jnp.asarray(np.stack(read, axis=1)[:, batch, row, place])

    def log_probabilities(self, network: Network, strength: Mapping[str, np.float32] | None = None) -> np.ndarray:
        """The mean log-probability of the tokens of each text that count, nats, float64 [n]."""
        means = []
        for batch in self.batches:
            scores = np.asarray(_log_probabilities(network, batch, strength), np.float64)
            means.append(_means(scores, batch, self.texts))
        return np.stack(means)[tuple(self.places.T)]


def batch_rows(rows: int, most: int) -> int:
    """Rows of a batch: as few batches of at most `most` rows as possible, as equal as possible."""
    return -(-rows // -(-rows // most))


def in_batches(rows: Sequence[Sequence[TokenizedExample]], length: int, size: int) -> tuple[Batch, ...]:
    """Rows in batches [size, length] on the device; the last is filled up with empty rows."""
    filled = [*rows, *([[]] * (-len(rows) % size))]
    stacked = (stack_rows(filled[start : start + size], length) for start in range(0, len(filled), size))
    return tuple(jax.tree.map(jnp.asarray, batch) for batch in stacked)


@jax.jit
def _log_probabilities(network: Network, batch: Batch, strength: Mapping[str, ArrayLike] | None) -> Array:
    """Of the tokens that count, at the tokens themselves, fp32 [B, T]."""
    hidden = forward(network.model, network.base, network.steering, batch, strength=strength).hidden
    head, softcap = output_embedding(network.base), network.model.config.final_softcap
    return token_log_probabilities(hidden, head, batch, softcap)


def _means(values: np.ndarray, batch: Batch, texts: int) -> np.ndarray:
    """The means [B, S] of values [B, T] over the tokens of each text that count."""
    segments, counted = np.asarray(batch.segments), np.asarray(batch.weights) != 0
    number = np.arange(1, texts + 1)[None, :, None]
    member = (segments[:, None] == number) & counted[:, None]
    return (np.where(member, values[:, None], 0).sum(axis=-1)) / np.maximum(member.sum(axis=-1), 1)
