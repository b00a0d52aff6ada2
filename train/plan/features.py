"""The features of a config's base model, without its weights."""

from __future__ import annotations

from pathlib import Path

from jaxsteer.io import load_config
from jaxsteer.models.config import ModelConfig, RopeScaling
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

KNOWN = {
    f"meta-llama/Llama-3.1-{size}{kind}": features
    for size, features in (("8B", _8B), ("70B", _70B))
    for kind in ("", "-Instruct")
}
"""Gated models, planned for without an account: the hub's id -> what its config.json says."""


def features_of(config: TrainConfig) -> ModelConfig:
    """What the config's model is like: from its local files where it has any, else from KNOWN, else from the hub.

    Raises:
        ValueError: nothing is known of the model, see `jaxsteer.io.load_config`.
    """
    if config.model in KNOWN and not Path(config.model).expanduser().exists():
        return KNOWN[config.model]
    return load_config(resolve_model(config.model))
