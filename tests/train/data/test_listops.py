import dataclasses
import hashlib
import random
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
from tiny_tokenizer import tiny_tokenizer

from train.data import encode
from train.data.listops import OPERATIONS, ListOps, evaluate, generate, read_tsv, split_of

SMALL = ListOps(train=800, validation=100, test=100)
ALL = dataclasses.replace(SMALL, operations=tuple(OPERATIONS))


problems = lru_cache(generate)


def expressions(settings, split):
    return [e.turns[0].text.removesuffix(" = ") for e in problems(settings, split)]


def reduced(expression):
    """The answer by reducing an innermost list until none is left; shares no code with `evaluate`."""
    tokens = expression.split()
    while len(tokens) > 1:
        end = tokens.index("]")
        start = max(i for i in range(end) if tokens[i].startswith("["))
        v = [int(t) for t in tokens[start + 1 : end]]
        s = sorted(v)
        half = len(s) // 2
        product = 1
        for n in v:
            product *= n
        value = {
            "[MAX": s[-1],
            "[MIN": s[0],
            "[MED": s[half] if len(s) % 2 else int((s[half - 1] + s[half]) / 2),
            "[SM": int(str(sum(v))[-1]),
            "[PM": int(str(product)[-1]),
            "[FIRST": v[0],
            "[LAST": v[-1],
        }[tokens[start]]
        tokens[start : end + 1] = [str(value)]
    return int(tokens[0])


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("7", 7),
        ("[MAX 2 [MIN 3 4 ] ]", 3),
        ("[MED 1 2 ]", 1),
        ("[MED 9 1 4 ]", 4),
        ("[MED 1 8 2 9 ]", 5),
        ("[SM 7 8 9 ]", 4),
        ("[PM 7 8 9 ]", 4),
        ("[PM 5 0 ]", 0),
        ("[FIRST 3 [LAST 1 2 ] 9 ]", 3),
        ("[LAST 3 [FIRST 6 2 ] ]", 6),
        ("[MIN [SM 9 9 ] [MED 5 6 7 8 ] ]", 6),
    ],
)
def test_evaluate_by_hand(expression, answer):
    assert evaluate(expression) == answer == reduced(expression)


def test_evaluate_agrees_with_rewriting():
    deep = dataclasses.replace(ALL, max_depth=6, max_args=6, max_length=60, seed=3)
    for settings in (SMALL, ALL, deep):
        for e in problems(settings, "train"):
            assert e.answer == e.turns[1].text == str(reduced(e.turns[0].text.removesuffix(" = ")))


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "[MAX 1 2",
        "[MAX 1 2 ] ]",
        "[MAX ]",
        "[AVG 1 ]",
        "[MAX 12 ]",
        "[MAX 1 ] 2",
        "]",
        "x",
        "[MAX ² ]",
        "1 2",
    ],
)
def test_evaluate_refuses(bad):
    with pytest.raises(ValueError, match="ListOps"):
        evaluate(bad)


def test_golden_problems():
    # Changing the generator changes every recorded result: it must be on purpose.
    assert [(e.turns[0].text, e.gold, e.source) for e in generate(ListOps(train=3), "train")] == GOLDEN


GOLDEN = [
    ("[MED 3 9 7 0 ] = ", "5", "listops/train:1"),
    ("[MED [MIN 4 0 7 ] 7 8 1 ] = ", "4", "listops/train:2"),
    ("[MAX [SM 7 6 9 ] 8 ] = ", "8", "listops/train:3"),
]


def test_the_same_in_another_process():
    code = """
import sys, types
for name in ("train", "train.data"):  # without what the packages import, which takes most of the time
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [name.replace(".", "/")]
from train.data.listops import ListOps, generate
problems = generate(ListOps(train=800, validation=100, test=100), "train")
print(",".join(e.turns[0].text.removesuffix(" = ") for e in problems))
"""
    root = Path(__file__).parents[3]
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={"PYTHONPATH": str(root), "PYTHONHASHSEED": "77", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip().split(",") == expressions(SMALL, "train")


def test_splits_are_disjoint_whatever_the_seed():
    seen = {split: set() for split in ("train", "validation", "test")}
    for seed in range(2):
        for settings in (SMALL, ALL):
            for split, texts in seen.items():
                texts.update(expressions(dataclasses.replace(settings, seed=seed), split))
    for split, texts in seen.items():
        assert {split_of(e) for e in texts} == {split}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_partition_is_the_documented_one():
    names = {0: "test", 1: "validation"}
    for e in expressions(SMALL, "train")[:50] + expressions(SMALL, "test")[:50]:
        assert split_of(e) == names.get(int(hashlib.sha256(e.encode()).hexdigest(), 16) % 10, "train")


def test_distinct_prefix_and_seed():
    short = problems(SMALL, "train")
    assert len({e.turns[0].text for e in short}) == len(short) == 800
    assert generate(dataclasses.replace(SMALL, train=900), "train")[:800] == short
    assert generate(dataclasses.replace(SMALL, seed=1), "train") != short
    assert generate(dataclasses.replace(SMALL, train=0), "train") == []


def test_no_constant_answer_scores():
    counts = Counter(e.gold for e in problems(ALL, "test"))
    assert counts == {str(d): 10 for d in range(10)}


def test_difficulty_settings_hold():
    settings = ListOps(
        operations=("PM", "LAST"),
        max_depth=2,
        max_args=3,
        min_length=6,
        max_length=11,
        train=200,
        balanced=False,
    )
    for e in expressions(settings, "train"):
        tokens = e.split()
        depth = deepest = 0
        args = []
        for t in tokens:
            if t == "]":
                depth -= 1
                assert 2 <= args.pop() <= 3
            else:
                if args:
                    args[-1] += 1
                if t[0] == "[":
                    depth += 1
                    args.append(0)
            deepest = max(deepest, depth)
        assert 6 <= len(tokens) <= 11
        assert deepest <= 2
        assert {t for t in tokens if t[0] == "["} <= {"[PM", "[LAST"}


def test_styles():
    (tagged,) = generate(ListOps(train=1, style="tagged"), "train")
    assert tagged.turns[0].text.endswith("<answer>digit</answer>.\n[MED 3 9 7 0 ]\n")
    assert tagged.turns[1].text == "<answer>5</answer>"
    assert tagged.answer == "5"
    (own,) = generate(ListOps(train=1, prompt="{expression} = {x}"), "train")
    assert own.turns[0].text == "[MED 3 9 7 0 ] = {x}"


def test_boundary_is_clean():
    tokenizer = tiny_tokenizer()
    examples = generate(ListOps(validation=20), "validation")
    for example, row in zip(examples, encode(examples, tokenizer)[0], strict=True):
        whole = tokenizer(example.turns[0].text + example.turns[1].text)["input_ids"]
        assert row.ids.tolist() == [*whole, tokenizer.eos_token_id]
        assert row.weights.tolist() == [0.0] * (len(whole) - 1) + [1.0, 1.0]  # one digit, one end


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operations": ("MAX", "AVG")}, "AVG"),
        ({"operations": ()}, "operations"),
        ({"operations": ("MAX", "MAX")}, "distinct"),
        ({"max_depth": 0}, "max_depth 0"),
        ({"max_args": 1}, "max_args 1"),
        ({"nesting": 1.5}, "nesting: got 1.5"),
        ({"min_length": 20}, "min_length 20"),
        ({"max_length": 3, "min_length": 1}, "max_length 3"),
        ({"test": -1}, "test: got -1"),
        ({"style": "long"}, "long"),
        ({"prompt": "no"}, "expression"),
    ],
)
def test_settings_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ListOps(**settings)


def test_too_few_problems_exist(monkeypatch):
    monkeypatch.setattr("train.data.listops.MAX_FAILURES", 5_000)
    with pytest.raises(ValueError, match=r"found only \d+ distinct train problems of 500"):
        generate(ListOps(max_depth=1, max_args=2, min_length=4, max_length=4, train=500), "train")
    with pytest.raises(ValueError, match="dev"):
        generate(SMALL, "dev")


def test_read_tsv(tmp_path):
    rng = random.Random(0)
    rows = [f"[MAX {rng.randrange(10)} {rng.randrange(10)} {rng.randrange(10)} ]" for _ in range(60)]
    path = tmp_path / "d.tsv"
    path.write_text("\n".join(f"{evaluate(r)}\t( ( {r.replace(' ]', ' ) ]')} )" for r in rows) + "\n\n")
    splits = {s: read_tsv(path, SMALL, s) for s in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == 60
    for split, examples in splits.items():
        for e in examples:
            assert split_of(e.turns[0].text.removesuffix(" = ")) == split
            assert e.turns[0].text.removesuffix(" = ") == rows[int(e.source.rpartition(":")[2]) - 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3 [MAX 1 3 ]", "expected a digit, a tab"),
        ("4\t[MAX 1 3 ]", "the answer given is 4, but .* is 3"),
        ("3\t[MAX 1 3", "left open"),
    ],
)
def test_read_tsv_refuses(tmp_path, line, message):
    path = tmp_path / "d.tsv"
    path.write_text("1\t[MIN 1 2 ]\n" + line + "\n")
    with pytest.raises(ValueError, match=f"d.tsv:2: .*{message}"):
        read_tsv(path, SMALL, "train")


def test_read_tsv_refuses_other_encodings(tmp_path):
    path = tmp_path / "d.tsv"
    path.write_bytes(b"1\t[MIN 1 2 ]\n\xff\t[MIN 1 2 ]\n")
    with pytest.raises(ValueError, match=r"d\.tsv:2: not UTF-8 text .*save the file as UTF-8"):
        read_tsv(path, SMALL, "train")


def test_read_tsv_empty(tmp_path):
    path = tmp_path / "d.tsv"
    path.write_text("\n")
    with pytest.raises(ValueError, match="no ListOps problem"):
        read_tsv(path, SMALL, "train")
