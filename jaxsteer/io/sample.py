"""Which weights a model has: values at fixed places of its files, to be compared with those of another copy of it.

A config says what shape a model has; a base model and its instruction-tuned sibling share it. A sample is read from the
stored files, a few thousand values in our layout, so that it costs little at any size and is the same on every process,
whatever dtype and sharding the weights are loaded in.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jaxsteer.io.files import Json
from jaxsteer.io.rounding import BLOCK, PLAIN, is_known, is_quantised, is_rounding_of, may_be_one
from jaxsteer.io.stored import Index, Stored, read_part_of_leaf, transform_of, with_prefix
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families.table import ONE_ADDED, Family, Row

MATRICES, VECTORS = 64, 24
"""Numbers of matrices and vectors (norms, biases) of which a sample keeps a block; its digest is of one in each."""


class Block(NamedTuple):
    """Consecutive values of one leaf.

    leaf    path in the base tree
    layer   0 for a leaf that is not stacked
    at      where they begin in the layer's leaf: (row, column), or one number for a vector
    form    in which they are stored: "F32", "BF16", "Q8_0", ...
    values  fp32 [n]
    """

    leaf: str
    layer: int
    at: tuple[int, ...]
    form: str
    values: np.ndarray

    @property
    def place(self) -> tuple[str, int, tuple[int, ...]]:
        """Where it is."""
        return self.leaf, self.layer, self.at


@dataclass(frozen=True, eq=False)
class WeightSample:
    """Values of a model's weights, as they are stored.

    digest  SHA-256 of a block of every matrix and vector, and of the forms in which they are stored
    forms   number of those blocks in each form
    blocks  some of them
    """

    digest: str
    forms: Mapping[str, int]
    blocks: tuple[Block, ...]

    def to_json(self) -> dict[str, Json]:
        """As plain values; `sample_from_json` reads them back."""
        joined = np.concatenate([block.values for block in self.blocks]) if self.blocks else np.zeros(0)
        return {
            "digest": self.digest,
            "forms": dict(self.forms),
            "places": [[*block.place, block.form, len(block.values)] for block in self.blocks],
            "values": base64.b64encode(joined.astype("<f4").tobytes()).decode(),
        }


def sample_from_json(data: Json) -> WeightSample:
    """The inverse of `WeightSample.to_json`.

    Raises:
        ValueError: `data` is not what it writes.
    """
    try:
        values = np.frombuffer(base64.b64decode(data["values"], validate=True), "<f4").astype(np.float32)
        ends = np.cumsum([0, *(int(count) for *_, count in data["places"])])
        if ends[-1] != len(values):
            raise ValueError(f"{len(values)} values for {ends[-1]} places")
        blocks = tuple(
            Block(leaf, layer, tuple(at), form, values[begin:end])
            for (leaf, layer, at, form, _), begin, end in zip(data["places"], ends[:-1], ends[1:], strict=True)
        )
        return WeightSample(data["digest"], {str(form): int(count) for form, count in data["forms"].items()}, blocks)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"weight sample: {error}") from None


def sample(stored: Mapping[str, Stored], layout: str, family: Family, config: ModelConfig) -> WeightSample:
    """Sample the weights in a file or folder, whose tensors `check_names` has passed.

    Args:
        stored, layout, family, config: as for `read_base`.
    """
    stored = with_prefix(stored, layout, family)
    blocks = []
    for row, layer in _leaves(family, config):
        index = _index(row, layer, config)
        values, form = read_part_of_leaf(stored, row, layout, config, layer, index)
        if ONE_ADDED in (row.transform, row.gguf_transform):
            # As GGUF files hold it: they have lost the low bits of a scale that is small beside 1.
            values = values + np.float32(1)
        blocks.append(Block(row.path, layer, tuple(part.start for part in index), form, values.reshape(-1)))
    digest, forms = hashlib.sha256(), dict[str, int]()
    for block in blocks:
        digest.update(f"{block.place} {block.form}".encode() + block.values.astype("<f4").tobytes())
        forms[block.form] = forms.get(block.form, 0) + 1
    return WeightSample(digest.hexdigest(), forms, tuple(_chosen(blocks)))


def _leaves(family: Family, config: ModelConfig) -> Iterator[tuple[Row, int]]:
    """Every matrix and vector of the model that can be read in parts: its row in the table, and its layer."""
    for row in family.parameters(config):
        in_parts = all(transform_of(row, layout).group is not None for layout in ("hf", "gguf"))
        if in_parts and "P" not in row.axes:  # max_length does not belong to a model's identity
            yield from ((row, layer) for layer in range(config.layers if row.stacked else 1))


def _index(row: Row, layer: int, config: ModelConfig) -> Index:
    """A block of one layer's leaf at a place drawn from its name, along a row of the matrix that GGUF files store."""
    shape = row.shape(config)
    along = 0 if len(shape) == 1 or transform_of(row, "gguf").flips else len(shape) - 1
    index = []
    for axis, length in enumerate(shape):
        if axis == along:
            start = BLOCK * _draw(f"{row.path} {layer} block", max(length // BLOCK, 1))
            index.append(slice(start, min(start + BLOCK, length)))
        else:
            start = _draw(f"{row.path} {layer} axis {axis}", length)
            index.append(slice(start, start + 1))
    return tuple(index)


def _draw(what: str, count: int) -> int:
    """A number below `count` that depends on a text only: the same in every version of NumPy."""
    return int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "little") % count


def _chosen(blocks: list[Block]) -> Iterator[Block]:
    """The blocks that are kept: MATRICES and VECTORS of them, at random but always the same."""
    order = sorted(blocks, key=lambda block: _draw(f"{block.place}", 1 << 60))
    for length, count in ((2, MATRICES), (1, VECTORS)):
        yield from [block for block in order if len(block.at) == length][:count]


Verdict = Literal["same", "consistent", "undecided", "another"]


@dataclass(frozen=True)
class Comparison:
    """Whether two samples are of one model.

    verdict  same: stored alike, value for value; consistent: stored in other forms, and equal but for their rounding;
             undecided: the forms' rounding is not known; another: neither
    reason   in words
    """

    verdict: Verdict
    reason: str


def compare_samples(here: WeightSample, there: WeightSample) -> Comparison:
    """Compare the weights of two models of one config.

    Args:
        here: of the model at hand.
        there: of the model that it should be.
    """
    if here.digest == there.digest:
        return Comparison("same", "the sampled weights are the same")
    known = {block.place: block for block in there.blocks}
    pairs = [(block, known[block.place]) for block in here.blocks if block.place in known]
    forms = f"stored as {_list(here.forms)} here, as {_list(there.forms)} there"
    if not pairs:
        return Comparison("undecided", "another version of jaxsteer sampled other places of the weights")
    outcomes = _outcomes(pairs)
    different = [one.leaf for (one, _), outcome in zip(pairs, outcomes, strict=True) if outcome == "different"]
    if different or (here.forms == there.forms and "unknown" not in outcomes):
        found = (
            f"{len(different)} of {len(pairs)} sampled parts of the weights differ" if different else "weights differ"
        )
        leaves = f" ({', '.join(sorted(set(different))[:3])})" if different else ""
        return Comparison("another", f"{found} by more than rounding{leaves}; {forms}")
    if all(outcome == "unknown" for (one, _), outcome in zip(pairs, outcomes, strict=True) if len(one.at) == 2):
        return Comparison("undecided", f"the weights are {forms}, which cannot be compared; norms and biases agree")
    return Comparison("consistent", f"the weights are {forms}, and equal but for rounding")


Outcome = Literal["alike", "different", "unknown"]

MADE_FROM = 0.3
"""Share of quantised blocks that must be exact roundings of the other file's for that file to be what they were made
from: of two forms of a third file hardly any are, and a quarter at most where the other was made from the quantised."""


def _outcomes(pairs: Sequence[tuple[Block, Block]]) -> list[Outcome]:
    """Compare the blocks of each place, and judge by the sharper test where many pass it."""
    outcomes = [_compare_blocks(*pair) for pair in pairs]
    sharp = [_is_exact(*pair) for pair in pairs]
    judged = [exact for exact in sharp if exact is not None]
    if judged and sum(judged) > MADE_FROM * len(judged):
        return ["different" if exact is False else outcome for exact, outcome in zip(sharp, outcomes, strict=True)]
    return outcomes


def _compare_blocks(one: Block, other: Block) -> Outcome:
    """Compare two blocks of one place."""
    if one.form == other.form and np.array_equal(one.values, other.values, equal_nan=True):
        return "alike"
    if not (is_known(one.form) and is_known(other.form)):
        return "unknown"
    if one.form == other.form:
        return "different"
    return "alike" if may_be_one(one.values, one.form, other.values, other.form) else "different"


def _is_exact(one: Block, other: Block) -> bool | None:
    """Whether one block is the exact rounding of the other; None if that is no question, or says nothing."""
    coarse, fine = (one, other) if is_quantised(one.form) else (other, one)
    if not is_quantised(coarse.form) or fine.form not in PLAIN or np.ptp(fine.values) == 0:
        return None
    return is_rounding_of(coarse.values, coarse.form, fine.values)


def _list(forms: Mapping[str, int]) -> str:
    """The forms of matrices and vectors, the most frequent first."""
    return " and ".join(sorted(forms, key=lambda form: -forms[form]))
