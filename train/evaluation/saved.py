"""One evaluation carried out: answers kept on disk on the way, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxsteer.io import LoadedModel, fingerprint
from jaxsteer.io.files import write_json
from jaxsteer.models.transformer import Model
from jaxsteer.plans import plan_to_json
from jaxsteer.types import Plan, PyTree, Steering
from train.data import Example
from train.devices.placement import Placement
from train.devices.processes import is_first, on_first
from train.display.console import progress
from train.evaluation.answers import (
    Decoded,
    Normalise,
    Prompts,
    accuracy_of,
    answer_from_json,
    choose,
    decode,
    make_prompts,
    read_answers,
    write_answers,
)

By = Literal["generation", "likelihood"]
"""How an answer is found: the model writes it, or the likeliest of the example's choices is taken."""


@dataclass(frozen=True)
class Answering:
    """Who answers, and how.

    model_name  of the base, which `loaded` holds and `place` spreads
    batch_size  prompts at a time
    by, normalise  see `By` and `train.evaluation.Normalise`
    """

    model_name: str
    loaded: LoadedModel
    place: Placement
    batch_size: int
    by: By = "generation"
    normalise: Normalise = "none"

    def answer(
        self,
        path: Path,
        title: str,
        examples: Sequence[Example],
        task: Any,
        plan: Plan,
        steering: Steering,
        *,
        reuse: bool = False,
    ) -> list[Decoded]:
        """Answer the examples of a task and write the answers to `path`.

        Args:
            path: a .jsonl file; unfinished answers lie beside it. title: shown while it works.
            plan, steering: what steers the base.
            reuse: read the answers instead, if exactly these are there.

        Raises:
            ValueError: unfinished answers of another evaluation lie there; examples without choices to choose from.
        """
        loaded, chosen = self.loaded, self.by == "likelihood"
        prompts = make_prompts(examples, loaded.tokenizer, loaded.stop_tokens, task, choices=chosen)
        made = json.dumps(
            {
                "model": self.model_name,
                "base": fingerprint(loaded.config),
                "dtype": jax.tree.leaves(loaded.base)[0].dtype.name,
                "plan": plan_to_json(plan),
                "steering": hash_tree(steering),
                "prompts": hash_prompts(prompts),
                "by": f"{self.by}, {self.normalise}" if chosen else self.by,
            }
        )
        identity = json.loads(made)  # tuples become lists, as in the file
        known = path.with_suffix(".identity.json")
        if reuse and on_first(lambda: path.exists() and known.exists() and json.loads(known.read_text()) == identity):
            return read_answers(path)
        with Unfinished(path, identity) as unfinished:
            with progress(len(examples), title, start=len(unfinished.done)) as bar, self.place.on_mesh():
                how: dict[str, Any] = {
                    "batch_size": self.batch_size,
                    "advance": bar.update,
                    "place": self.place.batch,
                    "done": unfinished.done,
                    "keep": unfinished.add,
                }
                model, params = Model(loaded.config, plan), self.place.copies(steering)
                if chosen:
                    answers = choose(model, loaded.base, params, prompts, normalise=self.normalise, **how)
                else:
                    answers = decode(model, loaded.base, params, prompts, loaded.tokenizer, **how)
            if is_first():
                write_answers(path, answers)
                write_json(known, identity)
            unfinished.remove()
        return answers


def summary_of(answers: Sequence[Decoded]) -> dict[str, Any]:
    """Figures of an evaluation, JSON values."""
    found = accuracy_of(answers)
    return {
        "accuracy": found.rate,
        "interval": list(found.interval),
        "truncated": sum(each.truncated for each in answers),
        "near_ties": sum(each.near_tie for each in answers),
    }


class Unfinished:
    """An append-only file beside the answers: a header that says which evaluation it is, then an answer a line.

    A context manager. Process 0 alone writes; all know what is done.

    Args:
        path: of the finished answers; the file is `path` with ".unfinished" behind it.
        identity: what makes the evaluation what it is, JSON values.

    Raises:
        ValueError: the file is another evaluation's.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path.with_name(path.name + ".unfinished")
        self._identity = dict(identity)
        held = on_first(self._read)
        self.done = {int(index): answer_from_json(answer) for index, answer in held}
        self._file = None
        if is_first():
            self._file = self.path.open("a", encoding="utf-8")
            if not self.path.stat().st_size:
                self._write({"evaluation": self._identity})

    def add(self, index: int, answer: Decoded) -> None:
        """Keep an answer; on disk at once."""
        if self._file is not None:
            self._write({"index": index, **asdict(answer)})

    def remove(self) -> None:
        """Forget the file: the answers are kept elsewhere."""
        self.__exit__()
        if is_first():
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Unfinished:
        """The file itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def _read(self) -> list[list[Any]]:
        """(number, answer) of each line; a last line that was only half written is cut off."""
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with self.path.open("rb+") as file:
                file.truncate(len(whole))
        rows = [json.loads(line) for line in whole.split(b"\n") if line]
        if not rows:
            return []
        before = rows[0].get("evaluation", {})
        if before != self._identity:
            keys = sorted({*before, *self._identity})
            differing = ", ".join(key for key in keys if before.get(key) != self._identity.get(key))
            raise ValueError(
                f"{self.path}: an evaluation with another {differing} was not finished there; go on with that one, "
                "delete the file to begin anew, or choose another --out"
            )
        return [[row.pop("index"), row] for row in rows[1:]]


def hash_tree(tree: PyTree) -> str:
    """sha256 over the paths and bytes of a tree's leaves."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def hash_prompts(prompts: Prompts) -> str:
    """sha256 over all that is asked and how it is scored."""
    digest = hashlib.sha256(repr((prompts.stop, prompts.rule, prompts.max_new_tokens, prompts.choices)).encode())
    for prompt in prompts.tokens:
        digest.update(prompt.ids.tobytes() + repr((prompt.source, prompt.answer)).encode())
    return digest.hexdigest()
