"""Show what is steered, and how far: `python -m train.inspect runs/x/steering.safetensors --prompt '[MAX 2 7 ] = '`.

Prints the plan with its parameter counts and, for a prompt, how far steering moves the residual stream at each layer,
‖h_steered − h‖ / ‖h‖, as a table and a plot. With --per-token, how far it moves each token, and how much more or less
likely it makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from rich.text import Text

from jaxsteer.batches import stack_rows
from jaxsteer.inference.scheduling import nonfinite_logits
from jaxsteer.inference.token_shift import per_token_shift
from jaxsteer.io import LoadedModel, SteeringFile, compute_dtype, load_config
from jaxsteer.models.config import ModelConfig, check_length
from jaxsteer.models.transformer import Model, forward, init_base
from jaxsteer.plans import method_name, parse_plan
from jaxsteer.steering import steering_shapes
from jaxsteer.types import Array, Batch, Plan, PyTree, Steering
from train.base_models import load_steered, read_steered, resolve_model
from train.cli import load_config_file, run_main
from train.config import TrainConfig
from train.data import Encoding, Example, TokenizedExample, encode_prompts
from train.data.prompts import check_unicode
from train.devices.machine import enable_compilation_cache
from train.display.heatmap import render_heatmap
from train.display.plots import plot_by_layer
from train.evaluation.replies import pieces_of
from train.evaluation.strength import parse_strength, show_strength
from train.run.program import make_program, mesh_of

SHOWN_SITES = ("attn", "mlp", "block")


@dataclass(frozen=True)
class InspectConfig:
    """Show a plan, and the effect of a trained one."""

    source: Annotated[str, tyro.conf.Positional]
    """A steering file (*.safetensors) or the folder of a run that has one, or a config file or its name."""
    prompt: str | None = None
    """Measure how far steering moves the residual stream on this text (loads the model)."""
    per_token: bool = False
    """Show the shift of each token of the prompt, and the change of its log-probability."""
    chat: bool | None = None
    """Put the prompt into the model's chat template, as a user's message; by default as in training. No other template
    is added."""
    strength: tuple[str, ...] = ()
    """Strength of the steering, see `jaxsteer generate`: for all slots (0.5) or for some (lora=0.5 post_block=2)."""
    model: str | None = None
    """Base model; by default the one named in the source."""
    other_base: bool = False
    """Steer a model of the same shape whose weights are not those that the steering was trained on."""
    plot: str | None = None
    """File for the plot (PNG); by default shift.png, or tokens.png with --per-token, beside the steering file."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights and the compute; auto: float32 on CPU, bfloat16 on accelerators."""

    def check(self) -> None:
        """Reject settings that show nothing.

        Raises:
            ValueError: names the option.
        """
        if self.prompt is not None and not self.prompt:
            raise ValueError("--prompt: the prompt is empty; give some text")
        if self.prompt is None and (self.per_token or self.strength or self.plot or self.chat):
            raise ValueError("--per-token, --strength, --plot and --chat need a --prompt")
        if self.plot is not None and Path(self.plot).suffix.lower() != ".png":
            raise ValueError(f"--plot {self.plot}: the picture is a PNG; give a name that ends in .png")
        if self.plot is not None and not Path(self.plot).resolve().parent.is_dir():
            raise ValueError(f"--plot {self.plot}: there is no folder {Path(self.plot).parent}")


@partial(jax.jit, static_argnames=("model", "sites"))
def relative_shift(
    model: Model,
    base: PyTree,
    steering: Steering,
    batch: Batch,
    sites: tuple[str, ...],
    strength: Mapping[str, float] | None = None,
) -> dict[str, Array]:
    """‖h_steered − h‖ / ‖h‖ at each site and layer, averaged over the batch's tokens. [L] for each site."""
    zeros = jax.tree.map(jnp.zeros_like, steering)
    taps = lambda params: forward(model, base, params, batch, capture=sites, strength=strength).taps
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
    if config.prompt is not None:
        raise ValueError(f"{config.source}: an untrained plan moves nothing; --prompt needs a steering file")
    run = load_config_file(config.source, TrainConfig)
    model_config = load_config(resolve_model(config.model or run.model))
    plan = parse_plan(run.plan, model_config)
    print_plan(plan, steering_shapes(plan, model_config), model_config)
    base = jax.eval_shape(lambda key: init_base(model_config, key, compute_dtype(run.dtype)), jax.random.key(0))
    kernel, reason = make_program(run, model_config, base, steps=1, mesh=mesh_of(run)).attention
    print(f"attention on these devices: {kernel} ({reason})")


def inspect_shift(config: InspectConfig, file: SteeringFile, prompt: str) -> None:
    """Show a steering file's plan, and how far it moves the residual stream on a prompt."""
    check_unicode(prompt, "--prompt")
    strength = parse_strength(config.strength, file.plan)
    loaded, _ = load_steered(file, config.model, config.dtype, other_base=config.other_base)
    print_plan(file.plan, file.steering, loaded.config)
    chat = file.notes.get("chat", False) if config.chat is None else config.chat
    encoding = Encoding(chat=chat, date=file.notes.get("date"))
    (tokens,), _ = encode_prompts([Example.of(prompt, None, "--prompt")], loaded.require_tokenizer(), encoding)
    check_length(loaded.config, len(tokens), "--prompt")
    prompt_batch = stack_rows([[tokens]], len(tokens))
    subject = Subject(Model(loaded.config, file.plan), loaded, file, strength, tokens, prompt_batch)
    if config.per_token:
        show_tokens(config, subject)
    else:
        show_layers(config, subject)


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    model, loaded  the steered model
    file           its steering
    strength       of its slots; None = 1
    tokens, batch  the prompt, and the same as a batch [1, T]
    """

    model: Model
    loaded: LoadedModel
    file: SteeringFile
    strength: Mapping[str, float] | None
    tokens: TokenizedExample
    batch: Batch

    def check(self, values: np.ndarray) -> None:
        """Refuse figures that are not finite."""
        if not np.isfinite(values).all():
            raise nonfinite_logits(self.tokens, self.loaded.config.vocab_size)


def show_layers(config: InspectConfig, subject: Subject) -> None:
    """The shift at each layer, mean over tokens, as a table and a plot."""
    network = (subject.model, subject.loaded.base, subject.file.steering, subject.batch)
    shifts = jax.device_get(relative_shift(*network, SHOWN_SITES, subject.strength))
    subject.check(np.stack([shifts[site] for site in SHOWN_SITES]))
    title = f"‖Δh‖ / ‖h‖ on {len(subject.tokens)} tokens, mean over tokens{show_strength(subject.strength)}"
    table = Table(title=title, title_justify="left")
    for column in ("layer", *SHOWN_SITES):
        table.add_column(column, justify="right")
    for layer in range(subject.loaded.config.layers):
        table.add_row(str(layer), *(f"{shifts[site][layer]:.4f}" for site in SHOWN_SITES))
    Console().print(table)
    path = Path(config.plot) if config.plot else subject.file.path.parent / "shift.png"
    series = {site: np.asarray(shifts[site]).tolist() for site in SHOWN_SITES}
    plot_by_layer(path, series, ylabel="‖Δh‖ / ‖h‖", title=f"How far steering moves the model: {config.prompt!r:.42}")
    print(f"plot: {path}")


def show_tokens(config: InspectConfig, subject: Subject) -> None:
    """The shift of each token, and the change of its log-probability: coloured text, a table and a picture."""
    network = (subject.model, subject.loaded.base, subject.file.steering, subject.batch)
    found = jax.device_get(per_token_shift(*network, strength=subject.strength))
    shift, change = found.shift[:, 0], found.change[0]
    subject.check(np.concatenate([shift, change[None]]))
    tokenizer = subject.loaded.require_tokenizer()
    pieces = pieces_of(subject.tokens.ids, tokenizer.decode)
    path = Path(config.plot) if config.plot else subject.file.path.parent / "tokens.png"
    console, given = Console(), show_strength(subject.strength)
    console.print(f"‖Δh‖ / ‖h‖ of each token, mean over layers (largest {shift.mean(0).max():.4f}){given}")
    console.print(render_heatmap(pieces, shift, label="‖Δh‖ / ‖h‖", png=path))
    console.print(f"change of its log-probability, nats (blue: less likely, sum {change.sum():+.4f})")
    console.print(render_heatmap(pieces, change))
    table = Table(title="‖Δh‖ / ‖h‖ by token", title_justify="left")
    for column in ("token", "mean over layers", "last layer", "Δ log p"):
        table.add_column(column, justify="right")
    for piece, of_layers, more in zip(pieces, shift.T, change, strict=True):
        table.add_row(Text(repr(piece)), f"{of_layers.mean():.4f}", f"{of_layers[-1]:.4f}", f"{more:+.4f}")
    console.print(table)
    print(f"plot: {path}")


def main() -> None:
    """Print the plan; with a prompt, also the shift by layer or by token."""
    config = tyro.cli(InspectConfig, prog="python -m train.inspect", description=__doc__)
    config.check()
    enable_compilation_cache()
    if not (config.source.endswith(".safetensors") or Path(config.source).is_dir()):
        inspect_config(config)
        return
    file = read_steered(config.source)
    assert file is not None
    if config.prompt is not None:
        inspect_shift(config, file, config.prompt)
    else:
        print(f"{file.path}: for {file.model_name}")
        print_plan(file.plan, file.steering, file.config)


if __name__ == "__main__":
    run_main(main)
