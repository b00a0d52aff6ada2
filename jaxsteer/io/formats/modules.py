"""Low-rank updates by the names of the published model's layers, from the tables of the families.

Some families store several projections as one layer (`attn.c_attn` of GPT-2, `qkv_proj` and `gate_up_proj` of Phi-3).
What updates such a layer is one update of all its projections: `by_module` joins ours, `by_place` takes it apart again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from jaxsteer.io.formats.updates import Place, Update, Updates, kernel_at
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families.table import Family, Row
from jaxsteer.types import PROJECTIONS, PyTree

Layout = Literal["hf", "gguf"]


@dataclass(frozen=True)
class Module:
    """A linear layer of the published model that holds one or several of our projections.

    name   its name without ".weight", {i} for the layer: "model.layers.{i}.self_attn.q_proj"
    rows   site -> the row of its kernel, in the order of the stored outputs
    """

    name: str
    rows: Mapping[str, Row]

    @property
    def tail(self) -> str:
        """The name within a layer: "self_attn.q_proj"."""
        return self.name.partition("{i}.")[2]

    def named(self, layer: int) -> str:
        """The name in one layer."""
        return self.name.replace("{i}", str(layer))

    def spans(self, config: ModelConfig) -> dict[str, slice]:
        """Which of the outputs are those of each site."""
        widths = {site: row.shape(config)[1] for site, row in self.rows.items()}
        ends = dict(zip(widths, np.cumsum(list(widths.values())).tolist(), strict=True))
        return {site: slice(end - widths[site], end) for site, end in ends.items()}

    def shape(self, config: ModelConfig) -> tuple[int, int]:
        """Numbers of inputs and outputs."""
        rows = list(self.rows.values())
        return rows[0].shape(config)[0], sum(row.shape(config)[1] for row in rows)

    def kernel(self, base: PyTree, layer: int) -> np.ndarray:
        """The kernel [in, out] in one layer of a base tree, fp32."""
        return np.concatenate([kernel_at(base, Place(site, layer)) for site in self.rows], 1)


def modules_of(family: Family, config: ModelConfig, layout: Layout = "hf") -> tuple[Module, ...]:
    """The linear layers in a block of a model, in the order of its family's table."""
    rows: dict[str, dict[str, Row]] = {}
    paths = {f"blocks/{site.replace('.', '/')}/kernel": site for site in PROJECTIONS}
    for row in family.parameters(config):
        if row.path in paths:
            rows.setdefault(getattr(row, layout).removesuffix(".weight"), {})[paths[row.path]] = row
    return tuple(Module(name, of_name) for name, of_name in rows.items())


def has_conv1d(family: Family, config: ModelConfig) -> bool:
    """Whether layers are stored [in, out], as those of GPT-2, which are no linear layers to other programs."""
    return any(not row.transform.flips for module in modules_of(family, config) for row in module.rows.values())


def by_module(updates: Updates, family: Family, config: ModelConfig, layout: Layout = "hf") -> dict[str, Update]:
    """Updates by the full names of the layers ("model.layers.3.self_attn.q_proj"), joined where these are.

    An update of a layer that is one projection is passed on as it is. Where several updates are joined, their factors
    are put next to each other; rows of A that they share are written once. All or none of them may have a magnitude.
    """
    joined = {}
    for module in modules_of(family, config, layout):
        for layer in range(config.layers):
            parts = {site: updates[place] for site in module.rows if (place := Place(site, layer)) in updates}
            if parts:
                single = len(module.rows) == 1
                joined[module.named(layer)] = next(iter(parts.values())) if single else _join(parts, module, config)
    return joined


def by_place(updates: Mapping[str, Update], family: Family, config: ModelConfig, layout: Layout = "hf") -> Updates:
    """The inverse of `by_module`: updates by site and layer. Names that the model does not have are passed over.

    Of an update of several projections each gets its rows of B, and only the ranks in which these are not zero;
    projections that are not updated get nothing.
    """
    apart: Updates = {}
    for module in modules_of(family, config, layout):
        for layer in range(config.layers):
            if (update := updates.get(module.named(layer))) is None:
                continue
            if len(module.rows) == 1:
                apart[Place(next(iter(module.rows)), layer)] = update
                continue
            for site, span in module.spans(config).items():
                if (part := _part(update, span)) is not None:
                    apart[Place(site, layer)] = part
    return apart


def with_magnitudes(updates: Updates, base: PyTree) -> Updates:
    """The same updates, all with a magnitude if one has it: a plain update has that of the kernel it makes.

    Formats of other programs say once whether all updates are DoRA.
    """
    if all(update.magnitude is None for update in updates.values()):
        return updates
    changed = {}
    for place, update in updates.items():
        if update.magnitude is None:
            before, after = kernel_at(base, place), kernel_at(base, place, update)
            update = replace(update, magnitude=norms(after) - norms(before))
        changed[place] = update
    return changed


def norms(kernel: np.ndarray) -> np.ndarray:
    """The norm of the weights of each output of a kernel [in, out], fp32."""
    return np.linalg.norm(kernel.astype(np.float64), axis=0).astype(np.float32)


def _join(parts: Mapping[str, Update], module: Module, config: ModelConfig) -> Update:
    """Updates of some of a layer's projections as one of the layer."""
    scales = {part.scale for part in parts.values()}
    scale = scales.pop() if len(scales) == 1 else None
    numbers: dict[tuple[bytes, int], int] = {}
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    spans, (_, outputs) = module.spans(config), module.shape(config)
    magnitude = np.zeros(outputs, np.float32)
    for site, part in parts.items():
        b = part.b if scale is not None else part.b * np.float32(part.scale)
        seen: dict[bytes, int] = {}
        for row, column in zip(part.a, b.T, strict=True):
            key = row.tobytes()
            seen[key] = seen.get(key, 0) + 1
            number = numbers.setdefault((key, seen[key]), len(rows))
            if number == len(rows):
                rows.append(row)
                columns.append(np.zeros(outputs, b.dtype))
            columns[number][spans[site]] = column
        if part.magnitude is not None:
            magnitude[spans[site]] = part.magnitude
    has_magnitude = any(part.magnitude is not None for part in parts.values())
    return Update(
        np.stack(rows), np.stack(columns, 1), 1.0 if scale is None else scale, magnitude if has_magnitude else None
    )


def _part(update: Update, span: slice) -> Update | None:
    """What an update does to some of the outputs; None if it does nothing to them."""
    b = update.b[span]
    magnitude = None if update.magnitude is None else update.magnitude[span]
    used = np.flatnonzero((b != 0).any(0))
    if not used.size and magnitude is not None and magnitude.any():
        used = np.array([0])
    return replace(update, a=update.a[used], b=b[:, used], magnitude=magnitude) if used.size else None
