"""A chat whose terminal is a script, and the tiny model that it is with."""

import io
import json
from dataclasses import replace

from rich.console import Console
from tiny_model import TINY

from jaxsteer import LinearSteering, LoRA, Slot
from train.chat.answers import Talker
from train.chat.commands import Chat
from train.chat.interrupts import CtrlC
from train.chat.settings import Settings

CONFIG = replace(TINY, max_length=512)
PLAN = (Slot("lora", LoRA(rank=2), ("attn.q",)), Slot("post_block", LinearSteering(rank=2), ("block",)))


class Session:
    """A chat, what it shows, and what it asks the engine for."""

    def __init__(self, engine, *, width=99, terminal=False, **options):
        self.shown, self.notes = io.StringIO(), io.StringIO()
        self.ctrl_c = CtrlC()
        consoles = [
            Console(file=file, force_terminal=terminal, color_system="truecolor" if terminal else None, width=width)
            for file in (self.shown, self.notes)
        ]
        settings = Settings(adapter="talk", max_new_tokens=8)
        self.chat = Chat(Talker(engine, 128, self.ctrl_c), settings, *consoles, **options)

    def type(self, *lines):
        """Type lines; gives what is shown, and what is said beside it."""
        starts = self.shown.tell(), self.notes.tell()
        given = iter(lines)
        self.chat.run(lambda prompt: _next(given))
        return tuple(file.getvalue()[start:] for file, start in zip((self.shown, self.notes), starts, strict=True))

    def conversation(self, tmp_path):
        """The messages, as /save writes them."""
        self.type(f"/save {tmp_path / 'talk.json'}")
        return json.loads((tmp_path / "talk.json").read_text())["messages"]


def _next(lines):
    for line in lines:
        return line
    raise EOFError


def text_of(request, engine):
    return engine.roster.loaded.tokenizer.decode(request.prompt.ids)
