"""Examples to token ids, with one boundary between prompt and completion for training and for generation.

Each piece of text is tokenised by itself and the ids are joined. A tokenizer merging across the boundary
would otherwise give a model another prompt in training than the one that generation starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from jinja2 import TemplateError

from train.data.examples import Example, TokenizedExample, Turn

OnLong = Literal["error", "drop", "cut"]
"""What to do with an example over the limit: stop, leave it out, or cut its prompt's beginning off."""

CHUNK = 2_000
"""Examples given to the tokenizer at once: enough for its threads, few enough to see it move."""


@dataclass(frozen=True)
class Report:
    """What tokenising did.

    examples    number given
    tokens      in the examples kept
    supervised  of these, tokens with a loss
    longest     length of the longest example given, in tokens
    max_length  the limit; None = no limit
    too_long    (source, length) of every example over the limit that was dropped
    cut         (source, length before) of every example over the limit whose prompt lost its beginning
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
        """Number of examples that are left."""
        return self.examples - len(self.too_long)

    def __str__(self) -> str:
        """One line; names the first few examples dropped or cut."""
        text = f"{self.kept:,} examples, {self.tokens:,} tokens ({self.supervised:,} supervised)"
        text += f"; dropped {_long(self, self.too_long)}" if self.too_long else ""
        return text + (f"; cut the prompts of {_long(self, self.cut)}" if self.cut else "")


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    chat: bool = False,
    max_length: int | None = None,
    on_long: OnLong = "error",
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[list[TokenizedExample], Report]:
    """Tokenise examples for training.

    Plain: beginning-of-sequence ids where the tokenizer adds them, then the turns, with the end-of-sequence
    token appended to every completion and supervised. Chat: the tokenizer's template, a prompt standing for a
    user's turn; every assistant turn is supervised up to and with its end-of-turn token.

    Args:
        examples: Each with at least one supervised turn.
        tokenizer: A fast transformers tokenizer.
        chat: Render through the tokenizer's chat template.
        max_length: The most tokens of an example, that is, the row length.
        on_long: What to do with longer ones: "error" raises; "drop" leaves them out; "cut" takes as many tokens as
            need be from the beginning of a plain prompt, never from a completion. The report names them.
        advance: Hears how many examples are done.

    Returns:
        The examples kept, in order, and the report.

    Raises:
        ValueError: naming the example: chat roles without `chat`; nothing supervised; nothing before the
            first supervised token; a template that is not prefix-stable or ends no turn; longer than
            max_length.
    """
    return _encode(examples, tokenizer, chat, max_length, on_long, generate=False, advance=advance)


def encode_prompts(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    chat: bool = False,
    max_length: int | None = None,
    on_long: OnLong = "error",
) -> tuple[list[TokenizedExample], Report]:
    """Tokenise what generation starts from: each example without its final supervised turn.

    The ids are those with which `encode` begins the same example. Earlier assistant turns
    count as completion, as they do in training. See `encode` for arguments and errors.
    """
    contexts = [e.context for e in examples]
    return _encode(contexts, tokenizer, chat, max_length, on_long, generate=True)


def stop_tokens(tokenizer: Any, *, chat: bool = False) -> tuple[int, ...]:
    """Ids that end a generated text: the end of sequence and, for a chat, the template's end of turn.

    Raises:
        ValueError: where the tokenizer has neither.
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
    tokenizer: Any,
    chat: bool,
    max_length: int | None,
    on_long: OnLong,
    generate: bool,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[list[TokenizedExample], Report]:
    """Both `encode` and `encode_prompts`."""
    if on_long not in get_args(OnLong):
        raise ValueError(f"on_long: got {on_long!r}, allowed are {', '.join(get_args(OnLong))}")
    if on_long == "cut" and chat:
        raise ValueError(
            "on_long: 'cut' is for plain prompts; a conversation without its beginning is none: use 'drop'"
        )
    if not examples:
        raise ValueError("no examples to tokenise")
    start = [] if chat else _beginning(tokenizer)  # a chat template writes its own
    kept, long, cut, longest = [], [], [], 0
    for first in range(0, len(examples), CHUNK):
        chunk = examples[first : first + CHUNK]
        for row in _rows(chunk, tokenizer, chat, generate, start):
            longest = max(longest, len(row))
            over = 0 if max_length is None else len(row) - max_length
            # A prompt keeps at least one token.
            if over > 0 and on_long == "cut" and row.prompt_length - len(start) > over:
                cut.append((row.source, len(row)))
                kept.append(_without(row, slice(len(start), len(start) + over)))
            elif over > 0:
                long.append((row.source, len(row)))
            else:
                kept.append(row)
        advance(first + len(chunk))
    total = sum(map(len, kept))
    supervised_total = int(sum(np.count_nonzero(r.weights) for r in kept))
    report = Report(len(examples), total, supervised_total, longest, max_length, tuple(long), tuple(cut))
    if long and on_long == "error":
        raise ValueError(f"{_long(report, long)}; raise max_length, shorten them, or drop them with on_long='drop'")
    if long and on_long == "cut":
        raise ValueError(
            f"{_long(report, long)}, and cutting the prompt is not enough; raise max_length, or use on_long='drop'"
        )
    if not kept:
        raise ValueError(f"no example is left: {_long(report, long)}")
    return kept, report


def _rows(
    examples: Sequence[Example], tokenizer: Any, chat: bool, generate: bool, start: list[int]
) -> Iterator[TokenizedExample]:
    """The tokens of each example; `start` begins each."""
    pieces = _chat_pieces if chat else _plain_pieces
    texts = [pieces(e, tokenizer, generate) for e in examples]
    # One call for all pieces: a fast tokenizer works on a batch in parallel.
    ids = iter(tokenizer([text for piece in texts for text, _ in piece], add_special_tokens=False)["input_ids"])
    specials = _special_ids(tokenizer) if chat else frozenset[int]()
    for example, piece in zip(examples, texts, strict=True):
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
        yield _finish(example, tokens, completion, generate)


def _without(row: TokenizedExample, gone: slice) -> TokenizedExample:
    """A row without some tokens of its prompt."""
    return replace(
        row,
        ids=np.delete(row.ids, gone),
        completion=np.delete(row.completion, gone),
        weights=np.delete(row.weights, gone),
        prompt_length=row.prompt_length - (gone.stop - gone.start),
    )


def _finish(example: Example, tokens: list[int], completion: list[bool], generate: bool) -> TokenizedExample:
    """Arrays of one example, checked."""
    ids, produced = np.asarray(tokens, np.int32), np.asarray(completion, bool)
    trained = np.flatnonzero(produced)
    if not generate:
        if not len(trained):
            raise ValueError(f"{example.source}: nothing to train on; no completion and no assistant turn")
        # What a template writes after the last end of turn (a newline) predicts nothing.
        ids, produced = ids[: trained[-1] + 1], produced[: trained[-1] + 1]
    prompt_length = int(trained[0]) if len(trained) else len(ids)
    if prompt_length == 0:
        raise ValueError(
            f"{example.source}: the prompt is empty and the tokenizer adds no beginning of sequence, so "
            "there is nothing to predict the first token from"
        )
    return TokenizedExample(ids, produced, prompt_length, example.source, example.gold)


def _plain_pieces(example: Example, tokenizer: Any, generate: bool) -> list[tuple[str, bool]]:
    """(text, supervised) of each turn."""
    for turn in example.turns:
        if turn.role not in ("prompt", "completion"):
            raise ValueError(
                f"{example.source}: has a {turn.role!r} message, which needs a chat template; set chat=True"
            )
    return [(turn.text, turn.supervised) for turn in example.turns]


def _chat_pieces(example: Example, tokenizer: Any, generate: bool) -> list[tuple[str, bool]]:
    """(text, supervised), cut out of the rendered conversation.

    A supervised piece is what one more assistant turn adds to the rendering of the turns before it with the
    generation prompt; this needs no knowledge of the template, only that each rendering begins with the last.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{example.source}: chat=True, but the tokenizer has no chat template; use the tokenizer of an "
            "instruction-tuned model, set tokenizer.chat_template, or chat=False"
        )
    names = {"prompt": "user", "completion": "assistant"}
    messages = [{"role": names.get(t.role, t.role), "content": t.text} for t in example.turns]

    def render(count: int, prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        except TemplateError as error:
            raise ValueError(
                f"{example.source}: the chat template refused messages 0 to {count - 1}: {error}"
            ) from error

    def added(text: str, before: str, count: int) -> str:
        if not text.startswith(before):
            raise ValueError(
                f"{example.source}: the chat template is not prefix-stable: with message {count - 1} it "
                f"renders the messages before it differently (it gave {before[-40:]!r}, then "
                f"{text[: len(before)][-40:]!r}), so training and generation would see different prompts; "
                "make one example of each assistant turn, or use a template without such rewriting"
            )
        return text[len(before) :]

    pieces, done = [], ""
    for i, turn in enumerate(example.turns):
        if turn.supervised:
            before, after = render(i, True), render(i + 1, False)
            pieces += [(added(before, done, i), False), (added(after, before, i + 1), True)]
            done = after
    if generate:
        pieces.append((added(render(len(messages), True), done, len(messages)), False))
    return pieces


def _end_of_turn(ids: list[int], tokenizer: Any, specials: frozenset[int], source: str, text: str) -> int:
    """Number of tokens of an assistant piece up to and with its end-of-turn token, its last special one."""
    end = max((i for i, token in enumerate(ids) if token in specials), default=-1) + 1
    if end == 0 or tokenizer.decode(ids[end:]).strip():
        raise ValueError(
            f"{source}: the chat template ends the assistant's turn with no special token (it renders "
            f"{text[-40:]!r}), so nothing would tell generation to stop; use a template that closes its turns"
        )
    return end


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of all special tokens, also those without a role such as eos."""
    added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset([*tokenizer.all_special_ids, *added])


def _beginning(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer puts before a text."""
    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("x")["input_ids"]
    for i in range(len(whole) - len(plain) + 1):
        if whole[i : i + len(plain)] == plain:
            return list(whole[:i])
    raise ValueError(f"the tokenizer gives {plain} for 'x' alone, but {whole} with special tokens")


def _end_of_sequence(tokenizer: Any) -> int:
    """The id that ends a completion."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token to end a completion; set tokenizer.eos_token")
    return int(tokenizer.eos_token_id)


def _long(report: Report, over: Sequence[tuple[str, int]]) -> str:
    """Examples over the limit, the first few by name."""
    named = ", ".join(f"{source} ({length})" for source, length in over[:3])
    more = ", ..." if len(over) > 3 else ""
    return (
        f"{len(over):,} of {report.examples:,} examples longer than {report.max_length} tokens "
        f"(longest {report.longest}): {named}{more}"
    )
