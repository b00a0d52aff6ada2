"""What it costs to keep predictions on neutral text: accuracy and KL by the weight of the penalty in the loss."""

from common_small import small

from train.compare.config import CompareConfig, Entry, Method
from train.config.run import KeepConfig

WEIGHTS = (0.0, 0.1, 1.0, 10.0)
STEERING, LORA = "nonlinear(rank=8) @ block", "lora(rank=1) @ projections"
SMALL = (LORA, "nonlinear(rank=4) @ block")


def entries(weight: float) -> tuple[Entry, ...]:
    keep = KeepConfig(weight, "runs/pretrain_listops/keep.txt", length=24) if weight else KeepConfig()
    made = lambda name, plan, lr, weights_lr=None: Entry(
        f"{name}, {weight:g}", Method(plan, keep=keep), lr, weights_lr, series=name
    )
    return (
        made("post-block r 8", (STEERING,), 5e-3),
        made("LoRA r 1", (LORA,), 6e-3),
        made("joint 1 + 4", SMALL, 5e-3, 2e-3),
    )


def config() -> CompareConfig:
    return small("runs/compare_keeping", [entry for weight in WEIGHTS for entry in entries(weight)], seeds=8)
