"""The harness's interface to a model with steering; likelihoods and windows are those of its Hugging Face model."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxsteer.inference import Decoder, generate_all
from jaxsteer.inference.likelihood import score_continuations
from jaxsteer.inference.scheduling import Limits, Request, nonfinite_logits
from jaxsteer.io import (
    LoadedModel,
    SteeringFile,
    compute_dtype,
    load_config,
    load_model,
    load_steering,
    sample_weights,
)
from jaxsteer.io.load import require_tokenizer
from jaxsteer.io.tokenizer import beginning_of
from jaxsteer.lm_eval.settings import Settings, read_settings
from jaxsteer.models.transformer import Model
from jaxsteer.types import Plan, Steering

DEFAULT_BATCH_SIZE = 32
_log = logging.getLogger(__name__)


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
        other_base: steer a model of the same shape whose weights are not those that the steering was trained on.
        dtype: float32, bfloat16, or auto: float32 on CPU, bfloat16 on accelerators.
        batch_size: number of prompts processed at a time; "auto" means 32.
        max_length: maximum number of tokens that the model reads at a time; by default the model's.
        seed: random seed for tasks that sample their answers.
        device, max_batch_size: accepted for the harness and ignored; JAX chooses the device.

    Raises:
        ValueError: no base model is named, the steering belongs to another model, or a size is not a positive number.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        steering: str | None = None,
        other_base: bool = False,
        dtype: str = "auto",
        batch_size: int | str = DEFAULT_BATCH_SIZE,
        max_length: int | None = None,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        number = _batch_size(batch_size)
        file = None if steering is None else load_steering(steering)
        name = pretrained or (file.model_name if file else None)
        if name is None:
            raise ValueError("which model? Give pretrained=..., or steering=... with a file that names its base model")
        if file is not None:
            _check_base(file, name, other_base=str(other_base).lower() == "true")
        require_tokenizer(name)
        loaded = load_model(name, dtype=compute_dtype(dtype))
        plan, params = (file.plan, file.steering) if file else ((), {})
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
        self.max_length = loaded.config.max_length if max_length is None else int(max_length)
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self._beginning = beginning_of(self.tokenizer)
        added = self.tokenizer.added_tokens_decoder.values()
        self._special = sorted((token.content for token in added if token.special), key=len, reverse=True)

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
        """A conversation as text; without its system message where the template refuses one."""
        as_text = lambda messages: self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return as_text(chat_history)
        except jinja2.TemplateError as error:
            users = [message for message in chat_history if message["role"] != "system"]
            if len(users) == len(chat_history):
                raise ValueError(f"the model's chat template refuses this conversation: {error}") from None
            _log.warning("The model's chat template refuses a system message (%s); it is left out.", error)
            return as_text(users)

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
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"request {number}: a continuation of {len(continuation)} tokens does not fit the maximum sequence "
                    f"length of {self.max_length}"
                )
            if continuation:
                # The model does not read the last token, so there is room for max_length + 1.
                kept = tuple(context[-(self.max_length + 1 - len(continuation)) :])
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
            # As in the harness's Hugging Face model: a beginning that the tokenizer adds is scored too.
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
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
        end = self.tokenizer.decode([self.eot_token_id])
        asked = [read_settings(request.args[1], end, f"request {n}") for n, request in enumerate(requests)]
        groups: dict[int, list[int]] = defaultdict(list)  # by the length of the answer, which is that of the cache
        for number, settings in enumerate(asked):
            groups[settings.max_new_tokens].append(number)
        results = [""] * len(requests)
        for numbers in groups.values():
            texts = self._generate(numbers, [(requests[n].args[0], asked[n]) for n in numbers])
            for number, text in zip(numbers, texts, strict=True):
                results[number] = text
        return results

    def _generate(self, numbers: Sequence[int], asked: Sequence[tuple[str, Settings]]) -> list[str]:
        """Answers of one maximum length; the requests' numbers seed their draws and appear in messages."""
        max_new_tokens = asked[0][1].max_new_tokens
        max_prompt = self.max_length - max_new_tokens
        if max_prompt < 1:
            raise ValueError(
                f"max_gen_toks={max_new_tokens} leaves no tokens for a prompt: the maximum sequence length is "
                f"{self.max_length}"
            )
        stop_tokens = tuple(sorted({*self.loaded.stop_tokens, self.eot_token_id}))
        requests = []
        for number, (context, settings) in zip(numbers, asked, strict=True):
            ids = self.tok_encode(context)[-max_prompt:] or [self.prefix_token_id]
            prompt = _Text(np.asarray(ids, np.int32), f"request {number}")
            seed = self.seed << 32 | number
            requests.append(Request(prompt, max_new_tokens, stop_tokens, settings.sampling, seed))
        until = [settings.until for _, settings in asked]
        limits = Limits(max(map(len, requests)), max_new_tokens, self.batch_size, max_stop_tokens=len(stop_tokens))
        decoder = Decoder(self.steered, self.loaded.base, self.steering, limits)
        ended = lambda index, tokens: any(stop in self.tokenizer.decode(tokens) for stop in until[index])
        results = [""] * len(requests)
        for index, answer in generate_all(decoder, requests, ended):
            if answer.finished == "nonfinite":
                raise nonfinite_logits(requests[index].prompt, self.loaded.config.vocab_size)
            results[index] = self._answer(answer.tokens, until[index])
        return results

    def _answer(self, tokens: np.ndarray, until: Sequence[str]) -> str:
        """The text before the first of the texts that end it, which may be or contain special tokens."""
        text = self.tokenizer.decode(tokens)
        ends = [text.find(stop) for stop in until if stop in text]
        if not ends:
            return self.tokenizer.decode(tokens, skip_special_tokens=True)
        text = text[: min(ends)]
        for special in self._special:
            text = text.replace(special, "")
        return text


def _check_base(file: SteeringFile, name: str, *, other_base: bool) -> None:
    """Refuse the steering of another model, before its weights are loaded."""
    file.check(load_config(name))
    try:
        note = file.check_weights(sample_weights(name), other_base=other_base)
    except ValueError as error:
        raise ValueError(f"{error}. Give its own model (pretrained=...), or steer this one: other_base=True") from None
    if note:
        _log.warning(note)


def _batch_size(asked: int | str) -> int:
    """A number of prompts, or the default for "auto" and "auto:N"."""
    if str(asked).partition(":")[0] == "auto":
        return DEFAULT_BATCH_SIZE
    if not str(asked).isdecimal() or int(asked) < 1:
        raise ValueError(f"batch_size must be a number of prompts or auto, got {asked!r}")
    return int(asked)
