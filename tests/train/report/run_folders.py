"""Folders of runs, written without training."""

import json

import jax
from tiny_model import TINY

from jaxsteer.io import save_steering
from jaxsteer.io.files import write_json
from jaxsteer.optim import OptimConfig
from jaxsteer.plans import parse_plan
from jaxsteer.steering import init_steering
from train.config import TrainConfig
from train.evaluation.answers import ScoredAnswer, write_answers
from train.run.folder import RunFolder
from train.run.result import notes_of
from train.tasks import JsonlTask

STEPS = 40
CONFIG = TrainConfig(
    task=JsonlTask("letters.jsonl", validation="letters.jsonl"),
    model="some/model",
    plan=("lora(rank=2) @ mlp.down layers=last:2", "nonlinear(rank=4) @ block name=post"),
    optim=OptimConfig(lr=1e-2),
    steps=STEPS,
    evaluate_every=20,
)
KINDS = {"gained": (False, True), "lost": (True, False), "right": (True, True), "wrong": (False, False)}
START = {
    "time": "2026-01-31T10:00:00+00:00",
    "done": 0,
    "steps": STEPS,
    "command": ["jaxsteer", "sft", "jsonl", "--task.train", "my letters.jsonl"],
    "trainable": 100,
    "parameters": 1000,
    "device": "cpu: 1 x cpu",
    "machine": {"processor": "A processor", "cores": 2, "memory_gb": 8.0, "system": "Linux"},
    "versions": {"jaxsteer": "1.0", "jax": "0.10"},
}


def answers(kinds, after):
    return [
        ScoredAnswer(f"{n}>", f"{kind}{after}", None, "gold", KINDS[kind][after], False, f"letters.jsonl:{n}")
        for n, kind in enumerate(kinds, 1)
    ]


def metrics():
    rows = [{"step": 0, "validation_loss": 3.0, "token_accuracy": 0.1, "accuracy": 0.2, "low": 0.1, "high": 0.4}]
    for step in range(1, STEPS + 1):
        row = {"step": step, "loss": 3 / step, "penalty": 0.1, "grad_norm": 1 / step, "overlap": [0.0, step / 100]}
        row |= {"tokens": 50.0, "supervised": 10.0, "data_wait": 0.01, "step_seconds": 0.1}
        rows.append(row | {"lr_weights": 1e-3, "lr_activations": 1e-2 * (1 - step / STEPS)})
        if step % 20 == 0:
            rows.append({"step": step, "validation_loss": 2 / step, "accuracy": 0.5, "low": 0.3, "high": 0.7})
    return rows


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder, config=CONFIG, kinds=("gained",) * 6 + ("lost", "right", "right", "wrong")):
    """The folder of a finished run, without the training."""
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    write_json(run.config, config.to_json())
    source = {"sha256": "ab" * 32, "examples": 100, "sources": ["letters.jsonl"]}
    write_json(
        run.inputs,
        {
            "train": source | {"tokens": 5000, "supervised": 1000},
            "start_from": {"path": "runs/earlier", "sha256": "cd" * 32, "model": "m", "inputs": {"train": source}},
        },
    )
    write_lines(run.metrics, metrics())
    write_lines(run.starts, [START])
    rate = lambda value: {"value": value, "interval": [value - 0.1, value + 0.1], "examples": len(kinds)}
    write_json(
        run.summary,
        {
            "accuracy_before": rate(0.3),
            "accuracy_after": rate(0.8),
            "trainable_parameters": 1632,
            "trainable_share": 0.05,
            "seconds": 135.0,
            "data_wait_seconds": 1.0,
            "tokens_per_second": 1234.0,
            "peak_memory_bytes": 2.3e9,
            "step": STEPS,
            "finished": "2026-01-31T10:05:00+00:00",
            "validation": {"before": {"loss": 3.0}, "after": {"loss": 0.05}},
        },
    )
    plan = parse_plan(config.plan, TINY)
    steering = jax.tree.map(lambda leaf: leaf + 0.1, init_steering(plan, TINY, jax.random.key(0)))
    save_steering(run.steering, steering, plan, model_name="some/model", config=TINY, notes=notes_of(config))
    write_answers(run.answers_before, answers(kinds, False))
    write_answers(run.answers_after, answers(kinds, True))
    shown = {"source": "v:1", "prompt": "q>", "gold": "b", "truncated": False}
    outputs = [(0, "a", False), (20, "b", True), (40, "b", True)]
    write_lines(run.answers_during, [shown | {"step": s, "output": o, "correct": c} for s, o, c in outputs])
    return run
