"""jaxsteer: steer and fine-tune language models in JAX, with weight updates and activation shifts as one idea.

The public API: pure functions over pytrees. Nothing here prints or keeps global state, and nothing but `load` reads
files; the rest of that is in `jaxsteer.io`.

    steered = jaxsteer.load("steering file, or a folder of peft, vLLM, llama.cpp, ...")
    hidden = forward(steered.model, steered.base, steered.steering, make_batch(tokens)).hidden

    loaded = jaxsteer.io.load_model("path or hub id")
    plan = (Slot("steer", NonlinearSteering(rank=8), sites=("block",)),)
    model = Model(loaded.config, plan)
    steering = init_steering(plan, loaded.config, jax.random.key(0))
    hidden = forward(model, loaded.base, steering, make_batch(tokens)).hidden
"""

from jaxsteer.adapters import Adapters, stack_adapters
from jaxsteer.batches import make_batch
from jaxsteer.folding import fold_all, fold_weights
from jaxsteer.inference.draws import Sampling
from jaxsteer.inference.generate import generate
from jaxsteer.interventions import (
    METHODS,
    DiReFT,
    DoRA,
    FixedVector,
    JoLA,
    LinearSteering,
    LoFiT,
    LoFiTScale,
    LoRA,
    LoReFT,
    NonlinearSteering,
    PiSSA,
    RsLoRA,
)
from jaxsteer.io.formats.convert import load
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.transformer import Model, forward, init_base, output_embedding
from jaxsteer.objectives.supervised import mean_loss
from jaxsteer.optim import OptimConfig, make_optimizer
from jaxsteer.orthogonality import Orthogonality, chance_overlap, joint_overlap, overlap_penalty, project_orthogonal
from jaxsteer.params import Params, combine, param_labels, partition
from jaxsteer.plans import parse_plan, plan_from_json, plan_to_json, validate_plan
from jaxsteer.steering import count_parameters, count_trained, init_steering, keep_kind, steering_shapes
from jaxsteer.training import TrainState, init_state, make_train_step, train_step
from jaxsteer.types import ACTIVATIONS, PROJECTIONS, SITES, Batch, Plan, Positions, Slot, Steering

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "METHODS",
    "PROJECTIONS",
    "SITES",
    "Adapters",
    "Batch",
    "DiReFT",
    "DoRA",
    "FixedVector",
    "JoLA",
    "LinearSteering",
    "LoFiT",
    "LoFiTScale",
    "LoRA",
    "LoReFT",
    "Model",
    "ModelConfig",
    "NonlinearSteering",
    "OptimConfig",
    "Orthogonality",
    "Params",
    "PiSSA",
    "Plan",
    "Positions",
    "RsLoRA",
    "Sampling",
    "Slot",
    "Steering",
    "TrainState",
    "chance_overlap",
    "combine",
    "count_parameters",
    "count_trained",
    "fold_all",
    "fold_weights",
    "forward",
    "generate",
    "init_base",
    "init_state",
    "init_steering",
    "joint_overlap",
    "keep_kind",
    "load",
    "make_batch",
    "make_optimizer",
    "make_train_step",
    "mean_loss",
    "output_embedding",
    "overlap_penalty",
    "param_labels",
    "parse_plan",
    "partition",
    "plan_from_json",
    "plan_to_json",
    "project_orthogonal",
    "stack_adapters",
    "steering_shapes",
    "train_step",
    "validate_plan",
]
