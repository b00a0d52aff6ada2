"""One program of a run on one topology: whether it fits, what takes the memory, how fast it can be."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxsteer.flops import StepFlops
from jaxsteer.models.config import ModelConfig
from train.config import TrainConfig
from train.plan.estimate import Estimate, Roofline, cache_bytes, estimate, flops_of, make_estimated, resident, roofline
from train.plan.hlo import Collectives
from train.plan.programs import TooBig, Which, compile_for
from train.plan.topology import CHIPS, GIB, Topology, parse_topology, sold_names
from train.run.program import Program


@dataclass(frozen=True)
class Figures:
    """What is known of a program. Bytes are of one chip, seconds of one run of the program.

    used       chips that the mesh takes
    compiled   by the compiler of the chip, or False: from the analytic estimate alone
    needed     bytes at the peak; 0 where a compiler refused without saying
    parts      what takes them
    tokens     that one run processes (training) or makes (decoding)
    estimated  what the analytic estimate says for `needed`
    words      the compiler's, where it refused
    remedies   what would fit by the estimate
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
        """Bytes of a chip that a program may use."""
        return int(self.topology.chip.memory)

    @property
    def tokens_per_second(self) -> float:
        """At the roofline."""
        return self.tokens / self.roofline.seconds

    @property
    def mfu(self) -> float:
        """Useful arithmetic at the roofline, as a share of what the chips could do in that time."""
        return self.flops.useful / (self.roofline.seconds * self.topology.chips * self.topology.chip.flops)

    def to_json(self) -> dict[str, Any]:
        """Everything, derived figures too, as plain values."""
        return asdict(self) | {
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
        }


def figures_of(
    which: Which,
    config: TrainConfig,
    model_config: ModelConfig,
    topology: Topology,
    prompt_length: int,
    *,
    compiled: bool = True,
) -> Figures:
    """Plan one program.

    Args:
        compiled: compile for TPUs; GPUs are estimated anyway.

    Raises:
        ValueError: the config does not fit the model or the devices, or there is no compiler.
    """
    program = make_estimated(config, model_config, topology)
    guess = estimate(which, program, config, prompt_length)
    if not compiled or topology.chip.platform != "tpu":
        return _figures(which, config, topology, prompt_length, program, guess, model_config)
    _, found = compile_for(which, config, model_config, topology, prompt_length)
    if isinstance(found, TooBig):
        return replace(
            _figures(which, config, topology, prompt_length, program, guess, model_config),
            compiled=True,
            fits=False,
            needed=found.needed,
            words=found.words,
            compile_seconds=found.seconds,
            remedies=remedies(which, config, model_config, topology, prompt_length),
        )
    held = {name: size for name, size in resident(program).items() if which == "train" or name != "optimizer"}
    if which == "decode":
        held["cache"] = cache_bytes(program, config, prompt_length)
    rest = found.peak - sum(held.values())
    flops = flops_of(which, program, config, prompt_length)
    sent = sum(traffic.sent for traffic in found.collectives.values())
    return replace(
        _figures(which, config, topology, prompt_length, program, guess, model_config),
        compiled=True,
        fits=True,
        needed=found.peak,
        parts=held | {"activations and temporaries": rest},
        collectives=found.collectives,
        roofline=roofline(flops.executed, guess.moved, sent, topology.chip, _size(program)),
        compile_seconds=found.seconds,
        remedies=(),
    )


def _figures(
    which: Which,
    config: TrainConfig,
    topology: Topology,
    prompt_length: int,
    program: Program,
    guess: Estimate,
    model_config: ModelConfig,
) -> Figures:
    """By the estimate alone."""
    flops = flops_of(which, program, config, prompt_length)
    fits = guess.peak <= topology.chip.memory
    assert program.mesh is not None
    return Figures(
        which=which,
        topology=topology,
        used=_size(program),
        mesh=" x ".join(f"{name} {size}" for name, size in program.mesh.shape.items()),
        attention=program.attention if which == "train" else ("dense", "queries read the whole cache"),
        compiled=False,
        fits=fits,
        needed=guess.peak,
        parts=guess.parts,
        collectives={},
        flops=flops,
        roofline=roofline(flops.executed, guess.moved, guess.sent, topology.chip, _size(program)),
        tokens=config.batch_size * config.sequence_length
        if which == "train"
        else config.eval_batch_size * config.task.max_new_tokens,
        estimated=guess.peak,
        remedies=() if fits else remedies(which, config, model_config, topology, prompt_length),
    )


def remedies(
    which: Which, config: TrainConfig, model_config: ModelConfig, topology: Topology, prompt_length: int
) -> tuple[str, ...]:
    """What would fit by the estimate, the least change first."""
    found: list[str] = []
    for group in _variants(which, config, topology):
        for change, there in group:
            try:
                program = make_estimated(change, model_config, there)
            except ValueError:
                continue
            peak = estimate(which, program, change, prompt_length).peak
            if peak <= there.chip.memory and _size(program) == there.chips:
                text = _difference(config, change, topology, there)
                found.append(f"{text}: about {peak / GIB:.1f} of {there.chip.memory / GIB:.1f} GiB")
                break
    return tuple(found)


def _variants(which: Which, config: TrainConfig, topology: Topology) -> list[list[tuple[TrainConfig, Topology]]]:
    """Groups of changes; of each, the first that fits is worth a word."""
    here: list[list[TrainConfig]] = []
    if which == "decode":
        here = [
            [replace(config, eval_batch_size=rows) for rows in (32, 16, 8, 4, 2, 1) if rows < config.eval_batch_size]
        ]
    else:
        full = replace(config, remat="full")
        parts = [
            config.grad_accumulation * 2**k
            for k in range(1, 8)
            if config.batch_size % (config.grad_accumulation * 2**k) == 0
        ]
        here.append([replace(config, grad_accumulation=n) for n in parts])
        if config.remat != "full":
            here += [[full], [replace(full, grad_accumulation=n) for n in parts]]
    slices = [parse_topology(name) for name in sold_names() if name.partition(":")[0] in CHIPS]
    same = [parse_topology(each.name, topology.slices) for each in slices if each.chip == topology.chip]
    larger = [each for each in same if each.chips > topology.chips]
    groups = [[(change, topology) for change in group] for group in here] + [[(config, each) for each in larger]]
    roomier = [chip for chip in CHIPS.values() if chip.platform == "tpu" and chip.memory > topology.chip.memory]
    enough = [each for each in slices if each.chips >= topology.chips]
    return groups + [[(config, each) for each in enough if each.chip == chip] for chip in roomier]


def _size(program: Program) -> int:
    assert program.mesh is not None
    return program.mesh.size


def _difference(config: TrainConfig, change: TrainConfig, topology: Topology, there: Topology) -> str:
    names = ("grad_accumulation", "remat", "eval_batch_size")
    flags = [f"--{n.replace('_', '-')} {getattr(change, n)}" for n in names if getattr(change, n) != getattr(config, n)]
    if there != topology:
        flags.append(f"--topology {there.name}")
    return " ".join(flags)
