"""The paper's claims on ListOps, decided by planned contrasts between methods with matched numbers of parameters."""

from common_matched import CONTRASTS, ENTRIES

from jaxsteer.optim import OptimConfig
from train.compare.config import CompareConfig
from train.config import TrainConfig
from train.data import ListOps
from train.evaluation.neutral import NEUTRAL
from train.tasks import ListOpsTask


def config() -> CompareConfig:
    problems = ListOps(
        operations=("MAX", "MIN", "MED", "SM", "FIRST", "LAST"),
        max_length=8,
        style="compact",
    )
    return CompareConfig(
        base=TrainConfig(
            model="smollm2-135m-instruct",
            task=ListOpsTask(problems),
            optim=OptimConfig(schedule="cosine", warmup=0.05),
            steps=154,  # of about 19 problems, twice as many as in compare_listops
            batch_size=2,
            sequence_length=96,
            validation_examples=500,
            test_examples=2000,
        ),
        entries=ENTRIES,
        contrasts=CONTRASTS,
        neutral=str(NEUTRAL),
        scoring="predictions",
        decoded=500,
        seeds=8,
        out="runs/compare_matched",
    )
