"""The stage tests: the numerical part of the test suite, on the accelerator."""

from __future__ import annotations

import os
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from train.bench.accelerator.records import Context, Figures, Need, Row, Stage
from train.bench.accelerator.settings import AcceleratorBench
from train.bench.provenance import ROOT
from train.devices.programs import run_program

GROUPS: dict[str, tuple[str, ...]] = {
    "models": tuple(
        f"tests/jaxsteer/models/test_{name}.py" for name in ("attention", "layers", "families_golden", "quantise")
    ),
    "steering": tuple(
        f"tests/jaxsteer/test_{name}.py"
        for name in ("golden", "golden_methods", "contracts", "steering", "strength", "updated_kernel")
    ),
    "tokens": tuple(
        f"tests/jaxsteer/test_{name}.py" for name in ("positions", "properties", "scan", "adapters", "matmul")
    ),
    "training": (
        "tests/jaxsteer/objectives",
        *(
            f"tests/jaxsteer/test_{name}.py"
            for name in ("derivatives", "training", "optim", "orthogonality", "projection", "randomness", "groups")
        ),
    ),
    "decoding": tuple(f"tests/jaxsteer/test_{name}.py" for name in ("generate", "decoder", "likelihood", "folding")),
    "theory": ("tests/jaxsteer/theory",),
}
"""Test files whose results are numbers. Not those that read and write files, and not those of SmolLM2 itself."""

SMALL = {"positions": ("tests/jaxsteer/test_positions.py",)}
"""What a rehearsal runs."""

WORKERS = 8
"""Processes that test at a time; they compile most of the time, so one GPU is enough for all."""

CLONE = Need("a clone of jaxsteer, for its tests", lambda device, config: (ROOT / "tests" / "conftest.py").is_file())
PYTEST = Need("pytest", lambda device, config: find_spec("pytest") is not None)

FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_deterministic_ops=true"
"""Two programs with the same product should choose the same kernel for it."""


def _environment(platform: str) -> dict[str, str]:
    """Variables of a test process. Several share the device, so none takes its memory beforehand."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {
        "XLA_FLAGS": f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}",
        "JAXSTEER_TEST_PLATFORM": platform,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": path,
    }


def _run(paths: Sequence[str], context: Context) -> Figures:
    """Run pytest, and count from its report.

    Raises:
        TookTooLong: the time limit came first.
        ValueError: there is no report.
    """
    workers = ("-n", str(min(WORKERS, os.cpu_count() or 1))) if not context.config.small and find_spec("xdist") else ()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ("-q", "-p", "no:cacheprovider", "-m", "not slow", f"--junitxml={report}", *workers)
        command = [sys.executable, "-m", "pytest", *options, *paths]
        environment = _environment(context.device.platform)
        done = run_program(command, "", "pytest", context.seconds_left, str(ROOT), environment)
        if not report.is_file():
            raise ValueError(f"pytest made no report: {(done.printed + done.complaint)[-500:]}")
        return _counted(ElementTree.parse(report).getroot())


def _counted(report: ElementTree.Element) -> Figures:
    """Numbers of tests by outcome, and what failed, from a JUnit report."""
    cases = list(report.iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "which failed": ", ".join(f"{case.get('classname', '')}::{case.get('name', '')}" for case in failed),
        "why": " | ".join(_reason(case) for case in failed[:10]),
    }


def _reason(case: ElementTree.Element) -> str:
    """The first line of a failure's message."""
    found = case.find("failure")
    found = case.find("error") if found is None else found
    message = "" if found is None else found.get("message", "")
    return f"{case.get('name')}: {message.strip()[:200]}".replace("\n", " ")


def rows(config: AcceleratorBench, records: Sequence[Any]) -> list[Row]:
    """A row for each group of files."""
    groups = SMALL if config.small else GROUPS
    return [
        Row(name, partial(_run, paths), {"files": list(paths)}, 240.0, needs=(CLONE, PYTEST), here=True)
        for name, paths in groups.items()
    ]


STAGE = Stage("tests", "the numerical tests on this device, in full precision; which failed", rows)
