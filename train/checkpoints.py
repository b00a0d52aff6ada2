"""Checkpoints that come back bit for bit or say why not: a thin adapter over Orbax.

A checkpoint is a folder `<step>/` with one Orbax item per tree ("steering", "optimizer", ...), each a flat
dictionary of named leaves, and a JSON record: the caller's meta, the metrics, and dtype, shape and checksum
of every leaf. Orbax by itself casts another dtype silently and restores a flipped byte as if nothing were
wrong; the record is what turns both into an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxsteer.types import PyTree
from train.leaves import (
    TreeMismatch,
    abstract_leaf,
    checksums,
    empty_leaf,
    like,
    named_leaves,
    record_of,
    require_match,
    storable,
)

RECORD = "record"
_RESERVED = (RECORD, "metrics", "default")
_FORMAT = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was read and verified.

    step     the number of optimizer steps that were done when it was saved
    trees    by name, of the structure that was asked for
    meta     what was saved beside the trees
    metrics  what was saved as metrics, {} where none were
    skipped  one message per newer checkpoint that could not be used: its step and why
    """

    step: int
    trees: dict[str, PyTree]
    meta: dict[str, Any]
    metrics: dict[str, float]
    skipped: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints in one folder; use it as a context manager, so that the last save is finished.

    With several processes every process opens the same folder and makes the same calls.

    Args:
        folder: of the checkpoints; made if it is not there.
        every: `due` and `save` take a checkpoint at steps that are multiples of this.
        keep_latest: how many of the newest are kept.
        best_metric: the metric by whose value one more, the best, is kept; None keeps no best.
        best_mode: whether a small ("min") or a large ("max") value is good. NaN is worse than any value.
        async_: write to disk while the training goes on.
        read_only: never write, delete or tidy: for looking into the folder of a run that may be running.

    Raises:
        ValueError: every or keep_latest below 1, an unknown best_mode, or nothing to read.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        every: int = 1,
        keep_latest: int = 2,
        best_metric: str | None = None,
        best_mode: Literal["min", "max"] = "min",
        async_: bool = True,
        read_only: bool = False,
    ) -> None:
        self.folder = Path(folder).absolute()
        if every < 1 or keep_latest < 1:
            raise ValueError(
                f"{self.folder}: every={every} and keep_latest={keep_latest} must both be at least 1"
            )
        if best_mode not in ("min", "max"):
            raise ValueError(f"{self.folder}: best_mode is {best_mode!r}, use 'min' or 'max'")
        if read_only and not self.folder.is_dir():
            raise ValueError(f"{self.folder}: no such folder, so there is no checkpoint to read")
        self.every = every
        self.best_metric = best_metric
        self.read_only = read_only
        self._sign = 1.0 if best_mode == "max" else -1.0
        policies = ocp.checkpoint_managers
        keep: list[Any] = [policies.LatestN(keep_latest)]
        if best_metric is not None:
            keep.append(
                policies.BestN(get_metric_fn=self._goodness, n=1, keep_checkpoints_without_metrics=False)
            )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                read_only=read_only,
                save_interval_steps=0 if read_only else 1,
                cleanup_tmp_directories=not read_only,  # what a kill in mid-save left behind
                enable_async_checkpointing=async_ and not read_only,
                best_fn=self._goodness if best_metric is not None else None,
                best_mode="max",
                preservation_policy=policies.AnyPreservationPolicy(keep),
            ),
        )

    def __enter__(self) -> Checkpoints:
        """The checkpoints themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """Finish the save under way and close."""
        self.close()

    def due(self, step: int) -> bool:
        """Whether `save` would take a checkpoint at this step without being forced."""
        return step > 0 and step % self.every == 0

    def save(
        self,
        step: int,
        trees: Mapping[str, PyTree],
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        force: bool = False,
    ) -> bool:
        """Save a checkpoint if the step is due or forced.

        Args:
            step: the number of optimizer steps done, at least 0.
            trees: by name; leaves are arrays, typed keys or Python numbers; None and empty containers are
                allowed. All is copied before this returns, so the caller may donate it.
            meta: a JSON object: configuration, plan, model, state of the data.
            metrics: by name; must hold best_metric where any are given.
            force: save whether or not the step is due.

        Returns:
            Whether a checkpoint was written. False where it was not due, or where the very same arrays and
            metrics already stand at this step.

        Raises:
            ValueError: the step exists with other contents, or something cannot be stored.
        """
        if self.read_only:
            raise ValueError(f"{self.folder}: opened read-only, so step {step} cannot be saved")
        if step < 0:
            raise ValueError(f"{self.folder}: step is {step}, it must be at least 0")
        if not (force or self.due(step)):
            return False
        if metrics is not None and self.best_metric is not None and self.best_metric not in metrics:
            raise ValueError(
                f"{self.folder}: the metrics of step {step} are {sorted(metrics)} and lack "
                f"{self.best_metric!r}, by which the best checkpoint is kept"
            )
        for name in trees:
            if not name.isidentifier() or name in _RESERVED:
                raise ValueError(f"a tree cannot be called {name!r}: use a plain name, none of {_RESERVED}")
        leaves = {name: named_leaves(tree) for name, tree in trees.items()}
        values = {name: float(value) for name, value in (metrics or {}).items()}
        body = {
            "format": _FORMAT,
            "step": int(step),
            "meta": dict(meta),
            "metrics": values,
            "trees": {name: record_of(tree) for name, tree in leaves.items()},
        }
        try:
            text = _canonical(body)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.folder}: the meta of step {step} is not JSON: {error}") from None
        if step in self._manager.all_steps():
            self._require_same(step, body, checked_metrics=metrics is not None)
            return False
        items: dict[str, Any] = {RECORD: ocp.args.JsonSave({**json.loads(text), "sha256": _digest(text)})}
        for name, tree in leaves.items():
            arrays = {leaf: storable(leaf, value) for leaf, value in tree.items()}
            # Orbax takes neither an empty tree nor an array without elements; the record says it all. A numpy
            # leaf is copied because the caller may change it in place while it is being written.
            full = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in arrays.items() if v.size}
            if full:
                items[name] = ocp.args.StandardSave(full)
        self._manager.save(
            step,
            args=ocp.args.Composite(**items),
            metrics=values if self.best_metric is not None else None,
            force=True,
        )
        return True

    def steps(self) -> tuple[int, ...]:
        """The steps at which a checkpoint exists, ascending."""
        return tuple(sorted(self._manager.all_steps()))

    def best_step(self) -> int | None:
        """The step with the best value of best_metric, the latest of equals; None where no value is a number.

        Raises:
            ValueError: no best_metric was named.
        """
        if self.best_metric is None:
            raise ValueError(f"{self.folder}: opened without best_metric, so no checkpoint is the best")
        self.wait()
        scored = [(self._goodness(self._manager.metrics(step)), step) for step in self.steps()]
        good, step = max(scored, default=(-math.inf, -1))
        return step if good > -math.inf else None

    def read_meta(self, step: int) -> dict[str, Any]:
        """The meta of a checkpoint, without its trees: enough to build the trees to restore into.

        Raises:
            ValueError: there is no such step, or its record is damaged.
        """
        return self._record(step)["meta"]

    def restore(self, step: int, abstract: Mapping[str, PyTree]) -> Restored:
        """Read and verify the trees of one checkpoint.

        Args:
            step: one of `steps`.
            abstract: by name, the trees to fill; leaves are jax.ShapeDtypeStruct (with a sharding to restore
                onto a mesh) or values of the same kind as those saved. Trees that are not named are not read.

        Returns:
            The trees with exactly the bits that were saved.

        Raises:
            TreeMismatch: the checkpoint holds another structure, shape or dtype.
            ValueError: no such step, or its contents are damaged.
        """
        record = self._record(step)
        wanted = {name: named_leaves(tree) for name, tree in abstract.items()}
        for name, leaves in wanted.items():
            if name not in record["trees"]:
                raise TreeMismatch(
                    f"{self.folder / str(step)}: holds no tree {name!r}, but {sorted(record['trees'])}"
                )
            require_match(f"{self.folder / str(step)}: {name}", record["trees"][name], leaves)
        sharding = _default_sharding()
        targets = {
            name: {leaf: abstract_leaf(value, sharding) for leaf, value in leaves.items()}
            for name, leaves in wanted.items()
        }
        stored = {
            name: {leaf: target for leaf, target in leaves.items() if math.prod(target.shape)}
            for name, leaves in targets.items()
        }
        items = {name: ocp.args.StandardRestore(leaves) for name, leaves in stored.items() if leaves}
        found = self._manager.restore(step, args=ocp.args.Composite(**items)) if items else {}
        trees = {}
        for name, leaves in wanted.items():
            arrays = {
                leaf: found[name][leaf] if leaf in stored[name] else empty_leaf(target)
                for leaf, target in targets[name].items()
            }
            sums = checksums(arrays)
            changed = [leaf for leaf in leaves if sums[leaf] != record["trees"][name][leaf]["checksum"]]
            if changed:
                raise ValueError(
                    f"{self.folder / str(step)}: damaged, the bits of {name} are not those that were saved: "
                    f"{', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''}"
                )
            restored = [like(value, arrays[leaf]) for leaf, value in leaves.items()]
            trees[name] = jax.tree.unflatten(jax.tree.structure(abstract[name]), restored)
        return Restored(step, trees, record["meta"], record["metrics"])

    def latest_good(self, abstract: Mapping[str, PyTree]) -> Restored | None:
        """Read the newest checkpoint that is whole, and set the damaged ones after it aside.

        A damaged checkpoint is renamed to `damaged-<step>` (unless read-only), so that the run can save that
        step again and nothing is lost.

        Args:
            abstract: see `restore`.

        Returns:
            The checkpoint, with a message for each that was skipped; None where there is no checkpoint.

        Raises:
            TreeMismatch: the newest whole checkpoint is of another structure, shape or dtype.
            ValueError: there are checkpoints, but every one is damaged.
        """
        self.wait()
        skipped: dict[int, str] = {}
        for step in reversed(self.steps()):
            found: Restored | None = None
            try:
                found = self.restore(step, abstract)
            except TreeMismatch:
                raise
            except Exception as error:  # whatever the layer that noticed the damage raises
                lines = str(error).strip().splitlines()
                reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
                skipped[step] = f"checkpoint {step} skipped: {reason}"
            if not _everywhere(found is not None):
                skipped.setdefault(step, f"checkpoint {step} skipped: another process could not read it")
                log.warning("%s", skipped[step])
                continue
            assert found is not None
            if not self.read_only:
                self._set_aside(tuple(skipped))
            return replace(found, skipped=tuple(skipped.values()))
        if skipped:
            raise ValueError(
                f"{self.folder}: none of the checkpoints can be read. {'; '.join(skipped.values())}. "
                "Start again in another folder, or bring back a copy."
            )
        return None

    def wait(self) -> None:
        """Wait until the save under way is on disk; raises what went wrong in it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish the save under way and let go of the folder."""
        self._manager.close()

    def _goodness(self, metrics: Mapping[str, float] | None) -> float:
        """Larger is better; a missing or NaN value is the worst."""
        value = float((metrics or {}).get(self.best_metric or "", math.nan))
        return -math.inf if math.isnan(value) else self._sign * value

    def _record(self, step: int) -> dict[str, Any]:
        """The JSON record of a step, verified."""
        where = self.folder / str(step)
        if step not in self._manager.all_steps():
            raise ValueError(f"{where}: no such checkpoint, there are {list(self.steps()) or 'none'}")
        self.wait()
        found = self._manager.restore(step, args=ocp.args.Composite(**{RECORD: ocp.args.JsonRestore()}))
        record = dict(found[RECORD])
        if record.pop("sha256", None) != _digest(_canonical(record)):
            raise ValueError(f"{where}: damaged, the record is not the one that was saved")
        if record["format"] != _FORMAT:
            raise TreeMismatch(
                f"{where}: format {record['format']} of the record, this program reads {_FORMAT}"
            )
        return record

    def _require_same(self, step: int, body: dict[str, Any], *, checked_metrics: bool) -> None:
        """Refuse a second save of a step whose contents differ from the first."""
        old = self._record(step)
        differ = [name for name in body["trees"] if old["trees"].get(name) != body["trees"][name]]
        differ += [name for name in old["trees"] if name not in body["trees"]]
        if checked_metrics and _canonical(old["metrics"]) != _canonical(body["metrics"]):
            differ.append("metrics")
        if differ:
            raise ValueError(
                f"{self.folder / str(step)}: exists and differs in {', '.join(differ)}. "
                "Save a step once, or use another folder."
            )

    def _set_aside(self, steps: tuple[int, ...]) -> None:
        """Rename damaged checkpoints, once for all processes."""
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                target, number = self.folder / f"damaged-{step}", 1
                while target.exists():
                    number += 1
                    target = self.folder / f"damaged-{step}-{number}"
                (self.folder / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints set aside")
        self._manager.reload()


def _canonical(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _default_sharding() -> jax.sharding.Sharding:
    """For leaves that name no sharding: this process's first device, or a copy on every device of all."""
    if jax.process_count() == 1:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _everywhere(ok: bool) -> bool:
    """Whether all processes say so."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))
