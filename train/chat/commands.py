"""A conversation and the commands that steer it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.text import Text

from jaxsteer.plans import did_you_mean
from train.chat import conversation, manual
from train.chat.answers import Reply, Talker
from train.chat.conversation import Exchange, Mode, Voice
from train.chat.lines import ReadLine, read_message
from train.chat.manual import HELP
from train.chat.screen import showing, visible
from train.chat.settings import NUMBERS, Settings, label, number_of, with_number
from train.chat.why import Explanation
from train.display.failures import sentence_of
from train.serving.engine import EngineError
from train.serving.lineup import UnknownModel

TOP_TOKENS = 5
"""Likeliest tokens that /why N shows."""


class Chat:
    """A conversation.

    Args:
        talker: the models.
        settings: to begin with.
        console: where answers go.
        notes: where notes and errors go.
        show_shift: colour each answer by how far steering moved its tokens.

    Attributes:
        failed: whether any line could not be obeyed.
    """

    def __init__(
        self, talker: Talker, settings: Settings, console: Console, notes: Console, *, show_shift: bool = False
    ) -> None:
        self.failed = False
        self._talker, self._settings = talker, settings
        self._console, self._notes = console, notes
        self._show_shift = show_shift
        self._exchanges: list[Exchange] = []
        self._drawn = 0  # answers since the seed was set
        self._explained: tuple[Exchange, Voice, Explanation] | None = None

    @property
    def prompt(self) -> str:
        """What stands before a message: who answers, and what is not as usual."""
        settings, form = self._settings, self._talker.form(self._settings)
        parts = [self._label(settings.voice)]
        parts += ["completion"] if form.mode == "completion" else []
        parts += [f"T={settings.sampling.temperature:g}"] if settings.sampling.temperature else []
        return " ".join(parts) + " > "

    def greet(self) -> None:
        """Say who is here, and how to go on."""
        self._note("/help lists the commands, /quit or Ctrl-D leaves")
        self._mode("")

    def words(self) -> dict[str, Any]:
        """What Tab completes."""
        roster = self._talker.roster
        after: dict[str, Any] = {
            "adapter": dict.fromkeys(roster.names()),
            "mode": dict.fromkeys((*get_args(Mode), "auto")),
            "strength": {f"{slot.name}=": None for name in roster.names() for slot in roster.get(name).plan},
            "why": {"all": None},
        }
        return {f"/{name}": after.get(name) for name in HELP}

    def run(self, read: ReadLine) -> None:
        """Answer messages and obey commands until there are no more.

        Raises:
            KeyboardInterrupt: Ctrl-C where there is nothing to stop, twice if there is a conversation to lose.
        """
        warned = False
        while True:
            try:
                text = read_message(read, self.prompt)
            except KeyboardInterrupt:
                if warned or not self._exchanges:
                    raise
                self._note("Ctrl-C again leaves; /save FILE.json keeps the conversation")
                warned = True
                continue
            except EOFError:
                return
            except ValueError as error:
                self._report(error)
                continue
            warned = False
            try:
                self.obey(text)
            except EOFError:
                return
            except KeyboardInterrupt:
                self._note("stopped")
            except Exception as error:
                self._report(error)

    def obey(self, text: str) -> None:
        """Answer a message, or obey a command.

        Raises:
            EOFError: /quit.
            ValueError, EngineError: it cannot be; the message says why.
        """
        if not text.strip():
            return
        if text.startswith("//") or not text.startswith("/"):
            self._keep(self._ask(self._exchanges, text.removeprefix("/"), [self._settings.voice])[0])
            return
        name, rest = [*text[1:].split(maxsplit=1), "", ""][:2]
        if name not in HELP:
            near = next((f" (did you mean {each}?)" for each in HELP if name and each.startswith(name)), "")
            hint = near or did_you_mean(name, HELP)
            raise ValueError(f"no command /{name}{hint}; /help lists them, and // begins a message that begins with /")
        if rest and not HELP[name][0]:
            raise ValueError(f"/{name} takes nothing more, got {rest!r:.40}")
        if name in NUMBERS:
            self._number(name, rest.strip())
        else:
            command: Callable[[str], None] = getattr(self, f"_{name}")
            command(rest.strip())

    # ---- answers

    def _ask(self, before: Sequence[Exchange], message: str, voices: Sequence[Voice]) -> list[Exchange]:
        """Have a message answered by each voice, all reading the same."""
        settings, talker = self._settings, self._talker
        form = talker.form(settings)
        prompt = talker.prompt(before, message, form, talker.served(settings.steered))
        requests = [talker.request(prompt, voice, settings, self._drawn) for voice in voices]
        self._drawn += 1
        with showing(self._console, [self._label(voice) for voice in voices]) as display:
            replies = talker.answers(requests, display)
        self._remark(voices, replies, requests[0].max_new_tokens)
        return [
            Exchange(message, form, voice, reply.text.text, tuple(reply.tokens), str(reply.finished))
            for voice, reply in zip(voices, replies, strict=True)
        ]

    def _remark(self, voices: Sequence[Voice], replies: Sequence[Reply], limit: int) -> None:
        """Say how answers ended that did not come to their end."""
        if any(reply.finished == "cancelled" for reply in replies):
            self._note("stopped; /retry answers again, /undo takes the message back")
        elif cut := [voice for voice, reply in zip(voices, replies, strict=True) if reply.finished == "length"]:
            full = limit < self._talker.limit(self._settings)
            what = "that is all the context has room for" if full else "/max N allows more"
            who = f"{self._label(cut[0])} " if len(cut) < len(voices) else ""
            self._note(f"{who}ended after {limit} tokens; {what}")

    def _keep(self, exchange: Exchange, before: Sequence[Exchange] | None = None) -> None:
        """Go on from an exchange."""
        if not exchange.answer and exchange.finished == "cancelled":
            self._note("nothing came, so the message is no part of the conversation")
            return
        self._exchanges = [*(self._exchanges if before is None else before), exchange]
        if self._show_shift and exchange.voice.model and exchange.tokens:
            self._explanation().show_answer(self._console)

    def _retry(self, _: str) -> None:
        *before, last = self._conversation()
        self._keep(self._ask(before, last.message, [self._settings.voice])[0], before)

    def _compare(self, message: str) -> None:
        steered = self._steered()
        before = self._exchanges if message else self._conversation()[:-1]
        asked = message or self._exchanges[-1].message
        _, exchange = self._ask(before, asked, [Voice(), steered])
        self._keep(exchange, before)

    def _explanation(self) -> Explanation:
        """What steering did to the last exchange; to the base model's answer, what it would have done."""
        *before, last = self._conversation()
        voice = last.voice if last.voice.model else self._steered()
        if self._explained is None or self._explained[0] is not last or self._explained[1] != voice:
            effects = self._talker.effects(before, last, voice, TOP_TOKENS)
            self._explained = last, voice, Explanation.of(effects, last.message, self._label(voice))
        return self._explained[2]

    def _why(self, what: str) -> None:
        picture = Path(what) if what.lower().endswith(".png") else None
        if not (what in ("", "all") or picture or what.isdecimal()):
            raise ValueError(f"/why {what}: give the number of a token, the word all, or a file, *.png")
        if picture is not None and not picture.resolve().parent.is_dir():
            raise ValueError(f"{picture}: there is no folder {picture.parent}")
        explanation = self._explanation()
        if what.isdecimal():
            explanation.show_token(self._console, int(what))
        else:
            explanation.show(self._console, every=what == "all", picture=picture)

    # ---- the conversation

    def _conversation(self) -> list[Exchange]:
        """The exchanges so far.

        Raises:
            ValueError: there are none.
        """
        if not self._exchanges:
            raise ValueError("nothing has been said yet")
        return self._exchanges

    def _undo(self, _: str) -> None:
        self._exchanges = self._conversation()[:-1]
        self._note(f"taken back; {_counted(self._exchanges)} left")

    def _reset(self, _: str) -> None:
        self._exchanges = []
        self._note("a new conversation")

    def _history(self, _: str) -> None:
        for each in self._conversation():
            heading = f"{self._label(each.voice)}{' (completion)' if each.form.mode == 'completion' else ''}:"
            self._print(f"> {each.message}", "dim")
            self._print(heading, "bold")
            self._print(each.answer)

    def _save(self, path: str) -> None:
        if not path:
            raise ValueError("/save: give a file, *.json")
        conversation.save(Path(path).expanduser(), self._conversation(), self._talker.roster.loaded.name)
        self._note(f"{_counted(self._exchanges)}: {path}")

    def _load(self, path: str) -> None:
        if not path:
            raise ValueError("/load: give a file that /save wrote")
        loaded = self._talker.roster.loaded
        exchanges, model = conversation.load(Path(path).expanduser(), loaded.name, loaded.config.vocab_size)
        self._exchanges = exchanges
        if exchanges:
            self._settings = replace(self._settings, system=exchanges[-1].form.system)
        other = "" if model == loaded.name else f", with another base model: {model}"
        self._note(f"{_counted(exchanges)}{other}")

    # ---- settings

    def _number(self, name: str, text: str) -> None:
        if text:
            settings, longest = with_number(self._settings, name, text), self._talker.longest
            if (settings.max_new_tokens or 0) > longest:
                raise ValueError(
                    f"/max {text}: answers have up to {longest:,} tokens here; --max-new-tokens starts with more"
                )
            self._settings = settings
            self._drawn = 0 if name == "seed" else self._drawn
        value = number_of(self._settings, name)
        self._note(f"{name} {self._talker.limit(self._settings) if value is None else f'{value:g}'}")

    def _strength(self, text: str) -> None:
        plan = self._talker.served(self._steered()).plan
        if text:
            self._settings = self._settings.with_strength(text.split(), plan)
        strength = self._settings.steered.strength
        self._note("strength " + ", ".join(f"{slot.name} {strength.get(slot.name, 1.0):g}" for slot in plan))

    def _steered(self) -> Voice:
        """The adapter at its strength.

        Raises:
            ValueError: there is none.
        """
        if self._settings.adapter is None:
            raise ValueError("only the base model is here; start the chat with a steering file to steer it")
        return self._settings.steered

    def _base(self, _: str) -> None:
        self._steered()
        self._settings = replace(self._settings, base=not self._settings.base)
        self._note(f"{self._label(self._settings.voice)} answers")

    def _adapter(self, name: str) -> None:
        roster = self._talker.roster
        if not name:
            self._console.print(manual.models(roster))
            return
        served = roster.get(name)
        if served.adapter is None:
            self._settings = replace(self._settings, base=self._settings.adapter is not None)
        else:
            self._settings = replace(self._settings, adapter=name, base=False)
        self._note(f"{self._label(self._settings.voice)} answers")

    def _system(self, text: str) -> None:
        if self._talker.form(self._settings).mode == "completion":
            raise ValueError("/system: completions have no system message; /mode chat has")
        if text:
            self._settings = replace(self._settings, system=None if text == "none" else text)
        self._note(f"system message: {self._settings.system or 'none'}")

    def _mode(self, text: str) -> None:
        modes = {"auto": None, **{mode: mode for mode in get_args(Mode)}}
        if text and text not in modes:
            raise ValueError(f"/mode {text}: give chat, completion or auto (as the adapter was trained)")
        if text == "chat" and not self._talker.roster.loaded.require_tokenizer().chat_template:
            raise ValueError("/mode chat: this model has no chat template; it only completes texts")
        if text:
            self._settings = replace(self._settings, mode=modes[text])
        form = self._talker.form(self._settings)
        self._note("chat" if form.mode == "chat" else f"completion of each message alone, as {form.template!r}")

    # ---- the rest

    def _help(self, _: str) -> None:
        self._console.print(manual.commands())
        self._print(manual.LINES)

    def _quit(self, _: str) -> None:
        raise EOFError

    def _label(self, voice: Voice) -> str:
        try:
            return label(voice, self._talker.served(voice).plan)
        except UnknownModel:  # in a conversation from a file
            return str(voice.model)

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(visible(text), style=style))

    def _note(self, text: str) -> None:
        self._notes.print(Text(visible(text), style="dim"), soft_wrap=True)

    def _report(self, error: Exception) -> None:
        """Say what went wrong in a sentence; a bug ends the chat."""
        message = str(error) if isinstance(error, EngineError) else sentence_of(error)
        if message is None:
            raise error
        self.failed = True
        self._notes.print(Text("error: ", style="bold red").append(message, style="not bold default"), soft_wrap=True)


def _counted(exchanges: Sequence[Exchange]) -> str:
    return f"{len(exchanges)} message{'' if len(exchanges) == 1 else 's'}"
