"""Chat templates: conversations as text, divided into what the model is given and what it is to say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from os.path import commonprefix
from typing import Any

from jaxsteer.io import Tokenizer
from train.data.examples import Example
from train.data.pieces import Piece

Messages = list[dict[str, str]]

_NAMES = {"prompt": "user", "completion": "assistant"}

_PROBES = ("one", "two")
"""Replies without a common beginning: what a template writes before both is its header."""

_MACRO = (
    "{%% macro strftime_now(format) %%}{%% set made = namespace(text=format) %%}{%% for name, value in %s %%}"
    "{%% set made.text = made.text | replace(name, value) %%}{%% endfor %%}{{ made.text }}{%% endmacro %%}"
)
_DIRECTIVES, _UNPADDED = "aAbBcdDeFHIjmMpRSTuUVwWxXyYzZ", "deHIjmMSUVWy"


def depends_on_date(tokenizer: Tokenizer) -> bool:
    """Whether the chat template may print the date: it asks for it through `strftime_now`, the only way there is."""
    return "strftime_now" in json.dumps(tokenizer.chat_template)


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template.

    tokenizer  of the model
    template   the template's text, with a fixed date; None for the tokenizer's own
    header     what begins every reply although the template ignores `add_generation_prompt`; usually empty
    """

    tokenizer: Tokenizer
    template: str | None = None
    header: str = ""

    def render(self, messages: Messages, prompt: bool, source: str) -> str:
        """The text of the messages; `prompt` adds what comes before a reply.

        Raises:
            ValueError: naming the source: the template does not accept them.
        """
        options: dict[str, Any] = {} if self.template is None else {"chat_template": self.template}
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options)
        except Exception as error:  # a template is a program, and fails in its own ways
            last = len(messages) - 1
            raise ValueError(f"{source}: the chat template refused messages 0 to {last}: {error}") from error
        return text + self.header if prompt else text


def chat_of(tokenizer: Tokenizer, example: Example, date: str | None) -> Chat:
    """The tokenizer's chat template, its date fixed and its header found.

    Args:
        tokenizer: of the model.
        example: any conversation that the template accepts, to find the header with.
        date: ISO date that the template prints; None for today.

    Raises:
        ValueError: naming the example: there is no template, it refuses the example, or it ignores
            `add_generation_prompt` and does not say how a reply begins.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{example.source}: --task.chat, but the tokenizer has no chat template; use an instruction-tuned model or "
            "its tokenizer (--tokenizer), or --task.no-chat"
        )
    chat = Chat(tokenizer, _dated(tokenizer, date))
    messages = _messages(example)
    first = next((i for i, turn in enumerate(example.turns) if turn.supervised), len(messages))
    return Chat(tokenizer, chat.template, _header(chat, messages[:first], example.source))


def chat_pieces(example: Example, chat: Chat, generate: bool) -> list[Piece]:
    """The pieces of the rendered conversation; with `generate`, also what comes before the reply to its last message.

    A completion is what one more assistant turn adds to the rendering of the turns before it with the generation
    prompt. This needs no knowledge of the template, only that each rendering is a prefix of the next.

    Raises:
        ValueError: naming the example: the template refuses it, or rewrites earlier turns.
    """
    messages, source = _messages(example), example.source
    pieces, rendered = [], ""
    for i, turn in enumerate(example.turns):
        if turn.supervised:
            before, after = chat.render(messages[:i], True, source), chat.render(messages[: i + 1], False, source)
            pieces.append(Piece(_added(before, rendered, source, i - 1), "prompt"))
            pieces.append(Piece(_added(after, before, source, i), "completion"))
            rendered = after
    if generate:
        whole = chat.render(messages, True, source)
        pieces.append(Piece(_added(whole, rendered, source, len(messages) - 1), "prompt"))
    return pieces


def _messages(example: Example) -> Messages:
    """The turns as a chat template takes them."""
    if not example.turns or example.turns[0].supervised:
        raise ValueError(
            f"{example.source}: the conversation begins with the assistant; a chat template needs a message before it"
        )
    if any(turn.role == "text" for turn in example.turns):
        raise ValueError(f"{example.source}: a 'text' cannot be part of a conversation; make it an example of its own")
    return [{"role": _NAMES.get(turn.role, turn.role), "content": turn.text} for turn in example.turns]


def _header(chat: Chat, context: Messages, source: str) -> str:
    """What the template writes before any reply to a context without being asked to by `add_generation_prompt`."""
    before = chat.render(context, False, source)
    if chat.render(context, True, source) != before:
        return ""
    wholes = [chat.render([*context, {"role": "assistant", "content": each}], False, source) for each in _PROBES]
    if not all(whole.startswith(before) for whole in wholes):
        return ""  # not prefix-stable, which is found where it matters
    replies = [whole.removeprefix(before) for whole in wholes]
    header = commonprefix(replies)  # noqa: RUF071  # of texts, not paths
    if not all(reply.startswith(header + probe) for reply, probe in zip(replies, _PROBES, strict=True)):
        raise ValueError(
            f"{source}: the chat template ignores add_generation_prompt, and where a reply begins cannot be told "
            f"(it renders {replies[0]!r} for the reply {_PROBES[0]!r}), so its header would be trained as part of the "
            "answer; use a template with {% if add_generation_prompt %} (--tokenizer names another tokenizer), or "
            "--task.no-chat"
        )
    return header.rstrip(" ")  # a space belongs to the first token of the reply


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


def _dated(tokenizer: Tokenizer, date: str | None) -> str | None:
    """The template with a `strftime_now` of its own that knows the date; None if it never asks for one.

    The date is a macro in the template's language, because transformers passes no functions to templates.
    """
    if date is None or not depends_on_date(tokenizer):
        return None
    templates: Any = tokenizer.chat_template  # a text, or several by name
    template = templates if isinstance(templates, str) else templates["default"]
    moment = datetime.fromisoformat(date)
    values = {f"%{letter}": moment.strftime(f"%{letter}") for letter in _DIRECTIVES}
    values |= {f"%-{letter}": values[f"%{letter}"].strip().lstrip("0") or "0" for letter in _UNPADDED}
    return _MACRO % json.dumps(list(values.items())) + template


def end_of_turn(ids: Sequence[int], tokenizer: Tokenizer, specials: frozenset[int], source: str) -> int:
    """Number of tokens of an assistant's piece up to and including its end-of-turn token, the last special one.

    Raises:
        ValueError: naming the source: there is none.
    """
    end = max((i for i, token in enumerate(ids) if token in specials), default=-1) + 1
    if end == 0 or tokenizer.decode(ids[end:]).strip():
        raise ValueError(
            f"{source}: the chat template ends the assistant's turn with no special token (it renders "
            f"{tokenizer.decode(ids)[-40:]!r}), so nothing would tell generation to stop; use a template that closes "
            "its turns"
        )
    return end


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of all special tokens, including those without a role such as eos."""
    added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset([*tokenizer.all_special_ids, *added])
