"""What is exported for MLX-LM, computed by MLX-LM itself, on the CPU."""

import pytest
from asked import check_export

pytestmark = pytest.mark.slow

PLANS = {
    "lora": ("lora(rank=3, alpha=7) @ projections",),
    "ranks": ("lora(rank=3, alpha=1) @ attn.q layers=1", "rslora(rank=2) @ mlp.up name=b", "linear @ mlp.in name=c"),
    "dora": ("dora(rank=2, alpha=3) @ attn.q,mlp.down",),
    "dora and pissa": ("dora(rank=2) @ mlp.up layers=0,1", "pissa(rank=2) @ attn.q name=b"),
}
BASES = ("llama", "mistral", "qwen3", "gemma2", "phi3")
# Not qwen2: MLX-LM passes over rope_parameters, the one place where the tiny model has its rotary base.


@pytest.mark.parametrize(
    ("base", "name"),
    [(base, ("lora", "dora")[i % 2]) for i, base in enumerate(BASES)] + [("llama", n) for n in list(PLANS)[1:]],
)
def test_mlx_computes_what_we_compute(golden, tmp_path, base, name):
    check_export("mlx", golden, base, PLANS[name], tmp_path)
