"""The stage attention: the kernels against each other, in time and against dense attention in fp32."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsteer.models.attention import Kernel, Span, attention
from jaxsteer.types import Array
from train.bench.accelerator.inputs import random_batch
from train.bench.accelerator.records import LARGE, NVIDIA, TPU, Context, Figures, Need, Row, Stage
from train.bench.accelerator.settings import AcceleratorBench

REPEATS = 10
"""Number of timed calls; the median is reported."""

Attend = Callable[[Array, Array, Array, Span], Array]


class Candidate(NamedTuple):
    """A way to compute attention: its name, the function (q, k, v, span) -> output, and what it needs."""

    name: str
    attend: Attend
    needs: tuple[Need, ...] = (LARGE,)


def _of(kernel: Kernel) -> Attend:
    return lambda q, k, v, span: attention(q, k, v, span, kernel=kernel)


def _causal(q: Array, k: Array, v: Array, span: Span) -> Array:
    """cuDNN's kernel without segments: right for rows of one example. What a mask costs is the difference."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _triton(q: Array, k: Array, v: Array, span: Span) -> Array:
    """JAX's Triton kernel, which skips blocks above the diagonal and knows segments, but not groups of heads."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return mha(q, k, v, span.segments, sm_scale=q.shape[-1] ** -0.5, causal=True)


CANDIDATES = (
    Candidate("dense", _of("dense")),
    Candidate("chunked", _of("chunked")),
    Candidate("cudnn", _of("cudnn"), (NVIDIA,)),
    Candidate("cudnn, causal without segments", _causal, (NVIDIA,)),
    Candidate("triton", _triton, (NVIDIA,)),
    Candidate("splash", _of("splash"), (TPU,)),
)


class _Case(NamedTuple):
    """Queries, keys and values of one example a row, and the cotangent of the output."""

    q: Array
    k: Array
    v: Array
    cotangent: Array
    span: Span


def _case(config: AcceleratorBench, size: int, length: int) -> _Case:
    model, dtype = config.shapes.model, config.shapes.dtype
    batch = random_batch(model, size, length)
    draw = lambda seed, heads: jax.random.normal(
        jax.random.key(seed), (size, length, heads, model.head_dim), jnp.float32
    ).astype(dtype)
    inputs = draw(0, model.heads), draw(1, model.kv_heads), draw(2, model.kv_heads), draw(3, model.heads)
    return _Case(*inputs, Span(batch.segments, batch.positions))


def _value_and_gradients(attend: Attend, case: _Case) -> tuple[Array, tuple[Array, ...]]:
    """The output, and the gradients of its product with the cotangent."""
    out, back = jax.vjp(lambda q, k, v: attend(q, k, v, case.span), case.q, case.k, case.v)
    return out, back(case.cotangent)


def _reference(case: _Case) -> tuple[Array, tuple[Array, ...]]:
    """Dense attention of the same numbers in fp32, one row at a time."""
    wide = lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    with jax.default_matmul_precision("highest"):
        row = lambda case: _value_and_gradients(_of("dense"), jax.tree.map(lambda x: x[None], case))
        out = jax.jit(lambda case: jax.lax.map(row, case))(jax.tree.map(wide, case))
    return jax.tree.map(lambda x: x[:, 0], out)


def _error(got: Array, want: Array) -> Array:
    """‖got − want‖ / ‖want‖."""
    got = got.astype(jnp.float32)
    return jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel())


def _seconds(function: Any, *arguments: Any) -> float:
    """The median time of a compiled function, after a call that touches the memory."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _measure(candidate: Candidate, size: int, length: int, context: Context) -> Figures:
    case = _case(context.config, size, length)
    both = jax.jit(partial(_value_and_gradients, candidate.attend)).lower(case).compile()
    forward = jax.jit(lambda case: candidate.attend(case.q, case.k, case.v, case.span)).lower(case).compile()
    out, gradients = both(case)
    want, want_gradients = _reference(case)
    errors = {"output": _error(out, want)}
    errors |= dict(zip(("dq", "dk", "dv"), map(_error, gradients, want_gradients), strict=True))
    del out, gradients, want, want_gradients
    memory: Any = both.memory_analysis()
    seconds_forward, seconds_both = _seconds(forward, case), _seconds(both, case)
    _, N, H = case.q.shape[1:]
    needed = 4 * size * length**2 * N * H / 2  # q kᵀ and · v below the diagonal; the backward pass needs 2.5 times that
    return {
        "forward, ms": 1e3 * seconds_forward,
        "forward + backward, ms": 1e3 * seconds_both,
        "forward, TFLOP/s": needed / seconds_forward / 1e12,
        "forward + backward, TFLOP/s": 3.5 * needed / seconds_both / 1e12,
        "temporaries, GB": memory.temp_size_in_bytes / 1e9,
        **{f"error of {name}": float(error) for name, error in errors.items()},
    }


def rows(config: AcceleratorBench, records: Sequence[Any]) -> list[Row]:
    """Every kernel at every shape."""
    return [
        Row(
            f"{candidate.name}, {size} x {length}",
            partial(_measure, candidate, size, length),
            {"kernel": candidate.name, "rows": size, "length": length, "small": config.small},
            seconds=30.0,
            needs=candidate.needs,
        )
        for size, length in config.shapes.attention
        for candidate in CANDIDATES
    ]


STAGE = Stage("attention", "attention kernels: time, memory, and error against dense attention in fp32", rows)
