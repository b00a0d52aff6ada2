"""Texts in packed rows: what is read of their streams, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.batches import bucket_length, pack, stack_rows
from jaxsteer.contrast import Reading, read_stream
from jaxsteer.inference.scores import score_tokens
from jaxsteer.models.transformer import Network
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
        places = np.zeros((len(examples), 3), np.int64)
        for r, row in enumerate(rows):
            for s, i in enumerate(row):
                places[i] = r // batch_size, r % batch_size, s
        rows += [[]] * (-len(rows) % batch_size)
        filled = [[examples[i] for i in row] for row in rows]
        starts = range(0, len(rows), batch_size)
        batches = tuple(
            jax.tree.map(jnp.asarray, stack_rows(filled[start : start + batch_size], length)) for start in starts
        )
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
            scores = score_tokens(network.model, network.base, network.steering, batch, strength=strength)
            means.append(_means(np.asarray(scores.log_probability, np.float64), batch, self.texts))
        return np.stack(means)[tuple(self.places.T)]


def _means(values: np.ndarray, batch: Batch, texts: int) -> np.ndarray:
    """The means [B, S] of values [B, T] over the tokens of each text that count."""
    segments, counted = np.asarray(batch.segments), np.asarray(batch.weights) != 0
    number = np.arange(1, texts + 1)[None, :, None]
    member = (segments[:, None] == number) & counted[:, None]
    return (np.where(member, values[:, None], 0).sum(axis=-1)) / np.maximum(member.sum(axis=-1), 1)
