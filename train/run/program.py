"""The static part of a run, without weights and data: model, optimizer, mesh, shardings, and the compiled step.

Training puts real arrays into it; the fit check (`train.plan`) compiles the same step from shapes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsteer.models.attention import Kernel, choose_attention
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.transformer import Model, write_scales
from jaxsteer.objectives.objective import Inputs, Objective
from jaxsteer.objectives.supervised import SUPERVISED
from jaxsteer.optim import make_optimizer
from jaxsteer.orthogonality import Orthogonality
from jaxsteer.params import Params, param_labels, partition
from jaxsteer.plans import parse_plan
from jaxsteer.sharding import MeshShape, base_shardings, check_shape, optimizer_shardings, steering_shardings
from jaxsteer.steering import param_specs, steering_shapes
from jaxsteer.training import Metrics, TrainState, init_state, make_train_step
from jaxsteer.types import Array, PyTree
from train.config import TrainConfig
from train.devices.placement import Placement, place_on


@dataclass(frozen=True)
class Program:
    """What is static about a run.

    model, tx, orthogonality, labels  as `train_step` and `partition` take them
    mesh       None on a single device of this process: nothing is placed then
    attention  the attention kernel, and why it is chosen
    base       shapes of the base tree
    skip_nonfinite, objective  as `train_step` takes them
    """

    model: Model
    tx: optax.GradientTransformation
    orthogonality: Orthogonality
    labels: PyTree
    mesh: Mesh | None
    attention: tuple[Kernel, str]
    base: PyTree
    skip_nonfinite: bool = False
    objective: Objective = SUPERVISED

    @cached_property
    def shapes(self) -> tuple[TrainState, Params]:
        """State and frozen leaves as `jax.ShapeDtypeStruct`s, with shardings if there is a mesh."""
        whole = Params(self.base, steering_shapes(self.model.plan, self.model.config))
        trained, frozen = partition(whole, self.labels)
        state = jax.eval_shape(partial(init_state, tx=self.tx), trained, key=jax.eval_shape(lambda: jax.random.key(0)))
        if self.mesh is None:
            return state, frozen
        specs = param_specs(self.model.plan, self.model.config)
        where = Params(base_shardings(self.base, self.mesh), steering_shardings(specs, self.mesh))
        trained_at, frozen_at = partition(where, self.labels)
        put = lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)
        everywhere = NamedSharding(self.mesh, P())
        moments_at = optimizer_shardings(self.tx, state.opt_state, trained, trained_at, self.mesh)
        state = jax.tree.map(put, state, TrainState(trained_at, moments_at, everywhere, everywhere))  # type: ignore[arg-type]
        return state, jax.tree.map(put, frozen, frozen_at)

    @cached_property
    def jitted(self) -> jax.stages.Wrapped:
        """The step, (state, inputs, frozen, given) -> (state, metrics), to be traced `on_mesh`; donates the state."""
        out = None
        if self.mesh is not None:
            out = (jax.tree.map(lambda leaf: leaf.sharding, self.shapes[0]), NamedSharding(self.mesh, P()))
        return make_train_step(
            self.model,
            self.tx,
            orthogonality=self.orthogonality,
            skip_nonfinite=self.skip_nonfinite,
            objective=self.objective,
            out_shardings=out,
        )

    @property
    def placement(self) -> Placement:
        """Puts arrays on the mesh."""
        return Placement(self.mesh)

    def on_mesh(self) -> AbstractContextManager:
        """The context in which to trace and call this run's functions."""
        return self.placement.on_mesh()

    def step(
        self, state: TrainState, inputs: Inputs, frozen: Params, given: PyTree = None
    ) -> tuple[TrainState, Metrics]:
        """One training step on placed arrays -> (state, metrics)."""
        with self.on_mesh():
            return self.jitted(state, inputs, frozen, given)

    def begin(self, trained: Params, key: Array) -> TrainState:
        """The state before the first step, placed as the step expects it. Every process passes the same values."""
        if self.mesh is None:
            return init_state(trained, self.tx, key)
        shapes = self.shapes[0]
        trained, data = self.placement.tree(trained, shapes.params), np.asarray(jax.random.key_data(key))
        init = lambda trained, data: init_state(trained, self.tx, jax.random.wrap_key_data(data))
        return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes))(trained, data)

    def place_frozen(self, frozen: Params) -> Params:
        """Place the leaves that do not train as the step expects them."""
        return self.placement.tree(frozen, self.shapes[1])


def make_program(
    config: TrainConfig,
    model_config: ModelConfig,
    base: PyTree,
    *,
    steps: int,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> Program:
    """Build a run's program.

    Args:
        config: the run.
        model_config: config of its base model.
        base: the base tree, arrays or shapes.
        steps: length of the schedules, in updates.
        mesh: from `mesh_of`, or a mesh of devices of another machine (then give `platform`).
        platform: cpu, gpu or tpu; by default this process's.

    Raises:
        ValueError: a plan that does not fit the model, a mesh that cannot split the model or the batch.
    """
    if not config.sequence_length:
        raise ValueError("--sequence-length 0: only a training run chooses it by its data; give a number")
    plan = parse_plan(config.plan, model_config)
    if mesh is not None:
        check_shape(
            MeshShape(**mesh.shape),
            devices=mesh.size,
            rows=config.microbatch,
            heads=model_config.heads,
            kv_heads=model_config.kv_heads,
            length=config.sequence_length,
            split_sequence=config.mesh.split_sequence,
        )
    base = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base)
    model = Model(
        model_config,
        plan,
        remat=config.remat,
        train_base=config.train_base,
        attention=config.attention,
        split_sequence=config.mesh.split_sequence,
    )
    orthogonality = config.orthogonality.resolve(plan)
    params = Params(base, steering_shapes(plan, model_config))
    labels = param_labels(params, plan, train_base=config.train_base, frozen=config.freeze)
    scales = partial(write_scales, model_config)
    tx = make_optimizer(config.optim, labels, steps, plan, orthogonality, scales_of=scales)
    return Program(
        model=model,
        tx=tx,
        orthogonality=orthogonality,
        labels=labels,
        mesh=mesh,
        attention=kernel_of(config, model_config, base, mesh, platform),
        base=base,
        skip_nonfinite=config.nonfinite == "skip",
        objective=config.loss,
    )


def kernel_of(
    config: TrainConfig,
    model_config: ModelConfig,
    base: PyTree,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> tuple[Kernel, str]:
    """The attention kernel that a run uses, and why."""
    if config.attention != "auto":
        return config.attention, "as asked"
    return choose_attention(
        platform or jax.default_backend(),
        rows=config.microbatch,
        length=config.sequence_length,
        heads=model_config.heads,
        kv_heads=model_config.kv_heads,
        head_dim=model_config.head_dim,
        dtype=base["embed"]["embedding"].dtype,
        softcap=model_config.attn_softcap,
        mesh=mesh if mesh is not None and mesh.size > 1 else None,
    )


def mesh_of(config: TrainConfig, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of a run on `devices` (by default all); None for a single device of this process.

    Raises:
        ValueError: the devices do not make the mesh that the config asks for.
    """
    return place_on(config.mesh, config.microbatch, devices).mesh
