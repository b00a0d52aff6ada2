"""LoRA of Llama-3.1-70B-Instruct on your own data, 128 rows of 2,048 tokens."""

from jaxsteer.optim import OptimConfig
from train.config import TrainConfig
from train.tasks import JsonlTask


def config() -> TrainConfig:
    return TrainConfig(
        model="meta-llama/Llama-3.1-70B-Instruct",
        task=JsonlTask(train="train.jsonl", chat=True, max_new_tokens=256),
        plan=("lora(rank=8) @ projections",),
        optim=OptimConfig(lr=2e-4, schedule="cosine", warmup=0.05),
        epochs=3,
        rows=128,
        row_length=2048,
        dtype="bfloat16",
        remat="full",
        eval_rows=64,
        out="runs/llama3_70b_lora",
    )
