"""The record that a model family is: how published fields and tensors read as ours, and the parts it is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxsteer.models.config import ModelConfig


@dataclass(frozen=True)
class Transform:
    """An invertible change of layout between a stored tensor and ours, both for one layer.

    read     (stored tensor, config) -> ours
    write    (ours, config) -> stored tensor
    flips    the stored matrix has our two axes in the other order
    group    `read` also takes part of a stored tensor: all of some columns, and rows in whole groups of so many;
             None = only the whole
    """

    read: Callable[[np.ndarray, ModelConfig], np.ndarray]
    write: Callable[[np.ndarray, ModelConfig], np.ndarray]
    flips: bool = False
    group: Callable[[ModelConfig], int] | None = None

    def outputs_axis(self, ndim: int) -> int:
        """Which axis of a stored tensor is our last, the outputs of a projection."""
        return 0 if self.flips else ndim - 1


def _heads_apart(tensor: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo llama.cpp's order of rotary pairs, [N, H/2, 2, ...] -> [N, 2, H/2, ...] along the first axis."""
    pairs = tensor.reshape(-1, head_dim // 2, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def _heads_together(tensor: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of `_heads_apart`."""
    halves = tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


IDENTITY = Transform(lambda t, c: t, lambda t, c: t, group=lambda c: 1)
"""Stored as ours."""

TRANSPOSE = Transform(lambda t, c: t.T, lambda t, c: t.T, flips=True, group=lambda c: 1)
"""PyTorch's Linear.weight [out, in] against our kernel [in, out]."""

ROTARY = Transform(
    lambda t, c: _heads_apart(t, c.head_dim).T,
    lambda t, c: _heads_together(t.T, c.head_dim),
    flips=True,
    group=lambda c: c.head_dim,
)
"""Query or key weight [out, in] (or bias [out]) in llama.cpp's order, where rotary pairs are neighbours."""

ONE_ADDED = Transform(lambda t, c: t - 1, lambda t, c: t + 1, group=lambda c: 1)
"""Scale of a norm that multiplies by 1 + scale, stored as what it multiplies by."""


@dataclass(frozen=True)
class Row:
    """One parameter: where it is in our tree and in the published files.

    path            ours, "/" between the keys; under "blocks/" it is stacked over layers
    axes            our shape for one layer, in axis letters; "NH" and "KH" are products
    hf, gguf        stored names, {i} for the layer
    transform       between the Hugging Face tensor and ours
    gguf_transform  between the GGUF tensor and ours; None = the same as `transform`
    when, unless    name of a `ModelConfig` flag that the parameter exists with, or without
    fused           where several parameters are one stored tensor, joined along their outputs: the outputs of each, in
                    axis letters; and `part`, which of them this one is
    """

    path: str
    axes: tuple[str, ...]
    hf: str
    gguf: str
    transform: Transform = IDENTITY
    gguf_transform: Transform | None = None
    when: str = ""
    unless: str = ""
    fused: tuple[str, ...] = ()
    part: int = 0

    @property
    def stacked(self) -> bool:
        """Whether there is one such tensor for every layer."""
        return self.path.startswith("blocks/")

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Our shape for one layer."""
        return tuple(self._sizes(config)[axis] for axis in self.axes)

    def stored_outputs(self, config: ModelConfig) -> tuple[int, int, int] | None:
        """Where it begins and ends in a fused tensor, and how many outputs that has; None for one of its own."""
        if not self.fused:
            return None
        sizes = [self._sizes(config)[axis] for axis in self.fused]
        start = sum(sizes[: self.part])
        return start, start + sizes[self.part], sum(sizes)

    def _sizes(self, config: ModelConfig) -> dict[str, int]:
        return {
            "V": config.vocab_size,
            "D": config.width,
            "F": config.mlp_width,
            "NH": config.heads * config.head_dim,
            "KH": config.kv_heads * config.head_dim,
            "H": config.head_dim,
            "P": config.max_length,
        }

    def exists(self, config: ModelConfig) -> bool:
        """Whether a model with these features has the parameter."""
        return (not self.when or getattr(config, self.when)) and not (self.unless and getattr(config, self.unless))


REQUIRED = object()
"""In place of a default: the published config must say it."""

GGUF_KEYS: dict[str, tuple[str, Any]] = {
    "layers": ("block_count", REQUIRED),
    "heads": ("attention.head_count", REQUIRED),
    "kv_heads": ("attention.head_count_kv", lambda read: read["heads"]),
    "head_dim": ("attention.key_length", lambda read: read["width"] // max(read["heads"], 1)),
    "mlp_width": ("feed_forward_length", REQUIRED),
    "norm_eps": ("attention.layer_norm_rms_epsilon", REQUIRED),
    "rope_theta": ("rope.freq_base", 10_000.0),
    "max_length": ("context_length", REQUIRED),
}
"""Our field -> (key of a GGUF file after its architecture's name, llama.cpp's default); nearly every family has these.

`local_layers` is a flag for each layer or a period n: every nth layer is global, none at 0. A default may be a function
of the fields before it, and of the vocab_size and width that the embedding has.
"""


@dataclass(frozen=True)
class Windows:
    """Which layers of a family attend to a window of tokens alone.

    default   of `sliding_window`, where the config does not say it
    local     (config fields, layer) -> whether a layer is local, where there is no `layer_types`
    switch    the field that must be true for any window to count
    ignored   fields that `local` reads, or that say the same once more
    listed    an exported config names each layer's kind
    """

    default: int | None
    local: Callable[[Mapping[str, Any], int], bool]
    switch: str = ""
    ignored: frozenset[str] = frozenset()
    listed: bool = True


@dataclass(frozen=True)
class Family:
    """How one family of published models reads as a `ModelConfig` and a base tree.

    name      ours
    hf_type   `model_type` in config.json
    hf_class  the class in transformers that reads what we export
    gguf      `general.architecture` in GGUF files; families that share it differ in the keys that they know
    fields    our field -> (Hugging Face field, its default in transformers or REQUIRED)
    fixed     Hugging Face fields that the forward pass knows one value of
    ignored   Hugging Face fields that change no result of a forward pass
    rows      the parameters
    harmless  regular expressions of stored tensors that are constants, not parameters
    features  of our config, the same for every model of the family
    windows   of local attention, where the family has it
    theta     the rotary base where the config does not say it
    local_theta  the same of local layers, where they have one of their own
    unrotated  (config fields, layer) -> whether a layer has no rotary positions
    gguf_keys  our field -> (key in GGUF files, its default in llama.cpp or REQUIRED)
    prefix    of all names in `rows`, which some files leave out
    """

    name: str
    hf_type: str
    hf_class: str
    gguf: str
    fields: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any]
    ignored: frozenset[str]
    rows: tuple[Row, ...]
    harmless: tuple[str, ...] = ()
    features: Mapping[str, Any] = field(default_factory=dict)
    windows: Windows | None = None
    theta: float = 10_000.0
    local_theta: float | None = None
    unrotated: Callable[[Mapping[str, Any], int], bool] | None = None
    gguf_keys: Mapping[str, tuple[str, Any]] = field(default_factory=lambda: GGUF_KEYS)
    prefix: str = ""

    def parameters(self, config: ModelConfig) -> tuple[Row, ...]:
        """The rows of the parameters that a model with these features has."""
        return tuple(row for row in self.rows if row.exists(config))


def projection(path: str, hf: str, gguf: str, axes: tuple[str, str], bias: str = "", **layout: Any) -> tuple[Row, ...]:
    """Kernel of one projection of a block, and its bias.

    Args:
        path: under "blocks/". hf, gguf: stored names in a layer, without ".weight".
        axes: of the kernel.
        bias: name of the `ModelConfig` flag that the bias exists with; "always", or "" = never.
        layout: of both, see `Row`.
    """
    ours, hf, gguf = f"blocks/{path}", f"model.layers.{{i}}.{hf}", f"blk.{{i}}.{gguf}"
    kernel = Row(f"{ours}/kernel", axes, f"{hf}.weight", f"{gguf}.weight", TRANSPOSE, **layout)
    if not bias:
        return (kernel,)
    when = "" if bias == "always" else bias
    return kernel, Row(f"{ours}/bias", axes[1:], f"{hf}.bias", f"{gguf}.bias", IDENTITY, when=when, **layout)


def norm(path: str, hf: str, gguf: str, axis: str = "D", **layout: Any) -> Row:
    """Scale of one norm of a block."""
    return Row(f"blocks/{path}/scale", (axis,), f"model.layers.{{i}}.{hf}.weight", f"blk.{{i}}.{gguf}.weight", **layout)


EMBEDDING = Row("embed/embedding", ("V", "D"), "model.embed_tokens.weight", "token_embd.weight")


def after_blocks(**layout: Any) -> tuple[Row, ...]:
    """Final norm (in this layout) and head."""
    return (
        Row("final_norm/scale", ("D",), "model.norm.weight", "output_norm.weight", **layout),
        Row("head/embedding", ("V", "D"), "lm_head.weight", "output.weight", IDENTITY, unless="tied_head"),
    )


def gated_mlp(bias: str = "") -> tuple[Row, ...]:
    """The three projections of a gated MLP."""
    return (
        *projection("mlp/gate", "mlp.gate_proj", "ffn_gate", ("D", "F"), bias),
        *projection("mlp/up", "mlp.up_proj", "ffn_up", ("D", "F"), bias),
        *projection("mlp/down", "mlp.down_proj", "ffn_down", ("F", "D"), bias),
    )


DIMENSIONS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", REQUIRED),
    "width": ("hidden_size", REQUIRED),
    "layers": ("num_hidden_layers", REQUIRED),
    "heads": ("num_attention_heads", REQUIRED),
    "kv_heads": ("num_key_value_heads", lambda read: read["heads"]),
    "head_dim": ("head_dim", lambda read: read["width"] // max(read["heads"], 1)),
    "mlp_width": ("intermediate_size", REQUIRED),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied_head": ("tie_word_embeddings", False),
    "max_length": ("max_position_embeddings", 2048),
}
"""Fields that nearly every family has, with their usual defaults."""

# Fields of every transformers config that say how to train, generate, classify or store, not what is
# computed.
GENERAL_IGNORED = {
    *("architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash"),
    *("dtype", "torch_dtype", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class", "initializer_range"),
    *("attention_dropout", "hidden_dropout", "id2label", "label2id", "num_labels", "problem_type"),
    *("task_specific_params", "_attn_implementation_autoset", "unsloth_version", "transformers.js_config"),
    "cache_implementation",
}

GENERAL_FIXED = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "partial_rotary_factor": 1.0,
}
