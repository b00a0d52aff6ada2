"""Splash attention: JAX's fused Pallas kernel for TPUs, with segment ids, on one device or under a mesh."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec as P

from jaxsteer.sharding import current_mesh, spec_of
from jaxsteer.types import Array

LANES = 128
"""The kernel's blocks are multiples of so many tokens."""

BLOCK = 512
"""Queries, and keys, of a block where the row is long enough."""


def splash_refusal(rows: int, length: int, kv_heads: int, row_shards: int, tensor: int) -> str:
    """Why the kernel cannot take rows of this kind on a mesh of these sizes; "" where it can."""
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

    Tokens of an example stand in order within a row, so causal by index is causal by position. Padding attends to
    padding, which nothing reads. Reverse mode only.

    Args:
        q: scaled, so that q · k is the score. k, v: as they are.
        segments: int32 [B, T], 0 = padding.
        softcap: scores s become c · tanh(s / c).
        window: a query reads so many tokens, itself included.
        interpret: emulate the kernel, for tests without a TPU.

    Raises:
        ValueError: rows or heads that the kernel cannot take, see `splash_refusal`.
    """
    # Slow to import, and needed on TPUs alone.
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
        """The rows and heads of one device."""
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
