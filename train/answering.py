"""One evaluation carried out: answers kept on disk on the way, so that a killed one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from jaxsteer.io import LoadedModel, fingerprint
from jaxsteer.models.transformer import Model
from jaxsteer.steering import plan_to_json
from jaxsteer.types import Plan, Steering
from train.data import Example
from train.devices.placement import Placement
from train.devices.processes import is_first, on_first
from train.display.console import progress
from train.evaluation import Decoded, Normalise, accuracy_of, choose, decode, make_prompts, read_answers, write_answers
from train.run_folder import write_json
from train.unfinished import Unfinished, hash_prompts, hash_tree

By = Literal["generation", "likelihood"]
"""How an answer is found: the model writes it, or the likeliest of the example's choices is taken."""


@dataclass(frozen=True)
class Answering:
    """Who answers, and how.

    model_name  of the base, which `loaded` holds and `place` spreads
    rows        prompts at a time
    by, normalise  see `By` and `train.evaluation.Normalise`
    """

    model_name: str
    loaded: LoadedModel
    place: Placement
    rows: int
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
                    "rows": self.rows,
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
