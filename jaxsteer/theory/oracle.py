"""Oracle steering: the shift of each token that makes a base model's stream equal a fine-tuned model's.

With h_ℓ the fine-tuned stream after block ℓ and S the steered layers, the base model runs and at each ℓ in S adds

    d_ℓ = h_ℓ − block_ℓ(g_{ℓ−1}),    g_ℓ = h_ℓ for ℓ in S, else block_ℓ(g_{ℓ−1}).

At a single layer this is the plain difference of the two streams; at every layer it is the increments, what each base
block misses on the fine-tuned stream (plain differences, added at every layer, would count the shifts of earlier blocks
again). arXiv 2603.00425.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxsteer.models.sites import Interventions
from jaxsteer.models.transformer import Network, block_function, embed, spread
from jaxsteer.types import (
    SITES,
    Array,
    Batch,
    Context,
    Intervention,
    Kind,
    ParamSpec,
    PyTree,
    SiteDims,
    Slot,
    Steering,
    Taps,
)

BlockStep = Callable[[tuple[PyTree, Steering], Array, Array], tuple[Array, Taps]]
"""((weights, steering) of one layer, h [B, T, D], layer) -> (the stream after the block, taps)."""
SLOT = "oracle"
"""Name of the slot that `replayed` adds to a plan."""


@dataclass(frozen=True)
class Replay(Intervention):
    """y' = y + shift, with a shift for every token of one batch: what an oracle knows, and no method could learn."""

    kind: ClassVar[Kind] = "activation"

    def param_specs(self, dims: SiteDims) -> dict[str, ParamSpec]:
        """There is nothing to initialise: shifts belong to a batch.

        Raises:
            ValueError: always.
        """
        raise ValueError("a replay holds one batch's shifts: compute them by `oracle_steering`, add them by `replayed`")

    def apply(self, p: Mapping[str, Array], x: Array, y: Array, ctx: Context) -> Array:
        """y + shift."""
        return y + p["shift"]


def check_comparable(one: Network, other: Network) -> None:
    """Raise ValueError unless both models have the same width, number of layers and vocabulary size."""
    for name in ("layers", "width", "vocab_size"):
        a, b = getattr(one.model.config, name), getattr(other.model.config, name)
        if a != b:
            raise ValueError(
                f"the two models cannot be compared: {name} is {a} in one and {b} in the other; "
                "both must come from the same base model"
            )


def check_layers(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The layers of a model with `count` of them; None = all.

    Raises:
        ValueError: they are not ascending, or not in the model.
    """
    layers = tuple(range(count)) if layers is None else tuple(layers)
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= count:
        raise ValueError(f"layers {list(layers)}: choose from 0 to {count - 1}, ascending, each once")
    return layers


def check_site(site: str) -> None:
    """Raise ValueError unless it is a site."""
    if site not in SITES:
        raise ValueError(f"no model has a site {site!r}; the sites are {', '.join(SITES)}")


def oracle_steering(
    network: Network, tuned: Network, batch: Batch, layers: Sequence[int] | None = None, site: str = "block"
) -> Array:
    """The shifts d_ℓ that give `network` the values of `tuned` at a site of each layer.

    Both models run side by side, one layer at a time; nothing but the shifts is kept.

    Args:
        network: the network to steer; may have steering already.
        tuned: the target.
        batch: [B, T], packed or padded.
        layers: to steer, ascending; None = all; static.
        site: where shifts are measured and added; static.

    Returns:
        [A, B, T, ...], in the order of the layers.

    Raises:
        ValueError: models of different shapes, an unknown site or layer.
    """
    check_comparable(network, tuned)
    check_site(site)
    count = network.model.config.layers
    layers = check_layers(layers, count)
    base_step, tuned_step = (block_step(each, batch, (site,)) for each in (network, tuned))
    # A shift inside the block changes the rest of the block, so the block runs again with the shift.
    shifted_step = None if site == "block" else block_step(replayed(network, jnp.zeros(0), site=site), batch)

    def step(state: tuple, xs: tuple) -> tuple[tuple, Array]:
        g, h = state
        (layer, steered), base_params, tuned_params = xs
        after, taps = base_step(base_params, g, layer)
        h, wanted = tuned_step(tuned_params, h, layer)
        shift = jnp.where(steered, wanted[site] - taps[site], 0)
        if shifted_step is None:
            after = after + shift
        else:
            weights, steering = base_params
            after, _ = shifted_step((weights, {**steering, SLOT: {site: {"shift": shift}}}), g, layer)
        return (after, h), shift

    flags = jnp.zeros(count, bool).at[jnp.array(layers)].set(True)
    start = (embed(network.model, network.base, batch), embed(tuned.model, tuned.base, batch))
    xs = ((jnp.arange(count, dtype=jnp.int32), flags), stacked(network), stacked(tuned))
    return jax.lax.scan(step, start, xs)[1][jnp.array(layers)]


def replayed(network: Network, shifts: Array, layers: Sequence[int] | None = None, site: str = "block") -> Network:
    """The network with the shifts [A, B, T, ...] of one batch added at a site of the layers; None = all layers."""
    check_site(site)
    layers = None if layers is None else tuple(layers)
    return network.steered(Slot(SLOT, Replay(), (site,), layers), {site: {"shift": shifts}})


def stacked(network: Network) -> tuple[PyTree, Steering]:
    """(weights, steering) of a network as a scan over the layers takes them, each leaf [L, ...]."""
    model = network.model
    return network.base["blocks"], spread(model.plan, network.steering, model.config.layers)


def blocks_on(network: Network, batch: Batch, inputs: Array, capture: Sequence[str]) -> Taps:
    """Run every block by itself, on an input of its own.

    Args:
        network: whose blocks.
        batch: [B, T], for positions and segments.
        inputs: the streams that the blocks read, [L, B, T, D].
        capture: sites whose values are returned.

    Returns:
        {site: [L, B, T, ...]}
    """
    block = block_step(network, batch, capture)
    layers = jnp.arange(network.model.config.layers, dtype=jnp.int32)
    step = lambda _, xs: (None, block(xs[0], xs[1], xs[2])[1])
    return jax.lax.scan(step, None, (stacked(network), inputs, layers))[1]


def block_inputs(network: Network, batch: Batch) -> Array:
    """The streams that a network's blocks read on a batch, [L, B, T, D]."""
    after = network(batch, capture=("block",)).taps["block"]
    return jnp.concatenate([embed(network.model, network.base, batch)[None], after[:-1]])


def block_step(network: Network, batch: Batch, capture: Sequence[str] = ()) -> BlockStep:
    """One block of a network as a function of one layer of `stacked(network)`."""
    block = block_function(network.model, batch, Interventions.on(batch, network.model.plan, capture=capture))

    def run(params: tuple[PyTree, Steering], h: Array, layer: Array) -> tuple[Array, Taps]:
        weights, steering = params
        h, (taps, _) = block(weights, h, layer, steering)
        return h, taps

    return run
