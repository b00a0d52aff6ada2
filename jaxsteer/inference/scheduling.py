"""Requests to a decoder, and the limits that it is made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from jaxsteer.batches import Tokens
from jaxsteer.inference.draws import GREEDY, TOP, Sampling


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
    prefix_tokens    maximum number of prompt tokens whose keys and values are kept, for prompts that begin alike
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
        """Reject sizes that are too small."""
        smallest = {"prefill_chunk": 2, "prefix_tokens": 0, "general": False}
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
