"""Published figures of known accelerators, by JAX's `device_kind`.

Sources: the Cloud TPU pages (https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x) and the data sheets of
NVIDIA A100, H100, H200 and B200, halved where they count sparsity. Figures are per JAX device; a TPU7x chip is two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    name       display name
    flops      peak of dense bf16 matmuls, FLOP/s
    memory     HBM size, bytes
    bandwidth  HBM bandwidth, bytes/s
    network    bandwidth to other chips, all links together, one way, bytes/s
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    network: float

    def peak(self, dtype: npt.DTypeLike) -> float | None:
        """Peak FLOP/s of matmuls of this dtype at JAX's default precision; None if unknown.

        At that precision NVIDIA GPUs multiply float32 as TF32, at half the speed of bf16, and TPUs as bf16.
        """
        name = np.dtype(dtype).name
        if name in ("bfloat16", "float16"):
            return self.flops
        if name == "float32":
            return self.flops if self.name.startswith("TPU") else self.flops / 2
        return None


_TPUS = {
    "TPU v4": Chip("TPU v4", 275e12, 32 * 2**30, 1228e9, 300e9),
    "TPU v5 lite": Chip("TPU v5e", 197e12, 16 * 2**30, 819e9, 200e9),
    "TPU v5": Chip("TPU v5p", 459e12, 95 * 2**30, 2765e9, 600e9),
    "TPU v6 lite": Chip("TPU v6e", 918e12, 32 * 2**30, 1638e9, 400e9),
    "TPU7x": Chip("TPU7x (half)", 2307e12 / 2, 96 * 2**30, 7380e9 / 2, 600e9 / 2),
}
_OTHER_NAMES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite", "TPU v7x": "TPU7x"}

# NVIDIA's names include memory and form factor ("NVIDIA H100 80GB HBM3"); more specific entries come first.
_GPUS = (
    (("A100", "40GB"), Chip("A100 40 GB", 312e12, 40e9, 1555e9, 300e9)),
    (("A100",), Chip("A100 80 GB", 312e12, 80e9, 2039e9, 300e9)),
    (("H100", "PCIE"), Chip("H100 PCIe", 1513e12 / 2, 80e9, 2000e9, 64e9)),
    (("H100", "NVL"), Chip("H100 NVL", 1671e12 / 2, 94e9, 3900e9, 300e9)),
    (("H100",), Chip("H100", 989e12, 80e9, 3350e9, 450e9)),
    (("H200", "NVL"), Chip("H200 NVL", 1671e12 / 2, 141e9, 4800e9, 450e9)),
    (("H200",), Chip("H200", 989e12, 141e9, 4800e9, 450e9)),
    (("B200",), Chip("B200", 4500e12 / 2, 180e9, 8000e9, 900e9)),
)


def chip_of(device_kind: str) -> Chip | None:
    """The figures of a device by its `device_kind`; None for a device that is not in the table, such as a CPU."""
    if device_kind.startswith("TPU"):
        return _TPUS.get(_OTHER_NAMES.get(device_kind, device_kind))
    # Match whole words: a GB200 is not a B200, and a MIG slice ("... MIG 1g.10gb") is not a whole GPU.
    words = set(device_kind.upper().replace("-", " ").split())
    if "MIG" in words:
        return None
    return next((chip for parts, chip in _GPUS if words.issuperset(parts)), None)
