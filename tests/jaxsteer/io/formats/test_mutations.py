"""Damaged and hostile files of every format: a clear error or the right answer; never a crash, or much memory."""

import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from malformed import working_time
from mutations import mutants
from tiny import random_steering

from jaxsteer.io import load_model
from jaxsteer.io.formats import FORMATS, Given, WriteOptions
from jaxsteer.io.steered import SteeredModel
from jaxsteer.plans import parse_plan
from jaxsteer.steering import steering_shapes

GOLDEN = Path(__file__).resolve().parents[3] / "golden"
SECONDS = 20  # of CPU time, however busy the machine is; a file takes a hundredth of a second
MEMORY = 30_000_000  # bytes; the files have 2,000 to 280,000
WORDS = 50_000  # letters of an error, which names up to 1000 missing tensors, or quotes a value of a config
IN_ALL, EACH = 50, 1000


@dataclass(frozen=True)
class Sample:
    """A good file or folder of a format.

    source  its path under tests/golden, or a function that writes it into a folder and returns its path
    given   what the person says
    base    the base model, under tests/golden; None for whole models
    """

    source: str | Callable[[Path], Path]
    given: Given = field(default_factory=Given)
    base: str | None = "tiny_llama"


def written(name, *texts, **options):
    """A source that writes the tiny Llama with random steering in a format."""

    def write(folder):
        loaded, format = load_model(GOLDEN / "tiny_llama"), FORMATS[name]
        plan = parse_plan(texts, loaded.config)
        chosen = WriteOptions(**{key: value(folder) for key, value in options.items()})
        steered = SteeredModel(loaded, plan, random_steering(plan, loaded.config))
        (folder / name).mkdir(exist_ok=True)
        format.write(format.reduce(steered, chosen), folder / name, chosen)
        return folder / name

    return write


BLOCK = "nonlinear(rank=4) @ block"
LOW_RANK = Given(alpha=1.0, activation="silu", positions="all")
REFT = Given(activation="none", positions="first:2+last:1")
SAMPLES: dict[str, list[Sample]] = {
    "steerling": [Sample(f"interop/steerling/{case}", LOW_RANK) for case in ("block", "submodules", "fixed", "joint")],
    "pyreft": [Sample(f"interop/pyreft/{case}", REFT) for case in ("loreft", "noreft", "direft", "lobireft")],
    "saelens": [Sample(f"interop/saelens/{case}", Given(feature=7, strength=2.0)) for case in ("post", "bf16")],
    "peft": [
        Sample("interop/steerling/joint"),
        Sample(written("peft", "dora(rank=2) @ attn.q,mlp.down")),
        Sample("interop/peft/pickled", base="families/smollm3"),
    ],
    "adapters": [Sample("interop/adapters/seq-bn"), Sample("interop/adapters/mistral", base="families/mistral")],
    "mlx": [Sample("interop/mlx/lora"), Sample("interop/mlx/dora")],
    "jaxsteer": [Sample(written("jaxsteer", BLOCK))],
    "hf": [Sample(written("hf", "lora(rank=2) @ attn.q"), base=None)],
    "hf-steered": [Sample(written("hf-steered", BLOCK), base=None)],
    "hf-steerable": [Sample(written("hf-steerable", BLOCK), base=None)],
    "vllm": [Sample(written("vllm", BLOCK, "lora(rank=2) @ attn.q", over=written("hf-steerable", BLOCK)))],
    "gguf": [Sample(written("gguf", "lora(rank=2) @ attn.q"), base=None)],
    "gguf-lora": [Sample(written("gguf-lora", "lora(rank=2) @ attn.q"))],
    "gguf-control": [Sample(written("gguf-control", "fixed @ block layers=1,2"))],
    "repeng": [Sample(written("gguf-control", "fixed @ block layers=1,2"), Given(strength=1.0))],
}
"""Samples of each row of FORMATS."""


def test_every_format_has_samples():
    assert set(SAMPLES) == set(FORMATS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(format name) -> its samples as (path, base model, what the person says), each read once."""
    bases, ready = {None: None}, {}

    def one(sample):
        if sample.base not in bases:
            bases[sample.base] = load_model(GOLDEN / sample.base)
        made = isinstance(sample.source, str)
        path = GOLDEN / sample.source if made else sample.source(tmp_path_factory.mktemp("sample"))
        return path, bases[sample.base], sample.given

    def prepare(name):
        if name not in ready:
            ready[name] = [one(sample) for sample in SAMPLES[name]]
            for path, base, given in ready[name]:
                assert FORMATS[name].recognises(path)
                check(FORMATS[name].read(path, base, given))
        return ready[name]

    return prepare


def check(steered):
    """What was read must fit its plan, and be finite."""
    shapes = steering_shapes(steered.plan, steered.loaded.config)
    assert jax.tree.structure(steered.steering) == jax.tree.structure(shapes)
    for leaf, shape in zip(jax.tree.leaves(steered.steering), jax.tree.leaves(shapes), strict=True):
        assert leaf.shape == shape.shape
        assert jnp.issubdtype(leaf.dtype, jnp.floating)
        assert np.isfinite(np.asarray(leaf, np.float32)).all(), "not finite"


def attempt(name, seed, sample, target):
    """None, or what went wrong with one mutation."""
    path, base, given = sample
    what = mutants(path, seed, target)
    tracemalloc.start()
    try:
        with working_time(SECONDS), np.errstate(all="ignore"):
            for format in FORMATS.values():
                assert format.recognises(target) in (True, False)
            try:
                check(FORMATS[name].read(target, base, given))
            except ValueError as error:
                said = str(error)
                if str(target.parent) not in said and "--" not in said:
                    return f"{name} {seed} ({what}): the error names no file and no option: {said[:300]}"
                if len(said) > WORDS:
                    return f"{name} {seed} ({what}): an error of {len(said)} letters"
        peak = tracemalloc.get_traced_memory()[1]
        return f"{name} {seed} ({what}): {peak} bytes" if peak > MEMORY else None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{name} {seed} ({what}): {type(error).__name__}: {str(error)[:300]}"
    finally:
        tracemalloc.stop()


def attempts(name, seeds, prepared, tmp_path):
    """All that went wrong."""
    found = []
    samples = prepared(name)
    for seed in seeds:
        path, *rest = samples[seed % len(samples)]
        target = tmp_path / f"mutant{path.suffix}"
        found.append(attempt(name, seed, (path, *rest), target))
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    return [wrong for wrong in found if wrong]


@pytest.mark.parametrize("name", FORMATS)
def test_some_mutations(name, prepared, tmp_path):
    """IN_ALL mutations, dealt out among the formats."""
    at = list(FORMATS).index(name)
    wrong = attempts(name, range(at, IN_ALL, len(FORMATS)), prepared, tmp_path)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_all_mutations(name, prepared, tmp_path):
    wrong = attempts(name, range(EACH), prepared, tmp_path)
    assert not wrong, f"{len(wrong)} of {EACH}:\n" + "\n".join(wrong)
