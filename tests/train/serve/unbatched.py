"""What a server should answer: by `generate`, one prompt at a time, with each adapter's own plan and steering."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from jaxsteer import Model, generate
from jaxsteer.batches import bucket_length, stack_rows
from jaxsteer.inference import score_tokens
from jaxsteer.inference.generate import to_device
from train.evaluation.replies import UNFINISHED
from train.serving.prompts import plain_prompt

SHORTEST = 64
CLOSE = 1e-4
"""Where the two likeliest tokens are closer than this, in nats, rounding may decide."""


@dataclass(frozen=True)
class Question:
    """What is asked. `strength` is one factor for all slots, or (slot, factor) of one."""

    model: str
    text: str
    chat: bool = False
    strength: float | tuple[str, float] | None = None

    @property
    def messages(self):
        return [{"role": "user", "content": self.text}]

    def fields(self):
        """The fields of the request's body."""
        body = {"model": self.model} | ({"messages": self.messages} if self.chat else {"prompt": self.text})
        if self.strength is None:
            return body
        by_slot = isinstance(self.strength, tuple)
        return body | {"steering_strength": dict([self.strength]) if by_slot else self.strength}


class Unbatched:
    """Greedy answers of a base model, and of it with steering files.

    Args:
        loaded: the base model, served as `base`.
        base: its name.
        files: steering files by name.
        longest: number of tokens in an answer at most.
    """

    def __init__(self, loaded, base, files, longest):
        self.loaded, self.longest, self._known = loaded, longest, {}
        self._models = {base: (Model(loaded.config), {})}
        for name, file in files.items():
            self._models[name] = (Model(loaded.config, file.plan), file.steering)

    def ids(self, question, count):
        """The tokens of the answer, and whether it ends before `count` of them."""
        if question not in self._known:
            model, steering = self._models[question.model]
            prompt, stop = self._prompt(question)
            batch = stack_rows([[prompt]], bucket_length(len(prompt.ids), SHORTEST))
            found = generate(
                model,
                self.loaded.base,
                steering,
                to_device(batch),
                max_new_tokens=self.longest,
                stop_tokens=stop,
                strength=self._strength(question, model),
            )
            assert bool(found.finite[0])
            self._known[question] = np.asarray(found.tokens[0, : int(found.lengths[0])]), bool(found.stopped[0])
        ids, stopped = self._known[question]
        return ids[:count].tolist(), stopped and len(ids) < count

    def text(self, question, count):
        """The answer, and why it ends."""
        ids, stopped = self.ids(question, count)
        return self.decode(ids), "stop" if stopped else "length"

    def decode(self, ids):
        return self.loaded.tokenizer.decode(ids, skip_special_tokens=True)

    def margin_of(self, question, answer):
        """By how much the likeliest token beats the next where another answer begins to differ, in nats."""
        model, steering = self._models[question.model]
        prompt, _ = self._prompt(question)
        ids = self.ids(question, self.longest)[0]
        same = sum(answer.startswith(self.decode(ids[: n + 1]).rstrip(UNFINISHED)) for n in range(len(ids)))
        whole = plain_prompt(self.loaded, [*prompt.ids.tolist(), *ids[:same], 0], "answer").tokens
        completion = np.arange(len(whole.ids)) >= len(prompt.ids)
        whole = replace(whole, completion=completion, prompt_length=len(prompt.ids))
        batch = to_device(stack_rows([[whole]], bucket_length(len(whole.ids), SHORTEST)))
        strength = self._strength(question, model)
        top = score_tokens(model, self.loaded.base, steering, batch, strength=strength, top=2).top
        first, second = np.asarray(top.log_probabilities)[0, len(whole.ids) - 1]
        return float(first - second)

    def _prompt(self, question):
        text = question.text
        if question.chat:
            template = self.loaded.tokenizer.apply_chat_template
            text = template(question.messages, tokenize=False, add_generation_prompt=True)
        found = plain_prompt(self.loaded, text, "prompt")
        end_of_turn = self.loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
        return found.tokens, tuple({*found.stop, end_of_turn})

    @staticmethod
    def _strength(question, model):
        strength = question.strength
        by_slot = dict([strength]) if isinstance(strength, tuple) else None
        factor = lambda slot: by_slot.get(slot.name, 1.0) if by_slot else 1.0 if strength is None else strength
        return {slot.name: jnp.float32(factor(slot)) for slot in model.plan}
