"""Checkpoints: named trees and a JSON record, saved in the background by Orbax and checked bit for bit.

Orbax alone silently casts to another dtype, restores a flipped byte as if nothing were wrong, ranks NaN as the best
metric, and declines to save a step that exists: the record and the checks here turn these into errors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from jaxsteer.types import PyTree
from train.devices.processes import together
from train.run.leaves import (
    MismatchError,
    SaveError,
    check,
    describe,
    digest_of,
    has_arrays,
    named_leaves,
    restored_leaf,
    stored,
    target,
)
from train.run.orbax_log import drop_reported_errors

_DISK = ("No space left on device", "Read-only file system", "Permission denied", "Disk quota exceeded")
_RECORD = "record"  # the item with meta, metrics and digests


@dataclass(frozen=True)
class Restored:
    """A restored checkpoint."""

    step: int
    """The step it was saved at."""
    trees: dict[str, PyTree]
    """The requested trees."""
    meta: dict[str, Any]
    """The JSON values saved with them."""
    skipped: list[str] = field(default_factory=list)
    """Later checkpoints that could not be read, with reasons."""


class Checkpoints:
    """The checkpoints of one run, opened by `open_checkpoints`. A context manager.

    Each tree is an item of its own, so it can be restored without the others. A leaf is an array (JAX or NumPy, any
    dtype), a typed key, or a Python number; None is not a leaf. The record beside the trees lists every leaf with its
    dtype, shape and sha256: a restored leaf has the same bits, or there is an error.
    """

    def __init__(
        self,
        folder: epath.Path,
        manager: ocp.CheckpointManager,
        best: tuple[str, str] | None,
    ) -> None:
        self.folder = folder
        self._manager = manager
        self._best = best
        self._records: dict[int, dict[str, Any]] = {}
        self._unreadable: set[int] = set()

    def save(
        self,
        step: int,
        trees: Mapping[str, PyTree],
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Save a step.

        The values are copied before this returns and written in the background; a write error is raised by the next
        `save`, `wait` or `close`. Checkpoints that `restore_latest` skipped are removed first: they can no longer be
        the latest of this run. A step that exists with the same bits and meta is not written again.

        Args:
            step: later than every existing checkpoint.
            trees: by name.
            meta: JSON values.
            metrics: what the best checkpoint is chosen by.

        Raises:
            ValueError: there is a later checkpoint, or one of this step with other content; a leaf that cannot be
                saved; meta that is not JSON; a reserved tree name.
        """
        record, arrays = self._pack(trees, meta, metrics)
        if self._unreadable:
            self.wait()
            for old in sorted(self._unreadable & set(self.steps())):
                self._manager.delete(old)
            self._unreadable.clear()
        there = self.steps()
        if step in there:
            if self.record(step)["trees"] == record["trees"] and self.record(step)["meta"] == record["meta"]:
                return
            raise ValueError(
                f"{self.folder}: step {step} exists already with other content; resume from it, or use another folder"
            )
        if there and there[-1] > step:
            raise ValueError(
                f"{self.folder}: cannot save step {step}, step {there[-1]} exists already; "
                "resume from the latest step, or use another folder"
            )
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items() if tree}
        items[_RECORD] = ocp.args.JsonSave(record | {"sha256": _json_digest(record)})
        ranked = None if metrics is None else {name: float(value) for name, value in metrics.items()}
        # Forced, because Orbax may otherwise decline silently.
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=ranked, force=True)
        self._records[step] = record

    def restore(self, step: int, like: Mapping[str, PyTree]) -> Restored:
        """Restore one step.

        Args:
            step: one of `steps()`.
            like: trees of the same structure, holding arrays or `jax.ShapeDtypeStruct`s: dtypes and shapes must equal
                those saved, shardings may differ. Trees left out are not read.

        Raises:
            ValueError: no such step; another structure, dtype or shape; damaged content.
        """
        if step not in self.steps():
            raise ValueError(f"{self.folder}: no checkpoint of step {step}; available: {self.steps() or 'none'}")
        try:
            return self._restore(step, like)
        except MismatchError:
            raise
        except Exception as error:
            raise ValueError(f"{self.folder}: step {step} cannot be read ({_reason(error)})") from error

    def restore_latest(self, like: Mapping[str, PyTree]) -> Restored | None:
        """Restore the latest intact step, and say which later ones were skipped.

        Returns:
            The checkpoint; None if there is none.

        Raises:
            ValueError: another structure, dtype or shape (see `restore`); or no checkpoint is intact.
        """
        skipped: list[str] = []
        for step in reversed(self.steps()):
            try:
                restored = self._restore(step, like)
            except MismatchError:
                raise  # it matches no step: going further back would only lose work
            except Exception as error:
                self._unreadable.add(step)
                skipped.append(f"step {step} cannot be read ({_reason(error)})")
                continue
            return Restored(restored.step, restored.trees, restored.meta, skipped)
        if skipped:
            self._unreadable.clear()
            raise ValueError(
                f"{self.folder}: no checkpoint is intact: {'; '.join(skipped)}. Move the folder away to start over"
            )
        return None

    def restore_best(self, like: Mapping[str, PyTree]) -> Restored | None:
        """Restore `best_step()`; None if no checkpoint has the metric."""
        step = self.best_step()
        return None if step is None else self.restore(step, like)

    def best_step(self) -> int | None:
        """The step with the best metric (the latest of equals, NaN is worst); None if no step has it.

        Raises:
            ValueError: the checkpoints were opened without `best_metric`.
        """
        if self._best is None:
            raise ValueError(f"{self.folder}: opened without best_metric, so no step is the best")
        ranked: list[tuple[float, int]] = []
        for step in self.steps():
            try:
                metrics = together(lambda step=step: self.record(step))["metrics"]  # type: ignore[misc]
            except Exception:  # a damaged one is not the best; restoring it reports the damage
                continue
            if self._best[0] in metrics:
                ranked.append((_rank(metrics, *self._best), step))
        return max(ranked)[1] if ranked else None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending, including one being written."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Wait until everything saved is on disk.

        Raises:
            SaveError: something could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait like `wait`, then release the folder."""
        with self._writing():
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            with suppress(Exception):  # an earlier one may still be written
                self._manager.wait_until_finished()
            good: list[int] = []
            with suppress(Exception):  # storage that cannot be written may not be readable either
                good = ocp.utils.checkpoint_steps(self.folder)
            reason = next((words for words in _DISK if words in str(error)), _reason(error))
            last = f"The last good one is step {max(good)}" if good else "There is no earlier one"
            raise SaveError(
                f"{self.folder}: a checkpoint could not be written ({reason}). {last}; fix this, then continue with "
                "--resume"
            ) from error

    def __enter__(self) -> Checkpoints:
        """The checkpoints themselves."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait and close; an error in progress is not replaced by another."""
        with nullcontext() if kind is None else suppress(SaveError):
            self.close()

    def _pack(
        self, trees: Mapping[str, PyTree], meta: Mapping[str, Any], metrics: Mapping[str, float] | None
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """The record, and what Orbax writes: the arrays of each tree by name."""
        leaves: dict[str, dict[str, Any]] = {}
        arrays: dict[str, dict[str, Any]] = {}
        for name, tree in trees.items():
            if name in (_RECORD, "metrics"):
                raise ValueError(f"{self.folder}: the tree name {name!r} is reserved; use another")
            flat = named_leaves(tree)
            leaves[name] = {path: describe(leaf, f"{name}/{path}") for path, leaf in flat.items()}
            # NumPy arrays are copied: the caller may change them while they are being written.
            arrays[name] = {path: _own(stored(leaf)) for path, leaf in flat.items() if has_arrays(leaf)}
        values = {name: repr(float(value)) for name, value in (metrics or {}).items()}
        record = {"meta": dict(meta), "metrics": values, "trees": leaves}
        try:
            return json.loads(json.dumps(record)), arrays
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.folder}: meta cannot be written as JSON ({error})") from None

    def record(self, step: int) -> dict[str, Any]:
        """What is kept beside the trees of a step: `meta`, `metrics`, and a list of the leaves."""
        if step not in self._records:
            args = ocp.args.Composite(**{_RECORD: ocp.args.JsonRestore()})
            record = dict(self._manager.restore(step, args=args)[_RECORD])
            if record.pop("sha256", None) != _json_digest(record):
                raise ValueError("its record is damaged: the sha256 differs")
            self._records[step] = record
        return self._records[step]

    def _restore(self, step: int, like: Mapping[str, PyTree]) -> Restored:
        self.wait()
        record = together(lambda: self.record(step))
        where = f"{self.folder}, step {step}"
        if missing := sorted(set(like) - set(record["trees"])):
            raise MismatchError(f"{where}: has no tree {missing}, only {sorted(record['trees'])}")
        flat = {name: named_leaves(tree) for name, tree in like.items()}
        for name, leaves in flat.items():
            check(record["trees"][name], leaves, f"{where}, {name}")
        targets = {
            name: {path: target(leaf) for path, leaf in leaves.items() if has_arrays(leaf)}
            for name, leaves in flat.items()
        }
        wanted = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items() if tree}

        def read() -> dict[str, Any]:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**wanted))) if wanted else {}

        arrays = together(read)

        def verify() -> None:
            for name, got in arrays.items():
                saved = record["trees"][name]
                if damaged := [path for path in got if digest_of(got[path]) != saved[path]["sha256"]]:
                    raise ValueError(f"{name} is damaged: the sha256 of {', '.join(damaged[:3])} differs")

        together(verify)
        trees = {}
        for name, leaves in flat.items():
            saved, got = record["trees"][name], arrays.get(name, {})
            values = [restored_leaf(leaf, got.get(path), saved[path]) for path, leaf in leaves.items()]
            trees[name] = jax.tree.unflatten(jax.tree.structure(like[name]), values)
        return Restored(step, trees, json.loads(json.dumps(record["meta"])))


def open_checkpoints(
    folder: str | Path,
    *,
    keep_latest: int = 2,
    best_metric: str | None = None,
    best_mode: Literal["min", "max"] = "min",
) -> Checkpoints:
    """Open a folder of checkpoints; all processes of a run do so together, on storage that all of them see.

    What a killed process left half-written is removed, so the folder must not be that of a run in progress.

    Args:
        folder: a path, or an address like gs://bucket/run; created if missing.
        keep_latest: number of latest checkpoints to keep.
        best_metric: name of a metric; the best checkpoint by it is kept besides the latest.
        best_mode: whether the smallest or the largest value is the best.

    Raises:
        ValueError: `keep_latest` below 1, an unknown mode; a remote folder that cannot be reached.
    """
    if keep_latest < 1:
        raise ValueError(f"checkpoints {folder}: keep_latest must be at least 1, got {keep_latest}")
    if best_mode not in ("min", "max"):
        raise ValueError(f"checkpoints {folder}: best_mode must be 'min' or 'max', got {best_mode!r}")
    drop_reported_errors()
    path = _reach(folder)
    path = path if (local := local_folder(folder)) is None else epath.Path(local)
    keep: list[Any] = [policies.LatestN(keep_latest)]
    best = None if best_metric is None else (best_metric, best_mode)
    rank = None if best is None else lambda metrics: _rank(metrics, *best)
    if rank is not None:
        keep.append(policies.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,
        # The policies decide what is kept; without this Orbax forgets the metrics when it is reopened.
        best_fn=rank,
        best_mode="max",
    )
    return Checkpoints(path, ocp.CheckpointManager(path, options=options), best)


def local_folder(folder: str | Path) -> Path | None:
    """A folder of checkpoints as a path on this machine; None if it is remote."""
    text = str(folder).removeprefix("file://")
    return None if "://" in text else Path(text).expanduser().absolute()


def check_reachable(folder: str | Path) -> None:
    """Refuse a folder of checkpoints that cannot be reached, or is not writable, before anything is computed.

    Raises:
        ValueError: an unknown kind of address, a missing package, or no permission.
    """
    if not str(folder):
        raise ValueError("checkpoints: got an empty address; leave it out for the run's own folder")
    _reach(folder)
    if (local := local_folder(folder)) is not None:
        there = next(each for each in (local, *local.parents) if each.exists())
        if not there.is_dir():
            raise ValueError(f"checkpoints {folder}: {there} is a file, not a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"checkpoints {folder}: cannot be written ({there}: permission denied)")


def _own(array: Any) -> Any:
    return array.copy() if isinstance(array, np.ndarray) else array


def _reach(folder: str | Path) -> epath.Path:
    """The folder, once it is known to be reachable."""
    text = str(folder).removeprefix("file://")
    try:
        path = epath.Path(text)
        path.exists()
    except (KeyError, ImportError, OSError) as error:
        reason = error if isinstance(error, (ImportError, OSError)) else "supported are gs://, s3:// and file://"
        raise ValueError(f"checkpoints {folder}: cannot be reached ({reason})") from None
    return path


def _rank(metrics: Mapping[str, Any], name: str, mode: str) -> float:
    """A metric as a number where larger is better; the worst if it is missing or NaN."""
    value = float(metrics.get(name, math.nan))
    return -math.inf if math.isnan(value) else -value if mode == "min" else value


def _json_digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
