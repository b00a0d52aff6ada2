"""Model configs of base models, without their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxsteer.io import load_config
from jaxsteer.models.config import ModelConfig, RopeScaling
from jaxsteer.models.families import config_from_hf
from train.base_models import resolve_model
from train.config import TrainConfig

_LLAMA_3_1 = {
    "vocab_size": 128_256,
    "kv_heads": 8,
    "head_dim": 128,
    "norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": RopeScaling("llama3", 8.0, low_factor=1.0, high_factor=4.0, original_length=8192),
    "max_length": 131_072,
}
_8B = ModelConfig(width=4096, layers=32, heads=32, mlp_width=14_336, **_LLAMA_3_1)  # type: ignore[arg-type]
_70B = ModelConfig(width=8192, layers=80, heads=64, mlp_width=28_672, **_LLAMA_3_1)  # type: ignore[arg-type]

_QWEN2_5_7B = {
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 32_768,
}
_MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32_768,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
    "max_position_embeddings": 32_768,
}
_GEMMA2_9B = {
    "model_type": "gemma2",
    "vocab_size": 256_000,
    "hidden_size": 3584,
    "intermediate_size": 14_336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
}


def _from_hf(raw: dict[str, Any]) -> ModelConfig:
    return config_from_hf(raw, raw["model_type"])[1]


KNOWN_CONFIGS = {
    **{f"meta-llama/Llama-3.1-8B{kind}": _8B for kind in ("", "-Instruct")},
    **{f"meta-llama/Llama-3.1-70B{kind}": _70B for kind in ("", "-Instruct")},
    **{f"Qwen/Qwen2.5-7B{kind}": _from_hf(_QWEN2_5_7B) for kind in ("", "-Instruct")},
    "mistralai/Mistral-7B-Instruct-v0.3": _from_hf(_MISTRAL_7B),
    **{f"google/gemma-2-9b{kind}": _from_hf(_GEMMA2_9B) for kind in ("", "-it")},
}
"""Hub id -> model config, as in the hub's config.json: models that can be checked offline."""


def model_config_of(config: TrainConfig) -> ModelConfig:
    """The model config of a run's base model: from local files, else from KNOWN_CONFIGS, else from the hub.

    Raises:
        ValueError: the model is in none of them, see `jaxsteer.io.load_config`.
    """
    if config.model in KNOWN_CONFIGS and not Path(config.model).expanduser().exists():
        return KNOWN_CONFIGS[config.model]
    return load_config(resolve_model(config.model))
