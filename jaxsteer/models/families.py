"""Model families as data: which published fields and tensors mean which of ours, readable in both directions.

A family is one record. To add one, write its `Family`: the config fields that become features of
`ModelConfig`, those that must have one value because the forward pass knows no other, those that change no
result, and one `Row` per parameter. Anything that a published model says and its family does not list is
refused rather than ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsteer.models.config import ModelConfig, RopeScaling


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


@dataclass(frozen=True)
class Row:
    """One parameter: where it is in our tree and in the published files.

    path            ours, "/" between the keys; under "blocks/" it is stacked over layers
    axes            our shape for one layer, in axis letters; "NH" and "KH" are products
    hf, gguf        stored names, {i} for the layer
    transform       between the Hugging Face tensor and ours
    gguf_transform  between the GGUF tensor and ours; None = the same as `transform`
    when, unless    name of a `ModelConfig` flag that the parameter exists with, or without
    """

    path: str
    axes: tuple[str, ...]
    hf: str
    gguf: str
    transform: Transform = IDENTITY
    gguf_transform: Transform | None = None
    when: str = ""
    unless: str = ""

    @property
    def stacked(self) -> bool:
        """Whether there is one such tensor for every layer."""
        return self.path.startswith("blocks/")

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Our shape for one layer."""
        sizes = {
            "V": config.vocab_size,
            "D": config.width,
            "F": config.mlp_width,
            "NH": config.heads * config.head_dim,
            "KH": config.kv_heads * config.head_dim,
        }
        return tuple(sizes[axis] for axis in self.axes)

    def exists(self, config: ModelConfig) -> bool:
        """Whether a model with these features has the parameter."""
        return (not self.when or getattr(config, self.when)) and not (self.unless and getattr(config, self.unless))


REQUIRED = object()
"""In place of a default: the published config must say it."""


@dataclass(frozen=True)
class Family:
    """How one family of published models reads as a `ModelConfig` and a base tree.

    name      ours
    hf_type   `model_type` in config.json
    hf_class  the class in transformers that reads what we export
    gguf      `general.architecture` in GGUF files
    fields    our field -> (Hugging Face field, its default in transformers or REQUIRED)
    fixed     Hugging Face fields that the forward pass knows one value of
    ignored   Hugging Face fields that change no result of a forward pass
    rows      the parameters
    harmless  regular expressions of stored tensors that are constants, not parameters
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

    def parameters(self, config: ModelConfig) -> tuple[Row, ...]:
        """The rows of the parameters that a model with these features has."""
        return tuple(row for row in self.rows if row.exists(config))


def _projection(path: str, hf: str, gguf: str, axes: tuple[str, str], **layout: Any) -> tuple[Row, Row]:
    """Kernel and optional bias of one projection of a Llama block."""
    flag = "attn_bias" if path.startswith("attn") else "mlp_bias"
    ours, hf, gguf = f"blocks/{path}", f"model.layers.{{i}}.{hf}", f"blk.{{i}}.{gguf}"
    return (
        Row(f"{ours}/kernel", axes, f"{hf}.weight", f"{gguf}.weight", TRANSPOSE, **layout),
        Row(f"{ours}/bias", axes[1:], f"{hf}.bias", f"{gguf}.bias", IDENTITY, when=flag, **layout),
    )


def _norm(path: str, hf: str, gguf: str) -> Row:
    return Row(f"blocks/{path}/scale", ("D",), f"model.layers.{{i}}.{hf}.weight", f"blk.{{i}}.{gguf}.weight")


# Fields of every transformers config that say how to train, generate, classify or store, not what is
# computed.
_GENERAL_IGNORED = {
    *("architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash"),
    *("dtype", "torch_dtype", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class", "initializer_range"),
    *("attention_dropout", "hidden_dropout", "id2label", "label2id", "num_labels", "problem_type"),
    *("task_specific_params", "_attn_implementation_autoset", "unsloth_version", "transformers.js_config"),
}

_GENERAL_FIXED = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "partial_rotary_factor": 1.0,
}

LLAMA = Family(
    name="llama",
    hf_type="llama",
    hf_class="LlamaForCausalLM",
    gguf="llama",
    fields={
        "vocab_size": ("vocab_size", REQUIRED),
        "width": ("hidden_size", REQUIRED),
        "layers": ("num_hidden_layers", REQUIRED),
        "heads": ("num_attention_heads", REQUIRED),
        "kv_heads": ("num_key_value_heads", lambda read: read["heads"]),
        "head_dim": ("head_dim", lambda read: read["width"] // read["heads"]),
        "mlp_width": ("intermediate_size", REQUIRED),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "tied_head": ("tie_word_embeddings", False),
        "attn_bias": ("attention_bias", False),
        "mlp_bias": ("mlp_bias", False),
        "max_length": ("max_position_embeddings", 2048),
    },
    fixed={**_GENERAL_FIXED, "hidden_act": "silu", "rope_interleaved": False},
    # pretraining_tp split matrix products in old versions without changing them; is_llama_config marks a
    # conversion.
    ignored=frozenset(_GENERAL_IGNORED | {"pretraining_tp", "is_llama_config"}),
    rows=(
        Row("embed/embedding", ("V", "D"), "model.embed_tokens.weight", "token_embd.weight"),
        _norm("attn_norm", "input_layernorm", "attn_norm"),
        *_projection("attn/q", "self_attn.q_proj", "attn_q", ("D", "NH"), gguf_transform=ROTARY),
        *_projection("attn/k", "self_attn.k_proj", "attn_k", ("D", "KH"), gguf_transform=ROTARY),
        *_projection("attn/v", "self_attn.v_proj", "attn_v", ("D", "KH")),
        *_projection("attn/o", "self_attn.o_proj", "attn_output", ("NH", "D")),
        _norm("mlp_norm", "post_attention_layernorm", "ffn_norm"),
        *_projection("mlp/gate", "mlp.gate_proj", "ffn_gate", ("D", "F")),
        *_projection("mlp/up", "mlp.up_proj", "ffn_up", ("D", "F")),
        *_projection("mlp/down", "mlp.down_proj", "ffn_down", ("F", "D")),
        Row("final_norm/scale", ("D",), "model.norm.weight", "output_norm.weight"),
        Row("head/embedding", ("V", "D"), "lm_head.weight", "output.weight", IDENTITY, unless="tied_head"),
    ),
    harmless=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA,)}
"""Every family by our name."""


def family_of(kind: str, name: Any, where: str) -> Family:
    """The family with this published name.

    Args:
        kind: "hf_type" (`model_type` of a config.json) or "gguf" (`general.architecture`).
        name: the published name.
        where: the file, for the message.

    Raises:
        ValueError: no family has it.
    """
    for family in FAMILIES.values():
        if getattr(family, kind) == name:
            return family
    key = "model_type" if kind == "hf_type" else "general.architecture"
    known = ", ".join(getattr(family, kind) for family in FAMILIES.values())
    raise ValueError(f"{where}: {key} is {name!r}; the families known here are {known}")


def config_from_hf(raw: Mapping[str, Any], where: str) -> tuple[Family, ModelConfig]:
    """Read a Hugging Face config.json.

    Args:
        raw: its content.
        where: the file, for messages.

    Raises:
        ValueError: an unknown family; a field that is missing, of the wrong type, or that the family does not
            know how to follow. The message names the field and its value.
    """
    family = family_of("hf_type", raw.get("model_type"), where)
    read: dict[str, Any] = {}
    for ours, (name, default) in family.fields.items():
        value = raw.get(name)
        if value is None:
            if default is REQUIRED:
                raise ValueError(f"{where}: {name} is missing; a {family.name} config must say it")
            value = default(read) if callable(default) else default
        read[ours] = _typed(value, ours, name, where)
    handled = {name for name, _ in family.fields.values()} | family.ignored | ROPE_FIELDS
    for name, value in raw.items():
        if name in handled or value is None:
            continue
        if name in family.fixed and value == family.fixed[name]:
            continue
        allowed = f"only {family.fixed[name]!r} is supported" if name in family.fixed else "the field is not known"
        raise ValueError(
            f"{where}: {name} is {value!r}, but for the {family.name} family {allowed}. If it changes "
            "nothing in the forward pass, remove it from the file; otherwise this model cannot be loaded "
            "faithfully"
        )
    theta, scaling = rope_from_hf(raw, read["max_length"], where)
    return family, ModelConfig(**read, rope_theta=theta, rope_scaling=scaling)


def _typed(value: Any, ours: str, name: str, where: str) -> Any:
    """The value of a field, if it has the type of ours; a whole number passes for a float."""
    kind = {"norm_eps": float, "tied_head": bool, "attn_bias": bool, "mlp_bias": bool}.get(ours, int)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{where}: {name} is {value!r}; expected {kind.__name__}")
    return value


ROPE_FIELDS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def rope_from_hf(raw: Mapping[str, Any], max_length: int, where: str) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from `rope_parameters` or, before transformers 5, `rope_theta` and so on.

    Raises:
        ValueError: a kind of scaling other than default, linear, llama3; a number missing; places that
            disagree.
    """
    said: dict[str, Any] = {}
    top = {} if raw.get("rope_theta") is None else {"rope_theta": raw["rope_theta"]}
    for place in (top, raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}):
        if not isinstance(place, Mapping):
            raise ValueError(f"{where}: the rotary parameters are {place!r}; expected an object")
        for key, value in place.items():
            key = "rope_type" if key == "type" else key
            if value is not None and said.setdefault(key, value) != value:
                raise ValueError(
                    f"{where}: {key} is given as {said[key]!r} and as {value!r} (rope_theta, "
                    "rope_parameters, rope_scaling); keep one"
                )
    kind = said.pop("rope_type", "default")
    if kind not in _ROPE_NUMBERS:
        raise ValueError(
            f"{where}: rope_type is {kind!r}; supported are {', '.join(_ROPE_NUMBERS)}. This model's "
            "position encoding cannot be computed faithfully"
        )
    theta = said.pop("rope_theta", 10_000.0)
    original = said.pop("original_max_position_embeddings", max_length)
    if said.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor must be 1.0: rotary positions cover the whole head here")
    expected = _ROPE_NUMBERS[kind]
    if set(said) != set(expected):
        raise ValueError(
            f"{where}: rope_type {kind!r} has the parameters {sorted(said)}; expected exactly {list(expected)}"
        )
    for key, value in {**said, "rope_theta": theta, "original_max_position_embeddings": original}.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{where}: {key} is {value!r}; expected a positive number")
    numbers = {key: float(value) for key, value in said.items()}
    if kind == "default":
        return float(theta), None
    if kind == "linear":
        return float(theta), RopeScaling("linear", numbers["factor"])
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    if high <= low:
        raise ValueError(f"{where}: high_freq_factor {high} must be above low_freq_factor {low}")
    return float(theta), RopeScaling("llama3", numbers["factor"], low, high, int(original))


def config_to_hf(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The config.json that transformers reads as this model; `config_from_hf` gives `config` back."""
    raw: dict[str, Any] = {"architectures": [family.hf_class], "model_type": family.hf_type}
    raw |= {name: getattr(config, ours) for ours, (name, _) in family.fields.items()}
    raw |= {name: value for name, value in family.fixed.items() if name not in _GENERAL_FIXED}
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := config.rope_scaling) is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_factor,
                "high_freq_factor": scaling.high_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
        raw["rope_scaling"] = dict(rope)  # read by tools that follow transformers before 5
    raw["rope_theta"] = config.rope_theta
    raw["rope_parameters"] = {"rope_theta": config.rope_theta, **rope}
    return raw
