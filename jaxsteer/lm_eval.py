"""Models with steering in EleutherAI's lm-evaluation-harness: `pip install jaxsteer[lm-eval]`, then

    python -m jaxsteer.lm_eval --tasks arc_easy --model_args pretrained=MODEL,steering=steering.safetensors

with the arguments of the harness's own `lm_eval`; or pass a `JaxsteerLM` as `model` to `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxsteer.inference.decoder import Decoder, generate_all
from jaxsteer.inference.generate import GREEDY, Sampling
from jaxsteer.inference.likelihood import score_continuations
from jaxsteer.inference.scheduling import Limits, Request, nonfinite_logits
from jaxsteer.io import LoadedModel, compute_dtype, load_config, load_model, load_steering
from jaxsteer.models.transformer import Model
from jaxsteer.types import Plan, Steering

DEFAULT_BATCH_SIZE = 32
DEFAULT_NEW_TOKENS = 256
"""Maximum number of tokens to generate where the task sets none."""


@dataclass(frozen=True)
class _Text:
    """A prompt, as `jaxsteer.batches.Tokens`."""

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
    """A model with or without steering, with the interface of the harness.

    The context is the prompt, and what is scored or generated is the completion, for steering that tells them apart.

    Args:
        pretrained: folder, .gguf file or Hugging Face id of the base model; by default the one named in the steering
            file.
        steering: a steering file (*.safetensors).
        dtype: float32, bfloat16, or auto: float32 on CPU, bfloat16 on accelerators.
        batch_size: number of prompts processed at a time; "auto" means 32.
        max_length: maximum sequence length in tokens; by default the model's.
        seed: random seed for tasks that sample their answers.
        device, max_batch_size: accepted for the harness and ignored; JAX chooses the device.

    Raises:
        ValueError: no base model is named, or the steering belongs to another model.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        steering: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = DEFAULT_BATCH_SIZE,
        max_length: int | None = None,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        file = None if steering is None else load_steering(steering)
        name = pretrained or (file.model_name if file else None)
        if name is None:
            raise ValueError("which model? Give pretrained=..., or steering=... with a file that names its base model")
        if file is not None:
            file.check(load_config(name))  # refuses the steering of another model before loading
        loaded = load_model(name, dtype=compute_dtype(dtype))
        plan, params = (file.plan, file.steering) if file else ((), {})
        number = int(batch_size) if str(batch_size).isdecimal() else DEFAULT_BATCH_SIZE
        self._set(loaded, plan, params, batch_size=number, max_length=max_length, seed=seed)

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        plan: Plan = (),
        steering: Steering | None = None,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        max_length: int | None = None,
        seed: int = 0,
    ) -> JaxsteerLM:
        """The same for a model and a steering tree in memory."""
        lm = cls.__new__(cls)
        lm._set(loaded, plan, steering or {}, batch_size=batch_size, max_length=max_length, seed=seed)
        return lm

    def _set(
        self,
        loaded: LoadedModel,
        plan: Plan,
        steering: Steering,
        *,
        batch_size: int,
        max_length: int | None,
        seed: int,
    ) -> None:
        TemplateLM.__init__(self)
        self.loaded, self.steering = loaded, steering
        self.steered = Model(loaded.config, plan)
        self.tokenizer = loaded.require_tokenizer()
        self.batch_size, self.seed = batch_size, seed
        self.max_length = max_length or loaded.config.max_length
        plain, whole = (self.tokenizer("x", add_special_tokens=add)["input_ids"] for add in (False, True))
        start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        self._beginning = list(whole[:start])

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        end = self.tokenizer.eos_token_id
        return int(self.loaded.stop_tokens[0] if end is None else end)

    @property
    def prefix_token_id(self) -> int:
        """The token that starts a text without a context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in the harness's cache of requests."""
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
        """Token ids, after the tokenizer's beginning of a text unless it is there already or not wanted."""
        ids = list(self.tokenizer(string, add_special_tokens=False)["input_ids"])
        has_beginning = ids[: len(self._beginning)] == self._beginning
        return ids if has_beginning or add_special_tokens is False else [*self._beginning, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(Σ log p, whether greedy) of each continuation; a context shared by several is read once."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # those of an empty continuation
        by_context: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = defaultdict(list)
        for number, (_texts, context, continuation) in enumerate(requests):
            if len(continuation) >= self.max_length:
                raise ValueError(
                    f"request {number}: a continuation of {len(continuation)} tokens does not fit the maximum sequence "
                    f"length of {self.max_length}"
                )
            if continuation:
                kept = tuple(context[-(self.max_length - len(continuation)) :])
                by_context[kept].append((number, np.asarray(continuation, np.int32)))
        contexts = list(by_context)
        scored = score_continuations(
            self.steered,
            self.loaded.base,
            self.steering,
            [_Text(np.asarray(context, np.int32), f"context {i}") for i, context in enumerate(contexts)],
            [[ids for _, ids in by_context[context]] for context in contexts],
            batch_size=self.batch_size,
        )
        for index, scores in scored:
            for (number, _ids), score in zip(by_context[contexts[index]], scores, strict=True):
                results[number] = score.log_probability, score.greedy
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Σ log p of whole texts, each token a target once, with as much context as fits."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        numbers = []  # of the request that each window belongs to
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            parts = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
            )
            for context, continuation in map(make_disjoint_window, parts):
                windows.append((None, context, continuation))
                numbers.append(number)
        totals = [0.0] * len(requests)
        for number, (log_probability, _) in zip(numbers, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += log_probability
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to the first of its `until` strings, which is left out."""
        groups: dict[int, list[int]] = defaultdict(list)  # by the length of the answer, which is that of the cache
        for number, request in enumerate(requests):
            groups[int(request.args[1].get("max_gen_toks") or DEFAULT_NEW_TOKENS)].append(number)
        results = [""] * len(requests)
        for max_new_tokens, numbers in groups.items():
            texts = self._generate(numbers, [requests[n].args for n in numbers], max_new_tokens)
            for number, text in zip(numbers, texts, strict=True):
                results[number] = text
        return results

    def _generate(
        self, numbers: Sequence[int], arguments: Sequence[tuple[str, Mapping[str, Any]]], max_new_tokens: int
    ) -> list[str]:
        """Answers to requests (context, settings), whose numbers seed their draws and appear in messages."""
        max_prompt = self.max_length - max_new_tokens
        if max_prompt < 1:
            raise ValueError(
                f"max_gen_toks={max_new_tokens} leaves no tokens for a prompt: the maximum sequence length is "
                f"{self.max_length}"
            )
        stop_tokens = tuple(sorted({*self.loaded.stop_tokens, self.eot_token_id}))
        asked = []
        for number, (context, settings) in zip(numbers, arguments, strict=True):
            ids = self.tok_encode(context)[-max_prompt:] or [self.prefix_token_id]
            prompt = _Text(np.asarray(ids, np.int32), f"request {number}")
            asked.append(Request(prompt, max_new_tokens, stop_tokens, _sampling(settings), self.seed << 32 | number))
        until = [_stop_strings(settings) for _, settings in arguments]
        limits = Limits(max(map(len, asked)), max_new_tokens, self.batch_size, max_stop_tokens=len(stop_tokens))
        decoder = Decoder(self.steered, self.loaded.base, self.steering, limits)
        ended = lambda index, tokens: any(stop in self._text(tokens) for stop in until[index])
        results = [""] * len(asked)
        for index, answer in generate_all(decoder, asked, ended):
            if answer.finished == "nonfinite":
                raise nonfinite_logits(asked[index].prompt, self.loaded.config.vocab_size)
            text = self._text(answer.tokens)
            ends = [text.find(stop) for stop in until[index] if stop in text]
            results[index] = text[: min(ends)] if ends else text
        return results

    def _text(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _stop_strings(settings: Mapping[str, Any]) -> list[str]:
    """A task's `until`: a string, or a list of them."""
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else [text for text in until if text]


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    """How a task wants its answers sampled: greedily unless it sets a temperature and does not set do_sample=False."""
    temperature = float(settings.get("temperature") or 0.0)
    if not settings.get("do_sample", temperature > 0):
        return GREEDY
    return Sampling(temperature or 1.0, int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0))


def main() -> None:
    """Run the harness's own command, with this model as the default."""
    from lm_eval.__main__ import cli_evaluate

    if not {"--model", "-m"} & {argument.partition("=")[0] for argument in sys.argv}:
        sys.argv[1:1] = ["--model", "jaxsteer"]
    cli_evaluate()


if __name__ == "__main__":
    # Imported under its own name, or the model would be registered a second time as __main__.
    from jaxsteer.lm_eval import main as run

    run()
