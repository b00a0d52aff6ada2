"""PiSSA, LoFiT and JoLA from their published formulas, a second time and on PyTorch.

    python make_methods.py FOLDER

writes methods.npz into FOLDER: for each CASE its inputs and parameters by name, the output `CASE/y`, and
`CASE/grad/NAME`, the gradient of Σ cotangent ⊙ y plus what the method itself adds to the loss. Weights are [out, in] as
in `Linear.weight`; activations of heads are [L, B, T, N, H], all else of heads starts with [L, N]. Everything is drawn
in fp32, computed in fp64 and stored in fp32. Needs torch.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import linear

RANK, ALPHA = 4, 6
LAYERS, HEADS, HEAD_DIM = 3, 4, 6
L1 = 0.05
SELECTED = 5
STEPS = (0, 1, 50, 1000)


def normal(*shape, scale=1.0):
    """Random values that fp32 holds exactly, as a leaf in fp64."""
    return (scale * torch.randn(shape)).double().requires_grad_()


def record(out, case, loss, leaves, **also):
    """The leaves with the gradients of the loss, and other values as they are."""
    grads = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    values = leaves | also | {f"grad/{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    for name, value in values.items():
        value = value.detach().numpy()
        out[f"{case}/{name}"] = value.astype(np.float32) if value.dtype == np.float64 else value


def pissa(out):
    """Meng et al. 2024, as in PEFT: the base becomes W − s B₀ A₀, and s B A is trained beside it."""
    scale = ALPHA / RANK
    weight, x, cotangent = normal(24, 20, scale=0.2), normal(2, 5, 20), normal(2, 5, 24)
    with torch.no_grad():
        u, singular, vt = torch.linalg.svd(weight)
        root = torch.diag(torch.sqrt(singular[:RANK] / scale))
        start_b, start_a = u[:, :RANK] @ root, root @ vt[:RANK]
        residual = weight - scale * start_b @ start_a
    a = (start_a + normal(RANK, 20, scale=0.2)).detach().float().double().requires_grad_()
    b = (start_b + normal(24, RANK, scale=0.2)).detach().float().double().requires_grad_()
    y = linear(x, residual) + scale * linear(linear(x, a), b)
    also = {"y": y, "weight": weight, "cotangent": cotangent}
    also |= {"product": scale * start_b @ start_a, "merged": residual + scale * b @ a}
    record(out, "pissa", (cotangent * y).sum(), {"x": x, "A": a, "B": b}, **also)


def lofit(out):
    """Yin et al. 2024: every head is scaled with an L1 penalty, then the heads of the largest ‖A‖₂ get a bias."""
    z, cotangent = (normal(LAYERS, 2, 5, HEADS, HEAD_DIM) for _ in range(2))
    scale = normal(LAYERS, HEADS, HEAD_DIM, scale=0.3)
    with torch.no_grad():
        scale[1, 2] = 0  # a head as at the start, where |A| has a kink
    heads = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    y = torch.empty_like(z)
    for layer, head in heads:
        y[layer, :, :, head] = (scale[layer, head] + 1) * z[layer, :, :, head]
    penalty = L1 * sum(scale[head].abs().sum() for head in heads)
    loss = (cotangent * y).sum() + penalty
    record(out, "lofit_scale", loss, {"z": z, "A": scale}, y=y, cotangent=cotangent, penalty=penalty)

    chosen = sorted(heads, key=lambda head: -scale[head].norm().item())[:SELECTED]
    selected = torch.zeros(LAYERS, HEADS)
    bias = normal(LAYERS, HEADS, HEAD_DIM, scale=0.3)
    y = z.clone()
    for layer, head in chosen:
        y[layer, :, :, head] = z[layer, :, :, head] + bias[layer, head]
        selected[layer, head] = 1
    loss = (cotangent * y).sum()
    record(out, "lofit", loss, {"z": z, "v": bias}, y=y, cotangent=cotangent, selected=selected)


def hard_concrete(log_gate, uniform=None):
    """Louizos et al. 2018, with JoLA's temperature 0.33 and stretch (−0.1, 1.1); no draw: the gate in evaluation."""
    if uniform is None:
        concrete = torch.sigmoid(log_gate)
    else:
        concrete = torch.sigmoid((torch.log(uniform / (1 - uniform)) + log_gate) / 0.33)
    return torch.clamp(1.2 * concrete - 0.1, 0, 1)


def jola(out):
    """Lai et al. 2025: z ← (g₂ A + 1) ⊙ z + g₁ v, and the expected number of open gates in the loss."""
    z, cotangent = (normal(LAYERS, 2, 5, HEADS, HEAD_DIM) for _ in range(2))
    scale, bias = (normal(LAYERS, HEADS, HEAD_DIM, scale=0.3) for _ in range(2))
    log_g1, log_g2 = (normal(LAYERS, HEADS, scale=1.5) for _ in range(2))
    leaves = {"z": z, "A": scale, "v": bias, "log_g1": log_g1, "log_g2": log_g2}
    u = torch.rand(LAYERS, 2, HEADS).clamp(0.02, 0.98).double()

    def edited(g1, g2):
        y = torch.empty_like(z)
        for layer in range(LAYERS):
            for head in range(HEADS):
                shift = g1[layer, head] * bias[layer, head]
                y[layer, :, :, head] = (g2[layer, head] * scale[layer, head] + 1) * z[layer, :, :, head] + shift
        return y

    gates = {
        "train": (hard_concrete(log_g1, u[:, 0]), hard_concrete(log_g2, u[:, 1])),
        "eval": (hard_concrete(log_g1), hard_concrete(log_g2)),
    }
    for mode, (g1, g2) in gates.items():
        y = edited(g1, g2)
        loss = (cotangent * y).sum()
        record(out, f"jola/{mode}", loss, leaves, y=y, cotangent=cotangent, u=u, gates=torch.stack([g1, g2], 1))

    open1, open2 = (torch.sigmoid(log - 0.33 * math.log(0.1 / 1.1)).sum() for log in (log_g1, log_g2))
    for step in STEPS:
        share = 0.1 * math.exp(-0.01 * step)
        penalty = (share * open1 + (1 - share) * open2) / (LAYERS * HEADS)
        record(out, f"jola/penalty_{step}", penalty, {"log_g1": log_g1, "log_g2": log_g2}, penalty=penalty)


def main(folder):
    """Compute and store."""
    torch.manual_seed(0)
    out = {}
    for method in (pissa, lofit, jola):
        method(out)
    np.savez_compressed(Path(folder) / "methods.npz", **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
