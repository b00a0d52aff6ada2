"""The console command: `jaxsteer COMMAND ...`, or `python -m train COMMAND ...`.

Only the module of the command is imported, so that `jaxsteer --help` does not wait for JAX.
"""

from __future__ import annotations

import difflib
import os
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from train.devices import interrupts

COMMANDS = {
    "quickstart": "steer SmolLM2-135M on a CPU: before, training, after",
    "create": "write a new model with random weights, to pretrain",
    "sft": "train steering, LoRA or the whole model on prompts and completions",
    "dpo": "train on preferences: DPO, IPO, SimPO, BiPO, KTO",
    "distill": "train on a teacher's predictions: the same model with a longer prompt, or another",
    "grpo": "train on rewards of the model's own answers",
    "contrast": "make a steering vector of pairs of texts, without training",
    "lofit": "train LoFiT's two stages: choose attention heads, then steer them",
    "generate": "answer prompts, with a steering file or without",
    "chat": "talk to a steered model in the terminal",
    "serve": "answer requests in OpenAI's protocol, and show a page to talk to steered models",
    "evaluate": "measure accuracy on a task, with intervals",
    "convert": "take steering to peft, vLLM, llama.cpp and others, or bring theirs here",
    "report": "write a report on runs, one HTML file: curves, answers, what is steered, how to do it again",
    "inspect": "show what a steering file holds and how far it moves activations",
    "robustness": "evaluate on perturbed prompts, another task and neutral text",
    "compare": "compare methods on one task with equal budgets",
    "bench": "measure speed and memory of training, decoding, evaluation and loading, and accelerators",
    "plan": "check whether a run fits on given TPUs or GPUs, and estimate its speed",
    "theory": "study weight updates as activation shifts on real fine-tunings",
}
"""What each command does. The command X runs the module `train.X`."""

_NEEDED = ("filelock", "matplotlib", "orbax", "rich", "scipy", "tyro")
"""Packages of the extra `train` without which no command runs."""


def usage() -> str:
    """The help text: every command with one line."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {line}" for name, line in COMMANDS.items())
    return "\n".join(
        (
            "usage: jaxsteer COMMAND [ARGUMENTS]\n\nSteer and fine-tune language models in JAX.\n\ncommands:",
            *lines,
            "\noptions:\n  --help     show this text; `jaxsteer COMMAND --help` lists the options of a command\n"
            "  --version  show the version",
        )
    )


def version() -> str:
    """The version of the library, read from its source because importing it would import JAX."""
    spec = find_spec("jaxsteer")
    assert spec is not None
    assert spec.origin is not None
    found = re.search(r'^__version__ = "(.+)"$', Path(spec.origin).read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Large arrays in huge pages."""
KEPT_MEMORY = f"{HUGE_PAGES}:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
"""And in memory that is kept for the next ones."""

SERVERS = ("chat", "serve")
"""Commands that wait most of the time, and give back the memory of rows and slots that they no longer need."""


def set_allocator(name: str) -> None:
    """Start this process again with the allocator that suits a command, which glibc reads from the environment.

    Without kept memory the system gives and takes back a training step's temporaries, page by page: 5 to 25 % of its
    time on a CPU. A user's own GLIBC_TUNABLES are left alone.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES if name in SERVERS else KEPT_MEMORY
        os.execv(sys.executable, sys.orig_argv)


def compute_in_the_calling_thread(name: str) -> None:
    """Have a CPU compute in the thread that asks for it: glibc keeps the memory of the main thread alone.

    JAX reads this setting from no environment variable, and only before it looks for devices.
    """
    if name not in SERVERS:
        import jax

        jax.config.update("jax_cpu_enable_async_dispatch", False)


def main() -> None:
    """Run a command, with the arguments that follow its name."""
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        print(usage())
        return
    if name == "--version":
        print(f"jaxsteer {version()}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        print(f"error: jaxsteer has no command {name!r}{hint}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    if missing := [package for package in _NEEDED if find_spec(package) is None]:
        print(
            f"error: `jaxsteer {name}` needs packages that are not installed ({', '.join(missing)}); "
            'install them with `pip install "jaxsteer[train]"`',
            file=sys.stderr,
        )
        raise SystemExit(1)
    set_allocator(name)
    sys.argv = [f"jaxsteer {name}", *arguments]
    with interrupts.handling():  # importing JAX takes seconds, in which Ctrl-C must end quietly too
        compute_in_the_calling_thread(name)
        runpy.run_module(f"train.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
