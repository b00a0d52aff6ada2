"""Show what is steered, and how far: `python -m train.inspect runs/x/steering.safetensors --prompt '[MAX 2 7 ] = '`.

Prints the plan with its parameter counts and, for a prompt, how far steering moves the residual stream at each layer,
‖h_steered − h‖ / ‖h‖, as a table and a plot.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from jaxsteer.batches import make_batch
from jaxsteer.io import compute_dtype, load_config, load_steering
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.transformer import Model, forward, init_base
from jaxsteer.plans import method_name, parse_plan
from jaxsteer.steering import steering_shapes
from jaxsteer.types import Array, Batch, Plan, PyTree, Steering
from train.base_models import load_steered, resolve_model
from train.cli import load_config_file, run_main
from train.config import TrainConfig
from train.devices.machine import enable_compilation_cache
from train.display.plots import plot_by_layer
from train.run.program import make_program, mesh_of

SHOWN_SITES = ("attn", "mlp", "block")


@dataclass(frozen=True)
class InspectConfig:
    """Show a plan, and the effect of a trained one."""

    source: Annotated[str, tyro.conf.Positional]
    """A steering file (*.safetensors), or a config file (*.py) or its name."""
    prompt: str | None = None
    """Measure how far steering moves the residual stream on this text (loads the model)."""
    model: str | None = None
    """Base model; by default the one named in the source."""
    plot: str | None = None
    """File for the plot; by default shift.png beside the steering file."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights and the compute; auto: float32 on CPU, bfloat16 on accelerators."""


@partial(jax.jit, static_argnames=("model", "sites"))
def relative_shift(
    model: Model, base: PyTree, steering: Steering, batch: Batch, sites: tuple[str, ...]
) -> dict[str, Array]:
    """‖h_steered − h‖ / ‖h‖ at each site and layer, averaged over the batch's tokens. [L] for each site."""
    zeros = jax.tree.map(jnp.zeros_like, steering)
    taps = lambda params: forward(model, base, params, batch, capture=sites).taps
    norm = lambda value: jnp.linalg.norm(value.astype(jnp.float32), axis=-1)
    real = (batch.segments > 0).astype(jnp.float32)

    def shift(there: Array, here: Array) -> Array:
        share = norm(there.astype(jnp.float32) - here.astype(jnp.float32)) / norm(here)
        return jnp.einsum("lbt,bt->l", share, real) / jnp.sum(real)

    return jax.tree.map(shift, taps(steering), taps(zeros))


def print_plan(plan: Plan, steering: Steering, config: ModelConfig) -> None:
    """Print a table with a row for each slot and site."""
    table = Table(title="Plan", title_justify="left")
    for column in ("slot", "method", "site", "layers", "positions"):
        table.add_column(column)
    table.add_column("parameters", justify="right")
    total = 0
    for slot in plan:
        layers = slot.active_layers(config.layers)
        shown = f"{layers[0]}-{layers[-1]}" if layers == tuple(range(layers[0], layers[-1] + 1)) else str(list(layers))
        for site in slot.sites:
            count = slot.method.count(steering[slot.name][site])
            total += count
            method = repr(slot.method).replace(type(slot.method).__name__, method_name(slot.method))
            table.add_row(slot.name, method, site, shown, str(slot.positions), f"{count:,}")
    table.add_section()
    table.add_row("total", "", "", "", "", f"{total:,}")
    Console().print(table)


def inspect_config(config: InspectConfig) -> None:
    """Show what a config would train, and the attention kernel on this machine.

    Raises:
        ValueError: a prompt is given, but nothing is trained yet.
    """
    if config.prompt:
        raise ValueError(f"{config.source}: an untrained plan moves nothing; --prompt needs a steering file")
    run = load_config_file(config.source, TrainConfig)
    model_config = load_config(resolve_model(config.model or run.model))
    plan = parse_plan(run.plan, model_config)
    print_plan(plan, steering_shapes(plan, model_config), model_config)
    base = jax.eval_shape(lambda key: init_base(model_config, key, compute_dtype(run.dtype)), jax.random.key(0))
    kernel, reason = make_program(run, model_config, base, steps=1, mesh=mesh_of(run)).attention
    print(f"attention on these devices: {kernel} ({reason})")


def inspect_shift(config: InspectConfig, prompt: str) -> None:
    """Show a steering file's plan, and how far it moves the residual stream on a prompt."""
    loaded, file = load_steered(config.source, config.model, config.dtype)
    assert file is not None
    print_plan(file.plan, file.steering, loaded.config)
    ids = loaded.require_tokenizer()(prompt)["input_ids"]
    if not ids:
        raise ValueError("--prompt: the prompt has no tokens; give some text")
    model, batch = Model(loaded.config, file.plan), make_batch(jnp.array([ids]))
    shifts = jax.device_get(relative_shift(model, loaded.base, file.steering, batch, SHOWN_SITES))
    table = Table(title=f"‖Δh‖ / ‖h‖ on {len(ids)} tokens, mean over tokens", title_justify="left")
    for column in ("layer", *SHOWN_SITES):
        table.add_column(column, justify="right")
    for layer in range(loaded.config.layers):
        table.add_row(str(layer), *(f"{shifts[site][layer]:.4f}" for site in SHOWN_SITES))
    Console().print(table)
    path = Path(config.plot) if config.plot else Path(config.source).parent / "shift.png"
    series = {site: np.asarray(shifts[site]).tolist() for site in SHOWN_SITES}
    plot_by_layer(path, series, ylabel="‖Δh‖ / ‖h‖", title=f"How far steering moves the model: {prompt[:40]!r}")
    print(f"plot: {path}")


def main() -> None:
    """Print the plan; with a prompt, also the shift by layer."""
    config = tyro.cli(InspectConfig, prog="python -m train.inspect", description=__doc__)
    enable_compilation_cache()
    if not config.source.endswith(".safetensors"):
        inspect_config(config)
    elif config.prompt is not None:
        inspect_shift(config, config.prompt)
    else:
        saved = load_steering(config.source)
        print(f"{config.source}: for {saved.model_name}")
        print_plan(saved.plan, saved.steering, saved.config)


if __name__ == "__main__":
    run_main(main)
