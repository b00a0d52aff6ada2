"""Splash attention: JAX's fused Pallas kernel for TPUs, with segment ids, on one device or under a mesh."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec as P

from jaxsteer.sharding import current_mesh, spec_of
from jaxsteer.types import Array

LANES = 128
"""Block sizes of the kernel are multiples of this."""

BLOCK = 512
"""Queries and keys in a block, if this divides the row's length."""


def splash_refusal(rows: int, length: int, kv_heads: int, row_shards: int, tensor: int) -> str:
    """Why the kernel cannot compute these shapes on a mesh, or "" if it can.

    Args:
        rows, length: of the batch, over all devices.
        kv_heads: K.
        row_shards: number of parts of the rows (data × fsdp).
        tensor: number of parts of the heads.
    """
    if length % LANES:
        return f"rows of {length} tokens are not a multiple of {LANES}"
    if rows % row_shards:
        return f"{rows} rows cannot be split over data x fsdp = {row_shards}"
    if kv_heads % tensor:
        return f"{kv_heads} key/value heads cannot be split over tensor = {tensor}"
    return ""


def splash_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    softcap: float | None = None,
    window: int | None = None,
    interpret: bool = False,
) -> Array:
    """Causal grouped-query attention within segments: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H].

    Tokens of an example are in order within a row, so causal by index is causal by position. Padding attends to
    padding, and its outputs are never used. Reverse mode only.

    Args:
        q: queries, already scaled, so that q · k is the score.
        k, v: keys and values.
        segments: int32 [B, T], 0 = padding.
        softcap: c, if scores s become c · tanh(s / c).
        window: number of tokens that a query attends to, itself included; None = all.
        interpret: emulate the kernel, for tests without a TPU.

    Raises:
        ValueError: shapes that the kernel cannot compute, see `splash_refusal`.
    """
    # Slow to import, and only needed on TPUs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (B, T, _, H), K = q.shape, k.shape[2]
    mesh = current_mesh()
    shards = (1, 1) if mesh is None else (mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"])
    if refusal := splash_refusal(B, T, K, *shards):
        raise ValueError(f"splash attention: {refusal}")
    block = next(size for size in (BLOCK, 2 * LANES, LANES) if T % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = kernels.BlockSizes(**{f"block_{name}": block for name in names})  # type: ignore[arg-type]

    def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
        """Attention of the rows and heads on one device."""
        rows, _, heads, _ = q.shape
        kv_heads = k.shape[2]
        seen = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
        mask = masks.MultiHeadMask([seen] * (heads // kv_heads))
        one = kernels.make_splash_mqa_single_device(
            mask=mask, block_sizes=sizes, attn_logits_soft_cap=softcap, interpret=interpret
        )
        q = q.reshape(rows, T, kv_heads, -1, H).transpose(0, 2, 3, 1, 4)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        row = lambda q, k, v, s: jax.vmap(one, (0, 0, 0, None))(q, k, v, kernels.SegmentIds(s, s))
        out = jax.vmap(row)(q, k, v, segments)  # [rows, K, G, T, H]
        return out.transpose(0, 3, 1, 2, 4).reshape(rows, T, heads, H).astype(v.dtype)

    if mesh is None:
        return local(q, k, v, segments)
    by_head = spec_of(k.shape, ("rows", None, "heads", None), mesh)
    by_row = P(by_head[0], None)
    split = jax.shard_map(local, in_specs=(by_head,) * 3 + (by_row,), out_specs=by_head, check_vma=False)
    return split(q, k, v, segments)
