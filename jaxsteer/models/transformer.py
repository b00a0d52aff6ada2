"""The functional interface of a model: `forward` runs the blocks as one scan and applies the steering tree.

The blocks are a `lax.scan` of `Block.apply` over parameters stacked on a leading axis L, so a block is traced once,
whatever the depth. Steering parameters and the layer index are scanned with the weights; each layer reads the KV cache,
and new keys and values are written after the scan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxsteer.models.adapters import check_adapters
from jaxsteer.models.attention import Kernel, Span
from jaxsteer.models.by_layer import BlockFunction, extended, is_by_layer, layer_caches, run_layers
from jaxsteer.models.config import ModelConfig, site_dims
from jaxsteer.models.layers import Block, Embed, KeysValues, layer_inputs, norm_of
from jaxsteer.models.sites import Interventions, Steer, unsteered
from jaxsteer.sharding import constrain
from jaxsteer.types import PROJECTIONS, SITES, Array, Batch, Cache, Output, Plan, PyTree, Slot, Steering, Taps

Remat = Literal["none", "selective", "full"]
SAVED = (*PROJECTIONS[:3], "attn.heads", "mlp.gate", "mlp.up", "residual")
"""What "selective" rematerialisation keeps of a block, where the backward pass needs it: recomputing the rest costs no
matmul but the scores of attention."""


@dataclass(frozen=True)
class Model:
    """The static part of a model: its config, its steering plan, and how it is computed. Hashable.

    config          dimensions and features
    plan            the interventions and their sites; () for the plain model
    remat           what the backward pass recomputes: "none" of a block, all but its matmuls ("selective"), or the
                    whole block ("full", least memory)
    train_base      whether the base tree is differentiated too (full fine-tuning); its weights are then scanned over
                    from the first layer, where a frozen base is read in place
    attention       the kernel, see `jaxsteer.models.attention.Kernel`; forward-mode derivatives need one of XLA's
    split_sequence  on a mesh, split the positions of the residual stream over the `tensor` axis between sublayers
    unroll          layers in one iteration of the loop over the layers: more of them compile longer
    """

    config: ModelConfig
    plan: Plan = ()
    _: KW_ONLY
    remat: Remat = "selective"
    train_base: bool = False
    attention: Kernel = "auto"
    split_sequence: bool = False
    unroll: int = 1


def init_base(config: ModelConfig, key: Array, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Random weights in the layout of the base tree, layers stacked on a leading axis.

    {"embed": {"embedding": [V, D]}, "blocks": {... leaves [L, ...]}, "final_norm": {"scale": [D]}} and, unless the
    head is tied, "head": {"embedding": [V, D]}; learned positions are "positions" [max_length, D] in "embed".
    """
    embed, blocks, head = jax.random.split(key, 3)
    tokens = jnp.zeros((1, 2), jnp.int32)
    h = jnp.zeros((1, 2, config.width), jnp.float32)
    span = Span(tokens + 1, jnp.arange(2)[None])
    inputs = layer_inputs(config, span)(jnp.zeros((), jnp.int32))
    init_block = lambda k: Block(config).init(k, h, inputs, None, unsteered())["params"]
    base = {
        "embed": Embed(config).init(embed, tokens, tokens)["params"],
        "blocks": jax.vmap(init_block)(jax.random.split(blocks, config.layers)),
        "final_norm": norm_of(config).init(head, h)["params"],
    }
    if not config.tied_head:
        base["head"] = {"embedding": Embed(config).init(head, tokens, tokens)["params"]["embedding"]}
    return jax.tree.map(lambda leaf: leaf.astype(dtype), base)


def output_embedding(base: PyTree) -> Array:
    """The output embedding [V, D], whose products with a hidden state are the logits; the input embedding if tied.

    An untied head has this layout too: a transposed embedding would be copied at every use.
    """
    return base["head" if "head" in base else "embed"]["embedding"]


def write_scales(config: ModelConfig, base: PyTree) -> dict[str, Array]:
    """The factors [L, D] of the norm after each projection that writes to the residual stream; {} if there is none."""
    if not config.post_norm:
        return {}
    one = 1.0 if config.norm_plus_one else 0.0
    factors = lambda part: base["blocks"][part]["post_norm"]["scale"].astype(jnp.float32) + one
    return {"attn.o": factors("attn"), "mlp.down": factors("mlp")}


def logits_of(hidden: Array, head: Array, softcap: float | None = None) -> Array:
    """Hidden states [..., D] and output embedding [V, D] -> logits [..., V] in at least fp32, soft-capped if asked."""
    wide = np.promote_types(hidden.dtype, np.float32)
    return capped(jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=wide), softcap)


def capped(logits: Array, softcap: float | None) -> Array:
    """Logits with a soft-cap c, c · tanh(z / c); None = as they are."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def init_cache(config: ModelConfig, rows: int, slots: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """An empty KV cache with `slots` tokens for each of `rows` rows."""
    shape = (config.layers, rows, config.kv_heads, slots, config.head_dim)
    empty = jnp.zeros((rows, slots), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty, empty, jnp.zeros((), jnp.int32))


def forward(
    model: Model,
    base: PyTree,
    steering: Steering,
    batch: Batch,
    *,
    cache: Cache | None = None,
    keep_cache: bool = False,
    capture: Sequence[str] = (),
    key: Array | None = None,
    train: bool = False,
    strength: Mapping[str, ArrayLike] | None = None,
    adapters: ArrayLike | None = None,
) -> Output:
    """Run the model on a batch: y' = y + Δ(steering; x, y) at each site of the plan.

    Args:
        model: the static part.
        base: pretrained weights in the layout of `init_base`, in the compute dtype; its blocks may also be a tuple of
            layers (`jaxsteer.models.by_layer`), and with them the cache's keys and values.
        steering: the steering tree of `model.plan`, see `jaxsteer.init_steering`.
        batch: [B, T] rows, packed, or padded on either side. Tokens are not checked here, because this is traced: one
            beyond the vocabulary makes its row NaN.
        cache: keys and values of earlier tokens, to which the batch's are appended; it needs T free slots.
        keep_cache: without `cache`, return a new cache that holds the batch in its T slots.
        capture: sites whose values are returned as taps.
        key: random key for methods that draw in training; folded for each slot, site and layer.
        train: training mode of the methods (dropout, gates).
        strength: for each slot by name, a factor s of its shift, y' = y + s · Δ: a scalar [], one per row [B], or one
            per token [B, T]. 0 is the identity and 1 the slot as it is, both bit for bit; slots not named have 1.
        adapters: with steering of E adapters (`jaxsteer.stack_adapters`), which of them steers each row [B] or each
            token [B, T], int; a number outside 0 to E - 1, such as -1, is the unsteered model.

    Returns:
        The hidden states after the final norm [B, T, D], the extended cache (or None), and the taps, each
        [L, B, T, ...], taken after the interventions at their site.

    Raises:
        ValueError: an unknown site in `capture`, steering whose slots are not those of the plan, a strength of another
            slot or shape, adapters that are not stacked, or a batch whose fields do not all have one shape [B, T].
    """
    config, plan = model.config, model.plan
    shapes = {name: field.shape for name, field in batch._asdict().items() if field is not None}
    if batch.tokens.ndim != 2 or len(set(shapes.values())) > 1:
        raise ValueError(f"forward: a batch needs [B, T] arrays of one shape, got {shapes}")
    for site in capture:
        if site not in SITES:
            raise ValueError(f"cannot capture {site!r}; the sites are {', '.join(SITES)}")
        site_dims(config, site)
    missing = [slot.name for slot in plan if slot.name not in steering]
    if missing or len(steering) > len(plan):
        raise ValueError(
            f"the steering pytree has slots {sorted(steering)}, the plan {[slot.name for slot in plan]}; "
            "they must be the same"
        )

    per_layer = spread(plan, steering, config.layers)
    adapters = check_adapters(config, plan, steering, adapters, batch.tokens.shape)
    interventions = Interventions.on(batch, plan, strength, capture=capture, key=key, train=train, adapters=adapters)
    block = block_function(model, batch, interventions, cache=cache, keep_cache=keep_cache)
    run = run_layers if is_by_layer(base["blocks"]) else partial(_scan_blocks, model)
    h, (taps, new) = run(block, base["blocks"], embed(model, base, batch), per_layer)
    hidden: Array = norm_of(config).apply({"params": base["final_norm"]}, h)  # type: ignore[assignment]
    if cache is not None:
        cache = extended(cache, new, batch)
    elif keep_cache:
        cache = Cache(new.k, new.v, batch.segments, batch.positions, jnp.int32(batch.tokens.shape[1]))
    return Output(hidden, cache, taps)


def embed(model: Model, base: PyTree, batch: Batch) -> Array:
    """The residual stream [B, T, D] that the first block reads."""
    h: Array = Embed(model.config).apply({"params": base["embed"]}, batch.tokens, batch.positions)  # type: ignore[assignment]
    return constrain(h, *_stream(model))


def block_function(
    model: Model, batch: Batch, interventions: Interventions, *, cache: Cache | None = None, keep_cache: bool = False
) -> BlockFunction:
    """One block as a function (weights, h, layer, p) -> (h, (taps, keys and values)), which `forward` scans.

    weights is one layer of `base["blocks"]`, h [B, T, D] the residual stream that the block reads, layer its index,
    and p one layer of `spread(plan, steering, layers)`, or None to steer nothing. Keys and values are None if no cache
    needs them. What all layers share is computed once, here. The other arguments are those of `forward`.
    """
    config = model.config
    inputs_of = layer_inputs(config, Span(batch.segments, batch.positions, batch.trunks))
    cache_of = layer_caches(cache, batch)

    def block(
        weights: PyTree, h: Array, layer: Array, p: Steering | None
    ) -> tuple[Array, tuple[Taps, KeysValues | None]]:
        steer = Steer(interventions, layer, p)
        run = Block(config, model.attention).apply
        out: tuple[Array, KeysValues] = run({"params": weights}, h, inputs_of(layer), cache_of(layer), steer)  # type: ignore[assignment]
        h, new = out
        return constrain(h, *_stream(model)), (steer.taps, new if keep_cache or cache is not None else None)

    return block


def _stream(model: Model) -> tuple[str | None, ...]:
    """The logical axes of the residual stream [B, T, D]."""
    return ("rows", "sequence" if model.split_sequence else None, None)


def _scan_blocks(
    model: Model, block: BlockFunction, weights: PyTree, h: Array, per_layer: Steering
) -> tuple[Array, PyTree]:
    """Scan `block` over the layers in two parts: below the first layer that needs a gradient, nothing is saved.

    Slicing the stacked weights would copy them, so the two parts index them layer by layer inside the body; above the
    split that needs rematerialisation, or the backward pass would keep a copy of each layer's weights.
    """
    L = model.config.layers
    first = min((layer for slot in model.plan for layer in slot.active_layers(L)), default=L)
    split = 0 if model.train_base or first == L else first
    indices = jnp.arange(L, dtype=jnp.int32)
    policy = None
    if model.remat == "selective":
        policy = jax.checkpoint_policies.save_only_these_names(*SAVED)
    remat = lambda f: f if model.remat == "none" else jax.checkpoint(f, policy=policy, prevent_cse=False)
    if split == 0:
        body = remat(lambda h, xs: block(xs[0], h, xs[1], xs[2]))
        return lax.scan(body, h, (weights, indices, per_layer), unroll=model.unroll)

    def indexed(h: Array, xs: tuple) -> tuple[Array, PyTree]:
        layer, p = xs
        return block(jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, layer, keepdims=False), weights), h, layer, p)

    part = lambda tree, start, stop: jax.tree.map(lambda leaf: leaf[start:stop], tree)
    # Below, p is None rather than zeros: zeros depend on the steering tree and would be differentiated in every layer.
    h, below = lax.scan(lambda h, layer: indexed(h, (layer, None)), h, indices[:split], unroll=model.unroll)
    upper = indexed if model.remat == "none" else remat(indexed)
    h, above = lax.scan(upper, h, part((indices, per_layer), split, L), unroll=model.unroll)
    return h, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), below, above)


def spread(plan: Plan, steering: Steering, layers: int) -> Steering:
    """Scatter each slot's active layers into [L, ...] zeros, the identity of every method for the other layers."""

    def put(leaf: Array, active: tuple[int, ...]) -> Array:
        if len(active) == layers:
            return leaf
        return jnp.zeros((layers, *leaf.shape[1:]), leaf.dtype).at[jnp.array(active)].set(leaf)

    return {
        slot.name: jax.tree.map(lambda leaf, s=slot: put(leaf, s.active_layers(layers)), steering[slot.name])
        for slot in plan
    }


@partial(jax.tree_util.register_dataclass, data_fields=["base", "steering"], meta_fields=["model"])
@dataclass(frozen=True)
class Network:
    """A model with its weights as one pytree, for jit and grad: the first three arguments of `forward`.

    model     the static part
    base      pretrained weights in the layout of `init_base`
    steering  the steering tree of `model.plan`
    """

    model: Model
    base: PyTree
    steering: Steering

    def __call__(self, batch: Batch, capture: Sequence[str] = ()) -> Output:
        """`forward` on a batch; `capture`: sites whose values are returned as taps."""
        return forward(self.model, self.base, self.steering, batch, capture=capture)

    def steered(self, slot: Slot, params: dict[str, dict[str, Array]]) -> Network:
        """The network with one more slot, applied after the others.

        Args:
            slot: the new slot.
            params: its parameters, params[site][param].

        Raises:
            ValueError: the network already has a slot of that name.
        """
        if slot.name in self.steering:
            raise ValueError(f"the network already has a slot {slot.name!r}; give the new one another name")
        model = replace(self.model, plan=(*self.model.plan, slot))
        return Network(model, self.base, {**self.steering, slot.name: params})
