"""Which prompts are read together, where each of them is in a prefill, and what their requests ask for; all numpy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsteer.adapters import BASE
from jaxsteer.batches import bucket_length, pack, stack_rows
from jaxsteer.inference.draws import NO_TOKEN, Drawing, Settings
from jaxsteer.inference.rows import Admission
from jaxsteer.inference.scheduling import Limits, Request
from jaxsteer.sharding import row_shards
from jaxsteer.types import Batch

PREFILL_SHARE = 16
"""A prefill has one row for every PREFILL_SHARE rows that decode, each of at least PREFILL_LENGTH tokens."""
PREFILL_LENGTH = 64
"""Short prompts share a row of the prefill: fewer shapes to compile, larger matrix products."""
ADMIT_SHARE = 4
"""Requests wait until they fill a prefill, or until 1 / ADMIT_SHARE of the rows are free for them."""
ADMITTED = 8
"""Number of requests that a prefill of an open queue is compiled for."""
FILLED = 0.75
"""A narrower prefill and another one follow if a wide one would be filled less than this."""
MANY_TOKENS = 1024
"""A prefill of many prompts at once on a CPU: with these many tokens, its products take most of its time."""
MANY_LENGTH = 256
"""Its rows have at least these many tokens, if the prompts fill them: shapes that serve most sets of prompts."""
MIN_ROWS = 8
"""Rows are not halved below this number: each number of rows is compiled separately."""


class PrefillLayout(NamedTuple):
    """The first `size` waiting requests, and which of them share each row of a prefill of `width` columns.

    same  for each request, the one whose prompt is read for it: itself, or an earlier one with the same prompt, which
          is then in no row; () = each itself
    """

    size: int
    rows: list[list[int]]
    width: int
    same: tuple[int, ...] = ()


def half_of(rows: int) -> int:
    """Half as many rows, or 0 where that is too few or cannot be split evenly over the devices."""
    half = rows // 2
    return half if half >= MIN_ROWS and half % row_shards() == 0 else 0


def repeated(requests: Iterable[Request]) -> tuple[int, ...]:
    """For each request, the first one with the same prompt (the same object), strengths and adapter."""
    first: dict[Any, int] = {}
    asked = ((id(each.prompt), tuple(sorted(each.strength.items())), each.adapter) for each in requests)
    return tuple(first.setdefault(key, i) for i, key in enumerate(asked))


def next_prefill(
    waiting: Iterable[Sized],
    rows: int,
    limit: int | None = None,
    *,
    many: bool = False,
    same: Sequence[int] = (),
) -> PrefillLayout:
    """Choose the waiting requests to prefill next, in order.

    Args:
        waiting: the queue of requests, at least one; their `len` is that of the prompt.
        rows: number of rows that decode.
        limit: maximum number of requests, by default a share of the rows.
        many: double the rows of the prefill while the requests fill them, up to MANY_TOKENS.
        same: from `repeated`, of the waiting requests; () = no two have the same prompt.
    """
    shards = row_shards()
    prefill_rows = -(-max(1, rows // PREFILL_SHARE) // shards) * shards
    limit = -(-rows // ADMIT_SHARE) if limit is None else limit
    whole = [len(prompt) for prompt in islice(waiting, limit)]
    own = [i for i in range(len(whole)) if not same or same[i] == i]
    lengths = [whole[i] for i in own]
    longest = max(max(lengths), min(sum(lengths), MANY_LENGTH) if many else 0)
    width = bucket_length(longest, PREFILL_LENGTH)
    packed = pack(lengths, width)
    while many and len(packed) > prefill_rows and 2 * prefill_rows * width <= MANY_TOKENS:
        prefill_rows *= 2
    # Prompts that several requests share need fewer rows; their number comes again, so the program is compiled once.
    while len(own) < len(whole) and prefill_rows % (2 * shards) == 0 and 2 * len(packed) <= prefill_rows:
        prefill_rows //= 2
    layout = _first_rows(lengths, prefill_rows, width)
    if len(own) == len(whole):
        return layout
    # Requests up to the first whose prompt has no room.
    read = set(own[: layout.size])
    size = next((i for i in range(len(whole)) if same[i] not in read), len(whole))
    return PrefillLayout(size, [[own[i] for i in row] for row in layout.rows], width, tuple(same[:size]))


def _first_rows(lengths: Sequence[int], rows: int, width: int) -> PrefillLayout:
    """As many of the prompts, in order, as fit a number of rows."""
    packed = pack(lengths, width)
    if len(packed) > rows:
        lengths = lengths[: packed[rows][0]]
        packed = pack(lengths, width)
    return PrefillLayout(len(lengths), [*packed, *([] for _ in range(rows - len(packed)))], width)


def widths_of(limits: Limits) -> tuple[int, ...]:
    """Columns of the prefills of an open queue, of which there are few."""
    widest = min(limits.prefill_chunk, bucket_length(limits.max_prompt, PREFILL_LENGTH))
    widths = [PREFILL_LENGTH]
    while widths[-1] < widest:
        widths.append(2 * widths[-1])
    return (*(width for width in widths if width < widest), widest)


def open_prefill(waiting: Iterable[Sized], widths: Sequence[int], limit: int) -> PrefillLayout:
    """Choose the waiting requests of an open queue to prefill next, in order: one row, in few shapes.

    Args:
        waiting: as for `next_prefill`, none longer than the widest prefill.
        widths: of prefills, from `widths_of`.
        limit: maximum number of requests.
    """
    shards = row_shards()
    lengths = [len(prompt) for prompt in islice(waiting, min(limit, ADMITTED))]
    tokens = min(-(-sum(lengths) // shards), widths[-1])
    fitting = [width for width in widths if width >= max(lengths)]
    enough = next((width for width in fitting if width >= tokens), fitting[-1])
    filled = [width for width in fitting if width <= tokens] if tokens < FILLED * enough else []
    return _first_rows(lengths, shards, filled[-1] if filled else enough)


def prefill_batch(requests: Sequence[Request], layout: PrefillLayout) -> Batch:
    """The prompts of the layout's requests as a batch, numpy [rows, width]."""
    return stack_rows([[requests[i].prompt for i in members] for members in layout.rows], layout.width)


def prefill_strength(requests: Sequence[Request], layout: PrefillLayout, slots: Sequence[str]) -> np.ndarray:
    """The strength of each slot at each token of `prefill_batch`, fp32 [rows, width, number of slots]."""
    values = np.array([strengths_of(request, slots) for request in requests], np.float32)
    return _at_tokens(values, requests, layout, padding=1)


def part_strength(request: Request, width: int, slots: Sequence[str]) -> np.ndarray:
    """The strength of each slot at each token of `part_batch`, fp32 [1, width, number of slots]."""
    return np.tile(np.array(strengths_of(request, slots), np.float32), (1, width, 1))


def part_adapters(request: Request, width: int) -> np.ndarray | None:
    """The place of the adapter at each token of `part_batch`, int32 [1, width]; None without adapters."""
    return None if (place := _adapters([request])) is None else np.tile(place, (1, width))


def prefill_adapters(requests: Sequence[Request], layout: PrefillLayout) -> np.ndarray | None:
    """The place of each token's adapter in `prefill_batch`, int32 [rows, width]; None without adapters."""
    places = _adapters(requests)
    return None if places is None else _at_tokens(places, requests, layout, padding=BASE)


def part_batch(request: Request, start: int, width: int) -> Batch:
    """A request's prompt from a token on as a batch, numpy [1, width]: padded, or cut off."""
    whole = stack_rows([[request.prompt]], max(len(request), start + width))
    return jax.tree.map(lambda field: field[:, start : start + width], whole)


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


def strengths_of(request: Request, slots: Sequence[str]) -> list[float]:
    """The request's strength of each slot."""
    return [request.strength.get(name, 1.0) for name in slots]


def make_admission(
    requests: Sequence[Request], layout: PrefillLayout, size: int, *, stop_width: int, slots: Sequence[str] = ()
) -> Admission:
    """Where the layout's requests are read, and what they ask for; numpy.

    Args:
        requests: the layout's, in order.
        layout: where their prompts are in the prefill.
        size: n, which the requests are padded to.
        stop_width: stop tokens are padded to this number.
        slots: names of the plan's slots.
    """
    source, start, length = np.zeros(size, np.int32), np.zeros(size, np.int32), np.ones(size, np.int32)
    for number, members in enumerate(layout.rows):
        column = 0
        for i in members:
            source[i], start[i], length[i] = number, column, len(requests[i])
            column += len(requests[i])
    for i, other in enumerate(layout.same):
        source[i], start[i], length[i] = source[other], start[other], length[other]
    fields: Any = (source, start, length, start + length - 1, _settings(requests, size, stop_width, slots))
    return Admission(*fields)  # numpy on the host


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
        fields["strength"][i] = strengths_of(request, slots)
        fields["top"][i] = request.top
    return Settings(**fields)


def drawing_of(requests: Sequence[Request], general: bool = False) -> Drawing:
    """What the requests ask of the programs that draw; `general`: whatever any request may ask for."""
    return Drawing(
        sampling=general or any(request.sampling.temperature > 0 for request in requests),
        top=general or any(request.top for request in requests),
    )


def any_scaled(requests: Sequence[Request], general: bool = False) -> bool:
    """Whether any request has a strength other than 1."""
    return general or any(factor != 1 for request in requests for factor in request.strength.values())
