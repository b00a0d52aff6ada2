"""What a data set is, in one number: a digest of its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from train.data.examples import TokenizedExample


def digest_of(rows: Sequence[TokenizedExample]) -> str:
    """sha256, in hexadecimal, over ids, completion and weights of all examples, in order.

    It does not depend on where the examples were read from.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(np.asarray(row.ids, np.int32).tobytes())
        digest.update(np.asarray(row.completion, np.uint8).tobytes())
        digest.update(np.asarray(row.weights, np.float32).tobytes())
    return digest.hexdigest()
