"""A run before it starts (`--dry-run`): what trains on what, how much memory a step needs, and examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from jaxsteer.io import Tokenizer
from jaxsteer.optim import Group
from jaxsteer.plans import format_plan
from jaxsteer.steering import count_parameters, steering_shapes
from jaxsteer.types import PyTree
from train.data import Split, TokenizedExample
from train.display.console import get_console, print_facts
from train.run.memory import compiled_bytes, enough_memory
from train.run.program import Program
from train.run.start import Prepared
from train.run.training import step_batch

EXAMPLES = 3
"""Number of training examples that are shown."""

MOST_TOKENS = 400
"""Number of tokens of an example that are shown: its end, where it is longer."""


def print_preview(prepared: Prepared) -> None:
    """Print everything about a run that can be known without its weights; compiles its step.

    Raises:
        ValueError: the compiled step does not fit the devices.
    """
    out, config = get_console(), prepared.config
    print_facts(_data_facts(prepared))
    if prepared.program.model.plan:
        out.print(_plan_table(prepared))
    print_facts(_schedule_facts(prepared))
    print_facts(_memory_facts(prepared))
    tokenizer = prepared.model.require_tokenizer()
    coloured = out.color_system is not None
    mark = Text("the loss is on these", style=SUPERVISED) if coloured else Text("⟦the loss is on these⟧")
    out.print(Text("\nTraining examples as the model sees them (").append(mark).append("):"))
    for example in prepared.data.source.examples[:EXAMPLES]:
        out.print(shown(example, tokenizer, coloured=coloured), soft_wrap=True, highlight=False)
    out.print(f"\nNothing was trained, and nothing written to {config.out}.", markup=False, highlight=False)


def _data_facts(prepared: Prepared) -> dict[str, str]:
    config, source, report = prepared.config, prepared.data.source, prepared.data.report
    every = report.tokens / report.kept
    known, rows = not math.isnan(source.fill), source.batch_size * prepared.steps
    real = f"about {round(rows * config.sequence_length * source.fill):,} tokens in all" if known else ""
    facts = {
        "data": str(report),
        "examples": f"{every:,.1f} tokens on average, {report.longest:,} at most; a row has {config.sequence_length:,}",
        "batch": f"{config.batch_size} rows of {config.sequence_length:,} tokens"
        + (f", {config.microbatch} at a time" if config.grad_accumulation > 1 else "")
        + (f"; {100 * source.fill:.1f} % of them real" if known else ""),
        "steps": f"{prepared.steps:,}, {prepared.steps / source.steps(1.0):.4g} passes over the data"
        + (f"; {real}" if known else ""),
    }
    splits: tuple[Split, ...] = ("validation", "test")
    for split in splits:
        if config.evaluate_every or split == "test":
            facts[split] = f"{len(prepared.evaluator.examples(split)):,} examples"
    return facts


def _plan_table(prepared: Prepared) -> Table:
    plan, config = prepared.program.model.plan, prepared.config
    shapes = steering_shapes(plan, prepared.model.config)
    table = Table(title="Plan", title_justify="left")
    for column in ("slot", "what"):
        table.add_column(column, overflow="fold")
    table.add_column("parameters", justify="right")
    for slot, text in zip(plan, format_plan(plan), strict=True):
        frozen = " (frozen)" if slot.name in config.freeze else ""
        table.add_row(escape(slot.name + frozen), escape(text), f"{count_parameters(shapes[slot.name]):,}")
    return table


def _schedule_facts(prepared: Prepared) -> dict[str, str]:
    """Parameters that train, and their learning rates."""
    optim, steps, program = prepared.config.optim, prepared.steps, prepared.program
    groups: tuple[Group, ...] = ("activations", "weights")
    trained = set(jax.tree.leaves(program.labels))
    facts = {"trained": f"{count_parameters(program.shapes[0].params):,} parameters"}
    for group in groups:
        if group in trained:
            kind, warmup = optim.schedule_of(group, steps)
            facts[f"lr of {group}"] = f"{optim.peak(group):g} after {warmup} steps of warmup, then {kind}"
    return facts


def _memory_facts(prepared: Prepared) -> dict[str, str]:
    """Sizes of the trees, and what the compiler says of the step, on the fullest device."""
    program = prepared.program
    state = program.shapes[0]
    facts = {
        "base": _size(prepared.model.base),
        "trained, with optimizer": _size((state.params, state.opt_state)),
    }
    memory = _compiled_memory(prepared, program)
    if memory is not None:
        facts["memory of a step"] = f"{size(memory)} on each device, weights included, says the compiler"
    return facts


def _compiled_memory(prepared: Prepared, program: Program) -> int | None:
    """Bytes that the compiled step needs; None if the compiler does not say."""
    config, (state, frozen) = prepared.config, program.shapes
    rows, place = config.microbatch, program.placement
    own = place.own_rows(rows)
    batch = place.batch(step_batch(config, prepared.data.source, 0, own), rows, own.start)
    given = prepared.algorithm.given_shapes(config, prepared.model, program)
    with program.on_mesh(), enough_memory(config, "step"):
        compiled = program.jitted.lower(state, batch, frozen, given).compile()
    return compiled_bytes(compiled, None if config.train_base else prepared.model.base, given)


def _size(tree: PyTree) -> str:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not _is_key(leaf)]
    return size(sum(leaf.size * jax.numpy.dtype(leaf.dtype).itemsize for leaf in leaves))


def size(count: float) -> str:
    """Bytes in a unit that suits them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def _is_key(leaf: jax.ShapeDtypeStruct) -> bool:
    return bool(jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key))


SUPERVISED, PLAIN, SCALED = "bold green", "dim", "bold yellow"


def shown(example: TokenizedExample, tokenizer: Tokenizer, *, coloured: bool = True) -> Text:
    """An example as coloured text: what the loss is on stands out, and a weight that is not 1 is written after it.

    Without colours, it is in brackets.
    """
    opening, closing = ("", "") if coloured else ("⟦", "⟧")
    text = Text(f"{example.source}: ", style="cyan")
    first = max(0, len(example) - MOST_TOKENS)
    text.append("... " if first else "", style=PLAIN)
    for start, end, weight in _runs(example.weights[first:].tolist()):
        piece = tokenizer.decode(example.ids[first + start : first + end].tolist(), skip_special_tokens=False)
        if not weight:
            text.append(piece, style=PLAIN)
            continue
        text.append(f"{opening}{piece}{closing}", style=SUPERVISED if weight == 1 else SCALED)
        text.append("" if weight == 1 else f"[weight {weight:g}]", style="yellow")
    return text


def _runs(weights: Sequence[float]) -> list[tuple[int, int, float]]:
    """(start, end, weight) of each run of equal weights."""
    runs: list[tuple[int, int, float]] = []
    for index, weight in enumerate(weights):
        if runs and runs[-1][2] == weight:
            runs[-1] = (runs[-1][0], index + 1, weight)
        else:
            runs.append((index, index + 1, weight))
    return runs
