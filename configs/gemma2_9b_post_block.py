"""Post-block steering of Gemma-2-9B-it on your own data, 64 rows of 2,048 tokens."""

from jaxsteer.optim import OptimConfig
from train.config import TrainConfig
from train.tasks import JsonlTask


def config() -> TrainConfig:
    return TrainConfig(
        model="google/gemma-2-9b-it",
        task=JsonlTask(train="train.jsonl", chat=True, max_new_tokens=256),
        plan=("nonlinear(rank=8) @ block",),
        optim=OptimConfig(lr=2e-3, schedule="cosine", warmup=0.05),
        epochs=3,
        rows=64,
        row_length=2048,
        dtype="bfloat16",
        remat="full",
        eval_rows=64,
        out="runs/gemma2_9b_post_block",
    )
