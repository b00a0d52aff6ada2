"""Methods with matched numbers of parameters, and the contrasts planned between them; see docs/results_design.md."""

from __future__ import annotations

from jaxsteer.orthogonality import Orthogonality
from train.compare.config import Contrast, Entry, Method

ENDS = "positions=first:7+last:7"
POST_BLOCK = "nonlinear(rank=8) @ block"
SMALL = ("lora(rank=1) @ projections", "nonlinear(rank=4) @ block")
LARGE = ("lora(rank=8) @ projections", POST_BLOCK)


def joint(plan: tuple[str, ...], name: str, constraint: str) -> Entry:
    """LoRA and post-block steering together."""
    orthogonality = Orthogonality(constraint)  # type: ignore[arg-type]  # one of its three kinds
    return Entry(f"joint {name}, {constraint}", Method(plan, orthogonality=orthogonality), 5e-3, 2e-3)


ENTRIES = (
    Entry("post-block r 8", Method((POST_BLOCK,)), lr=5e-3),
    Entry("LoRA r 1", Method(("lora(rank=1) @ projections",)), lr=6e-3),
    Entry("LoReFT r 8", Method(("loreft(rank=8) @ block",)), lr=3e-3),
    Entry("post-MLP r 8", Method(("nonlinear(rank=8) @ mlp",)), lr=5e-3),
    joint(SMALL, "1 + 4", "none"),
    joint(SMALL, "1 + 4", "projection"),
    joint(SMALL, "1 + 4", "penalty"),
    joint(LARGE, "8 + 8", "none"),
    joint(LARGE, "8 + 8", "projection"),
    joint(LARGE, "8 + 8", "penalty"),
    Entry("LoRA r 8, mlp.down and attn.o", Method(("lora(rank=8) @ mlp.down,attn.o",)), lr=6e-3),
    Entry("LoReFT r 8, f7+l7", Method((f"loreft(rank=8) @ block {ENDS}",)), lr=3e-3),
    Entry("DiReFT r 8, f7+l7", Method((f"direft(rank=8) @ block {ENDS}",)), lr=3e-3),
    Entry("full fine-tuning", Method((), train_base=True), lr=1e-4),
)

CONTRASTS = (
    Contrast("post-block against LoRA", "post-block r 8", ("LoRA r 1",)),
    Contrast("post-block against LoReFT", "post-block r 8", ("LoReFT r 8",)),
    Contrast("post-block against post-MLP", "post-block r 8", ("post-MLP r 8",)),
    Contrast("joint against its best part", "joint 1 + 4, none", ("LoRA r 1", "post-block r 8")),
    Contrast("keeping them orthogonal", "joint 1 + 4, projection", ("joint 1 + 4, none",)),
)
