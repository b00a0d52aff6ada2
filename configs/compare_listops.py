"""The paper's comparison of methods: SmolLM2-135M-Instruct on ListOps, one epoch of 1,500 problems each."""

from jaxsteer.optim import OptimConfig
from jaxsteer.orthogonality import Orthogonality
from train.compare.config import CompareConfig, Entry, LoFiT, Method
from train.config import TrainConfig
from train.data import ListOps
from train.tasks import ListOpsTask

LORA = "lora(rank=8) @ projections"
POST_BLOCK = "nonlinear(rank=8) @ block"
JOINT = (LORA, POST_BLOCK)
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
            Entry("full fine-tuning", Method((), train_base=True), lr=1e-4),
            Entry("LoRA", Method((LORA,)), lr=2e-3),
            Entry("LoReFT", Method((f"loreft(rank=8) @ block {ENDS}",)), lr=3e-3),
            Entry("DiReFT", Method((f"direft(rank=8) @ block {ENDS}",)), lr=3e-3),
            Entry("LoFiT", Method(("lofit @ attn.heads",)), lr=1e-2, lofit=LoFiT(heads=32)),
            Entry("JoLA", Method(("jola @ attn.heads",)), lr=1e-2),
            Entry("post-MLP nonlinear", Method(("nonlinear(rank=8) @ mlp",)), lr=5e-3),
            Entry("post-block fixed", Method(("fixed @ block",)), lr=1e-2),
            Entry("post-block linear", Method(("linear(rank=8) @ block",)), lr=5e-3),
            Entry("post-block nonlinear", Method((POST_BLOCK,)), lr=5e-3),
            Entry("joint, no constraint", Method(JOINT, orthogonality=Orthogonality("none")), 5e-3, 2e-3),
            Entry("joint, penalty", Method(JOINT, orthogonality=Orthogonality("penalty")), 5e-3, 2e-3),
            Entry("joint, projection", Method(JOINT, orthogonality=Orthogonality("projection")), 5e-3, 2e-3),
        ),
        out="runs/compare_listops",
    )
