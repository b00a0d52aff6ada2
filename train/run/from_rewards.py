"""How a run learns from rewards: rollouts of the present parameters, and what is told of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.groups import sharing_refusal
from jaxsteer.io import LoadedModel
from jaxsteer.objectives import Grpo, Rollouts
from jaxsteer.params import Params
from jaxsteer.training import TrainState
from train.config import TrainConfig
from train.config.grpo import GrpoConfig
from train.data import Report, encode_prompts, stop_tokens
from train.devices.processes import fetch, is_first
from train.display.console import say
from train.display.plots import Panel, plot_lines
from train.run.algorithm import Algorithm, Feed
from train.run.folder import RunFolder
from train.run.metrics import MetricsWriter, read_metrics
from train.run.program import kernel_of, mesh_of
from train.run.reference import log_probabilities, reference_of
from train.run.rollouts import PromptSource, Sampled, Sampler, learned_groups, microbatches_of
from train.run.training import RunData, Training, encoding_of
from train.run.validation import task_of
from train.tasks.rewards import WeightedReward, check_rewards, code_files, parse_rewards
from train.tasks.row_sources import digest_of_file

SHOWN_ANSWERS = 3
"""Answers to a question that are shown."""


@dataclass(frozen=True)
class FromRewards(Algorithm):
    """Learns from rewards of its own answers (GRPO)."""

    def refers(self, config: TrainConfig) -> bool:
        """The KL is that from the steering that the run starts from."""
        return True

    def read_data(self, config: TrainConfig, model: LoadedModel) -> RunData:
        """Read the questions, and try the rewards on the first one.

        Raises:
            ValueError: rewards that cannot be computed, no questions, or one that leaves no room for its answer.
        """
        assert isinstance(config, GrpoConfig)
        rewards = parse_rewards(config.rewards, config.task.rule)
        examples = [example.context for example in task_of(config).load("train")]
        if not examples:
            raise ValueError("jaxsteer grpo: the task has no training examples to ask")
        check_rewards(rewards, examples)
        tokenizer, encoding = model.require_tokenizer(), encoding_of(config)
        prompts, _ = encode_prompts(examples, tokenizer, replace(encoding, max_length=None, on_long="error"))
        room = config.sequence_length - config.task.max_new_tokens - 2
        fits = [len(prompt) <= room for prompt in prompts]
        long = tuple((prompt.source, len(prompt)) for prompt, fit in zip(prompts, fits, strict=True) if not fit)
        _check_long(config, long, room)
        kept = [i for i, fit in enumerate(fits) if fit]
        some, asked = [prompts[i] for i in kept], [examples[i] for i in kept]
        files = list(dict.fromkeys(example.source.rpartition(":")[0] for example in asked))[:8]
        own = code_files([reward.name for reward in rewards])
        by = " ".join(digest_of_file(Path(file)) for file in own)
        # The end that training data have: where a chat ends turns with a token of its own, that one.
        source = PromptSource(asked, some, stop_tokens(tokenizer, encoding)[-1], config, files + own, by)
        report = Report(len(examples), sum(map(len, some)), 0, max(map(len, prompts)), room, long)
        return RunData(source, report)

    def feed(self, training: Training, run: RunFolder, left: range) -> AbstractContextManager[Feed]:
        """Rollouts."""
        return RolloutFeed(training, run, left)

    def draw(self, run: RunFolder) -> None:
        """Reward, length of the answers, entropy and KL over the steps, so that a collapse can be seen."""
        rows = [row for row in read_metrics(run.metrics) if "reward" in row]
        panels = [
            _panel(rows, names, label) for names, label in _PANELS if any(name in row for name in names for row in rows)
        ]
        if panels:
            plot_lines(run.folder / "grpo.png", panels, title=str(run.folder.name))


_PANELS = (
    (("reward", "reward_spread"), "reward"),
    (("answer_length", "truncated"), "answer: tokens,\nshare truncated"),
    (("entropy", "kl"), "nats a token"),
    (("equal_groups", "clip_share"), "share of groups\nwithout advantage"),
)


def _panel(rows: Sequence[dict[str, Any]], names: Sequence[str], label: str) -> Panel:
    series = {
        name: ([row["step"] for row in rows if name in row], [row[name] for row in rows if name in row])
        for name in names
        if any(name in row for row in rows)
    }
    return Panel(series, "step", label)


def _check_long(config: GrpoConfig, long: Sequence[tuple[str, int]], room: int) -> None:
    if long and config.on_long == "error":
        source, length = long[0]
        raise ValueError(
            f"{source}: a prompt of {length} tokens leaves no room for an answer of {config.task.max_new_tokens} in a "
            f"row of {config.sequence_length} (at most {room}); {len(long):,} prompts are too long. Raise "
            "--sequence-length, or drop them with --on-long drop"
        )
    if long and config.on_long == "cut":
        raise ValueError("--on-long cut: prompts of rollouts cannot be cut; use --on-long drop")


class _Collected(NamedTuple):
    """Rollouts and what is told of them."""

    inputs: Rollouts
    facts: dict[str, Any]
    notes: tuple[str, ...]


class RolloutFeed(Feed):
    """Samples answers with the parameters before a step, and gives the step (and those that share them) their rows.

    Args:
        training: the run.
        run: its folder, where answers are shown in rollouts.jsonl.
        left: the steps that will be taken.
    """

    waited = 0.0

    def __init__(self, training: Training, run: RunFolder, left: range) -> None:
        assert isinstance(training.config, GrpoConfig)
        self._training, self._config = training, training.config
        self._rewards: tuple[WeightedReward, ...] = parse_rewards(self._config.rewards, self._config.task.rule)
        self._sampler = Sampler(training, self._rewards)
        reference = reference_of(training)  # copied: the first step donates what training starts from
        self._reference = reference._replace(steering=jax.tree.map(jnp.copy, reference.steering))
        kernel, _ = kernel_of(self._config, training.loaded.config, training.loaded.base, mesh_of(self._config))
        refusal = sharing_refusal(kernel, split_sequence=self._config.mesh.split_sequence)
        self._shared = self._config.share_prompts and not refusal
        if refusal and self._config.share_prompts:
            say(f"Note: the prompt of a group is computed for each answer: {refusal}", stderr=False)
        if self._config.train_base:
            say("Note: the pretrained base is held besides the trained one, as the reference", stderr=False)
        self._collected: _Collected | None = None
        self._writer = MetricsWriter(_table_of(run), resume_from=left.start + 1)

    def __exit__(self, *error: Any) -> None:
        """Close the table."""
        self._writer.close()

    def take(self, step: int, state: TrainState) -> Rollouts:
        """The rollouts of a step, sampled now unless an earlier step of their batch has them."""
        if step % self._config.updates == 0:
            self._collected = self._collect(step, self._training.answering(state))
        assert self._collected is not None
        return self._collected.inputs

    def facts(self) -> dict[str, Any]:
        """Rewards and answers."""
        assert self._collected is not None
        return self._collected.facts

    def notes(self, done: int) -> Sequence[str]:
        """A few answers, every `show_rollouts` batches of rollouts."""
        assert self._collected is not None
        return self._collected.notes if (done - 1) % self._config.updates == 0 else ()

    def may_save(self, done: int) -> bool:
        """Between batches of rollouts, which are sampled anew."""
        return done % self._config.updates == 0

    def _collect(self, step: int, params: Params) -> _Collected:
        began, config = time.perf_counter(), self._config
        sampled = self._sampler.sample(step, params)
        facts = told_of(sampled, self._rewards) | {"sampling_seconds": time.perf_counter() - began}
        learned = learned_groups(sampled, self._sampler.prompts, config, shared=self._shared)
        host = microbatches_of(learned, config, shared=self._shared)
        round_number = step // config.updates
        shown = config.show_rollouts > 0 and round_number % config.show_rollouts == 0
        watched = shown and not config.policy.beta  # else the loss tells the KL
        old = self._scored(host, params) if config.updates > 1 or watched else host.old
        reference = self._scored(host, self._reference) if config.policy.beta or watched else host.reference
        counted = np.asarray(host.batch.weights) != 0
        if watched and counted.any():
            facts["kl"] = float((np.asarray(old) - np.asarray(reference))[counted].mean())
        objective = self._training.program.objective
        assert isinstance(objective, Grpo)
        lengths = np.array([len(s.tokens) for group in sampled for s in group if s.ended or config.keep_truncated])
        divisor = np.zeros_like(host.advantages)
        divisor.flat[0] = objective.divisor(lengths)
        inputs = self._placed(host._replace(divisor=divisor, old=old, reference=reference))  # type: ignore[arg-type]
        lines = self._shown(step, sampled) if shown else ()
        return _Collected(inputs, facts, lines)

    def _scored(self, host: Rollouts, params: Params) -> np.ndarray:
        """Log-probabilities of the sampled tokens by a model, [M, B, T], at the temperature of the policy."""
        training = self._training
        program, base = training.program, training.loaded.base if params.base is None else params.base
        found = []
        with program.on_mesh():
            steering = params.steering if program.mesh is None else program.placement.copies(params.steering)
            for micro in range(len(host.advantages)):
                batch = program.placement.batch(jax.tree.map(lambda field, m=micro: field[m], host.batch))
                values = log_probabilities(program.model, base, steering, batch, self._config.temperature)
                found.append(fetch(values))
        return np.stack(found).astype(np.float32)

    def _placed(self, host: Rollouts) -> Rollouts:
        place, rows = self._training.program.placement, self._config.batch_size
        own = place.own_rows(rows)
        mine = jax.tree.map(lambda field: field[:, own.start : own.stop], host)
        return place.batch(mine, rows, own.start)

    def _shown(self, step: int, sampled: Sequence[Sequence[Sampled]]) -> tuple[str, ...]:
        """The first question's answers, for the console; all of them go to the table."""
        for group in sampled:
            example = self._sampler.example(group[0].number)
            rewards = [[*answer.rewards, answer.reward] for answer in group]
            texts = [answer.text for answer in group]
            self._writer.write(
                step + 1, source=example.source, prompt=example.turns[-1].text, gold=example.gold, answers=texts,
                rewards=rewards,
            )  # fmt: skip
        first = sampled[0]
        example = self._sampler.example(first[0].number)
        answers = sorted(first, key=lambda answer: -answer.reward)[:SHOWN_ANSWERS]
        said = ", ".join(f"“{_line(answer.text)}” ({answer.reward:g})" for answer in answers)
        return (f"    “{_line(example.turns[-1].text, -48)}” -> {said}  (right: {_line(example.gold or '')})",)


def _line(text: str, width: int = 32) -> str:
    line = " ".join(text.split())
    if len(line) <= abs(width):
        return line
    return line[: width - 1] + "…" if width > 0 else "…" + line[width + 1 :]


def _table_of(run: RunFolder) -> Path | None:
    return run.folder / "rollouts.jsonl" if is_first() else None


def told_of(sampled: Sequence[Sequence[Sampled]], rewards: Sequence[WeightedReward]) -> dict[str, Any]:
    """What is logged of a batch of rollouts.

    reward         mean of the weighted sums
    reward_spread  mean over groups of the standard deviation within them
    reward_NAME    mean of each reward, if there are several
    answer_length  mean number of tokens, the end included
    truncated      share of answers that reached the maximum number of tokens
    equal_groups   share of groups whose rewards are all the same, from which nothing is learned
    entropy        −log p of the sampled tokens, the mean: an estimate of the policy's entropy at temperature 1
    """
    totals = np.array([[answer.reward for answer in group] for group in sampled])
    flat = [answer for group in sampled for answer in group]
    surprise = np.concatenate([np.empty(0), *(answer.log_probabilities for answer in flat)])
    each = np.array([answer.rewards for answer in flat]).mean(axis=0)
    named = {f"reward_{reward.name}": float(mean) for reward, mean in zip(rewards, each, strict=True)}
    return {
        "reward": float(totals.mean()),
        "reward_spread": float(totals.std(axis=1).mean()),
        **(named if len(named) > 1 else {}),
        "answer_length": float(np.mean([len(answer.tokens) for answer in flat])),
        "truncated": float(np.mean([not answer.ended for answer in flat])),
        "equal_groups": float((totals == totals[:, :1]).all(axis=1).mean()),
        "entropy": float(-surprise.mean()) if len(surprise) else 0.0,
    }
