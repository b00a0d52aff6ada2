"""Answer prompts with a steered model: `python -m train.generate runs/quickstart/steering.safetensors '[MAX 2 7 ]'`.

Prompts come from the command line, from a file (--input), or one per line from standard input. Several are printed with
their answers, or written to a file (--output); the answer to a single one appears as it is generated.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from jaxsteer.inference.draws import Sampling
from jaxsteer.inference.scheduling import nonfinite_logits
from jaxsteer.io import SteeringFile
from jaxsteer.models.config import beyond_context, check_new_tokens
from jaxsteer.models.transformer import Model
from jaxsteer.params import Params
from jaxsteer.ranges import Count, Natural, NonNegative, Range, Seed, check_ranges
from train.base_models import load_steered, read_steered, steered
from train.cli import run_main
from train.data import Encoding, Example
from train.data.prompts import Asking, Division, Question, ask_all, check_unicode, read_questions, read_standard_input
from train.devices.machine import enable_compilation_cache
from train.devices.placement import MeshConfig, place_on
from train.devices.processes import DistributedConfig, is_first, join
from train.display.console import progress, say
from train.evaluation.answers import Prompts
from train.evaluation.evaluator import Evaluator
from train.evaluation.journal import FileJournal
from train.evaluation.replies import REPLIES, Reply, TextStream, reply_of
from train.evaluation.strength import parse_strength
from train.tasks import Split
from train.tasks.scoring import Rule


@dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts with a base model and, optionally, a steering file."""

    steering: Annotated[str, tyro.conf.Positional]
    """A steering file (*.safetensors), or the folder of a run that has one; "none" for the pretrained model."""
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Prompts; without any, and without --input, they are read from standard input."""
    input: str | None = None
    """File of prompts: *.jsonl, with "prompt" or "messages" in each line as in training; any other name is text."""
    divide: Division = "lines"
    """Prompts of a text and of standard input: one per line, separated by blank lines (paragraphs), or the whole text
    as one prompt."""
    output: str | None = None
    """File for the answers (*.jsonl): prompt, output, tokens, finished, and the line of the input as `row`. Run again
    after an interruption, it continues."""
    system: str | None = None
    """System message of the chat template, for conversations without one."""
    model: str | None = None
    """Base model; by default the one named in the steering file."""
    other_base: bool = False
    """Steer a model of the same shape whose weights are not those that the steering was trained on."""
    strength: tuple[str, ...] = ()
    """Strength of the steering: 0 the base, 1 as trained, 2 twice the shift; for all slots (0.5) or for some
    (lora=0.5 post_block=2)."""
    raw: bool = False
    """Use the prompts as they are, without the template that the steering was trained with."""
    chat: bool | None = None
    """Apply the model's chat template; by default as in training, and for prompts that are conversations."""
    compare: bool = False
    """Also print the unsteered model's answer."""
    max_new_tokens: Count | None = None
    """Maximum number of tokens to generate; by default as in training, else 64."""
    batch_size: Count = 64
    """Prompts answered at a time."""
    temperature: NonNegative = 0.0
    """Sampling temperature; 0: greedy decoding."""
    top_k: Natural = 0
    """Sample from the k most likely tokens only; 0: all."""
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    """Sample from the smallest set of most likely tokens whose probabilities add up to this."""
    seed: Seed = 0
    """Random seed for sampling."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How weights and prompts are sharded over devices."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """How the processes of a multi-host run find each other."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights and the compute; auto: float32 on CPU, bfloat16 on accelerators."""

    def check(self) -> None:
        """Reject settings that answer nothing, or that would be ignored.

        Raises:
            ValueError: names the option.
        """
        check_ranges(self)
        if self.prompts and self.input is not None:
            raise ValueError("give prompts, or --input with a file of them, not both")
        if self.output is not None:
            self._check_output(Path(self.output))

    def _check_output(self, path: Path) -> None:
        if path.suffix != ".jsonl" or path.is_dir():
            raise ValueError(f"--output {path}: must be the name of a .jsonl file")
        if self.input is not None and path.resolve() == Path(self.input).resolve():
            raise ValueError(f"--output {path}: is the file of prompts, which it would overwrite")
        if self.compare:
            raise ValueError(
                "--output takes the answers of one model: leave out --compare, and run again with the word none, not "
                "the steering file"
            )

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class OpenTask:
    """Questions without a known answer: how they are asked, and how long an answer may be."""

    template: str
    chat: bool
    max_new_tokens: int
    rule: Rule = "exact"

    def load(self, split: Split) -> list[Example]:
        """An open task has no examples of its own."""
        return []


def read_prompts(config: GenerateConfig, notes: Mapping[str, Any]) -> list[Question]:
    """The questions, from wherever the settings say, in the template that the steering was trained with.

    Raises:
        ValueError: there are none, or one cannot be read.
    """
    if config.system is not None:
        check_unicode(config.system, "--system")
    asking = Asking(_template(config, notes), config.system)
    if config.prompts:
        return ask_all(config.prompts, asking)
    if config.input is not None:
        return read_questions(config.input, asking, config.divide)
    # None where the process was started with a closed standard input.
    stream = None if sys.stdin is None else sys.stdin.buffer
    return read_standard_input(stream, asking, config.divide)


def open_task(config: GenerateConfig, notes: Mapping[str, Any], questions: Sequence[Question]) -> OpenTask:
    """How to ask: as typed, else as the steering file's notes say.

    Raises:
        ValueError: a system message without a chat template.
    """
    trained = notes.get("chat", False) or any(question.conversation for question in questions)
    chat = trained if config.chat is None else config.chat
    if config.system is not None and not chat:
        raise ValueError("--system needs a chat template; add --chat True")
    new_tokens = notes.get("max_new_tokens", 64) if config.max_new_tokens is None else config.max_new_tokens
    return OpenTask(_template(config, notes), chat, new_tokens)


def _template(config: GenerateConfig, notes: Mapping[str, Any]) -> str:
    return "{prompt}" if config.raw else notes.get("template", "{prompt}")


@dataclass(frozen=True)
class Answering:
    """An evaluator with the questions that it is to answer.

    evaluator  of the steered or of the pretrained model
    params     its parameters
    prompts    the questions as tokens
    questions  the same as they were given
    """

    evaluator: Evaluator
    params: Params
    prompts: Prompts
    questions: Sequence[Question]

    @classmethod
    def of(cls, evaluator: Evaluator, params: Params, questions: Sequence[Question]) -> Answering:
        """The same with the questions tokenised."""
        return cls(evaluator, params, evaluator.prompts([question.example for question in questions]), questions)

    def decode(self, tokens: np.ndarray) -> str:
        """The text of an answer."""
        return self.evaluator.loaded.require_tokenizer().decode(tokens, skip_special_tokens=True)

    def replies(self) -> list[Reply]:
        """The answers, in the order of the questions."""
        found = dict(self._generate(range(len(self.questions))))
        return [found[index] for index in range(len(found))]

    def write(self, path: Path) -> list[Reply]:
        """The answers, each on disk once it is finished: in a journal beside `path` first, at `path` at the end."""
        path.parent.mkdir(parents=True, exist_ok=True)
        total, rows = len(self.questions), json.dumps([question.row for question in self.questions])
        digest = hashlib.sha256(rows.encode()).hexdigest()
        identity = self.evaluator.identity(self.prompts, self.params) | {"rows": digest}
        with FileJournal(path, identity, codec=REPLIES) as journal:
            if path.exists():
                say(f"note: {path}: what it holds will be replaced once all prompts are answered")
            with progress(total, "Answering", start=len(journal.done)) as bar:
                for index, reply in self._generate([i for i in range(total) if i not in journal.done]):
                    journal.add(index, reply)
                    bar.update(len(journal.done))
            journal.finish()
        return [journal.done[index] for index in range(total)]

    def stream(self, show: Callable[[str], None]) -> list[Reply]:
        """The answer to the only question; `show` gets its text piece by piece."""
        text = TextStream(self.decode)

        def so_far(_: int, tokens: np.ndarray) -> bool:
            show(text.update(tokens))
            return False

        generated = self.evaluator.generate(self.prompts, self.params, [0], ended=so_far, chunk=4)
        ((_, answer),) = generated
        show(text.update(answer.tokens, final=True) + "\n")
        return [reply_of(self.questions[0], self.prompts.texts[0], answer, self.decode)]

    def _generate(self, left: Sequence[int]) -> Iterator[tuple[int, Reply]]:
        for index, answer in self.evaluator.generate(self.prompts, self.params, left):
            yield index, reply_of(self.questions[index], self.prompts.texts[index], answer, self.decode)

    def check(self, replies: Sequence[Reply]) -> None:
        """Report answers that ended because the model's logits were not finite.

        Raises:
            FloatingPointError: names the first such prompt, and how many more there are.
        """
        failed = [index for index, reply in enumerate(replies) if reply.finished == "nonfinite"]
        if failed:
            error = nonfinite_logits(self.prompts.tokens[failed[0]], self.evaluator.model.config.vocab_size)
            more = f" (and for {len(failed) - 1} of the other prompts)" if len(failed) > 1 else ""
            raise FloatingPointError(f"{error}{more}")


def main() -> None:
    """Print each prompt with its answer."""
    config = tyro.cli(GenerateConfig, prog="python -m train.generate", description=__doc__)
    config.check()
    join(config.distributed)
    enable_compilation_cache()
    sampling, file = config.sampling, read_steered(config.steering)
    notes = file.notes if file else {}
    strength = parse_strength(config.strength, file.plan if file else ())
    questions = read_prompts(config, notes)
    task = open_task(config, notes, questions)
    if file:
        check_new_tokens(file.config, task.max_new_tokens)
    place = place_on(config.mesh, min(len(questions), config.batch_size))
    loaded, _ = load_steered(
        file or config.steering, config.model, config.dtype, place.base, other_base=config.other_base
    )
    plan, steering = steered(file)
    evaluator = Evaluator(
        model=Model(loaded.config, plan),
        loaded=loaded,
        task=task,
        placement=place,
        eval_batch_size=config.batch_size,
        sampling=sampling,
        seed=config.seed,
        strength=strength,
        encoding=Encoding(chat=task.chat, date=notes.get("date")),
    )
    answering = Answering.of(evaluator, Params(None, steering), questions)
    for question in answering.prompts.tokens:
        if note := beyond_context(loaded.config, len(question)):
            say(f"note: {question.source}: {note}")
    answering.check(_answer(config, answering, file))


def _answer(config: GenerateConfig, answering: Answering, file: SteeringFile | None) -> list[Reply]:
    """Answer, and print or write the answers."""
    if config.output is not None:
        replies = answering.write(Path(config.output))
        if is_first():
            print(f"{len(replies)} answers: {config.output}")
        return replies
    if config.compare and file:
        base = replace(answering.evaluator, model=Model(answering.evaluator.model.config), strength=None)
        replies, unsteered = answering.replies(), Answering.of(base, Params(None, {}), answering.questions).replies()
        for reply, other in zip(replies, unsteered, strict=True):
            _print(f"{reply.prompt}\n  base     {other.output!r}\n  steered  {reply.output!r}\n")
        return replies
    if len(answering.questions) == 1:
        return answering.stream(_print)
    replies = answering.replies()
    for reply in replies:
        _print(f"{reply.prompt}\n  {reply.output}\n")
    return replies


def _print(text: str) -> None:
    if text and is_first():
        print(text, end="", flush=True)


if __name__ == "__main__":
    run_main(main)
