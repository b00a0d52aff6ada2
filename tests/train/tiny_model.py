"""The dimensions of the model that tests train."""

from jaxsteer.models.config import ModelConfig

TINY = ModelConfig(
    vocab_size=259, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_width=48, tied_head=True, max_length=64
)
