"""Encoding: examples to token ids, with the same prompt-completion boundary in training and in generation.

Each piece of text is tokenised by itself and the ids are concatenated. If the tokenizer could merge across the
boundary, the model would be trained on prompt ids that generation never starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from jinja2 import TemplateError

from jaxsteer.io import Tokenizer
from train.data.examples import Example, TokenizedExample, Turn

OnLong = Literal["error", "drop", "cut"]
"""What to do with examples over the maximum length: raise an error, drop them, or cut the beginning of the prompt."""

CHUNK = 2_000
"""Examples per call of the tokenizer: enough to keep its threads busy, few enough for a smooth progress bar."""


@dataclass(frozen=True)
class Report:
    """Statistics of encoding a data set.

    examples    number of examples given
    tokens      number of tokens in the examples kept
    supervised  number of those tokens whose weight in the loss is not 0
    longest     length of the longest example given, in tokens
    max_length  the maximum length; None for no limit
    too_long    (source, length) of every example dropped for its length
    cut         (source, original length) of every example whose prompt was cut
    """

    examples: int
    tokens: int
    supervised: int
    longest: int
    max_length: int | None
    too_long: tuple[tuple[str, int], ...] = ()
    cut: tuple[tuple[str, int], ...] = ()

    @property
    def kept(self) -> int:
        """Number of examples kept."""
        return self.examples - len(self.too_long)

    def __str__(self) -> str:
        """A one-line summary that names the first few examples dropped or cut."""
        text = f"{self.kept:,} examples, {self.tokens:,} tokens ({self.supervised:,} supervised)"
        text += f"; dropped {_long(self, self.too_long)}" if self.too_long else ""
        return text + (f"; cut the prompts of {_long(self, self.cut)}" if self.cut else "")


def encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    chat: bool = False,
    max_length: int | None = None,
    on_long: OnLong = "error",
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[list[TokenizedExample], Report]:
    """Encode examples for training.

    Plain text: the beginning-of-sequence ids that the tokenizer adds, if any, then the turns; every completion is
    followed by the end-of-sequence token, which is supervised too. Chat: the tokenizer's chat template, with a plain
    prompt as the user's message; every assistant turn is supervised, up to and including its end-of-turn token.

    Args:
        examples: each with at least one supervised turn.
        tokenizer: a fast transformers tokenizer.
        chat: apply the tokenizer's chat template.
        max_length: maximum number of tokens in an example, usually the sequence length; None for no limit.
        on_long: what to do with longer examples: "error" raises; "drop" leaves them out; "cut" removes as many tokens
            as necessary from the beginning of a plain prompt, never from a completion. The report lists them.
        advance: callback, called with the number of examples encoded so far.

    Returns:
        The examples kept, in order, and statistics. `completion` marks exactly the supervised tokens, and their
        weight in the loss is 1.

    Raises:
        ValueError: naming the example: chat roles without `chat`; nothing supervised; nothing before the first
            supervised token; a chat template that is not prefix-stable or does not end its turns; too long.
    """
    return _encode(examples, tokenizer, chat, max_length, on_long, generate=False, advance=advance)


def encode_prompts(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    chat: bool = False,
    max_length: int | None = None,
    on_long: OnLong = "error",
) -> tuple[list[TokenizedExample], Report]:
    """Encode what generation starts from: each example without its final supervised turn.

    The ids are a prefix of the ids that `encode` gives for the same example. Earlier assistant turns are marked as
    completion, as in training. See `encode` for the arguments and errors.
    """
    contexts = [example.context for example in examples]
    return _encode(contexts, tokenizer, chat, max_length, on_long, generate=True)


def stop_tokens(tokenizer: Tokenizer, *, chat: bool = False) -> tuple[int, ...]:
    """Ids that end a generated text: the end-of-sequence token and, for a chat, the template's end-of-turn token.

    Raises:
        ValueError: the tokenizer has neither.
    """
    stops = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if chat:
        turns = Example((Turn("user", "a"), Turn("assistant", "b")), "chat template")
        stops.append(int(encode([turns], tokenizer, chat=True)[0][0].ids[-1]))
    if not stops:
        raise ValueError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
    return tuple(dict.fromkeys(stops))


def _encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    chat: bool,
    max_length: int | None,
    on_long: OnLong,
    generate: bool,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[list[TokenizedExample], Report]:
    """`encode`, or `encode_prompts` with `generate`."""
    _check_on_long(on_long, chat)
    if not examples:
        raise ValueError("no examples to tokenise")
    start = [] if chat else _beginning(tokenizer)  # a chat template writes its own
    kept, too_long, cut, longest = [], [], [], 0
    for first in range(0, len(examples), CHUNK):
        chunk = examples[first : first + CHUNK]
        for row in _tokenised(chunk, tokenizer, chat, generate, start):
            longest = max(longest, len(row))
            over = 0 if max_length is None else len(row) - max_length
            # A prompt keeps at least one token.
            if over > 0 and on_long == "cut" and row.prompt_length - len(start) > over:
                cut.append((row.source, len(row)))
                kept.append(_without(row, slice(len(start), len(start) + over)))
            elif over > 0:
                too_long.append((row.source, len(row)))
            else:
                kept.append(row)
        advance(first + len(chunk))
    tokens = sum(map(len, kept))
    supervised = int(sum(np.count_nonzero(row.weights) for row in kept))
    report = Report(len(examples), tokens, supervised, longest, max_length, tuple(too_long), tuple(cut))
    _check_kept(report, on_long)
    return kept, report


def _check_on_long(on_long: OnLong, chat: bool) -> None:
    """Raise ValueError for a setting that does not exist, or that chats do not have."""
    if on_long not in get_args(OnLong):
        raise ValueError(f"on_long: got {on_long!r}, allowed are {', '.join(get_args(OnLong))}")
    if on_long == "cut" and chat:
        raise ValueError(
            "on_long: 'cut' is for plain prompts; a conversation cannot be cut at the beginning: use 'drop'"
        )


def _check_kept(report: Report, on_long: OnLong) -> None:
    """Raise ValueError for examples that are too long and may not be dropped, or if none is left."""
    long = _long(report, report.too_long)
    if report.too_long and on_long == "error":
        raise ValueError(f"{long}; raise max_length, shorten them, or drop them with on_long='drop'")
    if report.too_long and on_long == "cut":
        raise ValueError(f"{long}, and cutting the prompt is not enough; raise max_length, or use on_long='drop'")
    if not report.kept:
        raise ValueError(f"no example is left: {long}")


def _tokenised(
    examples: Sequence[Example], tokenizer: Tokenizer, chat: bool, generate: bool, start: list[int]
) -> Iterator[TokenizedExample]:
    """Yield the tokens of each example, `start` first."""
    pieces = [_chat_pieces(e, tokenizer, generate) if chat else _plain_pieces(e) for e in examples]
    # One call for all pieces: a fast tokenizer processes a list in parallel.
    texts = [text for piece in pieces for text, _ in piece]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    specials = _special_ids(tokenizer) if chat else frozenset[int]()
    for example, piece in zip(examples, pieces, strict=True):
        tokens, completion = list(start), [False] * len(start)
        for text, supervised in piece:
            new = next(ids)
            trained = 0
            if supervised and chat:
                trained = _end_of_turn(new, tokenizer, specials, example.source, text)
            elif supervised:
                new = [*new, _end_of_sequence(tokenizer)]
                trained = len(new)
            tokens += new
            completion += [True] * trained + [False] * (len(new) - trained)
        yield _to_arrays(example, tokens, completion, generate)


def _without(row: TokenizedExample, removed: slice) -> TokenizedExample:
    """The example without some tokens of its prompt."""
    return replace(
        row,
        ids=np.delete(row.ids, removed),
        completion=np.delete(row.completion, removed),
        weights=np.delete(row.weights, removed),
        prompt_length=row.prompt_length - (removed.stop - removed.start),
    )


def _to_arrays(example: Example, tokens: list[int], supervised: list[bool], generate: bool) -> TokenizedExample:
    """The tokens of one example as arrays, checked."""
    ids, completion = np.asarray(tokens, np.int32), np.asarray(supervised, bool)
    positions = np.flatnonzero(completion)
    if not generate:
        if not len(positions):
            raise ValueError(f"{example.source}: nothing to train on; no completion and no assistant turn")
        # Whatever a template writes after the last end of turn (a newline) predicts nothing.
        end = positions[-1] + 1
        ids, completion = ids[:end], completion[:end]
    prompt_length = int(positions[0]) if len(positions) else len(ids)
    if prompt_length == 0:
        raise ValueError(
            f"{example.source}: the prompt is empty and the tokenizer adds no beginning-of-sequence token, so "
            "there is nothing to predict the first token from"
        )
    return TokenizedExample(ids, completion, prompt_length, example.source, example.gold)


def _plain_pieces(example: Example) -> list[tuple[str, bool]]:
    """(text, supervised) of each turn."""
    for turn in example.turns:
        if turn.role not in ("prompt", "completion"):
            raise ValueError(
                f"{example.source}: has a {turn.role!r} message, which needs a chat template; set chat=True"
            )
    return [(turn.text, turn.supervised) for turn in example.turns]


def _chat_pieces(example: Example, tokenizer: Tokenizer, generate: bool) -> list[tuple[str, bool]]:
    """(text, supervised) of the pieces of the rendered conversation.

    A supervised piece is what one more assistant turn adds to the rendering of the turns before it with the
    generation prompt. This needs no knowledge of the template, only that each rendering is a prefix of the next.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{example.source}: chat=True, but the tokenizer has no chat template; use the tokenizer of an "
            "instruction-tuned model, set tokenizer.chat_template, or use chat=False"
        )
    names = {"prompt": "user", "completion": "assistant"}
    messages = [{"role": names.get(turn.role, turn.role), "content": turn.text} for turn in example.turns]

    def render(count: int, prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        except TemplateError as error:
            raise ValueError(
                f"{example.source}: the chat template refused messages 0 to {count - 1}: {error}"
            ) from error

    pieces, rendered = [], ""
    for i, turn in enumerate(example.turns):
        if turn.supervised:
            before, after = render(i, True), render(i + 1, False)
            pieces.append((_added(before, rendered, example.source, i - 1), False))
            pieces.append((_added(after, before, example.source, i), True))
            rendered = after
    if generate:
        last = len(messages) - 1
        pieces.append((_added(render(len(messages), True), rendered, example.source, last), False))
    return pieces


def _added(text: str, prefix: str, source: str, message: int) -> str:
    """What a rendering that ends with a message adds to an earlier one.

    Raises:
        ValueError: the earlier one is not a prefix of it.
    """
    if not text.startswith(prefix):
        raise ValueError(
            f"{source}: the chat template is not prefix-stable: with message {message} it renders the messages before "
            f"it differently (first {prefix[-40:]!r}, then {text[: len(prefix)][-40:]!r}), so training and generation "
            "would see different prompts; split the conversation into one example per assistant turn, or use a "
            "template that does not rewrite earlier turns"
        )
    return text[len(prefix) :]


def _end_of_turn(ids: list[int], tokenizer: Tokenizer, specials: frozenset[int], source: str, text: str) -> int:
    """Number of tokens of an assistant piece up to and including its end-of-turn token, the last special one."""
    end = max((i for i, token in enumerate(ids) if token in specials), default=-1) + 1
    if end == 0 or tokenizer.decode(ids[end:]).strip():
        raise ValueError(
            f"{source}: the chat template ends the assistant's turn with no special token (it renders "
            f"{text[-40:]!r}), so nothing would tell generation to stop; use a template that closes its turns"
        )
    return end


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of all special tokens, including those without a role such as eos."""
    added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset([*tokenizer.all_special_ids, *added])


def _beginning(tokenizer: Tokenizer) -> list[int]:
    """Ids that the tokenizer puts before a text."""
    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("x")["input_ids"]
    for i in range(len(whole) - len(plain) + 1):
        if whole[i : i + len(plain)] == plain:
            return list(whole[:i])
    raise ValueError(f"the tokenizer gives {plain} for 'x' alone, but {whole} with special tokens")


def _end_of_sequence(tokenizer: Tokenizer) -> int:
    """The id that ends a completion."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token to end a completion; set tokenizer.eos_token")
    return int(tokenizer.eos_token_id)


def _long(report: Report, examples: Sequence[tuple[str, int]]) -> str:
    """How many examples are over the maximum length; names the first few."""
    named = ", ".join(f"{source} ({length})" for source, length in examples[:3])
    more = ", ..." if len(examples) > 3 else ""
    return (
        f"{len(examples):,} of {report.examples:,} examples longer than {report.max_length} tokens "
        f"(longest {report.longest}): {named}{more}"
    )
