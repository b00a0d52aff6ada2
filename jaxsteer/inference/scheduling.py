"""The host side of continuous batching: requests, which of them are prefilled together, and how many rows are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from jaxsteer.adapters import BASE
from jaxsteer.batches import Tokens, bucket_length, pack, stack_rows
from jaxsteer.inference.draws import GREEDY, NO_TOKEN, TOP, Sampling, Settings
from jaxsteer.inference.rows import Admission
from jaxsteer.sharding import row_shards
from jaxsteer.types import Batch

PREFILL_SHARE = 16
"""A prefill has one row for every PREFILL_SHARE rows that decode, each of at least PREFILL_LENGTH tokens."""
PREFILL_LENGTH = 64
"""Short prompts share a row of the prefill: fewer shapes to compile, larger matrix products."""
ADMIT_SHARE = 4
"""Requests wait until they fill a prefill, or until 1 / ADMIT_SHARE of the rows are free for them."""
MANY_TOKENS = 1024
"""A prefill of many prompts at once on a CPU: with these many tokens, its products take most of its time."""
MANY_LENGTH = 256
"""Its rows have at least these many tokens, if the prompts fill them: shapes that serve most sets of prompts."""
MIN_ROWS = 8
"""Rows are not halved below this number: each number of rows is compiled separately."""


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to continue, and how.

    prompt          token ids, at least one
    max_new_tokens  maximum number of tokens in the answer
    stop_tokens     token ids that end the answer, not included in it
    sampling        how tokens are chosen; greedy by default
    seed            random seed, 0 <= seed < 2**64. Draws depend only on the seed and on the token's index in the
                    answer; for independent draws over numbered prompts use `seed << 32 | number`
    strength        factor of each slot's shift by the slot's name, as in `forward`; slots not named have 1
    adapter         name or place of an adapter in the decoder's `Adapters`; None = the unsteered model there, and the
                    steering of a decoder without adapters
    top             number of likeliest tokens to report at each step, with their log-probabilities, up to 20
    """

    prompt: Tokens
    max_new_tokens: int
    stop_tokens: tuple[int, ...] = ()
    sampling: Sampling = GREEDY
    seed: int = 0
    strength: Mapping[str, float] = field(default_factory=dict)
    adapter: str | int | None = None
    top: int = 0

    def __post_init__(self) -> None:
        """Reject what no decoder could answer."""
        if not len(self):
            raise ValueError(f"{self.prompt.source}: an empty prompt; there is nothing to continue")
        if self.max_new_tokens < 1:
            raise ValueError(f"{self.prompt.source}: max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"{self.prompt.source}: the seed must be from 0 to 2**64 - 1, got {self.seed}")
        if not 0 <= self.top <= TOP:
            raise ValueError(f"{self.prompt.source}: top must be from 0 to {TOP} likeliest tokens, got {self.top}")

    def __len__(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.ids)


@dataclass(frozen=True)
class Limits:
    """Sizes of a decoder, which its programs are compiled for.

    max_prompt       maximum number of tokens in a prompt
    max_new_tokens   maximum number of tokens in an answer
    rows             number of requests decoded at a time
    chunk            maximum number of decoding steps between two reports: 32 for throughput, 1 to 4 to stream tokens
                     and to cancel quickly
    max_stop_tokens  maximum number of stop tokens of a request
    prefill_chunk    a longer prompt is read in parts of this many tokens, one between two chunks of decoding, so that
                     the other requests go on; not while the queue is drained
    prefix_tokens    keys and values of so many tokens of prompts are kept, for prompts that begin alike; 0 = none
    general          compile only programs that can do whatever requests ask for, a little slower for greedy decoding at
                     full strength: with `Decoder.warm`, no request waits for a compiler
    """

    max_prompt: int
    max_new_tokens: int
    rows: int = 64
    chunk: int = 32
    max_stop_tokens: int = 16
    prefill_chunk: int = 256
    prefix_tokens: int = 0
    general: bool = False

    def __post_init__(self) -> None:
        """Reject sizes below 1."""
        smallest = {"prefix_tokens": 0, "general": False}
        for name in (each.name for each in fields(self)):
            if getattr(self, name) < smallest.get(name, 1):
                raise ValueError(f"{name} must be at least {smallest.get(name, 1)}, got {getattr(self, name)}")

    def check(self, request: Request) -> None:
        """Reject a request that is too large.

        Raises:
            ValueError: names the prompt's source and the limit.
        """
        sizes = {
            "max_prompt": ("tokens in the prompt", len(request)),
            "max_new_tokens": ("new tokens", request.max_new_tokens),
            "max_stop_tokens": ("stop tokens", len(set(request.stop_tokens))),
        }
        for name, (what, size) in sizes.items():
            if size > getattr(self, name):
                raise ValueError(
                    f"{request.prompt.source}: {size} {what}, but this decoder takes up to {getattr(self, name)}; "
                    f"make it with a larger {name}"
                )


class PrefillLayout(NamedTuple):
    """The first `size` waiting requests, and which of them share each row of a prefill of `width` columns."""

    size: int
    rows: list[list[int]]
    width: int


def half_of(rows: int) -> int:
    """Half as many rows, or 0 where that is too few or cannot be split evenly over the devices."""
    half = rows // 2
    return half if half >= MIN_ROWS and half % row_shards() == 0 else 0


def next_prefill(waiting: Iterable[Sized], rows: int, limit: int | None = None, *, many: bool = False) -> PrefillLayout:
    """Choose the waiting requests to prefill next, in order.

    Args:
        waiting: the queue of requests, at least one; their `len` is that of the prompt.
        rows: number of rows that decode.
        limit: maximum number of requests, by default a share of the rows.
        many: double the rows of the prefill while the requests fill them, up to MANY_TOKENS.
    """
    shards = row_shards()
    prefill_rows = -(-max(1, rows // PREFILL_SHARE) // shards) * shards
    limit = -(-rows // ADMIT_SHARE) if limit is None else limit
    lengths = [len(prompt) for prompt in islice(waiting, limit)]
    longest = max(max(lengths), min(sum(lengths), MANY_LENGTH) if many else 0)
    width = bucket_length(longest, PREFILL_LENGTH)
    packed = pack(lengths, width)
    while many and len(packed) > prefill_rows and 2 * prefill_rows * width <= MANY_TOKENS:
        prefill_rows *= 2
    if len(packed) > prefill_rows:
        lengths = lengths[: packed[prefill_rows][0]]
        packed = pack(lengths, width)
    return PrefillLayout(len(lengths), [*packed, *([] for _ in range(prefill_rows - len(packed)))], width)


def prefill_batch(requests: Sequence[Request], layout: PrefillLayout) -> Batch:
    """The prompts of the layout's requests as a batch, numpy [rows, width]."""
    return stack_rows([[requests[i].prompt for i in members] for members in layout.rows], layout.width)


def prefill_strength(requests: Sequence[Request], layout: PrefillLayout, slots: Sequence[str]) -> np.ndarray:
    """The strength of each slot at each token of `prefill_batch`, fp32 [rows, width, number of slots]."""
    values = np.array([_strengths(request, slots) for request in requests], np.float32)
    return _at_tokens(values, requests, layout, padding=1)


def prefill_adapters(requests: Sequence[Request], layout: PrefillLayout) -> np.ndarray | None:
    """The place of each token's adapter in `prefill_batch`, int32 [rows, width]; None without adapters."""
    places = _adapters(requests)
    return None if places is None else _at_tokens(places, requests, layout, padding=BASE)


def _at_tokens(values: np.ndarray, requests: Sequence[Request], layout: PrefillLayout, padding: int) -> np.ndarray:
    """The value [n, ...] of each request at its tokens of `prefill_batch`, [rows, width, ...]."""
    out = np.full((len(layout.rows), layout.width, *values.shape[1:]), padding, values.dtype)
    for row, members in enumerate(layout.rows):
        column = 0
        for i in members:
            out[row, column : column + len(requests[i])] = values[i]
            column += len(requests[i])
    return out


def _adapters(requests: Sequence[Request]) -> np.ndarray | None:
    """The places of the requests' adapters, int32 [n]; None without adapters."""
    places = [request.adapter for request in requests]
    return None if None in places else np.array(places, np.int32)


def _strengths(request: Request, slots: Sequence[str]) -> list[float]:
    return [request.strength.get(name, 1.0) for name in slots]


def make_admission(
    requests: Sequence[Request],
    layout: PrefillLayout,
    rows: Sequence[int],
    *,
    no_row: int,
    stop_width: int,
    slots: Sequence[str] = (),
) -> Admission:
    """Which rows the layout's requests take over, padded to a power of two of them; numpy.

    Args:
        requests: the layout's, in order.
        layout: where their prompts are in the prefill.
        rows: the row that each of them takes over.
        no_row: an index past the last row, for the padding.
        stop_width: stop tokens are padded to this number.
        slots: names of the plan's slots.
    """
    size = 1 << (layout.size - 1).bit_length()
    row, source, start = np.full(size, no_row, np.int32), np.zeros(size, np.int32), np.zeros(size, np.int32)
    length = np.ones(size, np.int32)
    row[: layout.size] = rows
    for number, members in enumerate(layout.rows):
        column = 0
        for i in members:
            source[i], start[i], length[i] = number, column, len(requests[i])
            column += len(requests[i])
    fields: Any = (row, source, start, length, _settings(requests, size, stop_width, slots))  # numpy on the host
    return Admission(*fields)


def _settings(requests: Sequence[Request], size: int, stop_width: int, slots: Sequence[str]) -> Settings:
    """What the requests ask for, padded to `size` requests."""
    fields: dict[str, Any] = {  # numpy on the host
        "prompt_length": np.zeros(size, np.int32),
        "seed": np.zeros((size, 2), np.uint32),
        "limit": np.zeros(size, np.int32),
        "temperature": np.zeros(size, np.float32),
        "top_k": np.zeros(size, np.int32),
        "top_p": np.ones(size, np.float32),
        "stop_tokens": np.full((size, stop_width), NO_TOKEN, np.int32),
        "strength": np.ones((size, len(slots)), np.float32),
        "top": np.zeros(size, np.int32),
        "adapter": None if (places := _adapters(requests)) is None else np.resize(places, size),
    }
    for i, request in enumerate(requests):
        fields["prompt_length"][i] = min(request.prompt.prompt_length, len(request))
        fields["seed"][i] = request.seed >> 32, request.seed & 0xFFFFFFFF
        fields["limit"][i] = request.max_new_tokens
        fields["temperature"][i] = request.sampling.temperature
        fields["top_k"][i] = request.sampling.top_k
        fields["top_p"][i] = request.sampling.top_p
        stops = sorted(set(request.stop_tokens))
        fields["stop_tokens"][i, : len(stops)] = stops
        fields["strength"][i] = _strengths(request, slots)
        fields["top"][i] = request.top
    return Settings(**fields)


def wanted(requests: Sequence[Request]) -> dict[str, bool]:
    """Static arguments of the programs that draw: whether any request samples, and whether any has tops reported."""
    return {
        "sampling": any(request.sampling.temperature > 0 for request in requests),
        "top": any(request.top for request in requests),
    }


def nonfinite_logits(prompt: Tokens, vocab_size: int) -> FloatingPointError:
    """The error for a prompt that the model answers with logits that are not finite; the caller raises it."""
    ids = [int(token) for token in prompt.ids]
    shown = ", ".join(map(str, ids[:8])) + (f", ... ({len(ids)} in all)" if len(ids) > 8 else "")
    cause = (
        "its weights or its steering hold NaN or infinity, the strength is too large, or half precision overflows "
        "(try float32)"
    )
    if outside := sorted({token for token in ids if not 0 <= token < vocab_size}):
        cause = f"token ids {outside[:8]} are outside the model's {vocab_size} embeddings: another model's tokenizer?"
    return FloatingPointError(
        f"{prompt.source}: the model gave non-finite logits (NaN or infinity) for this prompt, token ids {shown}. "
        f"Likely cause: {cause}"
    )
