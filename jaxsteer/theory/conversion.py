"""From weights to steering, and from steering to weights, by regression and without labels.

`to_steering` fits a post-block method to a fine-tuned model, block after block: at block ℓ, y is the stream of the base
with the blocks before ℓ steered already, h the fine-tuned stream, and y ↦ h − y is fitted. So later blocks make up for
what earlier fits left. `to_lora` fits a low-rank update of the MLP's last projection to a steered model in the same
way. `jaxsteer.theory.distillation` trains the result further.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxsteer.interventions import FixedVector, LinearSteering, LoRA, NonlinearSteering
from jaxsteer.models.layers import ACTIVATIONS
from jaxsteer.models.transformer import Network, embed, write_scales
from jaxsteer.plans import validate_plan
from jaxsteer.theory import fits
from jaxsteer.theory.oracle import block_step, check_comparable, check_layers, stacked
from jaxsteer.types import Array, Batch, Context, Plan, PyTree, Slot, Steering

Form = Literal["fixed", "linear", "affine", "nonlinear"]
"""Forms of post-block steering: the mean shift, U D y, U D y + v, U act(D y)."""
STEER, SHIFT, LORA = "steer", "shift", "lora"
"""Names of the slots that conversions make."""
Streams = tuple[Array, Array]
"""The base's stream and the target's, [B, T, D] each."""
Advance = Callable[[int], None]
"""Callback after every block, with the number of blocks done."""


@dataclass(frozen=True)
class FitSettings:
    """How `to_steering` fits the blocks."""

    form: Form = "nonlinear"
    """Form of the steering."""
    rank: int = 8
    """Rank of each block's steering (not used by "fixed")."""
    activation: str = "silu"
    """Activation of the nonlinear form."""
    ridge: float = 1e-5
    """Ridge penalty λ as a share of the mean square of an input, see `jaxsteer.theory.fits`."""
    sample: int = 2048
    """Number of tokens, drawn at random, on which the nonlinear form is optimised."""
    steps: int = 100
    """L-BFGS steps of the nonlinear form."""
    layers: tuple[int, ...] | None = None
    """Layers to steer, ascending; None = all."""
    seed: int = 0
    """Random seed for drawing the sample."""


class Converted(NamedTuple):
    """The result of a conversion.

    network      the base with the fitted slots: an ordinary plan and steering tree
    unexplained  Σ‖residual‖² / Σ‖shift‖² of each fit, fp32 [A]
    """

    network: Network
    unexplained: Array


def plan_of(form: Form, rank: int, activation: str = "silu", layers: tuple[int, ...] | None = None) -> Plan:
    """The post-block plan of a form.

    Raises:
        ValueError: an unknown form or activation.
    """
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
    *,
    flat: bool = False,
    advance: Advance = lambda done: None,
) -> Converted:
    """Fit post-block steering of `base` to the stream of `tuned` by least squares, block after block.

    Args:
        tuned: the target, with merged weights or any plan.
        base: the network to steer.
        batches: of one shape. No label is used; every token that is not padding counts. They are gone through once per
            block, so a sequence may make them on access.
        settings: form, rank and layers of the steering, and how it is fitted.
        flat: by default both streams of every batch are kept between blocks (two vectors per token), so that each block
            of either model runs once per batch. True keeps none of them and reruns the blocks below for each block,
            (L + 1)/2 times the work: memory then does not grow with the number of tokens.
        advance: callback after every block.

    Raises:
        ValueError: models of different shapes, a rank above the width, unknown layers, no batches.
    """
    config = base.model.config
    plan = plan_of(settings.form, settings.rank, settings.activation, settings.layers)
    layers = check_layers(settings.layers, config.layers)
    _check(tuned, base, batches, plan)
    key = jax.random.key(settings.seed)
    streams = _SteeredStreams(base, tuned, plan, flat)
    unexplained = []
    for layer in range(config.layers):
        if layer in layers or not flat:
            factor = fits.empty(config.width, config.width)
            sample = fits.empty_sample(settings.sample, config.width, config.width)
            for i, batch in enumerate(batches):
                y, h = streams.after(layer, i, batch)
                if layer in layers:
                    batch_key = jax.random.fold_in(jax.random.fold_in(key, layer), i)
                    draws = settings.form == "nonlinear"
                    factor, sample = _observe(factor, sample, batch_key, y, h, batch, draws=draws)
                if flat:
                    jax.block_until_ready(factor)  # or batches that are dispatched ahead would be in memory together
        if layer in layers:
            streams.fitted[layer], share = _fit(factor, sample, settings)
            unexplained.append(share)
        advance(layer + 1)
    steering = jax.tree.map(lambda *leaves: jnp.stack(leaves), *streams.fitted.values())
    network = base
    for slot in plan:
        network = network.steered(slot, steering[slot.name])
    return Converted(network, jnp.stack(unexplained))


@dataclass
class _SteeredStreams:
    """The streams of the base, steered by what is fitted so far, and of the target, one batch at a time.

    base, target  the networks
    plan          of the steering
    flat          keep no streams between blocks, rerun the blocks below instead
    fitted        the parameters of each layer's steering
    kept          the streams of each batch after the last block that ran, before it is steered
    """

    base: Network
    target: Network
    plan: Plan
    flat: bool
    fitted: dict[int, Steering] = field(default_factory=dict)
    kept: dict[int, Streams] = field(default_factory=dict)

    def after(self, layer: int, i: int, batch: Batch) -> Streams:
        """The streams of batch i after a block, not steered there yet. Unless flat, ask for the layers in order."""
        streams = _run_both(self.base, self.target, batch, jnp.array(layer, jnp.int32), self._before(layer, i, batch))
        if not self.flat:
            self.kept[i] = streams
        return streams

    def _before(self, layer: int, i: int, batch: Batch) -> Streams:
        if layer == 0:
            return _start(self.base, self.target, batch)
        y, h = self.after(layer - 1, i, batch) if self.flat else self.kept[i]
        if layer - 1 in self.fitted:
            y = _steer(self.plan, self.fitted[layer - 1], jnp.array(layer - 1, jnp.int32), y, h)
        return y, h


def to_lora(
    steered: Network,
    base: Network,
    batches: Sequence[Batch],
    rank: int = 8,
    ridge: float = 1e-2,
    advance: Advance = lambda done: None,
) -> Converted:
    """Fit a LoRA on `mlp.down` of `base` to the stream of a steered model by least squares, block after block.

    The update should add the steered stream minus the block's own output. In families with a norm behind the
    projection it is fitted to what should come before the norm, as far as a norm's output can be inverted; a block that
    such a fit does not bring nearer is left unchanged. Tokens are weighted by the inverse of their stream's mean
    square, in `unexplained` too.

    Args:
        steered: the target.
        base: the network to update.
        batches: as for `to_steering`.
        rank: of the LoRA.
        ridge: penalty of each block's fit, as a share of the mean square of an input. Not small: the MLP's inputs have
            many dimensions, and an unrestricted fit follows each of few tokens.
        advance: callback after every block.

    Raises:
        ValueError: models of different shapes, a rank above the widths, no batches.
    """
    config = base.model.config
    name = next(name for name in (LORA, f"fitted_{LORA}") if name not in base.steering)
    slot = Slot(name, LoRA(rank=rank, alpha=float(rank)), ("mlp.down",))
    _check(steered, base, batches, (slot,))
    streams = [_start(base, steered, batch) for batch in batches]
    fitted, unexplained = [], []
    for layer in range(config.layers):
        index = jnp.array(layer, jnp.int32)
        factor, wanted = fits.empty(config.mlp_width, config.width), []
        for batch, pair in zip(batches, streams, strict=True):
            factor, h = _observe_projection(base, steered, batch, index, pair, factor)
            wanted.append(h)
        best = fits.fit(factor, "linear", rank, ridge)
        params, share = {"A": best.read, "B": best.write}, fits.unexplained(factor, best)
        run = partial(_run_all, base, slot, batches=batches, layer=index, inputs=[g for g, _ in streams])
        outputs = run(params)
        if config.post_norm:  # a fit to the norm's input need not help behind the norm
            zeros = jax.tree.map(jnp.zeros_like, params)
            unchanged = run(zeros)
            if not _distance(outputs, wanted, batches) < _distance(unchanged, wanted, batches):
                params, outputs, share = zeros, unchanged, jnp.ones_like(share)
        fitted.append(params)
        unexplained.append(share)
        streams = list(zip(outputs, wanted, strict=True))
        advance(layer + 1)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *fitted)
    return Converted(base.steered(slot, {"mlp.down": params}), jnp.stack(unexplained))


def _check(target: Network, base: Network, batches: Sequence[Batch], plan: Plan) -> None:
    check_comparable(base, target)
    validate_plan(plan, base.model.config)
    taken = {slot.name for slot in plan} & set(base.steering)
    if taken:
        raise ValueError(f"the base already has a slot {sorted(taken)[0]!r}, which the conversion would add")
    if not batches:
        raise ValueError("a conversion needs at least one batch of tokens")


@jax.jit
def _start(base: Network, target: Network, batch: Batch) -> Streams:
    """Both streams before the first block."""
    return embed(base.model, base.base, batch), embed(target.model, target.base, batch)


def _at(network: Network, layer: Array) -> tuple[PyTree, Steering]:
    """(weights, steering) of one layer."""
    take = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    return jax.tree.map(take, stacked(network))


@jax.jit
def _run_both(base: Network, target: Network, batch: Batch, layer: Array, streams: Streams) -> Streams:
    """Both streams after one more block, before the base is steered there."""
    g, h = streams
    y, _ = block_step(base, batch)(_at(base, layer), g, layer)
    h, _ = block_step(target, batch)(_at(target, layer), h, layer)
    return y, h


@partial(jax.jit, static_argnames="draws")
def _observe(
    factor: fits.Factor, sample: fits.Sample, key: Array, y: Array, h: Array, batch: Batch, *, draws: bool
) -> tuple[fits.Factor, fits.Sample]:
    """The factor, and if asked for the sample, of y ↦ h − y with a batch's tokens added."""
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
    """The base's stream y, steered after a block."""
    for slot in plan:
        y = slot.method.apply(params[slot.name]["block"], h, y, Context(layer)).astype(y.dtype)
    return y


@jax.jit
def _observe_projection(
    base: Network, target: Network, batch: Batch, layer: Array, streams: Streams, factor: fits.Factor
) -> tuple[fits.Factor, Array]:
    """The factor with what `mlp.down` reads and should add, and the target's stream after the block."""
    config, (g, h) = base.model.config, streams
    inputs = ("mlp.gate", "mlp.up") if config.gated else ("mlp.up",)
    y, taps = block_step(base, batch, (*inputs, "mlp.down", "mlp"))(_at(base, layer), g, layer)
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
    """The weight of each token in a fit, fp32 [B, T]: 1 / mean square of its stream, 0 at padding.

    What follows reads the stream through a norm, so an error matters relative to the token's own size; and the first
    token of an example, far larger than the others, does not dominate the fit.
    """
    size = jnp.mean(stream.astype(jnp.float32) ** 2, axis=-1)
    return jnp.where(batch.segments > 0, 1 / jnp.maximum(size, 1e-12), 0)


def _distance(streams: Sequence[Array], wanted: Sequence[Array], batches: Sequence[Batch]) -> float:
    """Σ‖a − b‖² of two streams over the tokens that are not padding."""
    squares = lambda a, b, batch: jnp.sum(jnp.where((batch.segments > 0)[..., None], a - b, 0) ** 2)
    return float(sum(squares(*parts) for parts in zip(streams, wanted, batches, strict=True)))


def _run_all(
    base: Network,
    slot: Slot,
    params: dict[str, Array],
    *,
    batches: Sequence[Batch],
    layer: Array,
    inputs: Sequence[Array],
) -> list[Array]:
    """Each batch's stream after a block of the base with one more slot."""
    return [_run_with(base, slot, params, batch, layer, g) for batch, g in zip(batches, inputs, strict=True)]


@partial(jax.jit, static_argnames="slot")
def _run_with(base: Network, slot: Slot, params: dict[str, Array], batch: Batch, layer: Array, g: Array) -> Array:
    weights, steering = _at(base, layer)
    steering = {**steering, slot.name: {slot.sites[0]: params}}
    return block_step(base.steered(slot, {}), batch)((weights, steering), g, layer)[0]
