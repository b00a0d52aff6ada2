"""From weights to steering, and from steering to weights, without labels.

`to_steering` fits a post-block method to a fine-tuned model, block after block: at block ℓ it sees the stream y that
the base comes to when the blocks before ℓ are steered already, and fits y ↦ h − y, h the fine-tuned stream there. So
later blocks make up for what earlier fits left. `to_lora` fits a low-rank update of the MLP's last projection to a
steered model in the same way. `distill` then lowers KL(target ‖ fitted) by gradient descent, on any plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsteer.interventions import FixedVector, LinearSteering, LoRA, NonlinearSteering
from jaxsteer.models.layers import ACTIVATIONS
from jaxsteer.models.transformer import Network, embed, write_scales
from jaxsteer.plans import validate_plan
from jaxsteer.theory import fits
from jaxsteer.theory.compare import Totals, Where, compare_hidden, compare_networks, means, totals
from jaxsteer.theory.oracle import block_step, check_comparable, check_layers, stacked
from jaxsteer.types import Array, Batch, Context, Plan, PyTree, Slot, Steering

Form = Literal["fixed", "linear", "affine", "nonlinear"]
"""Of post-block steering: the mean shift, U D y, U D y + v, U act(D y)."""
STEER, SHIFT, LORA = "steer", "shift", "lora"
"""Names of the slots that conversions make."""


@dataclass(frozen=True)
class FitSettings:
    """How a conversion fits each block."""

    form: Form = "nonlinear"
    """What is fitted, of rank `rank` (but for the fixed vector)."""
    rank: int = 8
    """Directions that each block's steering reads and writes."""
    activation: str = "silu"
    """Of the nonlinear form."""
    ridge: float = 1e-5
    """λ as a share of the mean square of an input, see `jaxsteer.theory.fits`."""
    sample: int = 2048
    """Tokens that the descent of the nonlinear form sees, drawn from all that stream by."""
    steps: int = 100
    """Of that descent."""


class Converted(NamedTuple):
    """The network with the slots that were fitted, and Σ‖left over‖² / Σ‖shift‖² of each fit, fp32 [A]."""

    network: Network
    unexplained: Array


def plan_of(form: Form, rank: int, activation: str = "silu", layers: Sequence[int] | None = None) -> Plan:
    """The post-block plan of a form.

    Raises:
        ValueError: an unknown form or activation.
    """
    layers = None if layers is None else tuple(layers)
    shift = Slot(SHIFT, FixedVector(), ("block",), layers)
    linear = Slot(STEER, LinearSteering(rank=rank), ("block",), layers)
    nonlinear = Slot(STEER, NonlinearSteering(rank=rank, activation=activation), ("block",), layers)
    plans: dict[str, Plan] = {
        "fixed": (shift,),
        "linear": (linear,),
        "affine": (linear, shift),
        "nonlinear": (nonlinear,),
    }
    if form not in plans:
        raise ValueError(f"unknown form {form!r} of steering: {', '.join(plans)}")
    return plans[form]


def to_steering(
    tuned: Network,
    base: Network,
    batches: Sequence[Batch],
    settings: FitSettings = FitSettings(),  # frozen
    layers: Sequence[int] | None = None,
    key: Array | None = None,
    flat: bool = False,
    advance: Callable[[int], None] = lambda done: None,
) -> Converted:
    """The best post-block steering of `base` for going where `tuned` goes, in least squares, block after block.

    Of the tokens, a fit keeps what `jaxsteer.theory.fits` keeps. Both streams of every batch wait between blocks, two
    vectors a token, so that each block of either model is run once on each batch; unless `flat` is asked for.

    Args:
        tuned: where to: merged weights, or any plan. base: that is to be steered.
        batches: all of one shape; no label is looked at, every token that is not padding counts. They are gone through
            once a block, so they may be made when they are asked for.
        layers: steered, ascending; None = all.
        key: draws the sample of the nonlinear form.
        flat: keep no streams, but run the blocks below again for each block, (L + 1)/2 times the work: memory does not
            grow with the tokens.
        advance: hears how many blocks are done.

    Returns:
        base with the slots of `plan_of`, an ordinary plan and steering tree.

    Raises:
        ValueError: models of different shapes, a rank above the width, unknown layers, no batches.
    """
    count = base.model.config.layers
    plan = plan_of(settings.form, settings.rank, settings.activation, layers)
    layers = check_layers(layers, count)
    _check(tuned, base, batches, plan)
    key = jax.random.key(0) if key is None else key
    width = base.model.config.width
    kept: dict[int, tuple[Array, Array]] = {}
    fitted: dict[int, Steering] = {}

    def enter(i: int, batch: Batch, layer: int) -> tuple[Array, Array]:
        """Both streams where they enter a block."""
        if layer == 0:
            return _start(base, tuned, batch)
        y, h = leave(i, batch, layer - 1) if flat else kept[i]
        below = fitted.get(layer - 1)
        return (y if below is None else _steer(plan, below, jnp.array(layer - 1, jnp.int32), y, h)), h

    def leave(i: int, batch: Batch, layer: int) -> tuple[Array, Array]:
        """Both where they leave it, not steered there yet."""
        return _run_both(base, tuned, batch, jnp.array(layer, jnp.int32), *enter(i, batch, layer))

    left = []
    for layer in range(count):
        factor, sample = fits.empty(width, width), fits.empty_sample(settings.sample, width, width)
        for i, batch in enumerate(batches):
            if flat and layer not in layers:
                break
            y, h = leave(i, batch, layer)
            if layer in layers:
                own = jax.random.fold_in(jax.random.fold_in(key, layer), i)
                factor, sample = _observe(factor, sample, own, y, h, batch, draws=settings.form == "nonlinear")
            if flat:
                jax.block_until_ready(factor)  # or what is asked for ahead would be in memory together
            else:
                kept[i] = y, h
        if layer in layers:
            fitted[layer], share = _fit(factor, sample, settings)
            left.append(share)
        advance(layer + 1)
    found = list(fitted.values())
    steering = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    network = base
    for slot in plan:
        network = network.steered(slot, steering[slot.name])
    return Converted(network, jnp.stack(left))


def to_lora(
    steered: Network,
    base: Network,
    batches: Sequence[Batch],
    rank: int = 8,
    ridge: float = 1e-2,
    advance: Callable[[int], None] = lambda done: None,
) -> Converted:
    """The best LoRA on `mlp.down` for going where a steered model goes, in least squares, block after block.

    What the update should add is the steered stream less the block's own output: before the norm that follows the
    projection in families with one, as far as a norm's output can be had at all; a block that such a fit does not bring
    nearer is left as it is. Tokens count by the inverse of their stream's mean square, in `unexplained` too.

    Args:
        steered: where to. base, batches, advance: as for `to_steering`.
        rank, ridge: of each block's fit. Not small: the MLP's inputs have many dimensions, and a fit that is free to do
            so follows each of few tokens.

    Raises:
        ValueError: models of different shapes, a rank above the widths, no batches.
    """
    config = base.model.config
    slot = Slot(LORA, LoRA(rank=rank, alpha=float(rank)), ("mlp.down",))
    _check(steered, base, batches, (slot,))
    streams = [_start(base, steered, batch) for batch in batches]
    found, left = [], []
    for layer in range(config.layers):
        index = jnp.array(layer, jnp.int32)
        factor = fits.empty(config.mlp_width, config.width)
        before = [stream[0] for stream in streams]
        for i, batch in enumerate(batches):
            factor, h = _observe_projection(base, steered, batch, index, *streams[i], factor)
            streams[i] = (streams[i][0], h)
        best = fits.fit(factor, "linear", rank, ridge)
        params = {"A": best.read, "B": best.write}
        share = fits.unexplained(factor, best)
        run = lambda params, index=index, before=before: [
            _run_with(base, slot, params, batch, index, g) for batch, g in zip(batches, before, strict=True)
        ]
        wanted, after = [stream[1] for stream in streams], run(params)
        if config.post_norm:  # a fit in front of a norm need not help behind it
            none = jax.tree.map(jnp.zeros_like, params)
            without = run(none)
            if not _distance(after, wanted, batches) < _distance(without, wanted, batches):
                params, after, share = none, without, jnp.ones_like(share)
        left.append(share)
        found.append(params)
        streams = list(zip(after, wanted, strict=True))
        advance(layer + 1)
    stacks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    return Converted(base.steered(slot, {"mlp.down": stacks}), jnp.stack(left))


class Distilled(NamedTuple):
    """The network with its steering trained, the KL of every step, fp32 [steps], and the mean KL over the text before
    and after, nats a prediction. Where descent has not lowered that, the network is the one that it began with.
    """

    network: Network
    kl: Array
    before: float
    after: float


def distill(
    tuned: Network,
    network: Network,
    batches: Sequence[Batch],
    steps: int,
    lr: float = 1e-4,
    where: Where = "all",
    advance: Callable[[int, float], None] = lambda done, kl: None,
) -> Distilled:
    """Adam on the mean KL(tuned ‖ network) a prediction, over the network's steering; the batches in turn.

    What was fitted to streams with a few very large entries has entries of very different sizes itself, and a step of
    one size for all would ruin the small ones. So each entry p moves as p₀ + |p₀| q, Adam's being q: `lr` is the share
    of itself that an entry moves by (of at least a hundredth of its layer's root mean square; a layer of zeros moves
    by lr itself).

    Args:
        tuned: the target, any weights or plan. network: whose steering trains, from where it stands.
        batches: all of one shape. where: the predictions that count; "all" looks at no label.
        steps: of Adam. lr: after an eighth of them, from 0; down to 0 again by a cosine.
        advance: hears how many steps are done, and the KL.

    Raises:
        ValueError: models of different shapes, nothing to train, no batches.
    """
    check_comparable(tuned, network)
    start = network.steering
    if not batches or not jax.tree.leaves(start) or steps < 1:
        raise ValueError("distillation needs batches, a network with steering, and at least 1 step")
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, lr, min(steps - 1, -(-steps // 8)), steps))
    units = jax.tree.map(_units, start)
    moved = lambda q: jax.tree.map(lambda p, unit, by: p + unit * by, start, units, q)

    @jax.jit
    def step(tuned: Network, base: PyTree, q: Steering, state: Any, batch: Batch) -> tuple[Steering, Any, Array]:
        told = tuned(batch).hidden

        def loss(q: Steering) -> Array:
            other = Network(network.model, base, moved(q))
            found = compare_hidden(told, tuned, other(batch).hidden, other, batch, where)
            return jnp.sum(found.kl) / jnp.maximum(jnp.sum(found.counted), 1)

        kl, gradient = jax.value_and_grad(loss)(q)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(gradient, state, q)
        return optax.apply_updates(q, updates), state, kl

    over_all = lambda network: means(measure(tuned, network, batches[:steps], where)).kl
    q = jax.tree.map(jnp.zeros_like, start)
    state, seen, before = tx.init(q), [], over_all(network)
    for i in range(steps):
        q, state, kl = step(tuned, network.base, q, state, batches[i % len(batches)])
        seen.append(kl)
        advance(i + 1, float(kl))
    done = Network(network.model, network.base, moved(q))
    after = over_all(done)
    return Distilled(done if after < before else network, jnp.stack(seen), before, after)


def _units(leaf: Array) -> Array:
    """What one unit of a stacked leaf's entries [A, ...] is, see `distill`."""
    size = jnp.sqrt(jnp.mean(leaf**2, axis=tuple(range(1, leaf.ndim)), keepdims=True))
    return jnp.where(size > 0, jnp.maximum(jnp.abs(leaf), 0.01 * size), 1.0)


def measure(tuned: Network, network: Network, batches: Sequence[Batch], where: Where = "answers") -> Totals:
    """Compare a network with the tuned one over batches; see `jaxsteer.theory.compare.means`."""
    sums = [_totals(tuned, network, batch, where) for batch in batches]
    return jax.tree.map(lambda *values: sum(values[1:], values[0]), *sums)


@partial(jax.jit, static_argnames="where")
def _totals(tuned: Network, network: Network, batch: Batch, where: Where) -> Totals:
    return totals(compare_networks(tuned, network, batch, where), batch)


def _check(target: Network, base: Network, batches: Sequence[Batch], plan: Plan) -> None:
    check_comparable(base, target)
    validate_plan(plan, base.model.config)
    taken = {slot.name for slot in plan} & set(base.steering)
    if taken:
        raise ValueError(f"the base has a slot {sorted(taken)[0]!r} already, which the conversion would add")
    if not batches:
        raise ValueError("a conversion needs at least one batch of tokens")


@jax.jit
def _start(base: Network, target: Network, batch: Batch) -> tuple[Array, Array]:
    return embed(base.model, base.base, batch), embed(target.model, target.base, batch)


def _at(network: Network, layer: Array) -> tuple[PyTree, Steering]:
    take = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    return jax.tree.map(take, stacked(network))


@jax.jit
def _run_both(base: Network, target: Network, batch: Batch, layer: Array, g: Array, h: Array) -> tuple[Array, Array]:
    """Both streams after one more block, before it is steered."""
    y, _ = block_step(base, batch)(_at(base, layer), g, layer)
    h, _ = block_step(target, batch)(_at(target, layer), h, layer)
    return y, h


@partial(jax.jit, static_argnames="draws")
def _observe(
    factor: fits.Factor, sample: fits.Sample, key: Array, y: Array, h: Array, batch: Batch, *, draws: bool
) -> tuple[fits.Factor, fits.Sample]:
    real = batch.segments > 0
    factor = fits.absorb(factor, y, h - y, real.astype(jnp.float32))
    return factor, fits.draw(sample, key, y, h - y, real) if draws else sample


@partial(jax.jit, static_argnames="settings")
def _fit(factor: fits.Factor, sample: fits.Sample, settings: FitSettings) -> tuple[Steering, Array]:
    """One block's parameters in the form of a steering tree, and the share of the shift that they leave."""
    rank, ridge = settings.rank, settings.ridge
    if settings.form == "nonlinear":
        best = fits.fit_nonlinear(factor, sample, rank, settings.activation, ridge=ridge, steps=settings.steps)
        left = fits.unexplained_nonlinear(sample, best, settings.activation)
    else:
        best = fits.mean_shift(factor) if settings.form == "fixed" else fits.fit(factor, settings.form, rank, ridge)
        left = fits.unexplained(factor, best)
    params = {STEER: {"block": {"D": best.read, "U": best.write}}, SHIFT: {"block": {"v": best.bias}}}
    return {slot.name: params[slot.name] for slot in plan_of(settings.form, rank, settings.activation)}, left


@partial(jax.jit, static_argnames="plan")
def _steer(plan: Plan, params: Steering, layer: Array, y: Array, h: Array) -> Array:
    for slot in plan:
        y = slot.method.apply(params[slot.name]["block"], h, y, Context(layer)).astype(y.dtype)
    return y


@jax.jit
def _observe_projection(
    base: Network, target: Network, batch: Batch, layer: Array, g: Array, h: Array, factor: fits.Factor
) -> tuple[fits.Factor, Array]:
    """The factor with what `mlp.down` reads and should add, and the target's stream after the block."""
    config = base.model.config
    mine = _at(base, layer)
    into = ("mlp.gate", "mlp.up") if config.gated else ("mlp.up",)
    y, taps = block_step(base, batch, (*into, "mlp.down", "mlp"))(mine, g, layer)
    h, _ = block_step(target, batch)(_at(target, layer), h, layer)
    act = ACTIVATIONS[config.activation]
    x = act(taps["mlp.gate"]) * taps["mlp.up"] if config.gated else act(taps["mlp.up"])
    missing = h - y
    if scales := write_scales(config, base.base):
        # norm(z) = g z / rms(z): the z of the wanted output, with the length that it has now.
        z, factors = taps["mlp.down"], scales["mlp.down"][layer]
        rms = jnp.sqrt(jnp.mean(z**2, axis=-1, keepdims=True) + config.norm_eps)
        wanted = (taps["mlp"] + missing) / factors.reshape(1, 1, -1)
        missing = wanted * rms - z
    return fits.absorb(factor, x, missing, _weights(batch, h)), h


def _weights(batch: Batch, stream: Array) -> Array:
    """Of each token in a fit, fp32 [B, T]: what follows reads the stream through a norm, so errors count against the
    token's own size, and the first token of an example, far larger than the others, does not count for all of them.
    """
    size = jnp.mean(stream.astype(jnp.float32) ** 2, axis=-1)
    return jnp.where(batch.segments > 0, 1 / jnp.maximum(size, 1e-12), 0)


def _distance(streams: Sequence[Array], wanted: Sequence[Array], batches: Sequence[Batch]) -> float:
    """Σ‖·‖² of what two streams differ by, over tokens that are not padding."""
    off = lambda a, b, batch: jnp.sum(jnp.where((batch.segments > 0)[..., None], a - b, 0) ** 2)
    return float(sum(off(*each) for each in zip(streams, wanted, batches, strict=True)))


@partial(jax.jit, static_argnames="slot")
def _run_with(base: Network, slot: Slot, params: dict[str, Array], batch: Batch, layer: Array, g: Array) -> Array:
    """The stream after a block of the base with one slot more."""
    weights, p = _at(base, layer)
    network = base.steered(slot, {})
    return block_step(network, batch)((weights, {**p, slot.name: {slot.sites[0]: params}}), g, layer)[0]
