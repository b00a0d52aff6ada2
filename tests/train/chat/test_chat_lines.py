"""How lines become messages and commands."""

import io

import pytest
from chat_session import text_of

from train.chat.lines import piped_lines, read_message
from train.chat.manual import HELP


def read_all(text):
    read, messages = piped_lines(io.BytesIO(text)), []
    while True:
        try:
            messages.append(read_message(read, "> "))
        except EOFError:
            return messages


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (b"a\r\nb", ["a", "b"]),
        (b"a\\\nb\\\n\nc\n", ["a\nb\n", "c"]),
        (b"a\\\n", ["a\n"]),
        (b'"""\na\n\n b\\\n"""\nc\n', ["a\n\n b\\", "c"]),
        (b'"""a\nb"""\n', ["a\nb"]),
        (b'"""a"""\n', ["a"]),
        (b'say """a\n', ['say """a']),
        ("ü→\n".encode(), ["ü→"]),
        (b"", []),
    ],
)
def test_messages_of_several_lines(text, messages):
    assert read_all(text) == messages


def test_slashes_and_empty_lines(session, engine, asked):
    session.type("", "   ", "//ab")
    assert [text_of(request, engine) for request in asked] == [
        "<|im_start|>user\n/ab<|im_end|>\n<|im_start|>assistant\n"
    ]


def test_every_command_is_in_the_help(session):
    shown, _ = session.type("/help")
    assert all(f"/{name}" in shown for name in HELP)
    assert session.type("/adapter")[0].count("linear(rank=2) @ block") == 2
    assert session.chat.words()["/adapter"] == {"tiny": None, "talk": None, "plain": None}
    _, notes = session.type("/seed", "/max", "/strength", "/mode", "/system", "/quit", "never")
    assert notes.split("\n")[:-1] == [
        "seed 0", "max 8", "strength lora 1, post_block 1", "chat", "system message: none"
    ]  # fmt: skip
