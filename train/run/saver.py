"""The checkpoints of a training run: what goes into one, when one is due, and what a resumed run starts from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxsteer.io import fingerprint
from jaxsteer.plans import plan_to_json
from jaxsteer.training import TrainState
from train.config import TrainConfig
from train.devices.processes import on_first, together
from train.display.console import get_console
from train.run.changes import changes_of, listed
from train.run.checkpoints import Checkpoints, local_folder, open_checkpoints
from train.run.folder import RunFolder, changed_on_purpose
from train.run.inputs import data_inputs
from train.run.training import Training
from train.tasks.scoring import BEST


class Saver:
    """Saves and restores the state of one run. A context manager: leaving it waits for pending writes.

    Args:
        config: the run.
        run: its folder.
        training: its parts; says what a checkpoint holds.
        resume: whether the run's folder is that of a run to resume.
    """

    def __init__(self, config: TrainConfig, run: RunFolder, training: Training, *, resume: bool) -> None:
        self._config, self._run, self._last, self._resume = config, run, training.steps, resume
        self.metric: str = config.select_by if config.evaluate_every else "loss"
        """What the best checkpoint is chosen by."""
        self.meta = {
            "plan": plan_to_json(training.program.model.plan),
            "model": config.model,
            "fingerprint": fingerprint(training.loaded.config),
            "config": json.loads(json.dumps(config.to_json())),
            "data": data_inputs(training.data, training.report),
        }
        self._checkpoints: Checkpoints = open_checkpoints(
            run.checkpoints if config.checkpoints is None else config.checkpoints,
            best_metric=self.metric,
            best_mode=BEST[config.select_by] if config.evaluate_every else "min",
        )

    @property
    def resumed(self) -> bool:
        """Whether to continue an earlier run: its folder is here, or its checkpoints outlived the folder.

        Raises:
            ValueError: there are checkpoints, but nothing said to resume.
        """
        steps = self._checkpoints.steps()
        if self._resume or not steps:
            return self._resume
        if not self._config.auto_resume:
            raise ValueError(
                f"{self._checkpoints.folder}: holds checkpoints already, the last of step {steps[-1]}, but "
                f"{self._config.out} holds no run. --auto-resume continues from there; else use another --checkpoints"
            )
        return True

    def restore(self, state: TrainState) -> tuple[TrainState, int]:
        """The newest good checkpoint's state and step; `state` and 0 if nothing was saved yet.

        Raises:
            ValueError: the checkpoint was saved with other settings.
        """
        restored = self._checkpoints.restore_latest(_trees(state))
        if restored is None:
            get_console().print("Nothing was saved yet: starting from step 0.")
            return state, 0
        for message in restored.skipped:
            get_console().print(message, markup=False, highlight=False, soft_wrap=True)
        if differing := [change for change in changes_of(restored.meta, self.meta) if not self._accepted(change.name)]:
            raise ValueError(f"{self._checkpoints.folder}: was saved with other settings: {listed(differing)}")
        get_console().print(f"Restored step {restored.step}.", highlight=False)
        return _with_trees(state, restored.trees), restored.step

    def _accepted(self, name: str) -> bool:
        """Whether a part of `meta` was changed on purpose since the checkpoint was saved."""
        changed = on_first(lambda: sorted(changed_on_purpose(self._run)))
        if name.startswith("data."):
            return self._config.new_data or any(each.startswith("data.") for each in changed)
        return name.removeprefix("config.") in changed

    def restore_best(self, state: TrainState) -> tuple[TrainState, int] | None:
        """The best checkpoint's state and step; None if no checkpoint has the metric."""
        best = self._checkpoints.restore_best(_trees(state))
        return None if best is None else (_with_trees(state, best.trees), best.step)

    def due(self, done: int) -> bool:
        """Whether a checkpoint is due at this step."""
        return done % self._config.checkpoint_every == 0 or done == self._last

    def save(self, done: int, state: TrainState, values: Mapping[str, float]) -> None:
        """Save a step; written in the background.

        Args:
            done: the step, counted from 1.
            state: after it.
            values: its metrics and evaluation, of which `metric` ranks the checkpoint.
        """
        ranked: dict[str, float] = {self.metric: values[self.metric]} if self.metric in values else {}
        self._checkpoints.save(done, _trees(state), self.meta, ranked)

    def last_good(self) -> str:
        """A sentence on the last checkpoint on disk, for messages; waits for pending writes."""
        self._checkpoints.wait()
        steps = self._checkpoints.steps()
        if not steps:
            return "no checkpoint was saved yet"
        return f"the last good checkpoint is step {steps[-1]} in {self._checkpoints.folder}"

    def wait(self) -> None:
        """Wait until everything saved is on disk."""
        self._checkpoints.wait()

    def __enter__(self) -> Saver:
        """The saver itself."""
        self._checkpoints.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Wait for pending writes and close; an error in progress is not replaced by another."""
        self._checkpoints.__exit__(*error)


def saved_date(config: TrainConfig) -> str | None:
    """The day in the settings of the newest readable checkpoint in --checkpoints, where --auto-resume would continue.

    It is for a run whose folder was lost: with another day than the checkpoints', it would read other data.
    """
    if config.checkpoints is None or not config.auto_resume:
        return None
    if (local := local_folder(config.checkpoints)) is not None and not local.is_dir():
        return None
    with open_checkpoints(config.checkpoints) as checkpoints:
        for step in reversed(checkpoints.steps()):
            try:
                record = together(lambda step=step: checkpoints.record(step))  # type: ignore[misc]
            except Exception:  # restoring it reports the damage
                continue
            return record["meta"].get("config", {}).get("date")
    return None


def _trees(state: TrainState) -> dict[str, Any]:
    """The parts of a state, each an item of its own in a checkpoint."""
    return {
        "steering": state.params.steering,
        "base": state.params.base,
        "optimizer": state.opt_state,
        "progress": {"step": state.step, "key": state.key},
    }


def _with_trees(state: TrainState, trees: Mapping[str, Any]) -> TrainState:
    params = state.params._replace(base=trees["base"], steering=trees["steering"])
    return state._replace(params=params, opt_state=trees["optimizer"], **trees["progress"])
