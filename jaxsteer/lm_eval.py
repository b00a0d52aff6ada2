"""Base models with steering in EleutherAI's lm-evaluation-harness: `pip install jaxsteer[lm-eval]`, then

    python -m jaxsteer.lm_eval --tasks arc_easy --model_args pretrained=MODEL,steering=steering.safetensors

with the arguments of the harness's own `lm_eval`; or JaxsteerLM as the `model` of `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxsteer.inference.continuous import generate_all
from jaxsteer.inference.generate import Sampling
from jaxsteer.inference.likelihood import score_continuations
from jaxsteer.io import LoadedModel, compute_dtype, load_config, load_model, load_steering
from jaxsteer.models.transformer import Model
from jaxsteer.types import Plan, Steering

NEW_TOKENS = 256
"""Of an answer, where the task does not say."""


@dataclass(frozen=True)
class _Text:
    """Tokens to read, none of them an answer."""

    ids: np.ndarray
    source: str

    @property
    def completion(self) -> np.ndarray:
        return np.zeros(len(self.ids), bool)

    @property
    def weights(self) -> np.ndarray:
        return np.zeros(len(self.ids), np.float32)

    @property
    def prompt_length(self) -> int:
        return len(self.ids)


@register_model("jaxsteer")
class JaxsteerLM(TemplateLM):
    """A base model, steered or not, as the harness asks it.

    Context is prompt and what is scored or generated is completion, for steering that tells them apart.

    Args:
        pretrained: folder, .gguf file or hub id of the base; by default the one that the steering file names.
        steering: a steering file.
        dtype: float32, bfloat16, or auto: float32 on CPU.
        batch_size: prompts at a time.
        max_length: tokens that the model reads at most; by default what its config says.
        seed: of answers that are drawn.
        device, max_batch_size: of the harness; JAX chooses the device.

    Raises:
        ValueError: no base named, or steering of another model.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        steering: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 32,
        max_length: int | None = None,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        file = None if steering is None else load_steering(steering)
        name = pretrained or (file.model_name if file else None)
        if name is None:
            raise ValueError("which model? Give pretrained=..., or steering=... of a file that names its own")
        if file is not None:
            file.check(load_config(name))  # refuses the steering of another model before loading
        loaded = load_model(name, dtype=compute_dtype(dtype))
        plan, params = (file.plan, file.steering) if file else ((), {})
        self._set(loaded, plan, params, int(batch_size) if str(batch_size).isdecimal() else 32, max_length, seed)

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        plan: Plan = (),
        steering: Steering | None = None,
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        seed: int = 0,
    ) -> JaxsteerLM:
        """The same from a model and a steering tree in memory."""
        made = cls.__new__(cls)
        made._set(loaded, plan, steering or {}, batch_size, max_length, seed)
        return made

    def _set(
        self, loaded: LoadedModel, plan: Plan, steering: Steering, rows: int, max_length: int | None, seed: int
    ) -> None:
        TemplateLM.__init__(self)
        self.loaded, self.steering = loaded, steering
        self.steered = Model(loaded.config, plan)
        self.tokenizer = loaded.require_tokenizer()
        self.batch_size, self.key = rows, jax.random.key(seed)
        self.max_length = max_length or loaded.config.max_length
        plain, whole = (self.tokenizer("x", add_special_tokens=add)["input_ids"] for add in (False, True))
        start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        self._beginning = list(whole[:start])

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        end = self.tokenizer.eos_token_id
        return int(self.loaded.stop_tokens[0] if end is None else end)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context begins with."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self.loaded.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, after what the tokenizer puts before a text, unless that is there or not wanted."""
        ids = list(self.tokenizer(string, add_special_tokens=False)["input_ids"])
        begun = ids[: len(self._beginning)] == self._beginning
        return ids if begun or add_special_tokens is False else [*self._beginning, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(Σ log p, whether greedy) of each continuation; contexts that several share are read once."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # of nothing
        members: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = defaultdict(list)
        for number, (_texts, context, continuation) in enumerate(requests):
            if len(continuation) >= self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens does not fit the model's {self.max_length}"
                )
            room = self.max_length - len(continuation)
            if continuation:
                members[tuple(context[-room:])].append((number, np.asarray(continuation, np.int32)))
        contexts = list(members)
        found = score_continuations(
            self.steered,
            self.loaded.base,
            self.steering,
            [_Text(np.asarray(context, np.int32), f"context {i}") for i, context in enumerate(contexts)],
            [[ids for _, ids in members[context]] for context in contexts],
            batch_size=self.batch_size,
        )
        for index, scores in found:
            for (number, _ids), score in zip(members[contexts[index]], scores, strict=True):
                results[number] = score.log_probability, score.greedy
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Σ log p of whole texts, each token read once as a target, with as much context as fits."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owner = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            parts = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
            )
            for context, continuation in map(make_disjoint_window, parts):
                windows.append((None, context, continuation))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (logp, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += logp
        return totals

    def _has_one(self, until: Sequence[str], _index: int, tokens: np.ndarray) -> bool:
        return any(stop in self._text(tokens) for stop in until)

    def _text(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to one of its `until` texts, which is left out."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(number)
        results = [""] * len(requests)
        for members in groups.values():
            settings = dict(requests[members[0]].args[1])
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else [text for text in until if text]
            new = int(settings.get("max_gen_toks") or NEW_TOKENS)
            room = self.max_length - new
            if room < 1:
                raise ValueError(f"max_gen_toks={new} leaves no room for a prompt in the model's {self.max_length}")
            contexts = [self.tok_encode(requests[n].args[0])[-room:] or [self.prefix_token_id] for n in members]
            answers = generate_all(
                self.steered,
                self.loaded.base,
                self.steering,
                [_Text(np.asarray(ids, np.int32), f"request {n}") for n, ids in zip(members, contexts, strict=True)],
                self.key,
                max_new_tokens=new,
                stop_tokens=tuple(sorted({*self.loaded.stop_tokens, self.eot_token_id})),
                rows=self.batch_size,
                sampling=_sampling(settings),
                ended=partial(self._has_one, until),
            )
            for index, answer in answers:
                text = self._text(answer.tokens)
                ends = [text.find(stop) for stop in until if stop in text]
                results[members[index]] = text[: min(ends)] if ends else text
        return results


def _sampling(settings: dict[str, Any]) -> Sampling:
    """How a task wants its answers drawn: greedily unless it says do_sample and a temperature."""
    temperature = float(settings.get("temperature") or 0.0)
    if not settings.get("do_sample", temperature > 0):
        return Sampling()
    return Sampling(temperature or 1.0, int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0))


def main() -> None:
    """The harness's own command with this model."""
    from lm_eval.__main__ import cli_evaluate

    if not {"--model", "-m"} & {argument.partition("=")[0] for argument in sys.argv}:
        sys.argv[1:1] = ["--model", "jaxsteer"]
    cli_evaluate()


if __name__ == "__main__":
    # Under its own name: registered once, and not a second time as __main__.
    from jaxsteer.lm_eval import main as run

    run()
