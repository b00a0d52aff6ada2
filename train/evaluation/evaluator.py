"""One way to evaluate: before, during and after a training, and in every command that asks a model questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsteer.batches import bucket_length, pack, stack_rows
from jaxsteer.inference import Decoder, generate_all
from jaxsteer.inference.draws import Sampling
from jaxsteer.inference.events import Answer
from jaxsteer.inference.likelihood import score_continuations
from jaxsteer.inference.scheduling import Limits, Request, nonfinite_logits
from jaxsteer.io import LoadedModel
from jaxsteer.models.config import check_length
from jaxsteer.models.transformer import Model
from jaxsteer.params import Params
from jaxsteer.plans import plan_to_json
from jaxsteer.types import Batch, PyTree, Steering
from train.data import Encoding, Example, encode
from train.devices import interrupts
from train.devices.placement import Placement
from train.devices.processes import fetch
from train.display.console import progress
from train.evaluation.answers import (
    By,
    Normalise,
    Prompts,
    ScoredAnswer,
    accuracy_of,
    chosen_reader,
    generated_reader,
    make_prompts,
)
from train.evaluation.journal import FileJournal, MemoryJournal, hash_prompts, hash_tree
from train.evaluation.loss import Loss, loss_sums, predicted_tokens, total_loss
from train.tasks import AnyTask, Split
from train.tasks.scoring import Metric


class Validation(NamedTuple):
    """An evaluation on the validation split.

    results  validation_loss (nats a supervised token), perplexity and token_accuracy; and, where answers were
             generated, accuracy with the ends of its 95 % interval, low and high; shares from 0 to 1
    answers  to the first few of its questions
    """

    results: dict[str, float]
    answers: list[ScoredAnswer]


class _Packed(NamedTuple):
    """Batches of a shape, the last filled up with empty rows, and the numbers of the examples in each row."""

    batches: list[Batch]
    members: list[list[int]]


@dataclass(frozen=True)
class Evaluator:
    """Answers a task's questions with a model, scores them, and measures the loss of its reference completions.

    Each split is tokenised once. Every process of a run calls the methods together.

    model            config and plan; its steering, and a trained base, come with each call
    loaded           the pretrained base, its tokenizer and its stop tokens
    task             where questions come from, and how answers are scored
    placement        where arrays go
    eval_batch_size  prompts answered at a time
    limits           maximum number of examples of a split; a split that is not named is used whole
    metric           what decides between the results of `validate`: answers are generated if it is the accuracy
    shown            number of answers that `validate` returns
    loss_shape       rows of a batch, and least tokens of a row, when the loss is measured
    by, normalise    how answers are found, see `By` and `Normalise`
    sampling, seed   how answers are generated; greedy by default
    encoding         how texts become tokens; None for the task's `chat` and no more. Its limit is for the loss only
    strength         of the plan's slots, as in `jaxsteer.forward`
    measure          (split, params) -> further figures of a model, by name
    """

    model: Model
    loaded: LoadedModel
    task: AnyTask
    placement: Placement
    eval_batch_size: int = 64
    limits: Mapping[Split, int] = field(default_factory=dict)
    metric: Metric = "accuracy"
    shown: int = 0
    loss_shape: tuple[int, int | None] = (8, None)
    by: By = "generation"
    normalise: Normalise = "none"
    sampling: Sampling = Sampling()  # noqa: RUF009  # frozen
    seed: int = 0
    encoding: Encoding | None = None
    strength: Mapping[str, float] | None = None
    measure: Callable[[Split, Params], Mapping[str, float]] = lambda split, params: {}  # nothing more
    _cache: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def steered_by(self, model: Model, loaded: LoadedModel | None = None) -> Evaluator:
        """The same evaluator for another plan, or with weights; it shares the splits that are tokenised already."""
        other = replace(self, model=model, loaded=loaded or self.loaded)
        object.__setattr__(other, "_cache", self._cache)
        return other

    def knowing(self, examples: Mapping[Split, list[Example]]) -> Evaluator:
        """The same evaluator, which need not load these splits; they are within their limits."""
        other = replace(self)
        object.__setattr__(other, "_cache", {f"examples of {split}": some for split, some in examples.items()})
        return other

    def measuring(self, measure: Callable[[Split, Params], Mapping[str, float]]) -> Evaluator:
        """The same evaluator, with further figures; it shares the splits that are tokenised already."""
        other = replace(self, measure=measure)
        object.__setattr__(other, "_cache", self._cache)
        return other

    def examples(self, split: Split) -> list[Example]:
        """The examples of a split, up to its limit."""
        return self._once(f"examples of {split}", lambda: self._load(split))

    def prompts(self, examples: Sequence[Example]) -> Prompts:
        """Tokenised prompts of examples.

        Raises:
            ValueError: an example without choices where they are to be scored.
        """
        tokenizer, stop = self.loaded.require_tokenizer(), self.loaded.stop_tokens
        encoding = replace(self._encoding, max_length=None)
        return make_prompts(examples, tokenizer, encoding, stop, self.task, choices=self.by == "likelihood")

    def answer(
        self,
        questions: Split | Sequence[Example],
        params: Params,
        path: Path | None = None,
        *,
        title: str | None = None,
        reuse: bool = False,
    ) -> list[ScoredAnswer]:
        """Answer and score questions, in their order.

        Args:
            questions: a split of the task, or examples.
            params: steering of the model's plan, and the base if it is not the pretrained one (else None).
            path: .jsonl file for the answers. A killed evaluation of the same questions by the same model resumes.
            title: of a progress bar; None shows none.
            reuse: return the answers at `path` if they are exactly these.

        Raises:
            ValueError: an unfinished evaluation of something else is at `path`.
        """
        prompts = self._split_prompts(questions) if isinstance(questions, str) else self.prompts(questions)
        total = len(prompts.tokens)
        if not total:
            return []
        # An answer is in the journal as soon as it is given: the process may end at any moment.
        keeping = nullcontext() if path is None else interrupts.block("soon")
        with (
            keeping,
            self._journal(prompts, params, path, reuse) as journal,
            _bar(total, title, len(journal.done)) as advance,
        ):
            try:
                for index, answer in self._ask(prompts, params, [i for i in range(total) if i not in journal.done]):
                    journal.add(index, answer)
                    advance(len(journal.done))
                    interrupts.safe_point()
            except interrupts.Interrupted:
                raise interrupts.Interrupted(_kept(path, len(journal.done), total)) from None
            journal.finish()
        return [journal.done[index] for index in range(total)]

    def validate(self, params: Params) -> Validation:
        """Measure the loss, and the accuracy if that is the `metric`, on the validation split.

        A request to stop waits for the end: a step and its evaluation belong together.

        Returns:
            Nothing where the task has no validation examples.
        """
        examples = self.examples("validation")
        if not examples:
            return Validation({}, [])
        results = {**figures_of(self.loss("validation", params)), **self.measure("validation", params)}
        with interrupts.deferred():
            if self.metric == "accuracy":
                answers = self.answer("validation", params)
                result = accuracy_of(answers)
                low, high = result.interval
                return Validation({**results, "accuracy": result.rate, "low": low, "high": high}, answers[: self.shown])
            asked = [example for example in examples if example.context.turns][: self.shown]
            return Validation(results, self.answer(asked, params) if asked else [])

    def loss(self, split: Split, params: Params) -> Loss:
        """The loss of a split's reference completions.

        Raises:
            ValueError: no supervised tokens, or an example with more tokens than the model has positions.
        """
        base, steering = self._base(params), self._placed(params.steering)
        with self.placement.on_mesh():
            placed = (self.placement.batch(batch) for batch in self._batches(split).batches)
            sums = [jax.device_get(loss_sums(self.model, base, steering, batch, self.strength)) for batch in placed]
        return total_loss(sums, f"{split} examples")

    def predicted(self, split: Split, params: Params) -> list[bool]:
        """Whether each example's completion is what greedy decoding would give, its end included.

        One forward pass over packed rows: a completion is, if each of its tokens is the likeliest given those before.

        Raises:
            ValueError: naming an example without a completion that counts: its weights are 0.
        """
        packed, found = self._batches(split), []
        base, steering = self._base(params), self._placed(params.steering)
        with self.placement.on_mesh():
            for batch in packed.batches:
                placed = self.placement.batch(batch)
                found.append(fetch(predicted_tokens(self.model, base, steering, placed, self.strength)))
        right, segments, weights = map(
            np.concatenate,
            (found, [batch.segments for batch in packed.batches], [batch.weights for batch in packed.batches]),
        )
        results: dict[int, bool] = {}
        for r, row in enumerate(packed.members):
            for segment, i in enumerate(row, start=1):
                own = (segments[r] == segment) & (weights[r] != 0)
                if not own.any():
                    raise ValueError(f"{self.examples(split)[i].source}: has no completion that counts")
                results[i] = bool(right[r][own].all())
        return [results[i] for i in range(len(results))]

    def generate(
        self,
        prompts: Prompts,
        params: Params,
        left: Sequence[int],
        *,
        ended: Callable[[int, np.ndarray], bool] | None = None,
        chunk: int = 32,
    ) -> Iterator[tuple[int, Answer]]:
        """Generate answers to some of the prompts, whatever their end.

        Args:
            prompts: from `prompts`.
            params: as for `answer`.
            left: indices of the prompts to answer.
            ended: as in `generate_all`, called with indices into `prompts`.
            chunk: maximum number of tokens between two of its calls.

        Yields:
            (index, answer), as they are finished.
        """
        if not left:
            return
        tokens = [prompts.tokens[i] for i in left]
        limits = Limits(max(map(len, tokens)), prompts.max_new_tokens, rows=self.eval_batch_size, chunk=chunk)
        settings = (prompts.max_new_tokens, prompts.stop, self.sampling)
        requests = [
            # The seed: a prompt's answer does not depend on the others.
            Request(prompt, *settings, self.seed << 32 | index, self.strength or {})
            for index, prompt in zip(left, tokens, strict=True)
        ]

        def told(number: int, so_far: np.ndarray) -> bool:
            interrupts.safe_point()
            return ended is not None and ended(left[number], so_far)

        base, steering = self._base(params), self._placed(params.steering)
        with self.placement.on_mesh():
            decoder = Decoder(self.model, base, steering, limits, self.placement.batch)
            for number, answer in generate_all(decoder, requests, told):
                yield left[number], answer

    def _ask(self, prompts: Prompts, params: Params, left: Sequence[int]) -> Iterator[tuple[int, ScoredAnswer]]:
        """(index, answer) of the prompts that are left, as they are finished.

        Raises:
            FloatingPointError: the model's logits are not finite for one of them.
        """
        if not left:
            return
        if self.by == "likelihood":
            yield from self._choose(prompts, params, left)
            return
        read = generated_reader(prompts, self.loaded.require_tokenizer())
        for index, answer in self.generate(prompts, params, left):
            if answer.finished == "nonfinite":
                raise nonfinite_logits(prompts.tokens[index], self.model.config.vocab_size)
            yield index, read(index, answer)

    def _choose(self, prompts: Prompts, params: Params, left: Sequence[int]) -> Iterator[tuple[int, ScoredAnswer]]:
        choose = chosen_reader(prompts, self.normalise)
        base, steering = self._base(params), self._placed(params.steering)
        with self.placement.on_mesh():
            scored = score_continuations(
                self.model,
                base,
                steering,
                [prompts.tokens[i] for i in left],
                [prompts.choice_ids[i] for i in left],
                batch_size=self.eval_batch_size,
                place=self.placement.batch,
                strength=self.strength,
            )
            yield from ((left[i], choose(left[i], likelihoods)) for i, likelihoods in scored)

    def identity(self, prompts: Prompts, params: Params) -> dict[str, Any]:
        """Everything that determines the answers to prompts, JSON values; every process must call it."""
        identity = {
            "model": self.loaded.name,
            "base": self.loaded.fingerprint if params.base is None else hash_tree(params.base),
            "dtype": jax.tree.leaves(self.loaded.base)[0].dtype.name,
            "plan": plan_to_json(self.model.plan),
            "steering": hash_tree(params.steering),
            "prompts": hash_prompts(prompts),
            "by": f"{self.by}, {self.normalise}" if self.by == "likelihood" else f"{self.by}, {self.sampling}",
        }
        if self.by == "generation" and self.sampling.temperature > 0:
            identity["seed"] = self.seed
        if self.strength:
            identity["strength"] = dict(sorted(self.strength.items()))
        return identity

    def _journal(self, prompts: Prompts, params: Params, path: Path | None, reuse: bool) -> MemoryJournal | FileJournal:
        if path is None:
            return MemoryJournal()
        return FileJournal(path, self.identity(prompts, params), reuse=reuse)

    def _base(self, params: Params) -> PyTree:
        return self.loaded.base if params.base is None else params.base

    def _placed(self, steering: Steering) -> Steering:
        """The steering on the mesh: a training's is there already."""
        mesh = self.placement.mesh
        there = all(
            getattr(getattr(leaf, "sharding", None), "mesh", None) == mesh for leaf in jax.tree.leaves(steering)
        )
        return steering if mesh is None or there else self.placement.copies(steering)

    @property
    def _encoding(self) -> Encoding:
        return Encoding(chat=self.task.chat) if self.encoding is None else self.encoding

    def _load(self, split: Split) -> list[Example]:
        limit = self.limits.get(split)
        return [] if limit == 0 else self.task.load(split)[:limit]

    def _split_prompts(self, split: Split) -> Prompts:
        examples = self.examples(split)
        empty = Prompts((), (), (), self.task.rule, self.task.max_new_tokens)
        return self._once(f"prompts of {split}", lambda: self.prompts(examples) if examples else empty)

    def _batches(self, split: Split) -> _Packed:
        """A split's examples with their completions."""
        return self._once(f"batches of {split}", lambda: self._pack(split))

    def _pack(self, split: Split) -> _Packed:
        rows, length = self.loss_shape
        encoding = replace(self._encoding, max_length=None)
        examples, _ = encode(self.examples(split), self.loaded.require_tokenizer(), encoding)
        for example in examples:
            check_length(self.loaded.config, len(example), example.source)
        length = max(length or 0, bucket_length(max(map(len, examples))))
        packed = pack([len(example) for example in examples], length)
        packed += [[] for _ in range(-len(packed) % rows)]
        members = [[examples[i] for i in row] for row in packed]
        starts = range(0, len(members), rows)
        return _Packed([stack_rows(members[start : start + rows], length) for start in starts], packed)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]


def figures_of(loss: Loss) -> dict[str, float]:
    """A loss as it is logged, by name."""
    return {"validation_loss": loss.mean, "perplexity": loss.perplexity, "token_accuracy": loss.token_accuracy}


def _kept(path: Path | None, done: int, total: int) -> str:
    return "" if path is None else f"{done} of {total} answers are kept."


@contextmanager
def _bar(total: int, title: str | None, start: int) -> Iterator[Callable[[int], None]]:
    if title is None:
        yield lambda done: None
        return
    with progress(total, title, start=start) as bar:
        yield bar.update
