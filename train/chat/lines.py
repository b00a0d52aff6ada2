"""What is typed or piped in, as messages: lines, put together where a message has several."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from jaxsteer.io import cache_folder
from train.data.prompts import check_unicode

QUOTES = '"""'
"""Begins and ends a message of several lines."""
CONTINUED = "... "
"""What stands before the further lines of a message."""

ReadLine = Callable[[str], str]
"""(what to show before it) -> the next line without its end; raises EOFError after the last one, and
KeyboardInterrupt."""


def read_message(read: ReadLine, prompt: str) -> str:
    '''The next message: a line, lines that end in a backslash with the next one, or a block between """ and """.

    Raises:
        EOFError: there are no more.
        ValueError: a block that does not end, or no valid Unicode.
    '''
    text = read(prompt)
    if text.lstrip().startswith(QUOTES):
        text = _block(text.lstrip().removeprefix(QUOTES), read)
    else:
        while text.endswith("\\"):
            text = text[:-1] + "\n"
            with suppress(EOFError):
                text += read(CONTINUED)
    check_unicode(text, "the message")
    return text


def _block(first: str, read: ReadLine) -> str:
    """The lines of a block, of which the first has begun."""
    lines = [first] if first else []
    while not (lines and lines[-1].rstrip().endswith(QUOTES)):
        try:
            lines.append(read(CONTINUED))
        except EOFError:
            raise ValueError(f"a message that began with {QUOTES} has no {QUOTES} at its end") from None
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines if lines[-1] else lines[:-1])


def piped_lines(stream: BinaryIO | None) -> ReadLine:
    """Lines of standard input that is no terminal; nothing is shown before them."""
    stream = io.BytesIO() if stream is None else stream

    def read(_: str) -> str:
        line = stream.readline()
        if not line:
            raise EOFError
        return line.decode("utf-8-sig").rstrip("\r\n")

    return read


def typed_lines(words: Mapping[str, Any], history: Path) -> ReadLine:
    """Lines typed at a terminal, with editing, history and completion.

    Args:
        words: what Tab completes: commands, each with the words that may follow it.
        history: the file that keeps what was typed.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        history=_history(history),
        completer=_completer(words),
        complete_while_typing=False,
        key_bindings=keys,
    )
    return lambda prompt: session.prompt([("bold", prompt)])


def _completer(words: Mapping[str, Any]) -> Any:
    """Completes a command, and the first word after it."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document

    class Words(Completer):
        def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
            *before, word = document.text_before_cursor.split(" ")
            known = words if not before else words.get(before[0]) if len(before) == 1 else None
            for each in known or ():
                if each.startswith(word):
                    yield Completion(each, start_position=-len(word))

    return Words()


def _history(path: Path) -> Any:
    """The history in a file that only its owner reads; in memory where there can be none."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.open("r+b").close()
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


def is_typed() -> bool:
    """Whether standard input is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def open_lines(words: Mapping[str, Any]) -> ReadLine:
    """The lines of standard input; `words` as in `typed_lines`."""
    if is_typed():
        return typed_lines(words, cache_folder() / "chat_history")
    return piped_lines(None if sys.stdin is None else sys.stdin.buffer)
