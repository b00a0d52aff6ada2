"""Accuracy by number of training examples, 50 to 5,000: post-block steering, LoRA, both together, full fine-tuning."""

from dataclasses import replace

from common_small import small

from train.compare.config import CompareConfig, Entry, Method

COUNTS = (50, 150, 500, 1500, 5000)
STEERING, LORA = "nonlinear(rank=8) @ block", "lora(rank=1) @ projections"
SMALL = (LORA, "nonlinear(rank=4) @ block")


def entries(count: int) -> tuple[Entry, ...]:
    made = lambda name, plan, lr, weights_lr=None, **rest: Entry(
        f"{name}, {count:,}", Method(plan, train_examples=count, **rest), lr, weights_lr, series=name
    )
    return (
        made("post-block r 8", (STEERING,), 5e-3),
        made("LoRA r 1", (LORA,), 2e-3),
        made("joint 1 + 4", SMALL, 5e-3, 2e-3),
        made("full fine-tuning", (), 9e-4, train_base=True),
    )


def config() -> CompareConfig:
    found = small("runs/compare_data", [entry for count in COUNTS for entry in entries(count)], seeds=8)
    return replace(found, axis="examples", neutral=None)
