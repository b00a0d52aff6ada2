"""How a run learns from preferences: pairs or judged answers, and log-probabilities of the reference kept on disk."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from jaxsteer.groups import sharing_refusal
from jaxsteer.io import LoadedModel, cache_folder
from jaxsteer.params import Params
from jaxsteer.plans import parse_plan
from train.config import TrainConfig
from train.config.dpo import DpoConfig
from train.data import Split, TokenStore
from train.data.encoding import Report
from train.data.judged import JudgedSource
from train.data.pairs import Layout, PairSource, fitting_pairs
from train.data.records import Recipe
from train.data.store import within
from train.data.tokenised import tokenised
from train.display.console import say
from train.run.algorithm import Algorithm, Feed, Measure, Prefetched
from train.run.folder import RunFolder
from train.run.program import kernel_of, mesh_of
from train.run.reference import ReferredSource, reference_of, reference_table, score_table
from train.run.training import RunData, Training, encoding_of, tokenising
from train.run.validation import measured, task_of
from train.tasks.protocols import PairTask
from train.tasks.scoring import Metric


@dataclass(frozen=True)
class FromPreferences(Algorithm):
    """Learns from pairs of answers, or from judged ones (KTO)."""

    metric: ClassVar[Metric | None] = "pair_accuracy"

    def refers(self, config: TrainConfig) -> bool:
        """All but SimPO compare with the reference."""
        assert isinstance(config, DpoConfig)
        return config.preference.needs_reference

    def read_data(self, config: TrainConfig, model: LoadedModel) -> RunData:
        """Read and tokenise the preferences.

        Raises:
            ValueError: a task without preferences, settings that the plan does not allow, or data that are none.
        """
        assert isinstance(config, DpoConfig)
        _check(config, model)
        for split in measured(config):  # so that none of them stops the run when it has trained
            read_evaluated(config, model, split)
        return read_preferences(config, model, "train")

    def feed(self, training: Training, run: RunFolder, left: range) -> AbstractContextManager[Feed]:
        """Batches with the log-probabilities of the reference, which are computed first."""
        config = training.config
        assert isinstance(config, DpoConfig)
        if config.preference.needs_reference:
            source: ReferredSource = training.data  # type: ignore[assignment]  # from `read_data`
            table = reference_table(training, source, run)
            training = replace(training, data=source.referenced(table))
        return Prefetched(training.batch, left)

    def measure(self, training: Training) -> Measure:
        """Pairs right and their mean margin, on pairs of the split."""
        return PairMeasure(training)


def _check(config: DpoConfig, model: LoadedModel) -> None:
    plan = parse_plan(config.plan, model.config)
    if config.preference.bidirectional and any(slot.method.kind != "activation" for slot in plan):
        weights = ", ".join(slot.name for slot in plan if slot.method.kind != "activation")
        raise ValueError(f"--preference.bidirectional: {weights} updates weights; use activation methods only")
    if config.preference.bidirectional and config.train_base:
        raise ValueError("--preference.bidirectional: a trained base has no other direction; leave out --train-base")
    if config.loss_on != "completion":
        raise ValueError(f"--loss-on {config.loss_on}: preferences are about answers; leave the option out")
    task = task_of(config)
    inner = config.task
    if not (isinstance(task, PairTask) and isinstance(inner, PairTask)):
        raise ValueError(
            f"jaxsteer dpo: a {type(inner).__name__} has no preferences; use a PreferenceTask (your own pairs) or a "
            "PairedTask (right and wrong answers to another task)"
        )


def read_preferences(config: DpoConfig, model: LoadedModel, split: Split, limit: int | None = None) -> RunData:
    """The preferences of a split as training data.

    Args:
        config: the run.
        model: its base model; the weights are not needed.
        split: train, validation or test.
        limit: maximum number of pairs, or of answers of each kind.

    Raises:
        ValueError: data that are no preferences; for pairs, answers that are judged one by one.
    """
    task = task_of(config)
    assert isinstance(task, PairTask)
    layout = Layout(config.batch_size, config.sequence_length, config.seed, config.pack)
    stores = (_tokenised(config, model, recipe) for recipe in (task.recipe(split), task.rejected(split)))
    wanted, unwanted = (replace(store, chosen=store.chosen[:limit]) for store in stores)
    if config.preference.kind == "kto":
        return _judged(config, wanted, unwanted, layout)
    shared = shares_prompts(config, model)
    kept = fitting_pairs(wanted, unwanted, config.sequence_length, config.on_long, shared=shared)
    return RunData(PairSource(kept.chosen, kept.rejected, layout, shared), kept.report)


def read_evaluated(config: DpoConfig, model: LoadedModel, split: Split) -> RunData:
    """The preferences of a split that a run is evaluated on; as `read_preferences`."""
    limit = config.test_examples if split == "test" else config.validation_examples
    rows = replace(config, batch_size=config.microbatch, grad_accumulation=1, on_long="drop")
    return read_preferences(rows, model, split, limit)


def _judged(config: DpoConfig, wanted: TokenStore, unwanted: TokenStore, layout: Layout) -> RunData:
    encoding = replace(encoding_of(config), max_length=config.sequence_length, on_long=config.on_long)
    sides = [within(store, encoding, store.begins) for store in (wanted, unwanted)]
    return RunData(JudgedSource(sides[0][0], sides[1][0], layout), joined(tuple(report for _, report in sides)))


def joined(reports: tuple[Report, ...]) -> Report:
    """The statistics of several sets of examples together."""
    first, *others = reports
    for other in others:
        first = Report(
            first.examples + other.examples,
            first.tokens + other.tokens,
            first.supervised + other.supervised,
            max(first.longest, other.longest),
            first.max_length,
            first.too_long + other.too_long,
            first.cut + other.cut,
            first.begun + other.begun,
            first.ended + other.ended,
            first.straddled + other.straddled,
        )
    return first


def _tokenised(config: DpoConfig, model: LoadedModel, recipe: Recipe) -> TokenStore:
    """All answers of a recipe, of any length; none if there are none."""
    encoding = replace(encoding_of(config), max_length=None)
    return tokenised(recipe, model.require_tokenizer(), encoding, cache_folder() / "tokens", tokenising)[0]


def shares_prompts(config: DpoConfig, model: LoadedModel) -> bool:
    """Whether the prompt of a pair is computed once: as asked, where the attention kernel can."""
    if not config.share_prompts:
        return False
    kernel, _ = kernel_of(config, model.config, model.base, mesh_of(config))
    refusal = sharing_refusal(kernel, split_sequence=config.mesh.split_sequence)
    if refusal:
        say(f"Note: the prompt of a pair is computed for both answers: {refusal}", stderr=False)
    return not refusal


class PairMeasure:
    """(split, params) -> pair_accuracy, margin and pair_ranking, of what `Evaluator` takes for a model.

    Margins are scaled by beta, relative to the reference. Answers that are judged one by one are compared each with
    each: pair_accuracy is the share of (desirable, undesirable) pairs of answers whose margins are in the right order.

    Args:
        training: the run, before its first step.
    """

    def __init__(self, training: Training) -> None:
        assert isinstance(training.config, DpoConfig)
        self._training, self._config = training, training.config
        self._reference, self._splits = reference_of(training), measured(self._config)
        self._cache: dict[Split, tuple[PairSource | JudgedSource, np.ndarray]] = {}

    def __call__(self, split: Split, params: Params) -> dict[str, float]:
        """The figures of a model on a split; {} if it has no preferences."""
        if split not in self._splits:
            return {}
        if split not in self._cache:
            source: Any = read_evaluated(self._config, self._training.loaded, split).source
            self._cache[split] = source, score_table(self._training, source, self._reference)
        source, reference = self._cache[split]
        policy = score_table(self._training, source, params)
        wanted, unwanted = source.sums(policy)
        gained, lost = source.sums(policy - reference)
        if isinstance(source, JudgedSource):
            order = gained[:, None] - lost[None]
            return {"pair_accuracy": float((order > 0).mean()), "margin": float(self._beta * order.mean())}
        if self._config.preference.kind == "simpo":
            wanted, unwanted = (side / count for side, count in zip((wanted, unwanted), source.lengths, strict=True))
            gained, lost = wanted, unwanted
        return {
            "pair_accuracy": float((gained > lost).mean()),
            "pair_ranking": float((wanted > unwanted).mean()),
            "margin": float(self._beta * (gained - lost).mean()),
        }

    @property
    def _beta(self) -> float:
        return self._config.preference.scale
