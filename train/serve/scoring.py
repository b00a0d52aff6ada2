"""Log-probabilities of the tokens of given texts, for completions that echo their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from jaxsteer.adapters import Adapters
from jaxsteer.batches import Tokens, bucket_length, pack, stack_rows
from jaxsteer.inference.draws import TOP
from jaxsteer.inference.generate import to_device
from jaxsteer.inference.scheduling import nonfinite_logits
from jaxsteer.inference.scores import TokenScores, score_tokens
from jaxsteer.models.transformer import Network
from train.serve.errors import bad_request
from train.serve.replies import Scored
from train.serve.service import Service, of_engine, unknown_model
from train.serving.effects import score_at, steering_arguments, text_added
from train.serving.engine import EngineError
from train.serving.models import Served, UnknownModel
from train.serving.text import Decode, pieces

SHORTEST = 64
"""Rows have a `bucket_length` of at least this, each of which is compiled once."""
MAX_TOKENS = 2048
"""Tokens scored in one call of `Engine.run`, which bounds its memory and how long other calls wait; a single text may
be longer."""


async def score_prompts(
    service: Service, served: Served, texts: Sequence[Tokens], strength: Mapping[str, float], top: int
) -> list[list[Scored]]:
    """The tokens of each text, with their log-probabilities given those before them.

    Args:
        service: with the engine.
        served: the model that is asked.
        texts: of at least one token each.
        strength: of the slots of its own plan.
        top: number of most likely tokens to report in place of each, up to 20.

    Raises:
        ApiError: 400, the logits are not finite; 404, the adapter was unloaded; or the engine's error.
    """
    found: dict[int, TokenScores] = {}
    for layout in _layouts([len(text.ids) for text in texts]):
        members = [[texts[i] for i in row] for row in layout.rows]
        work = partial(_score, rows=members, width=layout.width, served=served, strength=strength)
        try:
            scores = await service.computed(service.engine.run(work))
        except EngineError as error:
            raise of_engine(error) from None
        except UnknownModel as error:
            raise unknown_model(error) from None
        except (ValueError, FloatingPointError) as error:
            raise bad_request(str(error), "prompt") from None
        found |= zip((i for row in layout.rows for i in row), scores, strict=True)
    decode = service.engine.roster.loaded.require_tokenizer().decode
    return [_shown(text.ids.tolist(), found[i], top, decode) for i, text in enumerate(texts)]


@dataclass(frozen=True)
class _Layout:
    """Texts that are scored together, by their indices: those of each row of `width` tokens."""

    rows: list[list[int]]
    width: int


def _layouts(lengths: Sequence[int]) -> list[_Layout]:
    """Rows that short texts share; their numbers are powers of two, so that few programs are compiled."""
    width = bucket_length(max(lengths), SHORTEST)
    rows, most = pack(lengths, width), max(1, MAX_TOKENS // width)
    layouts = []
    for start in range(0, len(rows), most):
        some = rows[start : start + most]
        layouts.append(_Layout([*some, *([] for _ in range(_power(len(some)) - len(some)))], width))
    return layouts


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _score(
    network: Network,
    adapters: Adapters | None,
    *,
    rows: Sequence[Sequence[Tokens]],
    width: int,
    served: Served,
    strength: Mapping[str, float],
) -> list[TokenScores]:
    """The scores of each text's tokens, in numpy, in the order of the rows; for `Engine.run`."""
    steered = steering_arguments(network, adapters, served, strength, len(rows))
    batch = to_device(stack_rows(rows, width))
    found = jax.device_get(score_tokens(network.model, network.base, network.steering, batch, top=TOP, **steered))
    scores = []
    for row, texts in enumerate(rows):
        column = 0
        for text in texts:
            part = np.s_[row, column : column + len(text.ids)]
            scores.append(jax.tree.map(lambda field, part=part: field[part], found))
            column += len(text.ids)
            if not np.isfinite(scores[-1].log_probability).all():
                raise nonfinite_logits(text, network.model.config.vocab_size)
    return scores


def _shown(ids: Sequence[int], scores: TokenScores, top: int, decode: Decode) -> list[Scored]:
    """The tokens of a text as they are shown."""
    texts, added = pieces(ids, decode), text_added(decode)
    shown = [Scored(texts[0], None, ())]
    for t in range(1, len(ids)):
        text_of = lambda id, t=t: texts[t] if id == ids[t] else added(ids[t - 1], id)
        shown.append(Scored(texts[t], *score_at(scores, t, top, text_of)))
    return shown
