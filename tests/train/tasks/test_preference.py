"""Preferences as tasks: the kinds of line, what is refused and where, and pairs made of right and wrong answers."""

import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from train.data import Example, ListOps, Turn
from train.data.loading import load
from train.tasks import (
    JsonlTask,
    ListOpsTask,
    PairedTask,
    PreferenceTask,
    on_file,
    preference,
    task_from_json,
    task_to_json,
)
from train.tasks.held_out import HeldOutTask
from train.tasks.preference import right_answer, wrong_answer
from train.tasks.rows import read_records
from train.tasks.scoring import score

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def said(*texts):
    """Messages, the user's and the assistant's in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def transcript(*texts):
    return "".join((HUMAN, ASSISTANT)[i % 2] + " " + text for i, text in enumerate(texts))


@pytest.fixture
def task(tmp_path):
    """(lines, settings) -> a task whose training file has these lines."""

    def made(lines, **settings):
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return PreferenceTask(str(path), **settings)

    return made


def turns(recipe):
    return [[tuple(turn) for turn in example.turns] for example in load(recipe)]


def both(task, split="train"):
    return turns(task.recipe(split)), turns(task.rejected(split))


PLAIN = [[("prompt", "p"), ("completion", "a")]], [[("prompt", "p"), ("completion", "b")]]
CHAT = tuple([[("user", "p"), ("assistant", answer)]] for answer in "ab")
LONG = tuple([[("user", "x"), ("assistant", "y"), ("user", "p"), ("assistant", answer)]] for answer in "ab")
REPLY = {"prompt": said("x", "y", "p"), "chosen": said("", "a")[1:], "rejected": said("", "b")[1:]}


@pytest.mark.parametrize(
    ("line", "chat", "expected"),
    [
        (PAIR, False, PLAIN),
        (PAIR, True, CHAT),
        (REPLY, True, LONG),
        ({**REPLY, "chosen": "a", "rejected": "b"}, True, LONG),
        ({"chosen": said("x", "y", "p", "a"), "rejected": said("x", "y", "p", "b")}, True, LONG),
        ({"prompt": "p", "chosen": said("p", "a"), "rejected": said("p", "b")}, True, CHAT),
        ({"prompt": "p", "chosen": REPLY["chosen"], "rejected": REPLY["rejected"]}, True, CHAT),
        (
            {
                "prompt": "p",
                **{k: [{"from": "gpt", "value": v}] for k, v in zip(("chosen", "rejected"), "ab", strict=True)},
            },
            True,
            CHAT,
        ),
        ({"chosen": transcript("x", "y", "p", "a"), "rejected": transcript("x", "y", "p", "b")}, True, LONG),
        (
            {"chosen": transcript("x", "y", "p", "a"), "rejected": transcript("x", "y", "p", "b")},
            False,
            tuple([[("prompt", transcript("x", "y", "p") + ASSISTANT), ("completion", " " + v)]] for v in "ab"),
        ),
    ],
)
def test_kinds_of_line(task, line, chat, expected):
    assert both(task([line], chat=chat)) == expected


def test_parquet_and_the_hub(task, tmp_path, monkeypatch):
    lines = [REPLY, {"prompt": said("p"), "chosen": said("", "c")[1:], "rejected": said("", "d")[1:]}]
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), path)
    assert both(PreferenceTask(str(path), chat=True)) == both(task(lines, chat=True))
    asked = []
    monkeypatch.setattr(preference, "read_hub", lambda *name, **more: asked.append((name, more)) or read_records(path))
    hub = PreferenceTask("train_prefs", data="org/prefs", subset="en", chat=True)
    assert both(hub) == both(task(lines, chat=True))
    assert asked == [(("org/prefs", "train_prefs"), {"subset": "en"})] * 2
    assert hub.recipe("validation").parts == ()


def test_only_the_last_turn_counts(task):
    example = load(task([REPLY], chat=True).recipe("train"))[0]
    assert example.turn_weights == (1.0, 0.0, 1.0, 1.0)
    assert [turn.supervised for turn in example.turns] == [False, True, False, True]
    assert load(task([PAIR]).recipe("train"))[0].turn_weights == ()


def test_judged_answers(task):
    lines = [{"prompt": f"q{i}", "completion": f"c{i}", "label": i % 3 > 0} for i in range(5)]
    wanted, unwanted = both(task(lines))
    assert [example[1][1] for example in wanted] == ["c1", "c2", "c4"]
    assert [example[1][1] for example in unwanted] == ["c0", "c3"]
    assert both(task([*lines, PAIR])) == (wanted + PLAIN[0], unwanted + PLAIN[1])
    with pytest.raises(ValueError, match=r"d\.jsonl:6: no key 'completion', got"):
        load(task([*lines, {"prompt": "p", "label": True}]).recipe("train"))


def test_keys_template_and_weight(task):
    keys = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    lines = [{"question": "p", "good": "a", "bad": "b", "weight": 1}, {"weight": 0, "question": "x"}]
    first = task(lines, template="Q: {prompt}\n")
    first = task_from_json({**task_to_json(first), "keys": {**task_to_json(first)["keys"], **keys}})
    assert both(first)[1] == [[("prompt", "Q: p\n"), ("completion", "b")]]


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, {}, "no key 'rejected', got"),
        ({**PAIR, "rejected": "a"}, {}, "are the same answer, 'a'; --task.on-empty drop"),
        ({**PAIR, "chosen": ""}, {}, "'chosen' is empty"),
        ({**PAIR, "chosen": 5}, {}, "'chosen' must be a string, got 5"),
        ({**REPLY, "chosen": 5}, {"chat": True}, "must be a text or a list of messages, got 5"),
        ({**PAIR, "weight": 0.5}, {}, "'weight' is 0.5; preferences have the weights 0 and 1 only"),
        (REPLY, {}, "give --task.chat"),
        ({"chosen": said("p", "a"), "rejected": said("q", "b")}, {"chat": True}, "differ before their last message"),
        ({"chosen": said("p", "a"), "rejected": said("p", "a", "b")}, {"chat": True}, "the last message must be"),
        ({**REPLY, "chosen": said("z", "a")}, {"chat": True}, "does not begin with 'prompt'"),
        ({"chosen": "hello", "rejected": "b"}, {}, "no key 'prompt', and 'chosen' is not a transcript"),
        ({"chosen": transcript("p", "a", "q"), "rejected": transcript("p", "b")}, {}, "ends with the human"),
        ({"chosen": transcript("p", "a"), "rejected": transcript("p", "")}, {}, "ends with an empty answer"),
        *(
            ({"prompt": "p", "completion": "c", "label": label}, {}, "'label' must be true or false, got")
            for label in (None, "false", 2, [])
        ),
    ],
)
def test_errors_name_the_line_on_both_sides(task, line, settings, message):
    good = {"chosen": said("p", "a"), "rejected": said("p", "b")} if settings else PAIR
    made = task([good, line], **settings)
    for recipe in (made.recipe("train"), made.rejected("train")):
        with pytest.raises(ValueError, match=r"d\.jsonl:2: ") as error:
            load(recipe)
        assert message in str(error.value)


def test_dropped_rows_are_counted_and_sides_stay_aligned(task, capsys):
    lines = [
        {**PAIR, "rejected": "a"},
        PAIR,
        {**PAIR, "chosen": ""},
        {"chosen": transcript("p", "a"), "rejected": transcript("q", "b")},
        {**PAIR, "chosen": "c"},
    ]
    made = task(lines, on_empty="drop")
    assert [[e.source for e in load(side("train"))] for side in (made.recipe, made.rejected)] == [
        [f"{made.train}:2", f"{made.train}:5"]
    ] * 2
    assert "dropped 3 of 5 rows with an empty or missing text, or no pair of different" in capsys.readouterr().err
    with pytest.raises(ValueError, match="every row has"):
        load(task(lines[:1], on_empty="drop").recipe("train"))


def test_answers_of_one_kind_only(task):
    lines = [{"prompt": "p", "completion": "c", "label": True}]
    assert len(load(task(lines).recipe("train"))) == 1  # enough for imitation
    with pytest.raises(ValueError, match=r"d\.jsonl: no rejected answer, and none whose label is false"):
        load(task(lines).rejected("train"))
    with pytest.raises(ValueError, match="no chosen answer, and none whose label is true"):
        load(task([{**lines[0], "label": False}]).recipe("train"))


def test_held_out_answers_share_no_prompt(task):
    judged = [{"prompt": f"q{i}", "completion": f"good{i}", "label": True} for i in range(30)]
    judged += [{"prompt": f"q{i}", "completion": f"bad{i}", "label": False} for i in range(0, 40, 4)]
    held = HeldOutTask(task(judged), 0.2)
    asked = {
        s: [{e[0][1] for e in turns(side(s))} for side in (held.recipe, held.rejected)] for s in ("train", "validation")
    }
    assert all(len(side) for sides in asked.values() for side in sides)
    assert not set.union(*asked["train"]) & set.union(*asked["validation"])
    assert all({"q32", "q36"} & asked[split][1] for split in asked)  # prompts with unwanted answers alone
    assert len(set.union(*asked["train"], *asked["validation"])) == 32  # q0 to q29, q32, q36
    pairs = HeldOutTask(task([{**PAIR, "prompt": f"q{i}"} for i in range(20)]), 0.2)
    for split in ("train", "validation"):
        wanted, unwanted = both(pairs, split)
        assert [e[0] for e in wanted] == [e[0] for e in unwanted]


def test_json_and_files(task, tmp_path):
    made = task([PAIR], validation="v.jsonl", on_empty="drop")
    for each in (made, PairedTask(JsonlTask("a.jsonl"), seed=3)):
        assert task_from_json(json.loads(json.dumps(task_to_json(each)))) == each
    assert on_file(made, "o.jsonl").test == "o.jsonl"
    assert on_file(PairedTask(JsonlTask("a.jsonl")), "o.jsonl").test == "o.jsonl"
    with pytest.raises(ValueError, match=r"a PreferenceTask cannot be .* nor can pairs be made of it"):
        task_from_json({"type": "PairedTask", "of": task_to_json(made), "seed": 0})
    with pytest.raises(ValueError, match=r"must contain \{prompt\}"):
        PreferenceTask("a.jsonl", template="Q")


CHOICES = ("Answer: A.", "Answer: B.", "Answer: C.")


@pytest.mark.parametrize(
    ("text", "gold", "choices", "rule", "pattern"),
    [
        ("<answer>3</answer>", "3", (), "tagged", r"<answer>\d</answer>"),
        ("<answer>3</answer> of 5", "3", (), "tagged", r"<answer>\d</answer> of 5"),
        ("It is 5 of 9", "5", (), "digit", r"It is \d of 9"),
        ("5 and 5 are 10\nAnswer: 1,500", "1500", (), "number", r"5 and 5 are 10\nAnswer: 1,\d{3}"),
        ("Answer: B.", "B", CHOICES, "label", r"Answer: [AC]\."),
        ("7 * 3 = 21.\nAnswer: B.", "B", CHOICES, "label", r"7 \* 3 = 21\.\nAnswer: [AC]\."),
        ("Answer: B, so\nAnswer: B.", "B", CHOICES, "label", r"Answer: [AC]\."),
        ("-20000000000", "-20000000000", (), "exact", r"-[1-9]\d{10}"),
    ],
)
def test_wrong_answers_are_wrong(text, gold, choices, rule, pattern):
    example = Example.of("q", text, "f:1", gold, choices)
    made = [wrong_answer(example, rule, seed) for seed in range(20)]
    for wrong in made:
        assert wrong.turns[:-1] == example.turns[:-1]
        assert not score(wrong.turns[-1].text, gold, rule)
        assert re.fullmatch(pattern, wrong.turns[-1].text)
        assert (wrong.gold, wrong.source) == (gold, "f:1")
    assert len({wrong.turns[-1].text for wrong in made}) > 1
    assert made[7] == wrong_answer(example, rule, 7)


def test_questions_without_a_wrong_answer():
    with pytest.raises(ValueError, match=r"f:1: no wrong answer can be made.*'Paris'"):
        wrong_answer(Example.of("q", "Paris", "f:1"), "exact", 0)
    with pytest.raises(ValueError, match="f:1: has no answer"):
        right_answer(Example((Turn("text", "a 5"),), "f:1"))
    with pytest.raises(ValueError, match="f:1: has a weight other than 1"):
        right_answer(Example.of("q", "5", "f:1", weight=0.5))


def test_pairs_of_listops_and_of_conversations(tmp_path):
    task = PairedTask(ListOpsTask(ListOps(max_length=8, train=16, validation=2, test=2)))
    wanted, unwanted = (load(side("train")) for side in (task.recipe, task.rejected))
    assert [e.turns for e in wanted] == [e.turns for e in load(task.of.recipe("train"))]
    for right, wrong in zip(wanted, unwanted, strict=True):
        assert (right.turns[:-1], right.source, right.gold) == (wrong.turns[:-1], wrong.source, wrong.gold)
        assert score(right.turns[-1].text, right.gold, task.rule)
        assert not score(wrong.turns[-1].text, right.gold, task.rule)
    other = PairedTask(task.of, seed=1).rejected("train")
    assert turns(other) != turns(task.rejected("train"))
    assert other.parts[0].records.key != task.rejected("train").parts[0].records.key
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": said("2+2?", "4", "3+3?", "6")}) + "\n")
    chats = PairedTask(JsonlTask(str(tmp_path / "c.jsonl"), chat=True, rule="number"))
    right, wrong = (load(side("train"))[0] for side in (chats.recipe, chats.rejected))
    assert right.turn_weights == wrong.turn_weights == (1.0, 0.0, 1.0, 1.0)
    assert right.turns[:3] == wrong.turns[:3]
    assert right.turns[3] != wrong.turns[3]
