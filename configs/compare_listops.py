"""The paper's comparison of methods: SmolLM2-135M-Instruct on ListOps, one epoch of 1,500 problems each."""

from jaxsteer.optim import OptimConfig
from jaxsteer.orthogonality import Orthogonality
from train.compare.config import CompareConfig, Entry
from train.config import TrainConfig
from train.data import ListOps
from train.tasks import ListOpsTask

LORA = "lora(rank=8) @ projections"
POST_BLOCK = "nonlinear(rank=8) @ block"
ENDS = "positions=first:7+last:7"


def config() -> CompareConfig:
    problems = ListOps(
        operations=("MAX", "MIN", "MED", "SM", "FIRST", "LAST"),
        max_length=8,
        train=1500,
        validation=250,
        test=500,
        style="compact",
    )
    return CompareConfig(
        base=TrainConfig(
            model="smollm2-135m-instruct",
            task=ListOpsTask(problems),
            optim=OptimConfig(schedule="cosine", warmup=0.05),
            batch_size=2,
            sequence_length=96,  # about 16 problems per step, the paper's batch size
            validation_examples=250,
            test_examples=500,
            eval_batch_size=128,
        ),
        entries=(
            Entry("full fine-tuning", (), lr=1e-4, train_base=True),
            Entry("LoRA", (LORA,), lr=2e-3),
            Entry("LoReFT", (f"loreft(rank=8) @ block {ENDS}",), lr=3e-3),
            Entry("DiReFT", (f"direft(rank=8) @ block {ENDS}",), lr=3e-3),
            Entry("LoFiT", ("lofit @ attn.heads",), lr=1e-2, recipe="lofit", heads=32),
            Entry("JoLA", ("jola @ attn.heads",), lr=1e-2),
            Entry("post-MLP nonlinear", ("nonlinear(rank=8) @ mlp",), lr=5e-3),
            Entry("post-block fixed", ("fixed @ block",), lr=1e-2),
            Entry("post-block linear", ("linear(rank=8) @ block",), lr=5e-3),
            Entry("post-block nonlinear", (POST_BLOCK,), lr=5e-3),
            Entry("joint, no constraint", (LORA, POST_BLOCK), 5e-3, 2e-3, orthogonality=Orthogonality("none")),
            Entry("joint, penalty", (LORA, POST_BLOCK), 5e-3, 2e-3, orthogonality=Orthogonality("penalty")),
            Entry("joint, projection", (LORA, POST_BLOCK), 5e-3, 2e-3, orthogonality=Orthogonality("projection")),
        ),
        out="runs/compare_listops",
    )
