"""Log-probabilities of a run's answers by its reference: computed once, before the first step, and kept on disk.

The reference is the steering that training starts from, on the same base: nothing (zeros) for a new one. So no second
model is needed, neither for this nor afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.io.files import read_json, write_json
from jaxsteer.models.transformer import Model
from jaxsteer.objectives.objective import policy_log_probabilities
from jaxsteer.params import Params
from jaxsteer.plans import plan_to_json
from jaxsteer.types import Array, Batch, PyTree, Steering
from train.data import StepSource
from train.data.pairs import Located
from train.devices import interrupts
from train.devices.processes import fetch, is_first, on_first
from train.display.console import progress
from train.evaluation.journal import hash_tree
from train.run.folder import RunFolder
from train.run.training import Training

SAVED_EVERY = 20
"""Batches between two notes of how far the table is."""


class ReferredSource(StepSource, Protocol):
    """A source whose inputs hold what a reference makes of their tokens."""

    @property
    def counted(self) -> int:
        """Number of places in the table: one for each token that counts."""
        ...

    def located(self, step: int, rows: Sequence[int] | None = None) -> list[Located]:
        """The batches of a step that the reference sees."""
        ...

    def referenced(self, table: np.ndarray) -> StepSource:
        """The source with the reference's log-probabilities, fp32 [counted], in its inputs."""
        ...


def reference_of(training: Training) -> Params:
    """What `Evaluator` takes for the reference: the steering that the run starts from, on the pretrained base."""
    if not training.continues:
        return training.untouched()
    # The first step donates its state.
    return Params(None, jax.tree.map(jnp.copy, training.params(training.state).steering))


def reference_table(training: Training, source: ReferredSource, run: RunFolder) -> np.ndarray:
    """log p(token) by the reference, for every token that counts in the run's steps: fp32 [counted], mapped from disk.

    What is there already, from an earlier start, is not computed again.

    Args:
        training: the run, before its first step.
        source: its data.
        run: its folder, which all processes share.
    """
    reference = reference_of(training)
    file, note = run.folder / "reference.f32", run.folder / "reference.json"
    identity = _identity(training, source, reference)
    needed = min(training.steps, source.steps(1.0))  # the first epoch has every answer
    done = on_first(lambda: _opened(file, note, identity, source.counted))
    if done < needed:
        with progress(needed, "Reference", start=done) as bar:
            for step in range(done, needed):
                found = _scored(training, reference, source, step)
                if is_first():
                    _keep(file, found)
                    if (step + 1) % SAVED_EVERY == 0 or step + 1 == needed:
                        write_json(note, {"of": identity, "steps": step + 1})
                bar.update(step + 1)
                interrupts.safe_point()
    on_first(lambda: None)  # all of it is on disk now
    return np.memmap(file, np.float32, mode="r", shape=(source.counted,))


def _identity(training: Training, source: ReferredSource, reference: Params) -> dict[str, Any]:
    """All that the table depends on, JSON values."""
    return {
        "data": source.digest(),
        "model": training.loaded.fingerprint,
        "dtype": training.loaded.base["embed"]["embedding"].dtype.name,
        "plan": plan_to_json(training.program.model.plan),
        "steering": hash_tree(reference.steering),
        "rows": [training.config.microbatch, training.config.sequence_length],
    }


def _opened(file: Path, note: Path, identity: dict[str, Any], counted: int) -> int:
    """Make an empty table, unless there is one of this identity. Returns the number of steps that it holds."""
    if file.exists() and note.exists() and (found := read_json(note)).get("of") == identity:
        return int(found["steps"])
    note.unlink(missing_ok=True)
    np.memmap(file, np.float32, mode="w+", shape=(counted,)).flush()
    write_json(note, {"of": identity, "steps": 0})
    return 0


Scored = tuple[np.ndarray, np.ndarray]
"""Places in a table, int64 [n], and the log-probabilities there, fp32 [n]."""


def score_table(training: Training, source: ReferredSource, params: Params) -> np.ndarray:
    """log p(token) by a model, for every token that counts of a source: fp32 [counted], in memory.

    Args:
        training: how the model is computed.
        source: of the tokens.
        params: what `Evaluator` takes for the model.
    """
    table = np.zeros(source.counted, np.float32)
    for step in range(source.steps(1.0)):
        for places, values in _scored(training, params, source, step):
            table[places] = values
    return table


def _scored(training: Training, params: Params, source: ReferredSource, step: int) -> list[Scored]:
    """The tokens of a step that count."""
    program, rows = training.program, training.config.microbatch
    base = training.loaded.base if params.base is None else params.base
    with program.on_mesh():
        steering = params.steering if program.mesh is None else program.placement.copies(params.steering)
        scored = []
        for batch, places in source.located(step):
            found = []
            for first in range(0, len(places), rows):
                micro = jax.tree.map(lambda field, at=first: field[at : at + rows], batch)
                placed = program.placement.batch(micro)
                found.append(fetch(log_probabilities(program.model, base, steering, placed)))
            counts = places >= 0
            scored.append((places[counts], np.concatenate(found)[counts]))
    return scored


@partial(jax.jit, static_argnums=(0, 4))
def log_probabilities(model: Model, base: PyTree, steering: Steering, batch: Batch, temperature: float = 1.0) -> Array:
    """`policy_log_probabilities` of a model in use, compiled."""
    return policy_log_probabilities(model, base, steering, batch, temperature=temperature)


def _keep(file: Path, found: Sequence[Scored]) -> None:
    table = np.memmap(file, np.float32, mode="r+")
    for places, values in found:
        table[places] = values
    table.flush()
