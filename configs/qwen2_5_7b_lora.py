"""LoRA of Qwen2.5-7B-Instruct on your own data, 64 rows of 2,048 tokens."""

from jaxsteer.optim import OptimConfig
from train.config import TrainConfig
from train.tasks import JsonlTask


def config() -> TrainConfig:
    return TrainConfig(
        model="Qwen/Qwen2.5-7B-Instruct",
        task=JsonlTask(train="train.jsonl", chat=True, max_new_tokens=256),
        plan=("lora(rank=8) @ projections",),
        optim=OptimConfig(lr=2e-4, schedule="cosine", warmup=0.05),
        epochs=3,
        rows=64,
        row_length=2048,
        dtype="bfloat16",
        remat="full",
        eval_rows=64,
        out="runs/qwen2_5_7b_lora",
    )
