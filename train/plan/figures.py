"""The answer to a question: whether a compiled step fits, what uses the memory, and how fast it can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import NotRequired, TypedDict

from jaxsteer.flops import StepFlops
from train.config import TrainConfig
from train.plan.estimate import (
    Estimate,
    Roofline,
    decoding_resident,
    estimate,
    estimated_program,
    flops_of,
    resident,
    roofline,
)
from train.plan.hlo import Collectives
from train.plan.programs import Compiled, TooBig, compile_step
from train.plan.question import Question, Which
from train.plan.topology import CHIPS, GIB, Topology, parse_topology, sold_names
from train.run.program import Program


class TrafficJson(TypedDict):
    """`Traffic` in a JSON file."""

    count: int
    bytes: int
    sent: int


EFFICIENCY = 0.5
"""The share of the roofline's speed that a run is assumed to reach. For comparison: 38 to 43 % of H100's peak (Llama 3
405B, arXiv 2407.21783); on TPU v4 46.2 % without and 57.8 % with recomputation (PaLM 540B, arXiv 2204.02311)."""


class FiguresJson(TypedDict):
    """`Figures` in a JSON file, derived figures included."""

    which: Which
    topology: str
    mesh: str
    used: int
    attention: tuple[str, str]
    compiled: bool
    fits: bool
    needed: int
    parts: dict[str, int]
    collectives: dict[str, TrafficJson]
    flops: dict[str, float]
    roofline: dict[str, float]
    tokens: int
    estimated: int
    compile_seconds: NotRequired[float]
    words: str
    remedies: tuple[str, ...]
    sold: str
    slices: int
    chips: int
    limit: int
    seconds: float
    bound: str
    tokens_per_second: float
    mfu: float
    expected: NotRequired[dict[str, float]]


@dataclass(frozen=True)
class Figures:
    """What is known of a compiled step. Bytes are per chip, seconds per run of the step.

    used       chips in the mesh
    attention  kernel, and why it was chosen
    compiled   whether the chip's compiler was asked; otherwise everything is estimated
    needed     bytes at the peak; 0 where the compiler ran out of memory without saying how much it wanted
    parts      what uses them
    tokens     processed (training) or generated (decoding) per run of the step
    estimated  the analytic estimate of `needed`
    words      the compiler's message, if it ran out of memory
    remedies   changes that would make it fit, by the estimate
    """

    which: Which
    topology: Topology
    mesh: str
    used: int
    attention: tuple[str, str]
    compiled: bool
    fits: bool
    needed: int
    parts: dict[str, int]
    collectives: Collectives
    flops: StepFlops
    roofline: Roofline
    tokens: int
    estimated: int
    compile_seconds: float = 0.0
    words: str = ""
    remedies: tuple[str, ...] = ()

    @property
    def limit(self) -> int:
        """Bytes of a chip that a compiled step may use."""
        return int(self.topology.chip.memory)

    @property
    def tokens_per_second(self) -> float:
        """At the roofline."""
        return self.tokens / self.roofline.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation at the roofline: useful arithmetic over what the chips could do in that time."""
        return self.flops.useful / (self.roofline.seconds * self.topology.chips * self.topology.chip.flops)

    @property
    def expected(self) -> dict[str, float]:
        """Seconds, tokens/s and MFU at EFFICIENCY times the roofline's speed."""
        return {
            "efficiency": EFFICIENCY,
            "seconds": self.roofline.seconds / EFFICIENCY,
            "tokens_per_second": self.tokens_per_second * EFFICIENCY,
            "mfu": self.mfu * EFFICIENCY,
        }

    def to_json(self) -> FiguresJson:
        """Everything as plain values, derived figures included."""
        return asdict(self) | {  # type: ignore[return-value]
            "topology": self.topology.name,
            "sold": self.topology.sold,
            "slices": self.topology.slices,
            "chips": self.topology.chips,
            "flops": self.flops._asdict(),
            "limit": self.limit,
            "seconds": self.roofline.seconds,
            "bound": self.roofline.bound,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "expected": self.expected,
        }


def figures_of(question: Question, *, compiled: bool = True) -> Figures:
    """Answer a question.

    Args:
        compiled: compile for TPUs; steps for GPUs are always estimated.

    Raises:
        ValueError: the config does not fit the model or the devices, or libtpu is not installed.
    """
    program = estimated_program(question)
    guess = estimate(question, program)
    figures = _estimated(question, program, guess)
    if compiled and question.topology.chip.platform == "tpu":
        result = compile_step(question)
        if isinstance(result, TooBig):
            figures = _refused(figures, result)
        else:
            figures = _compiled(figures, question, program, guess, result)
    return figures if figures.fits else replace(figures, remedies=remedies(question))


def _estimated(question: Question, program: Program, guess: Estimate) -> Figures:
    """Figures from the estimate alone, without remedies."""
    config, topology = question.config, question.topology
    assert program.mesh is not None
    if question.which == "train":
        attention, tokens = program.attention, config.batch_size * config.sequence_length
    else:
        attention = ("dense", "queries read the whole cache")
        tokens = config.eval_batch_size * config.task.max_new_tokens
    flops = flops_of(question, program)
    return Figures(
        which=question.which,
        topology=topology,
        used=_mesh_size(program),
        mesh=" x ".join(f"{name} {size}" for name, size in program.mesh.shape.items()),
        attention=attention,
        compiled=False,
        fits=guess.peak <= topology.chip.memory,
        needed=guess.peak,
        parts=guess.parts,
        collectives={},
        flops=flops,
        roofline=roofline(flops.executed, guess, topology.chip, _mesh_size(program)),
        tokens=tokens,
        estimated=guess.peak,
    )


def _refused(figures: Figures, result: TooBig) -> Figures:
    """The figures of a step that the compiler could not fit; what the compiler does not say stays estimated."""
    return replace(
        figures,
        compiled=True,
        fits=False,
        needed=result.needed,
        words=result.message,
        compile_seconds=result.seconds,
    )


def _compiled(figures: Figures, question: Question, program: Program, guess: Estimate, result: Compiled) -> Figures:
    """The figures of a step that compiled. Its collectives give the network's time; memory traffic stays estimated."""
    if question.which == "train":
        parts = resident(program)
    else:
        parts = decoding_resident(program, question.config, question.prompt_length)
    sent = sum(traffic.sent for traffic in result.collectives.values())
    chip = question.topology.chip
    return replace(
        figures,
        compiled=True,
        fits=True,
        needed=result.peak,
        parts=parts | {"activations and temporaries": result.peak - sum(parts.values())},
        collectives=result.collectives,
        roofline=roofline(figures.flops.executed, replace(guess, sent=sent), chip, _mesh_size(program)),
        compile_seconds=result.seconds,
    )


def remedies(question: Question) -> tuple[str, ...]:
    """Changes that would make a step fit by the estimate, the smallest change first."""
    texts: list[str] = []
    for group in [*_cheaper_settings(question), *_larger_topologies(question)]:
        for candidate in group:
            try:
                program = estimated_program(candidate)
            except ValueError:
                continue
            peak, chips = estimate(candidate, program).peak, candidate.topology
            if peak <= chips.chip.memory and _mesh_size(program) == chips.chips:
                flags = _changed_flags(question, candidate)
                texts.append(f"{flags}: about {peak / GIB:.1f} of {chips.chip.memory / GIB:.1f} GiB")
                break
    return tuple(texts)


def _cheaper_settings(question: Question) -> list[list[Question]]:
    """Groups of questions with settings that need less memory; of each group only the first that fits is reported."""
    config = question.config
    if question.which == "decode":
        smaller = [rows for rows in (32, 16, 8, 4, 2, 1) if rows < config.eval_batch_size]
        fewer = [question.with_config(replace(config, eval_batch_size=rows)) for rows in smaller]
        return [*_even_batches(question), fewer]

    def accumulated(config: TrainConfig) -> Iterator[Question]:
        for doublings in range(1, 8):
            microbatches = config.grad_accumulation * 2**doublings
            if config.batch_size % microbatches == 0:
                yield question.with_config(replace(config, grad_accumulation=microbatches))

    groups = [*_even_batches(question), list(accumulated(config))]
    if config.remat != "full":
        full = replace(config, remat="full")
        groups += [[question.with_config(full)], list(accumulated(full))]
    return groups


def _even_batches(question: Question) -> list[list[Question]]:
    """Where the rows do not divide over all chips: the nearest numbers of rows that do, the smaller first."""
    config, chips = question.config, question.topology.chips
    mesh = config.mesh
    if mesh.data is not None and mesh.fsdp is not None:
        return []
    step = config.grad_accumulation * max(1, chips // max(1, mesh.tensor))
    if config.batch_size % step == 0:
        return []
    below, above = config.batch_size // step * step, (config.batch_size // step + 1) * step
    return [[question.with_config(replace(config, batch_size=rows))] for rows in (below, above) if rows]


def _larger_topologies(question: Question) -> list[list[Question]]:
    """Groups of questions about more chips of the same kind, then about kinds of TPU with more memory."""
    topology = question.topology
    single_slices = [parse_topology(name) for name in sold_names() if name.partition(":")[0] in CHIPS]
    same_chip = [parse_topology(t.name, topology.slices) for t in single_slices if t.chip == topology.chip]
    larger_chips = [chip for chip in CHIPS.values() if chip.platform == "tpu" and chip.memory > topology.chip.memory]
    groups = [
        [t for t in same_chip if t.chips > topology.chips],
        *([t for t in single_slices if t.chip == chip and t.chips >= topology.chips] for chip in larger_chips),
    ]
    asked = [[replace(question, topology=larger) for larger in group] for group in groups]
    even = [[more[-1][0] for larger in group if (more := _even_batches(larger))] for group in asked]
    return [plain + rounded for plain, rounded in zip(asked, even, strict=True)]


def _mesh_size(program: Program) -> int:
    assert program.mesh is not None
    return program.mesh.size


def _changed_flags(before: Question, after: Question) -> str:
    """The options that turn one question into the other, as typed."""
    flags = []
    for name in ("batch_size", "grad_accumulation", "remat", "eval_batch_size"):
        value = getattr(after.config, name)
        if value != getattr(before.config, name):
            flags.append(f"--{name.replace('_', '-')} {value}")
    if after.topology != before.topology:
        flags.append(f"--topology {after.topology.name}")
    return " ".join(flags)
