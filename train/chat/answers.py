"""Messages to the engine, and its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue

import numpy as np

from jaxsteer.inference.events import Event
from jaxsteer.inference.scheduling import Request
from train.chat.conversation import Exchange, Form, Voice, messages_of
from train.chat.interrupts import CtrlC
from train.chat.screen import Display
from train.chat.settings import CHAT_TOKENS, COMPLETION_TOKENS, Settings
from train.serving.effects import Effects, Passage, effects
from train.serving.engine import Engine, EngineError, Listener
from train.serving.lineup import Served
from train.serving.models import Roster
from train.serving.prompts import Prompt, chat_prompt, plain_prompt
from train.serving.text import TextOfAnswer

SOURCE = "the message"

News = tuple[int, Event | EngineError]
"""What is new of an answer, with its number."""


@dataclass
class Reply:
    """An answer, growing.

    text      so far
    tokens    the ids so far
    finished  why it ended; None while it has not
    """

    text: TextOfAnswer
    tokens: list[int] = field(default_factory=list)
    finished: str | None = None


@dataclass(frozen=True)
class Talker:
    """A model that answers messages.

    engine   runs it
    context  maximum number of tokens of a conversation with its last answer
    ctrl_c   stops an answer
    waiting  shows that an answer is being waited for, until its first tokens come
    """

    engine: Engine
    context: int
    ctrl_c: CtrlC
    waiting: Callable[[], AbstractContextManager] = nullcontext

    @property
    def roster(self) -> Roster:
        """The base model and its adapters."""
        return self.engine.roster

    def served(self, voice: Voice) -> Served:
        """The model behind a voice.

        Raises:
            UnknownModel: there is none.
        """
        return self.roster.base if voice.model is None else self.roster.get(voice.model)

    def form(self, settings: Settings) -> Form:
        """How the next message is put to the model: as the adapter was trained, unless the user wants otherwise."""
        served = self.served(settings.steered)
        mode = settings.mode or ("chat" if served.chat else "completion")
        return Form(mode, settings.system, served.template) if mode == "chat" else Form(mode, None, served.template)

    def prompt(self, before: Sequence[Exchange], message: str, form: Form, served: Served) -> Prompt:
        """What the model reads.

        Raises:
            ValueError: an empty message, or the model has no chat template, or one that refuses the conversation.
        """
        if form.mode == "completion":
            return plain_prompt(self.roster.loaded, form.template.replace("{prompt}", message), SOURCE)
        return chat_prompt(self.roster.loaded, served, messages_of(before, form.system, message), "the conversation")

    @property
    def longest(self) -> int:
        """Maximum number of tokens of an answer that can be asked for."""
        return self.engine.limits.max_new_tokens

    def room(self, prompt: Prompt) -> int:
        """Number of tokens that an answer may have.

        Raises:
            ValueError: none; the message says what to do.
        """
        length = len(prompt.tokens.ids)
        if length >= self.context:
            longest = self.roster.loaded.config.max_length
            more = (
                f", or start with a longer --context (the model reads up to {longest:,})"
                if longest > self.context
                else ""
            )
            raise ValueError(
                f"the conversation has {length:,} tokens with this message, and no answer fits into the context of "
                f"{self.context:,}: shorten it with /undo, begin anew with /reset{more}. The message was not sent"
            )
        return min(self.context - length, self.longest)

    def limit(self, settings: Settings) -> int:
        """The longest answer that the settings want."""
        if settings.max_new_tokens is not None:
            return settings.max_new_tokens
        if self.form(settings).mode == "chat":
            return CHAT_TOKENS
        return self.served(settings.steered).max_new_tokens or COMPLETION_TOKENS

    def request(self, prompt: Prompt, voice: Voice, settings: Settings, number: int) -> Request:
        """A request for an answer; `number` counts the answers, so that each draws anew."""
        served = self.served(voice)
        return Request(
            prompt=prompt.tokens,
            max_new_tokens=min(self.limit(settings), self.room(prompt)),
            stop_tokens=prompt.stop,
            sampling=settings.sampling,
            seed=settings.seed << 32 | number,
            strength=served.strength(voice.strength) if voice.model else {},
            adapter=served.adapter,
        )

    def answers(self, requests: Sequence[Request], display: Display) -> list[Reply]:
        """Answer requests together, showing the text as it comes; Ctrl-C stops them, and what came is kept.

        Raises:
            EngineError: why there is no answer.
        """
        news: SimpleQueue[News | None] = SimpleQueue()
        decode = partial(self.roster.loaded.require_tokenizer().decode, skip_special_tokens=True)
        replies = [Reply(TextOfAnswer(decode)) for _ in requests]
        with self.ctrl_c.calling(partial(news.put, None)):
            stopped, jobs = False, []
            try:
                for number, request in enumerate(requests):
                    jobs.append(self.engine.submit(request, _listener(news.put, number)))
                with self.waiting():
                    item = news.get()
                while item is not None:
                    _take(replies[item[0]], *item, display)
                    if all(reply.finished for reply in replies):
                        break
                    item = news.get()
                stopped = item is None
            finally:
                for job in jobs:
                    job.cancel()
                for number, reply in enumerate(replies):
                    if reply.finished is None and (stopped or reply.tokens):
                        reply.finished = "cancelled"
                        display.end(number)
        return replies

    def effects(self, before: Sequence[Exchange], exchange: Exchange, voice: Voice, top: int) -> Effects:
        """What steering does to a message and its answer, with all that the model read before them.

        Args:
            before: the exchanges before it.
            exchange: the message and its answer.
            voice: the adapter and its strength.
            top: number of likeliest tokens.
        """
        served, tokenizer = self.served(voice), self.roster.loaded.require_tokenizer()
        prompt = self.prompt(before, exchange.message, exchange.form, served)
        tokens = exchange.tokens or tuple(tokenizer(exchange.answer, add_special_tokens=False)["input_ids"])
        passage = Passage(served, prompt.tokens, np.array(tokens, np.int32), served.strength(voice.strength), top)
        return self.engine.run(lambda network, adapters: effects(network, adapters, passage, tokenizer.decode)).result()


def _listener(put: Callable[[News], None], number: int) -> Listener:
    return lambda event: put((number, event))


def _take(reply: Reply, number: int, event: Event | EngineError, display: Display) -> None:
    """Add an event to its reply.

    Raises:
        EngineError: it is one.
    """
    if isinstance(event, EngineError):
        raise event
    reply.tokens += event.tokens.tolist()
    delta = reply.text.push(event)
    display.add(number, delta.text)
    if delta.finished:
        reply.finished = delta.finished
        display.end(number)
