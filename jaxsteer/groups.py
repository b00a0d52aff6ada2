"""Groups of examples with one prompt, which a row holds once: the answers of a pair, or the samples of a question.

The common beginning of a group is a segment of its own, the trunk. Each example follows it as a segment that begins
with the token before its first target, so that every target is predicted from its own segment. Positions go on after
the trunk, and attention sees segment and trunk: each example is computed as if it stood alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxsteer.batches import Tokens
from jaxsteer.models.attention import Kernel
from jaxsteer.types import Batch


class Group(NamedTuple):
    """Examples that are laid out together.

    examples  with targets each
    shared    tokens of the trunk, the same in all of them; 0 lays the examples out whole
    """

    examples: tuple[Tokens, ...]
    shared: int = 0

    @property
    def length(self) -> int:
        """Tokens of a row that the group takes."""
        return self.shared + sum(len(example.ids) - self.shared for example in self.examples)


class Grouped(NamedTuple):
    """Groups in rows, numpy [B, T] each.

    batch   the rows; segments count trunks and examples from 1 in each row
    group   int32, number of the token's group in its row, from 1; 0 = padding
    member  int32, number of the token's example in its group, from 1; 0 in trunks and padding
    """

    batch: Batch
    group: np.ndarray
    member: np.ndarray


def shared_length(examples: Sequence[Tokens]) -> int:
    """Tokens that a trunk of these examples can have: all but one before the first target, if they agree in them."""
    first = min(int(np.argmax(example.weights != 0)) for example in examples) - 1
    head, *others = examples
    agree = lambda field: all(
        np.array_equal(getattr(head, field)[:first], getattr(other, field)[:first]) for other in others
    )
    alike = first > 0 and agree("ids") and agree("completion")
    return first if alike and len({example.prompt_length for example in examples}) == 1 else 0


def sharing_refusal(kernel: Kernel, *, split_sequence: bool = False) -> str:
    """Why prompts cannot be shared with an attention kernel, or "" if they can."""
    if kernel == "splash":
        return "splash attention knows segments only"
    return "positions are split over devices (split_sequence)" if split_sequence else ""


_FIELDS = (np.int32, np.int32, np.int32, np.int32, np.bool_, np.float32, np.int32)


def stack_groups(rows: Sequence[Sequence[Group]], length: int, *, trunks: bool) -> Grouped:
    """Write groups into rows, one after another.

    Args:
        rows: the groups of each row; a row may be empty.
        length: T. What the groups leave free is padding, zero in every field.
        trunks: whether the batch has trunks; without, no group may have one.

    Raises:
        ValueError: the groups of a row do not fit.
    """
    blank = [np.zeros((len(rows), length), dtype) for dtype in _FIELDS]
    group, member = (np.zeros((len(rows), length), np.int32) for _ in range(2))
    for r, row in enumerate(rows):
        total = sum(each.length for each in row)
        if total > length:
            raise ValueError(f"row {r} (from {row[0].examples[0].source}): {total} tokens do not fit a row of {length}")
        at = segment = 0
        for g, each in enumerate(row, start=1):
            pieces = [(each.examples[0], slice(0, each.shared), 0)] if each.shared else []
            pieces += [(example, slice(each.shared, None), m) for m, example in enumerate(each.examples, start=1)]
            trunk = segment + 1 if each.shared else 0
            for example, part, m in pieces:
                segment += 1
                end = at + len(example.ids[part])
                for field, values in zip(blank, _fields(example, part, segment, trunk), strict=True):
                    field[r, at:end] = values
                group[r, at:end], member[r, at:end] = g, m
                at = end
    tokens, segments, positions, prompt_lengths, completion, weights, trunk_of = blank
    fields = (tokens, segments, positions, prompt_lengths, completion, weights, trunk_of if trunks else None)
    batch = Batch(*fields)  # type: ignore[arg-type]  # numpy on the host
    return Grouped(batch, group, member)


def _fields(example: Tokens, part: slice, segment: int, trunk: int) -> tuple:
    """The fields of a batch for a part of an example. Nothing predicts the first token of a whole one."""
    positions = np.arange(len(example.ids), dtype=np.int32)[part]
    behind = positions > 0
    return (
        example.ids[part],
        segment,
        positions,
        example.prompt_length,
        example.completion[part] & behind,
        np.where(behind, example.weights[part], 0),
        trunk,
    )
