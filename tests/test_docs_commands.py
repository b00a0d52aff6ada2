"""The commands in the documentation run, on tiny models and data, or their page says why they are not.

Above each block of commands is a comment that readers do not see: `<!-- run -->`; `<!-- run: A -> B; C -> D -->`, with
texts to replace before it is run; or `<!-- not run: REASON -->`. A page's blocks run in order, in one folder that has
a tiny model (`tiny`), configs for it (`tiny_listops.py`; `tiny_arc.py`, a named task whose questions list choices),
data (`my.jsonl`, `held_out.jsonl`, `pairs.jsonl`), a task for the lm-evaluation-harness (`letters.yaml`) and finished,
evaluated runs: `runs/quickstart` of the first config, `runs/x`, `runs/y` and so on of the second.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(
    r"^(?P<mark>[^\n]*)\n( *)```(?:bash|sh|console)[^\n]*\n(?P<body>.*?)^\2```", re.MULTILINE | re.DOTALL
)
MARK = re.compile(r"\s*<!-- (?:run(?:: (?P<changes>.+))?|not run: (?P<reason>\S.+)) -->")
RUNS = ("x", "y", "a", "b")


def blocks(page):
    """(mark, commands, line) of every block of commands on a page; the mark is None where there is none."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        yield MARK.fullmatch(found["mark"]), found["body"], text.count("\n", 0, found.start("body"))


def script_of(mark, body):
    """The commands of a marked block, with its replacements."""
    for change in (mark["changes"] or "").split("; "):
        if change:
            before, arrow, after = change.partition(" -> ")
            assert arrow, change
            assert before in body, f"{before!r} is not in the block"
            body = body.replace(before, after)
    return body


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_commands_is_marked(page):
    found = list(blocks(page))
    assert len(found) == len(re.findall(r"^ *```(?:bash|sh|console)\b", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert not [f"{page.name}:{line}" for mark, _, line in found if mark is None]


def test_replacements():
    mark = MARK.fullmatch("<!-- run: big -> tiny; 100 -> 2 -->")
    assert script_of(mark, "train big --steps 100\n") == "train tiny --steps 2\n"
    assert MARK.fullmatch("<!-- not run: needs a TPU -->")["reason"] == "needs a TPU"
    assert MARK.fullmatch("<!-- not run -->") is None


CONFIG = """
from jaxsteer.optim import OptimConfig
from train.config import TrainConfig
from train.data import ListOps
from train.tasks import ListOpsTask


def config() -> TrainConfig:
    return TrainConfig(
        model="tiny",
        task=ListOpsTask(ListOps(max_length=6, train=40, validation=8, test=8)),
        plan=("nonlinear(rank=2) @ block",),
        optim=OptimConfig(lr=1e-3),
        steps=2,
        batch_size=2,
        sequence_length=256,
        test_examples=4,
        validation_examples=2,
    )
"""
ARC = (
    CONFIG.replace("from train.data import ListOps\n", "")
    .replace("ListOpsTask\n", "HubTask\n")
    .replace(
        "ListOpsTask(ListOps(max_length=6, train=40, validation=8, test=8))",
        'HubTask("arc_easy", train="arc.jsonl", test="arc.jsonl", max_new_tokens=8)',
    )
)
LETTERS = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: letters.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{c}}"
doc_to_target: "{{a}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """`jaxsteer`, `python` and `.venv/bin/python` of this environment, first on PATH; nothing of the user's."""
    bin_ = tmp_path_factory.mktemp("bin")
    for name, words in {"jaxsteer": f'"{sys.executable}" -m train', "python": f'"{sys.executable}"'}.items():
        (bin_ / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        (bin_ / name).chmod(0o755)
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return os.environ | {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": quick,
        "HF_HOME": str(bin_ / "hf"),
        "BIN": str(bin_),
    }


def execute(script, folder, environment):
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def stocked(tmp_path_factory, environment):
    """A folder with everything that the documented commands read."""
    import jax

    from jaxsteer.io import save_hf
    from jaxsteer.models.config import ModelConfig
    from jaxsteer.models.transformer import init_base

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests/train/data"))
        from tiny_tokenizer import tiny_tokenizer

    sizes = {"width": 32, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 48, "max_length": 1024}
    config = ModelConfig(vocab_size=259, tied_head=True, **sizes)
    folder = tmp_path_factory.mktemp("stocked")
    save_hf(folder / "tiny", config, init_base(config, jax.random.key(3)), "llama", tiny_tokenizer())
    (folder / "tiny_listops.py").write_text(CONFIG)
    (folder / "tiny_arc.py").write_text(ARC)
    (folder / "letters.yaml").write_text(LETTERS)
    write = lambda name, rows: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("letters.jsonl", [{"q": "ab", "c": ["cd", "x"], "a": 0}, {"q": "m", "c": ["no", "n"], "a": 1}])
    options = lambda *texts: {"text": texts, "label": ["A", "B", "C", "D"][: len(texts)]}
    questions = [("Which freezes first?", options("water", "iron")), ("What glows?", options("coal", "sun", "dust"))]
    write("arc.jsonl", [{"question": asked, "choices": listed, "answerKey": "B"} for asked, listed in questions * 2])
    for name in ("my.jsonl", "held_out.jsonl"):
        write(name, [{"prompt": f"{chr(97 + i)}>", "completion": chr(98 + i)} for i in range(8)])
    # A random model with a tied head repeats the letter that its stream is moved towards.
    write("pairs.jsonl", [{"prompt": f"{letter}?", "chosen": "aaaa", "rejected": "zzz"} for letter in "bcdefghijk"])
    write("prompts.jsonl", [{"prompt": "[MAX 2 7 ]"}, {"messages": [{"role": "user", "content": "Who are you?"}]}])
    (folder / "letter.txt").write_text("Dear reader,\n\nwho are you?\n")
    (folder / ".venv/bin").mkdir(parents=True)
    shutil.copy(Path(environment["BIN"]) / "python", folder / ".venv/bin/python")
    execute("jaxsteer sft tiny_listops.py --out runs/quickstart", folder, environment)
    execute("jaxsteer sft tiny_arc.py --out runs/x && jaxsteer evaluate runs/x", folder, environment)
    for name in RUNS[1:]:
        shutil.copytree(folder / "runs/x", folder / "runs" / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- run" in page.read_text()], ids=lambda page: page.name)
def test_the_commands_run(page, stocked, environment, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(stocked, folder)
    marked = [(mark, body) for mark, body, _ in blocks(page) if mark and not mark["reason"]]
    assert marked
    for mark, body in marked:
        execute(script_of(mark, body), folder, environment)
