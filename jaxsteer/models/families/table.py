"""`Family`, which maps the fields and tensors of a published model family to ours, and the parts to build one from."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, TypeAlias

import numpy as np

from jaxsteer.models.config import ModelConfig, RopeScaling

RawConfig: TypeAlias = dict[str, Any]
"""A published config.json: its fields as JSON gives them, unchecked."""

FieldValue: TypeAlias = bool | int | float | str | tuple[bool, ...] | RopeScaling | None
"""Value of a field of a `ModelConfig`."""

Fields: TypeAlias = dict[str, Any]
"""Fields of a `ModelConfig` by name, each a FieldValue."""


class _Required(Enum):
    REQUIRED = "required"


REQUIRED: Final = _Required.REQUIRED
"""Instead of a default: the published config must give the field."""

Default: TypeAlias = FieldValue | Callable[[Fields], FieldValue] | _Required
"""For a field that the published config does not give: a value, a function of the fields before it, or REQUIRED."""


@dataclass(frozen=True)
class Transform:
    """An invertible change of layout between a stored tensor and our leaf, both for one layer.

    read     (stored tensor, config) -> our leaf
    write    (our leaf, config) -> stored tensor
    flips    whether the stored matrix has our two axes in the other order
    group    config -> g: `read` also accepts rows kg to lg of a stored tensor, and any part of its other axes;
             None if it needs the whole tensor
    """

    read: Callable[[np.ndarray, ModelConfig], np.ndarray]
    write: Callable[[np.ndarray, ModelConfig], np.ndarray]
    flips: bool = False
    group: Callable[[ModelConfig], int] | None = None

    def outputs_axis(self, ndim: int) -> int:
        """The axis of a stored tensor that is our last one, the outputs of a projection."""
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
"""Stored in our layout."""

TRANSPOSE = Transform(lambda t, c: t.T, lambda t, c: t.T, flips=True, group=lambda c: 1)
"""PyTorch's Linear.weight [out, in]; our kernel is [in, out]."""

ROTARY = Transform(
    lambda t, c: _heads_apart(t, c.head_dim).T,
    lambda t, c: _heads_together(t.T, c.head_dim),
    flips=True,
    group=lambda c: c.head_dim,
)
"""Query or key weight [out, in] (or bias [out]) in llama.cpp's order, where the two of a rotary pair are adjacent."""

ONE_ADDED = Transform(lambda t, c: t - 1, lambda t, c: t + 1, group=lambda c: 1)
"""Scale of a norm that multiplies by 1 + scale, stored as 1 + scale."""


@dataclass(frozen=True)
class Row:
    """One parameter: its place in our tree and in the published files.

    path            in our tree, "/" between the keys; under "blocks/" it is stacked over layers
    axes            our shape for one layer, in axis letters; "NH" and "KH" are products
    hf, gguf        stored names, {i} for the layer
    transform       between the Hugging Face tensor and our leaf
    gguf_transform  between the GGUF tensor and our leaf; None = the same as `transform`
    when, unless    name of the `ModelConfig` flag with which, or without which, the parameter exists; "" = always
    fused           for a stored tensor that joins several parameters along their outputs: the outputs of each, in axis
                    letters; () if the tensor is this parameter alone
    part            the index of this parameter in `fused`
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
        """Whether every layer has one such tensor."""
        return self.path.startswith("blocks/")

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Our shape for one layer."""
        return tuple(self._sizes(config)[axis] for axis in self.axes)

    def stored_outputs(self, config: ModelConfig) -> tuple[int, int, int] | None:
        """Start and stop within the outputs of the fused tensor, and how many those are; None if it is not fused."""
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
        """Whether a model with this config has the parameter."""
        return (not self.when or getattr(config, self.when)) and not (self.unless and getattr(config, self.unless))


GGUF_KEYS: dict[str, tuple[str, Default]] = {
    "layers": ("block_count", REQUIRED),
    "heads": ("attention.head_count", REQUIRED),
    "kv_heads": ("attention.head_count_kv", lambda read: read["heads"]),
    "head_dim": ("attention.key_length", lambda read: read["width"] // max(read["heads"], 1)),
    "mlp_width": ("feed_forward_length", REQUIRED),
    "norm_eps": ("attention.layer_norm_rms_epsilon", REQUIRED),
    "rope_theta": ("rope.freq_base", 10_000.0),
    "max_length": ("context_length", REQUIRED),
}
"""Our field -> (GGUF key without the architecture's name, llama.cpp's default), for keys of almost all families.

`local_layers` is a flag for each layer, or a period n: every nth layer is global, none if n = 0. A default that is a
function also sees the vocab_size and width of the embedding.
"""


def layer_count(raw: RawConfig, *names: str, default: int, minimum: int = 1) -> int:
    """The first of these fields that a published config gives (null counts as absent): a number of layers.

    Raises:
        ValueError: it is not an integer of at least `minimum`; the message names the field.
    """
    for name in names:
        if (value := raw.get(name)) is None:
            continue
        if type(value) is not int or value < minimum:
            raise ValueError(f"{name} is {reprlib.repr(value)}; expected an integer of at least {minimum}")
        return value
    return default


@dataclass(frozen=True)
class Windows:
    """Which layers of a family attend within a sliding window.

    default   of `sliding_window`, if the config does not give it
    local     (published config, layer) -> whether the layer is local, if the config has no `layer_types`
    switch    the field that must be true for the window to be used; "" = always used
    ignored   fields that `local` reads, or that repeat what others say
    listed    whether an exported config has `layer_types`
    """

    default: int | None
    local: Callable[[RawConfig, int], bool]
    switch: str = ""
    ignored: frozenset[str] = frozenset()
    listed: bool = True


@dataclass(frozen=True)
class LlamaCpp:
    """What llama.cpp computes of a family, measured with llama-cpp-python 0.3.36.

    biases        flags of a config whose biases it takes; others make a file that it does not load
    rope_factors  whether it takes the tensor of rotary factors
    windowed      whether it computes the sliding window; if so, it crashes on a model without one
    ignored       fields of a config that it reads nothing of
    """

    biases: tuple[str, ...] = ()
    rope_factors: bool = False
    windowed: bool = False
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """How the config and the tensors of a published model family map to a `ModelConfig` and a base tree.

    name         our name of the family
    hf_type      `model_type` in config.json
    hf_class     the class in transformers that reads what we export
    hf_classes   its other classes there that are not named as in most families: config, backbone, block
    gguf         `general.architecture` in GGUF files; families that share it differ in the keys that they know
    fields       our field -> (Hugging Face field, its default in transformers or REQUIRED)
    fixed        Hugging Face fields of which the forward pass supports one value: field -> value
    rows         the parameters
    ignored      Hugging Face fields that do not change a forward pass; for those of any family see `general`
    harmless     regular expressions of stored tensors that are constants, not parameters
    features     fields of our config that are the same in every model of the family
    windows      local attention; None if the family has none
    theta        the rotary base, if the config does not give it
    local_theta  the rotary base of local layers, if the config does not give it; None if they have the same base
    unrotated    (published config, layer) -> whether the layer has no rotary positions; None if all layers have them
    gguf_keys    our field -> (key in GGUF files, its default in llama.cpp or REQUIRED)
    llama_cpp    what llama.cpp computes of it
    prefix       common to all names in `rows`, which some files omit
    """

    name: str
    hf_type: str
    hf_class: str
    gguf: str
    fields: Mapping[str, tuple[str, Default]]
    fixed: Mapping[str, FieldValue]
    rows: tuple[Row, ...]
    ignored: frozenset[str] = frozenset()
    harmless: tuple[str, ...] = ()
    features: Mapping[str, FieldValue] = field(default_factory=dict)
    windows: Windows | None = None
    theta: float = 10_000.0
    local_theta: float | None = None
    unrotated: Callable[[RawConfig, int], bool] | None = None
    gguf_keys: Mapping[str, tuple[str, Default]] = field(default_factory=lambda: GGUF_KEYS)
    llama_cpp: LlamaCpp = LlamaCpp()
    prefix: str = ""
    hf_classes: Mapping[str, str] = field(default_factory=dict)

    def parameters(self, config: ModelConfig) -> tuple[Row, ...]:
        """The rows of the parameters that a model with this config has."""
        return tuple(row for row in self.rows if row.exists(config))


def projection(path: str, hf: str, gguf: str, axes: tuple[str, str], bias: str = "", **layout: Any) -> tuple[Row, ...]:
    """Kernel and bias of one projection of a block.

    Args:
        path: under "blocks/".
        hf, gguf: stored names within a layer, without ".weight".
        axes: of the kernel.
        bias: name of the `ModelConfig` flag with which the bias exists; "always", or "" = never.
        layout: more fields of both rows, see `Row`.
    """
    ours, hf, gguf = f"blocks/{path}", f"model.layers.{{i}}.{hf}", f"blk.{{i}}.{gguf}"
    kernel = Row(f"{ours}/kernel", axes, f"{hf}.weight", f"{gguf}.weight", TRANSPOSE, **layout)
    if not bias:
        return (kernel,)
    when = "" if bias == "always" else bias
    return kernel, Row(f"{ours}/bias", axes[1:], f"{hf}.bias", f"{gguf}.bias", IDENTITY, when=when, **layout)


def norm(path: str, hf: str, gguf: str, axis: str = "D", **layout: Any) -> Row:
    """Scale of one norm of a block; `layout`: more fields of the row."""
    return Row(f"blocks/{path}/scale", (axis,), f"model.layers.{{i}}.{hf}.weight", f"blk.{{i}}.{gguf}.weight", **layout)


EMBEDDING = Row("embed/embedding", ("V", "D"), "model.embed_tokens.weight", "token_embd.weight")


def after_blocks(**layout: Any) -> tuple[Row, ...]:
    """Final norm and head; `layout`: more fields of the norm's row."""
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


DIMENSIONS: dict[str, tuple[str, Default]] = {
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
"""Our field -> (Hugging Face field, default), for fields that almost all families have."""
