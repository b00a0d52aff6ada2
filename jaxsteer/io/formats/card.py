"""The model card of an export, README.md: what it is, how exact, and how to load it, as the Hugging Face Hub shows it.

What comes from files, such as names and notes, is not trusted: it stands between backquotes, where neither Markdown nor
HTML means anything, and only ids of the Hub get into the front matter.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

from jaxsteer.io.files import Json
from jaxsteer.io.formats import find_format
from jaxsteer.io.formats.format import JAXSTEER, Use
from jaxsteer.io.provenance import library_version, provenance_of
from jaxsteer.io.source import hub_id
from jaxsteer.io.steered import SteeredModel
from jaxsteer.plans import method_name
from jaxsteer.types import Plan

NAME = "README.md"

_LONGEST = 300
"""Characters of a text from a file that are shown."""


def model_card(steered: SteeredModel, to: str, verdict: Mapping[str, Json]) -> str:
    """The text of README.md.

    Args:
        steered: what was exported, with `lost` saying what the files do not hold of it.
        to: the format's name.
        verdict: how exact it is, as `Verdict.to_json` says it; under "peers" what other programs answered, a mapping as
            of `train.peers.verify` for each. Whatever is missing is left out.
    """
    row = find_format(to)
    assert row.use is not None
    base = hub_id(steered.source or steered.loaded.name)
    parts = [
        _front_matter(steered.plan, row.use, base),
        f"# Steering for {quoted(steered.source or steered.loaded.name)}",
        f"For {row.programs}, written by jaxsteer {library_version()} (format `{to}`).",
        _section("What it is", _contents(steered)),
        _section("Training", _training(steered)),
        _section("How exact it is", _exactness(verdict)),
        f"## How to load it\n\n{_how_to_load(row.use, base)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _how_to_load(use: Use, base: str | None) -> str:
    """The code, with this base model's id if it is known, and what does the same in jaxsteer."""
    code = use.code if base is None else use.code.replace("BASE", base)
    names = "`FOLDER` is the id of this repository, or where you have put it"
    if "BASE" in code:
        names += "; `BASE` is the base model, as a folder, a file or an id"
    parts = [f"{names}. {use.needs}".strip(), _block(code, use.language)]
    return "\n\n".join(parts if code == JAXSTEER else [*parts, "In jaxsteer:", _block(JAXSTEER, "python")])


def _block(code: str, language: str) -> str:
    return f"```{language}\n{code}\n```"


def quoted(text: str) -> str:
    """A text from a file as Markdown that shows it literally, on one line: between backquotes."""
    line = "".join(char if char.isprintable() else " " for char in text[: _LONGEST + 1])
    line = " ".join(line.split())
    line = line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    # A backquote at an end needs a space between it and the fence.
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line or ' '}{fence}"


def _section(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(lines) if lines else ""


def _front_matter(plan: Plan, use: Use, base: str | None) -> str:
    """What the Hub reads: YAML between two lines of dashes."""
    methods = dict.fromkeys(method_name(slot.method) for slot in plan)
    front: dict[str, Json] = {"library_name": use.library, "pipeline_tag": "text-generation"}
    if base is not None:
        front |= {"base_model": base} | ({"base_model_relation": use.relation} if use.relation else {})
    front["tags"] = list(dict.fromkeys(["jaxsteer", "steering", *methods, *use.tags]))
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items()]  # plain ASCII as JSON is YAML
    return "\n".join(["---", *lines, "---"])


def _contents(steered: SteeredModel) -> list[str]:
    """Base model, plan and size."""
    config = steered.loaded.config
    lines = [f"- Base model: {quoted(steered.source or steered.loaded.name)}, family {steered.loaded.family}"]
    for slot in steered.plan:
        method = repr(slot.method).replace(type(slot.method).__name__, method_name(slot.method))
        active = slot.active_layers(config.layers)
        layers = f"layers {', '.join(map(str, active))} of" if len(active) < config.layers else "all"
        kind = "updates weights" if slot.method.kind == "weight" else "shifts activations"
        where = f"at {', '.join(slot.sites)}, of {slot.positions} tokens, in {layers} {config.layers} layers"
        lines.append(f"- {quoted(slot.name)}: {quoted(method)} {kind} {where}")
    if not steered.plan:
        lines.append("- No steering: the weights hold everything")
    trained = sum(slot.method.count(steered.steering[slot.name][site]) for slot in steered.plan for site in slot.sites)
    lines += [f"- Trained parameters: {trained:,}"] if trained else []
    return lines + [f"- Not in these files: {quoted(text)}" for text in steered.lost]


def _training(steered: SteeredModel) -> list[str]:
    """Task, prompts and result, as far as the notes have them."""
    notes = steered.notes
    steps = provenance_of(notes, steered.loaded.name, steered.plan)
    settings: Mapping[str, Json] = next((s["config"] for s in steps[::-1] if isinstance(s.get("config"), dict)), {})
    lines = []
    if isinstance(task := settings.get("task"), dict):
        plain = [f"{key}={value}" for key, value in task.items() if isinstance(value, str | int | float)]
        lines.append(f"- Task: {quoted(', '.join(plain))}")
    if isinstance(template := notes.get("template"), str) and template not in ("", "{prompt}"):
        lines.append(f"- Prompts are asked as {quoted(json.dumps(template, ensure_ascii=False))}")
    if notes.get("chat") is True:
        lines.append("- Prompts are asked in the model's chat template")
    if _is_count(settings, "steps") and _is_count(settings, "batch_size"):
        lines.append(f"- Trained for {settings['steps']:,} steps of {settings['batch_size']:,} rows")
    result = notes.get("result")
    figures = result.items() if isinstance(result, dict) else ()
    return lines + [f"- {quoted(str(name))}: {text}" for name, value in figures if (text := _figure(value))]


def _is_count(settings: Mapping[str, Json], key: str) -> bool:
    return type(value := settings.get(key)) is int and 0 < value < 2**63


def _figure(value: Json) -> str:
    """A figure of a result, alone or as {value, interval, examples}; "" if it is none."""
    if not isinstance(value, dict):
        return f"{value:.4g}" if _is_number(value) else ""
    text, interval = _figure(value.get("value")), value.get("interval")
    if text and isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval)):
        text += f" (95 % interval {interval[0]:.3g} to {interval[1]:.3g})"
    return f"{text}, {value['examples']:,} examples" if text and _is_count(value, "examples") else text


def _is_number(value: Json) -> bool:
    """Whether a value is a finite number; an integer may be too large for a float."""
    return math.isfinite(value) if isinstance(value, float) else type(value) is int and abs(value) < 2**63


def _exactness(verdict: Mapping[str, Json]) -> list[str]:
    """What was measured, a sentence each."""
    lines = []
    figures = {name: verdict.get(name) for name in ("logit_difference", "kl", "top1", "positions")}
    if all(map(_is_number, figures.values())):
        difference, kl, top1, positions = figures.values()
        most = f"logits differ from the trained model's by at most {difference:.1e}, on {positions:,} tokens"
        away = f"KL divergence {kl:.2e} nats, the same token first at {top1:.1%}"
        lines.append(f"- Exact: {most}" if verdict.get("exactness") == "exact" else f"- Approximate: {most}; {away}")
    noise = verdict.get("bf16")
    if isinstance(noise, dict) and _is_number(noise.get("kl")) and _is_number(noise.get("base_kl")):
        lines.append(
            f"- Computed in bf16 instead of fp32: KL divergence {noise['kl']:.1e} nats, the base model alone "
            f"{noise['base_kl']:.1e}"
        )
    if verdict.get("verbatim") is True:
        lines.append("- The trained factors stand in the files bit for bit: jaxsteer reads them back as they were")
    peers = verdict.get("peers")
    return lines + [_peer(peer) for peer in (peers if isinstance(peers, list) else ()) if isinstance(peer, dict)]


def _peer(peer: Mapping[str, Json]) -> str:
    """What another program answered."""
    versions = peer.get("versions")
    of = [f"{name} {version}" for name, version in versions.items()] if isinstance(versions, dict) else []
    text = f"- Loaded with {quoted(', '.join(of) or str(peer.get('peer')))}, {quoted(str(peer.get('dtype')))}"
    if _is_number(peer.get("largest_difference")):
        text += (
            f": {quoted(str(peer.get('compared')))} differ from jaxsteer's by at most {peer['largest_difference']:.1e}"
        )
    if _is_count(peer, "generated") and _is_number(peer.get("generated_agreeing")):
        text += f"; {peer['generated_agreeing']:,} of {peer['generated']:,} greedy tokens are the same"
    return text
