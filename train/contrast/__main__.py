"""Fixed steering from pairs of texts, without training: `python -m train.contrast pairs.jsonl --chat`.

A direction from the negative to the positive sides is taken at every layer; layer and strength are picked on held-out
pairs: the strongest effect that moves the model's predictions on neutral text by at most --max-kl. The result is an
ordinary steering file. Also written: all figures (contrast.json), effect against cost (contrast.png), and the
projections of tokens (tokens_1.png, ...). What has been measured is kept (sweep.jsonl): the same command goes on after
an interruption, and does not measure again for another --max-kl.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from jaxsteer.contrast import Directions, contrast_directions, contrast_steering, told_apart
from jaxsteer.io import LoadedModel, save_steering
from jaxsteer.io.files import write_json
from jaxsteer.io.provenance import derived_notes
from jaxsteer.models.config import check_new_tokens
from jaxsteer.models.transformer import Model, Network
from jaxsteer.types import Array, Positions
from train.base_models import describe, load
from train.cli import run_main
from train.contrast.kept import KeptCells
from train.contrast.material import Material, read_material
from train.contrast.pairs import Sides
from train.contrast.report import Outcome, Projecting, plot_outcome, print_answers, print_outcome
from train.contrast.rows import Rows
from train.contrast.settings import SWEEP, ContrastConfig
from train.contrast.sweep import Cell, Sweep, affordable, best, gain_of
from train.devices.machine import enable_compilation_cache
from train.display.console import print_facts, progress


def find_directions(config: ContrastConfig, network: Network, material: Material) -> tuple[Directions, np.ndarray]:
    """The directions of all layers, and the share of the validation pairs that each tells apart.

    Raises:
        FloatingPointError: the model's activations are not finite on the pairs.
    """

    def read(sides: Sides) -> tuple[Array, Array]:
        streams = Rows.of([*sides.positive, *sides.negative], config.batch_size).streams(network, config.reading)
        return streams[:, : len(sides.positive)], streams[:, len(sides.positive) :]

    positive, negative = read(material.pairs)
    directions = contrast_directions(positive, negative, config.direction)
    if not np.isfinite(np.asarray(directions.vectors)).all():
        raise FloatingPointError(f"{config.pairs}: the model's activations are not finite on these pairs; try float32")
    return directions, np.asarray(told_apart(directions, *read(material.validation)))


def search(
    config: ContrastConfig, measured: Sweep, kept: KeptCells, layers: Sequence[int], apart: np.ndarray
) -> Outcome:
    """Sweep the dial, and choose.

    Raises:
        ValueError: no strength is affordable, or none has an effect.
    """
    before = measured.untouched()
    with progress(len(layers) * len(set(config.strengths)), "Sweeping") as bar:
        cells = kept.sweep(measured, layers, config.strengths, bar.update)
    within = affordable(cells, config.max_kl)
    if measured.answering.scorer is not None:
        within = kept.with_answers(measured, within)
        done = {(cell.layer, cell.strength): cell for cell in within}
        cells = [done.get((cell.layer, cell.strength), cell) for cell in cells]
    by_layer = [[cell for cell in within if cell.layer == layer] for layer in layers]
    leading = [max(some, key=lambda cell: gain_of(cell, before)) for some in by_layer if some]
    best(leading, before)
    if measured.answering.scorer is None:
        leading = kept.with_answers(measured, leading)
    effect = (
        f"score by {config.scorer}"
        if config.scorer
        else "log-probability of the positive sides beside the negative ones, nats per token"
    )
    return Outcome(before, cells, leading, best(leading, before), apart, effect, config.max_kl)


def notes_of(config: ContrastConfig, material: Material, chosen: Cell, effect: str) -> dict[str, Any]:
    """Notes for the steering file: how to ask, and how it was made."""
    figures = {"layer": chosen.layer, "strength": chosen.strength, "kl": chosen.kl.mean, "effect": chosen.effect.mean}
    step = derived_notes(
        "contrast", None, settings=asdict(config), data=material.digests, chosen=figures | {"what": effect}
    )
    how = {"template": config.template, "chat": config.chat, "max_new_tokens": config.max_new_tokens}
    return how | {"date": material.encoding.date} | step


def save(config: ContrastConfig, loaded: LoadedModel, directions: Directions, outcome: Outcome, notes: Any) -> Path:
    """Write the steering file, the figures and the plot; the file's path."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    chosen, path = outcome.chosen, out / "steering.safetensors"
    write_json(out / "contrast.json", {"settings": asdict(config), **outcome.to_json()})
    plan, steering = contrast_steering(directions, chosen.layer, chosen.strength, Positions(config.positions))
    save_steering(
        path, steering, plan, model_name=config.model, config=loaded.config, notes=notes, sample=loaded.sample
    )
    plot_outcome(out / "contrast.png", outcome, f"{loaded.name}: {Path(config.pairs).name}")
    return path


def main() -> None:
    """Make the vector, pick its layer and strength, and print what it does and costs."""
    config = tyro.cli(ContrastConfig, prog="python -m train.contrast", description=__doc__)
    config.check()
    enable_compilation_cache()
    described = describe(config.model, config.dtype)
    layers = config.layers_to_try(described.config.layers)
    check_new_tokens(described.config, config.max_new_tokens)
    material = read_material(config, described)
    loaded = load(config.model, config.dtype)
    network = Network(Model(loaded.config), loaded.base, {})
    directions, apart = find_directions(config, network, material)
    measured = Sweep(
        network, directions, Positions(config.positions), material.validation, material.neutral, material.answering,
        config.batch_size,
    )  # fmt: skip
    kept = KeptCells(Path(config.out) / SWEEP, measured.digest())
    outcome = search(config, measured, kept, layers, apart)
    path = save(config, loaded, directions, outcome, notes_of(config, material, outcome.chosen, outcome.effect))
    print_outcome(outcome)
    print_answers([asked.text for asked in material.answering.asked], outcome)
    projecting = Projecting(network, loaded.require_tokenizer(), directions, outcome.chosen.layer)
    for number, (name, text) in enumerate(material.texts, 1):
        projecting.show(text, name, path.with_name(f"tokens_{number}.png"))
    chosen, norm = outcome.chosen, float(np.linalg.norm(jax.device_get(directions.vectors[outcome.chosen.layer])))
    print_facts(
        {
            "chosen": f"layer {chosen.layer}, strength {chosen.strength:g} (norm {norm * chosen.strength:.3g})",
            "pairs": f"{len(material.pairs.positive)}, and {len(material.validation.positive)} that decided",
            "steering": str(path),
            "plots": f"{path.with_name('contrast.png')}, {path.with_name('tokens_1.png')} and so on",
        }
    )


if __name__ == "__main__":
    run_main(main)
