"""Search meshes, batch sizes and remat policies: rank all by the analytic estimate, compile the best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import gcd

from jaxsteer.models.config import ModelConfig
from jaxsteer.models.transformer import Remat
from train.config import TrainConfig
from train.devices.placement import MeshConfig
from train.plan.estimate import estimate, estimated_program, flops_of, roofline
from train.plan.figures import Figures, figures_of
from train.plan.question import Question
from train.plan.topology import Topology

MARGIN = 1.05
"""The estimate may be too high: settings that need up to this multiple of a chip's memory are still compiled."""

REMATS: tuple[Remat, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Candidate:
    """Settings to try, and their estimate.

    tokens_per_second  at the roofline
    total              seconds per token if arithmetic, memory traffic and network did not overlap at all
    peak               bytes per chip
    """

    config: TrainConfig
    tokens_per_second: float
    total: float
    peak: int

    def __str__(self) -> str:
        """The settings as options of a command."""
        c = self.config
        mesh = f"--mesh.data {c.mesh.data} --mesh.fsdp {c.mesh.fsdp} --mesh.tensor {c.mesh.tensor}"
        return f"{mesh} --batch-size {c.batch_size} --grad-accumulation {c.grad_accumulation} --remat {c.remat}"


def meshes(model_config: ModelConfig, topology: Topology) -> Iterator[MeshConfig]:
    """Every mesh of powers of two that uses all chips, divides the heads, and spans slices with its data axis alone."""
    chips = topology.chips // topology.slices
    powers = [2**k for k in range(chips.bit_length()) if chips % 2**k == 0]
    for tensor in powers:
        if gcd(model_config.heads, model_config.kv_heads) % tensor == 0:
            for fsdp in powers:
                if chips % (tensor * fsdp) == 0:
                    yield MeshConfig(topology.slices * chips // (tensor * fsdp), fsdp, tensor)


def batches(config: TrainConfig) -> Iterator[tuple[int, int]]:
    """(batch_size, grad_accumulation) to try: up to 16 microbatches, then batches two and four times as large."""
    for microbatches in (1, 2, 4, 8, 16):
        if config.batch_size % microbatches == 0:
            yield config.batch_size, microbatches
    yield 2 * config.batch_size, 1
    yield 4 * config.batch_size, 1


def candidates(question: Question) -> list[Candidate]:
    """All settings that may fit, fastest first; between equals, the one with less traffic first."""
    config, topology = question.config, question.topology
    fitting = []
    for mesh in meshes(question.model_config, topology):
        for batch_size, microbatches in batches(config):
            changed = replace(config, mesh=mesh, batch_size=batch_size, grad_accumulation=microbatches)
            try:
                program = estimated_program(question.with_config(changed))
            except ValueError:  # this mesh cannot split this batch
                continue
            for remat in REMATS:
                variant = question.with_config(replace(changed, remat=remat))
                guess = estimate(variant, program)
                if guess.peak <= MARGIN * topology.chip.memory:
                    bound = roofline(flops_of(variant, program).executed, guess, topology.chip, topology.chips)
                    tokens = batch_size * config.sequence_length
                    speed, total = tokens / bound.seconds, bound.total / tokens
                    fitting.append(Candidate(variant.config, speed, total, guess.peak))
    return sorted(fitting, key=lambda candidate: _rank(candidate.tokens_per_second, candidate.total))


def _rank(tokens_per_second: float, total: float) -> tuple[float, float]:
    """Sort key: tokens/s at the roofline to three digits, then the time without overlap."""
    return -float(f"{tokens_per_second:.3g}"), total


def search(
    question: Question,
    best: int,
    log: Callable[[str], None] = lambda text: None,
    *,
    compiled: bool = True,
) -> list[tuple[Candidate, Figures]]:
    """Compile candidates until `best` of them fit, and return those, fastest first.

    Args:
        question: about the training step; its mesh, batch and remat policy are where the search starts.
        best: number of settings to return, at most.
        log: called with a line of text on each candidate.
        compiled: compile for TPUs; steps for GPUs are always estimated.

    Raises:
        ValueError: by the estimate, nothing fits.
    """
    ranked = candidates(question)
    if not ranked:
        raise ValueError(
            f"{question.topology}: by the estimate no mesh, batch or remat policy fits; use more chips, or chips with "
            "more memory"
        )
    log(f"{len(ranked)} settings may fit, by the estimate")
    fitting: list[tuple[Candidate, Figures]] = []
    for candidate in ranked[: 3 * best]:
        figures = figures_of(question.with_config(candidate.config), compiled=compiled)
        log(f"{candidate}: {'fits' if figures.fits else 'does not fit'}")
        if figures.fits:
            fitting.append((candidate, figures))
        if len(fitting) == best:
            break
    return sorted(fitting, key=lambda pair: _rank(pair[1].tokens_per_second, pair[1].roofline.total / pair[1].tokens))
