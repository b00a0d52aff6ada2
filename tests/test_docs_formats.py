"""The table of docs/formats.md is what the formats themselves say of a Llama."""

from pathlib import Path

import pytest

from jaxsteer import parse_plan
from jaxsteer.io import FORMATS, LoadedModel, SteeredModel, WriteOptions, fingerprint
from jaxsteer.models.families import FAMILIES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "formats.md"

ROWS = {
    "LoRA, rsLoRA, PiSSA": ("lora @ attn.q", "rslora @ mlp.up", "pissa @ mlp.gate"),
    "DoRA": ("dora @ attn.q",),
    "nonlinear @ block": ("nonlinear @ block",),
    "nonlinear @ block and LoRA (joint)": ("nonlinear @ block", "lora @ attn.o,mlp.down"),
    "linear @ block": ("linear @ block",),
    "fixed @ block, from block 1 on": ("fixed @ block layers=1-3",),
    "fixed @ block, with block 0": ("fixed @ block",),
    "LoReFT, DiReFT @ block": ("loreft @ block", "direft @ block"),
    "linear @ attn, mlp.in or mlp": ("linear @ attn,mlp.in,mlp",),
    "fixed @ attn, mlp.in or mlp": ("fixed @ attn,mlp.in,mlp",),
    "nonlinear @ attn, mlp.in or mlp": ("nonlinear @ attn,mlp.in,mlp",),
    "LoFiT, JoLA @ attn.heads": ("lofit @ attn.heads", "jola @ attn.heads"),
    "any, at positions other than all": ("nonlinear @ block positions=last",),
}


NOT_SHOWN = ("jaxsteer", "hf-steerable")
"""jaxsteer's own files hold everything; a steerable base is what `vllm` is over."""


@pytest.fixture(scope="module")
def over(tmp_path_factory, tiny_config, tiny_base):
    """Steerable bases by the activation of their places."""
    loaded = LoadedModel(tiny_config, tiny_base, None, "tiny", fingerprint(tiny_config), "llama", ())
    row, folders = FORMATS["hf-steerable"], {}
    for method, activation in (("nonlinear", "silu"), ("linear", "none")):
        plan = parse_plan([f"{method} @ block"], tiny_config)
        folders[activation] = tmp_path_factory.mktemp(activation)
        row.write(row.reduce(SteeredModel(loaded, plan), WriteOptions()), folders[activation], WriteOptions())
    return folders


def refuses(name, plan, config, over):
    """Whether a format refuses a plan; vllm, whether it does so over every base."""
    options = [WriteOptions(over=folder) for folder in over.values()] if name == "vllm" else [WriteOptions()]
    return all(FORMATS[name].refuse(plan, FAMILIES["llama"], config, option) for option in options)


def cell(name, plans, config, over):
    """What becomes of plans in a format: exact; fitted, if --fit-lora can replace what is refused; no."""
    refused = {refuses(name, plan, config, over) for plan in plans}
    assert len(refused) == 1, f"{name} takes some of {plans} only"
    if not refused.pop():
        return "exact"
    takes_lora = not refuses(name, parse_plan(["lora @ mlp.down"], config), config, over)
    everywhere = all(slot.positions.kind == "all" for plan in plans for slot in plan)
    is_lora = all(slot.method.kind == "weight" for plan in plans for slot in plan)
    return "fitted" if takes_lora and everywhere and not is_lora else "no"


def table(config, over):
    """The table in Markdown."""
    columns = [name for name, row in FORMATS.items() if row.writable and name not in NOT_SHOWN]
    lines = ["| | " + " | ".join(f"`{name}`" for name in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for label, texts in ROWS.items():
        plans = [parse_plan(texts, config)] if "joint" in label else [parse_plan([text], config) for text in texts]
        lines.append(f"| {label} | " + " | ".join(cell(name, plans, config, over) for name in columns) + " |")
    return "\n".join(lines)


def test_the_table_is_what_the_formats_say(tiny_config, over):
    assert table(tiny_config, over) in PAGE.read_text(encoding="utf-8")
