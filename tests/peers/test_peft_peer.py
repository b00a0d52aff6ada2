"""What is exported for peft, computed by peft itself: as an adapter and merged, in every family."""

import pytest
from asked import check_export

from jaxsteer.models.families import FAMILIES

pytestmark = pytest.mark.slow

PLANS = {
    "lora": ("lora(rank=3, alpha=7) @ projections", "lora(rank=2, alpha=0.3) @ attn.o layers=1 name=b"),
    "rslora": ("rslora(rank=3, alpha=7) @ attn.q,attn.v,mlp.down layers=0,2",),
    "dora": ("dora(rank=2, alpha=3) @ projections",),
    "dora and lora": ("dora(rank=2) @ attn.k,mlp.up layers=0,1", "lora(rank=3, alpha=1) @ attn.q,mlp.down name=b"),
    "pissa": ("pissa(rank=2, alpha=3) @ projections",),
    "affine": ("linear(rank=2, alpha=0.5) @ mlp.in", "lora @ attn.q name=b"),
    "affine behind": ("linear(rank=2) @ mlp,attn", "linear(rank=3) @ mlp.in name=b", "lora @ mlp.down name=c"),
}
CASES = [(family, ("lora", "dora")[i % 2]) for i, family in enumerate(FAMILIES)] + [
    *(("llama", plan) for plan in PLANS if plan != "lora"),
    *((family, plan) for family in ("gpt2", "phi3") for plan in ("lora", "dora", "dora and lora", "pissa", "affine")),
    ("gemma2", "affine"),
]


@pytest.mark.parametrize(("family", "name"), sorted(set(CASES)))
def test_peft_computes_what_we_compute(golden, tmp_path, family, name):
    check_export("peft", golden, family, PLANS[name], tmp_path)
