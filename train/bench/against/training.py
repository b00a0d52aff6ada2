"""Training on the same examples: ours in packed rows, the opponent's as it collates them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.inference.generate import to_device
from jaxsteer.io import LoadedModel
from jaxsteer.optim import OptimConfig
from jaxsteer.params import Params, partition
from jaxsteer.steering import init_steering
from jaxsteer.training import init_state
from jaxsteer.types import Batch, Steering
from train.bench.against.arena import LOSS_TOLERANCE, NORM_TOLERANCE, Arena
from train.bench.against.bound import training_needs
from train.bench.against.contest import Better, Contest, Part, Side
from train.config import TrainConfig
from train.data import DataSource, TokenizedExample
from train.devices.placement import SINGLE
from train.peers import Conversation, temporary_folder
from train.run.program import make_program
from train.run.row_length import best_row_length

RATE = 1e-4
"""Learning rate of both sides."""

COLLATES = {
    "padded": "padded to {length}",
    "grouped": "grouped by length",
    "flattened": "padding-free, one long row",
    "packed": "padding-free, rows of {length}",
}
"""How the opponent makes batches, as tests/peers/bench_peer.py names them -> in words."""


class Work(NamedTuple):
    """What both sides train on.

    steps   our batches: for each step its rows, each a list of examples
    source  what they are from
    padded  rows of a padded batch, and the length of each
    """

    steps: list[list[list[TokenizedExample]]]
    source: DataSource
    padded: tuple[int, int]

    @property
    def examples(self) -> list[TokenizedExample]:
        """All examples of a round."""
        return [example for step in self.steps for row in step for example in row]

    def asked(self, collate: str, steps: int | None = None) -> dict[str, Any]:
        """The peer's request for batches of these examples, or of those of the first few steps.

        A batch that is grouped by length has as many examples as ours has on average.
        """
        rows, length = self.padded
        if collate == "grouped":
            rows = -(-len(self.examples) // len(self.steps))
        if collate == "packed":
            length = self.source.sequence_length
        told = [[[_told(example) for example in row] for row in step] for step in self.steps[:steps]]
        return {"collate": collate, "rows": rows, "length": length, "steps": told}


def _told(example: TokenizedExample) -> dict[str, list[int]]:
    """An example as the peer reads it."""
    return {"ids": example.ids.tolist(), "targets": (example.weights != 0).astype(int).tolist()}


def work_of(arena: Arena, kind: str, steps: int) -> Work:
    """The examples of our first few batches."""
    source = source_of(arena, kind)
    members = [source.row_members(step) for step in range(steps)]
    batches = [[[source.examples[i] for i in row] for row in step] for step in members]
    return Work(batches, source, (arena.config.batch_size, arena.config.sequence_length))


def source_of(arena: Arena, kind: str) -> DataSource:
    """Our batches: as many tokens as a padded batch has, in rows of the length that costs least.

    `jaxsteer sft --sequence-length 0` chooses it in the same way.
    """
    config, examples = arena.config, arena.training_examples(kind)
    lengths = np.random.default_rng(0).permutation([len(example) for example in examples])
    supervised = sum(np.count_nonzero(example.weights) for example in examples) / lengths.sum()
    run = TrainConfig(batch_size=config.batch_size, mesh=SINGLE)
    length, _ = best_row_length(run, arena.loaded, lengths, supervised, config.sequence_length)
    rows = max(1, config.batch_size * config.sequence_length // length)
    return DataSource(examples, rows, length)


class Trainer:
    """Our training step, as `jaxsteer sft` compiles it, on the batches of a round."""

    def __init__(self, loaded: LoadedModel, plan: Sequence[str], train_base: bool, source: DataSource) -> None:
        config = TrainConfig(
            plan=tuple(plan),
            train_base=train_base,
            optim=OptimConfig(lr=RATE, schedule="constant", warmup=0.0),
            batch_size=source.batch_size,
            sequence_length=source.sequence_length,
            mesh=SINGLE,
        )
        self._program = make_program(config, loaded.config, loaded.base, steps=1000)
        self.model = self._program.model
        self.steering = init_steering(self.model.plan, loaded.config, jax.random.key(0), base=loaded.base)
        trained, self._frozen = partition(Params(loaded.base, self.steering), self._program.labels)
        # The step donates its state.
        self._state = init_state(jax.tree.map(jnp.copy, trained), self._program.tx, jax.random.key(1))
        self._source = source
        self._batches: dict[int, Batch] = {}

    def step(self, number: int) -> float:
        """Train on one batch of the round, and return the seconds that it took."""
        batch = self._batch(number)
        began = time.perf_counter()
        self._state, self._metrics = self._program.step(self._state, batch, self._frozen)
        jax.block_until_ready(self._state)
        return time.perf_counter() - began

    def begin(self) -> tuple[float, float]:
        """Train on the first batch -> its mean loss and gradient norm before any training."""
        self.step(0)
        return float(self._metrics.loss), float(self._metrics.grad_norm)

    def _batch(self, number: int) -> Batch:
        if number not in self._batches:
            self._batches[number] = to_device(self._source.batch(number))
        return self._batches[number]


def save_steering(path: Path, steering: Steering) -> None:
    """Write the steering as SITE/NAME [layers, ...], for the peer to start from."""
    sites = [(site, leaves) for slot in steering.values() for site, leaves in slot.items()]
    leaves = {f"{site}/{name}": np.asarray(leaf) for site, leaves in sites for name, leaf in leaves.items()}
    np.savez(path, **leaves)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TrainingRow:
    """Training: a plan of ours against a method of the peer.

    plan, train_base  what trains on our side
    asked             what trains on theirs: method, rank and alpha, see tests/peers/bench_peer.py
    opponent          name of theirs
    data              "gsm8k", "boolq" or "dense" (random tokens that fill every row)
    collates          ways to make batches that the opponent chooses from
    same              both sides train the same parameters; else theirs trains fewer
    """

    name: str
    group: str
    title: str
    plan: tuple[str, ...]
    asked: Mapping[str, Any]
    opponent: str
    data: str
    collates: tuple[str, ...]
    train_base: bool = False
    same: bool = True
    better: ClassVar[Better] = "higher"

    @property
    def unit(self) -> str:
        """Unit of the figure."""
        return "tokens/s" if self.data == "dense" else "examples/s"

    @contextmanager
    def contest(self, arena: Arena) -> Iterator[Contest]:
        """Both sides, compared before any training."""
        work = work_of(arena, self.data, arena.config.steps)
        ours = Trainer(arena.loaded, self.plan, self.train_base, work.source)
        with arena.peer() as peer:
            self.begin(peer, ours.steering)
            loss, norm = ours.begin()
            checked = {"loss": loss} | ({"grad_norm": norm} if self.same else {})
            for collate in self.collates:
                self._check(peer.ask("check", **work.asked(collate, 1)), loss, norm)
            parts = [
                Part(partial(ours.step, n), self._done(sum(map(len, rows)), arena)) for n, rows in enumerate(work.steps)
            ]
            needed = training_needs(ours.model, [example.weights != 0 for example in work.examples], len(parts))
            theirs = [self._their_side(peer, work.asked(collate), arena) for collate in self.collates]
            yield Contest(Side("jaxsteer", parts), theirs, checked, needed)

    def begin(self, peer: Conversation, steering: Steering) -> None:
        """Set up the peer's trainer; it starts from our values where it trains the same."""
        with temporary_folder("jaxsteer-initial-") as folder:
            path = Path(folder) / "initial.npz"
            save_steering(path, steering if self.same else {})
            peer.ask("train", **self.asked, lr=RATE, initial=str(path))

    def _check(self, said: Mapping[str, float], loss: float, norm: float) -> None:
        """Refuse to measure sides that do not compute the same."""
        if not abs(said["loss"] - loss) <= LOSS_TOLERANCE:
            raise ValueError(
                f"{self.name}: before any training {self.opponent} has a loss of {said['loss']:.6f} on the examples of "
                f"the first step, and jaxsteer {loss:.6f}; the sides do not do the same work, so nothing is measured"
            )
        if self.same and not abs(said["grad_norm"] - norm) <= NORM_TOLERANCE * norm:
            raise ValueError(
                f"{self.name}: on the examples of the first step the gradient of {self.opponent} has the norm "
                f"{said['grad_norm']:.6g}, and that of jaxsteer {norm:.6g}; the sides do not train the same, so "
                "nothing is measured"
            )

    def _their_side(self, peer: Conversation, request: Mapping[str, Any], arena: Arena) -> Side:
        """The opponent with one way to make batches, all of them in a round."""
        collate = request["collate"]
        counts = peer.ask("batches", **request)["batches"]
        step = lambda index: float(peer.ask("step", collate=collate, index=index)["seconds"])
        parts = [Part(partial(step, index), self._done(count, arena)) for index, count in enumerate(counts)]
        return Side(self.side_name(request), parts)

    def side_name(self, request: Mapping[str, Any]) -> str:
        """The opponent with a way to make batches, in words."""
        return f"{self.opponent}, {COLLATES[request['collate']].format(length=request['length'])}"

    def _done(self, examples: int, arena: Arena) -> float:
        """Examples as what is counted."""
        return examples * (arena.config.sequence_length if self.data == "dense" else 1)
