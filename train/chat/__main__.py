"""Talk to a steered model in the terminal: `python -m train.chat runs/quickstart`.

Answers appear as they are generated. /strength 0.5 turns the steering, /compare asks the base model too, /why colours
the last exchange by how far steering moved each token, and /help lists the other commands. Standard input may be a file
or a pipe, with a message or a command in each line; the exit status is then 1 if a line could not be obeyed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Annotated, Literal

import tyro

from jaxsteer.inference.draws import Sampling
from jaxsteer.io import SteeringFile, load_config
from jaxsteer.io.provenance import BaseOptions
from jaxsteer.models.config import ModelConfig
from jaxsteer.ranges import Count, Natural, NonNegative, Range, Seed, check_ranges
from train.base_models import describe, find_base, read_steered, resolve_model
from train.chat.answers import Talker
from train.chat.commands import Chat
from train.chat.conversation import Mode
from train.chat.interrupts import CtrlC
from train.chat.lines import is_typed, open_lines
from train.chat.settings import Settings
from train.cli import run_main
from train.data.prompts import check_unicode
from train.devices.machine import enable_compilation_cache
from train.display.console import get_console
from train.evaluation.strength import parse_strength
from train.serving.engine import CLIENTS, Engine, EngineSettings
from train.serving.models import open_roster, parse_sources

CONTEXT, LONGEST = 4096, 1024
"""Tokens of a conversation and of an answer for which there is room, where nothing else is said."""
CHUNK = 4
"""Tokens between two pieces of an answer on the screen."""


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a base model and its adapters."""

    steering: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Steering files (*.safetensors) or folders of runs of one base model, also as NAME=PATH; the first one answers to
    begin with. "none" for the pretrained model alone."""
    model: str | None = None
    """Base model; by default the one named in the first steering file."""
    other_base: bool = False
    """Steer a model of the same shape whose weights are not those that the steering was trained on."""
    strength: tuple[str, ...] = ()
    """Strength of the first adapter's steering: 0 the base, 1 as trained, 2 twice the shift; for all slots (0.5) or for
    some (lora=0.5 post_block=2)."""
    mode: Literal["auto", "chat", "completion"] = "auto"
    """chat: messages are a conversation in the model's chat template; completion: each is completed alone, in the
    template that the adapter was trained with; auto: as the adapter was trained."""
    system: str | None = None
    """System message of the conversation."""
    max_new_tokens: Count | None = None
    """Maximum number of tokens of an answer; by default 256 in a chat, and as in training for a completion."""
    context: Annotated[int, Range(2)] | None = None
    """Maximum number of tokens of a conversation; by default the model's context, but at most 4,096."""
    temperature: NonNegative = 0.0
    """Sampling temperature; 0: greedy decoding."""
    top_k: Natural = 0
    """Sample from the k most likely tokens only; 0: all."""
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    """Sample from the smallest set of most likely tokens whose probabilities add up to this."""
    seed: Seed = 0
    """Random seed for sampling."""
    show_shift: bool = False
    """After each answer, show it coloured by how far steering moved each token."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights and the compute; auto: float32 on CPU, bfloat16 on accelerators."""

    def check(self) -> None:
        """Reject settings that no chat could have.

        Raises:
            ValueError: names the option.
        """
        check_ranges(self)
        if self.system is not None:
            check_unicode(self.system, "--system")
            if self.mode == "completion":
                raise ValueError("--system is for a chat, but --mode completion has none")


@dataclass(frozen=True)
class Start:
    """A chat whose settings fit the model, of which no weights are loaded yet.

    sources   paths of steering by name
    settings  to begin with
    sizes     of the engine
    context   maximum number of tokens of a conversation
    """

    sources: Mapping[str, str]
    settings: Settings
    sizes: EngineSettings
    context: int


def prepare(config: ChatConfig) -> Start:
    """Check the settings against the steering files and the model's config.

    Raises:
        ValueError: names what does not fit.
    """
    if is_typed():
        import_module("prompt_toolkit")  # fails now rather than after the model is loaded
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    sources = parse_sources(config.steering)
    first = next(iter(sources), None)
    file = None if first is None else read_steered(sources[first])
    strength = parse_strength(config.strength, file.plan if file else ())
    mode = _mode(config, file)
    model = file.config if file else load_config(resolve_model(find_base(None, config.model)))
    context = _context(config, model)
    longest = min(context - 1, max(LONGEST, config.max_new_tokens or 0))
    if (config.max_new_tokens or 0) > longest:
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens}: more than fits into a context of {context:,} tokens"
        )
    settings = Settings(
        adapter=first,
        strengths={first: strength} if first and strength else {},
        mode=mode,
        system=config.system,
        sampling=sampling,
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
    )
    limits = replace(
        CLIENTS, rows=2, max_prompt=context - 1, max_new_tokens=longest, chunk=CHUNK, prefix_tokens=context
    )
    # One person waits for the programs of one size rather than for those of all.
    return Start(sources, settings, EngineSettings(limits, warm=False), context)


def _mode(config: ChatConfig, file: SteeringFile | None) -> Mode | None:
    """The mode that was asked for; None for the adapter's own.

    Raises:
        ValueError: a chat with a model that has no chat template, or a system message without a chat.
    """
    trained = True if file is None else file.notes.get("chat", False)
    if config.system is not None and config.mode == "auto" and not trained:
        raise ValueError("--system is for a chat, but this steering was trained on plain prompts; add --mode chat")
    if config.mode == "chat":
        name, options = find_base(file, config.model), file.base_options if file else BaseOptions()
        if not describe(name, **options._asdict()).require_tokenizer().chat_template:
            raise ValueError(f"--mode chat: {name} has no chat template; it only completes texts")
    return None if config.mode == "auto" else config.mode


def _context(config: ChatConfig, model: ModelConfig) -> int:
    """Tokens of a conversation.

    Raises:
        ValueError: more than the model reads.
    """
    if config.context is None:
        return min(model.max_length, CONTEXT)
    if config.context > model.max_length:
        raise ValueError(f"--context {config.context:,}: this model reads up to {model.max_length:,} tokens")
    return config.context


def chat(config: ChatConfig, start: Start) -> bool:
    """Load the models and talk.

    Returns:
        Whether every line was obeyed.
    """
    places = max(1, len(start.sources))
    roster = open_roster(start.sources, config.model, dtype=config.dtype, places=places, other_base=config.other_base)
    ctrl_c, console, notes = CtrlC(), get_console(), get_console(stderr=True)
    waiting = partial(notes.status, "[dim]...") if is_typed() else nullcontext
    with Engine(roster, start.sizes) as engine:
        engine.start()
        talker = Talker(engine, start.context, ctrl_c, waiting)
        talk = Chat(talker, start.settings, console, notes, show_shift=config.show_shift)
        read = open_lines(talk.words())
        if not is_typed():
            talk.run(read)
            return not talk.failed
        talk.greet()
        with ctrl_c.handled():
            talk.run(read)
        return True


def main() -> None:
    """Talk until there is nothing more to say."""
    config = tyro.cli(ChatConfig, prog="python -m train.chat", description=__doc__)
    config.check()
    enable_compilation_cache()
    if not chat(config, prepare(config)):
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
