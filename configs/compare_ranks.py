"""Accuracy by number of parameters: post-block steering, LoRA and both together, of ranks 1 to 32."""

from dataclasses import replace

from common_small import small

from train.compare.config import CompareConfig, Entry, Method

RANKS = (1, 2, 4, 8, 16, 32)


def entries(rank: int) -> tuple[Entry, ...]:
    steering, lora = f"nonlinear(rank={rank}) @ block", f"lora(rank={rank}) @ projections"
    return (
        Entry(f"post-block r {rank}", Method((steering,)), lr=5e-3, series="post-block"),
        Entry(f"LoRA r {rank}", Method((lora,)), lr=6e-3, series="LoRA"),
        Entry(f"joint {rank} + {rank}", Method((lora, steering)), 5e-3, 2e-3, series="joint"),
    )


def config() -> CompareConfig:
    return replace(
        small("runs/compare_ranks", [entry for rank in RANKS for entry in entries(rank)], seeds=8), neutral=None
    )
