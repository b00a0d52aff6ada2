"""What the commands of a chat are, and which models there are, as tables."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from jaxsteer.plans import format_plan
from train.chat.lines import QUOTES
from train.serving.models import Roster

HELP = {
    "help": ("", "show this"),
    "strength": (
        "[X | SLOT=X ...]",
        "how far the adapter steers: 0 as the base, 1 as trained; of all slots or of some",
    ),
    "base": ("", "from now on, the base model answers; again: the adapter"),
    "adapter": ("[NAME]", "list the adapters, or go on with another"),
    "compare": ("[MESSAGE]", "base and adapter answer this, or the last message; the adapter's answer is kept"),
    "why": ("[N | all | FILE.png]", "what steering did to the last exchange, coloured; to token N; to all; a picture"),
    "system": ("[TEXT | none]", "the system message of the conversation"),
    "mode": ("[chat | completion | auto]", "converse, or complete each message alone in the adapter's template"),
    "temperature": ("[X]", "0: always the most likely token"),
    "top_k": ("[N]", "draw from the N most likely tokens only; 0: all"),
    "top_p": ("[X]", "draw from the most likely tokens that have this probability together; 1: all"),
    "seed": ("[N]", "of the draws"),
    "max": ("[N]", "the longest answer, in tokens"),
    "undo": ("", "take back the last message and its answer"),
    "retry": ("", "answer the last message again, as set now"),
    "reset": ("", "begin a new conversation; settings stay"),
    "history": ("", "show the conversation"),
    "save": ("FILE.json", "write the conversation"),
    "load": ("FILE.json", "go on with a conversation that was saved"),
    "quit": ("", "leave, as Ctrl-D does"),
}
"""Arguments and meaning of each command."""

LINES = (
    f"A line is a message. It goes on in the next line after a backslash; a longer one stands between {QUOTES} and "
    f"{QUOTES}. // begins a message that begins with /. Ctrl-C stops an answer, and what came of it is kept."
)


def commands() -> Table:
    """The commands, one a row."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, (arguments, meaning) in HELP.items():
        table.add_row(Text(f"/{name} {arguments}", style="bold"), Text(meaning))
    return table


def models(roster: Roster) -> Table:
    """The models, one a row."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("model", "plan", "trained as"):
        table.add_column(column)
    for name in roster.names():
        served = roster.get(name)
        trained = "chat" if served.chat else f"completion, {served.template!r}"
        row = (name, "; ".join(format_plan(served.plan)), trained if served.adapter else "the base model")
        table.add_row(*map(Text, row))
    return table
