"""Meshes, batch sizes and remat policies: all by the analytic estimate, the best of them by the compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import gcd

from jaxsteer.models.config import ModelConfig
from jaxsteer.models.transformer import Remat
from train.config import TrainConfig
from train.devices.placement import MeshConfig
from train.plan.estimate import estimate_training, flops_of, make_estimated, roofline
from train.plan.figures import Figures, figures_of
from train.plan.topology import Topology

MARGIN = 1.05
"""The estimate may be off: settings that need so many times a chip's memory are still given to the compiler."""

REMATS: tuple[Remat, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Candidate:
    """Settings, and what the estimate says of them: tokens/s at the roofline, seconds a token without any
    overlap, bytes at the peak.
    """

    config: TrainConfig
    tokens_per_second: float
    total: float
    peak: int

    def __str__(self) -> str:
        """As flags of a command."""
        c = self.config
        mesh = f"--mesh.data {c.mesh.data} --mesh.fsdp {c.mesh.fsdp} --mesh.tensor {c.mesh.tensor}"
        return f"{mesh} --batch-size {c.batch_size} --grad-accumulation {c.grad_accumulation} --remat {c.remat}"


def meshes(model_config: ModelConfig, topology: Topology) -> Iterator[MeshConfig]:
    """Every mesh of powers of two that uses all chips, divides the heads, and joins slices by its data axis."""
    chips = topology.chips // topology.slices
    powers = [2**k for k in range(chips.bit_length()) if chips % 2**k == 0]
    for tensor in powers:
        if gcd(model_config.heads, model_config.kv_heads) % tensor == 0:
            for fsdp in powers:
                if chips % (tensor * fsdp) == 0:
                    yield MeshConfig(topology.slices * chips // (tensor * fsdp), fsdp, tensor)


def batches(config: TrainConfig) -> Iterator[tuple[int, int]]:
    """(batch_size, grad_accumulation) to try: more and more microbatches, and batches twice and four times as large."""
    for parts in (1, 2, 4, 8, 16):
        if config.batch_size % parts == 0:
            yield config.batch_size, parts
    yield 2 * config.batch_size, 1
    yield 4 * config.batch_size, 1


def candidates(config: TrainConfig, model_config: ModelConfig, topology: Topology) -> list[Candidate]:
    """All settings that may fit, the fastest first; of equals, the one with less traffic."""
    found = []
    for mesh in meshes(model_config, topology):
        for rows, accumulation in batches(config):
            change = replace(config, mesh=mesh, batch_size=rows, grad_accumulation=accumulation)
            try:
                program = make_estimated(change, model_config, topology)
            except ValueError:  # this mesh cannot split these rows
                continue
            for remat in REMATS:
                own = replace(change, remat=remat)
                guess = estimate_training(program, own)
                if guess.peak > MARGIN * topology.chip.memory:
                    continue
                flops = flops_of("train", program, own, 0)
                line = roofline(flops.executed, guess.moved, guess.sent, topology.chip, topology.chips)
                tokens = rows * config.sequence_length
                found.append(Candidate(own, tokens / line.seconds, line.total / tokens, guess.peak))
    return sorted(found, key=lambda each: _rank(each.tokens_per_second, each.total))


def _rank(tokens_per_second: float, total: float) -> tuple[float, float]:
    """The roofline to three digits, then the time without overlap."""
    return -float(f"{tokens_per_second:.3g}"), total


def search(
    config: TrainConfig,
    model_config: ModelConfig,
    topology: Topology,
    best: int,
    say: Callable[[str], None] = lambda text: None,
    *,
    compiled: bool = True,
) -> list[tuple[Candidate, Figures]]:
    """Compile candidates until `best` of them fit; those, the fastest first. GPUs: by the estimate alone.

    Raises:
        ValueError: nothing may fit, by the estimate.
    """
    ranked = candidates(config, model_config, topology)
    if not ranked:
        raise ValueError(f"{topology}: by the estimate no mesh, batch or remat policy fits; take more or larger chips")
    say(f"{len(ranked)} settings may fit by the estimate")
    found: list[tuple[Candidate, Figures]] = []
    for candidate in ranked[: 3 * best]:
        figures = figures_of("train", candidate.config, model_config, topology, 0, compiled=compiled)
        say(f"{candidate}: {'fits' if figures.fits else 'does not fit'}")
        if figures.fits:
            found.append((candidate, figures))
        if len(found) == best:
            break
    return sorted(found, key=lambda pair: _rank(pair[1].tokens_per_second, pair[1].roofline.total / pair[1].tokens))
