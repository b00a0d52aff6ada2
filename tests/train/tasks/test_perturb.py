"""Perturbed prompts: what changes, what stays, and that the change is deterministic."""

import json
import random

import pytest
from task_rows import CHAT, INSTRUCTIONS, ROWS

from train.tasks import TASKS, HubTask, JsonlTask, ListOpsTask
from train.tasks.perturb import misspelt, perturbed
from train.tasks.scoring import score


def task(tmp_path, name, rows):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return HubTask(name, test=str(path))


LISTED = [name for name in ROWS if "{options}" in TASKS[name].prompt]
PROSE = [name for name in ROWS if name != "listops"]


@pytest.mark.parametrize("name", PROSE)
@pytest.mark.parametrize("kind", ["typos", "casing", "paraphrase"])
def test_only_the_prompt_changes(tmp_path, name, kind):
    asked = task(tmp_path, name, [ROWS[name][0]])
    [before], [after] = asked.load("test"), perturbed(asked, "test", kind)
    assert after.turns[0].text != before.turns[0].text
    assert (after.turns[1:], after.gold, after.choices, after.source) == (
        before.turns[1:],
        before.gold,
        before.choices,
        before.source,
    )
    assert perturbed(asked, "test", kind) == [after]
    # The listed candidates stay readable.
    for line in before.turns[0].text.splitlines():
        assert not line.startswith(("(", "Option")) or line in after.turns[0].text


@pytest.mark.parametrize("name", LISTED)
def test_the_gold_follows_the_shuffle(tmp_path, name):
    asked = task(tmp_path, name, [ROWS[name][0]])
    [before] = asked.load("test")
    [old] = asked.questions("test")
    text = old.question.gold.text
    golds = set()
    for seed in range(8):
        [after] = perturbed(asked, "test", "choices", seed)
        assert after.turns[0].text != before.turns[0].text
        assert sorted(after.turns[0].text) == sorted(before.turns[0].text)
        line = old.record.option.replace("{label}", after.gold).replace("{text}", text)
        assert line in after.turns[0].text.splitlines()
        assert score(after.turns[-1].text, after.gold, asked.rule)
        assert [score(choice, after.gold, asked.rule) for choice in after.choices].count(True) == 1
        golds.add(after.gold)
    assert golds - {before.gold}


def test_instructions_are_perturbed_too(tmp_path):
    asked = task(tmp_path, "arc_challenge", [INSTRUCTIONS["arc_challenge"][0]])
    [shuffled] = perturbed(asked, "test", "choices", 1)
    assert f"{shuffled.gold.capitalize()}: sun" in shuffled.turns[0].text
    assert shuffled.turns[-1].text == f"the correct answer is {shuffled.gold}"
    [reworded] = perturbed(asked, "test", "paraphrase")
    assert "Please choose" not in reworded.turns[0].text
    assert reworded.turns[0].text.endswith("Answer format: answer1/answer2/answer3\n")
    [loud] = [
        e for seed in range(9) for e in perturbed(asked, "test", "casing", seed) if "WHICH IS HOT?" in e.turns[0].text
    ][:1]
    assert "Answer1: sun" in loud.turns[0].text


def test_an_example_changes_the_same_way_whatever_its_place(tmp_path):
    rows = [{**ROWS["gsm8k"][0], "question": f"Somebody counted {i} different things yesterday?"} for i in range(20)]
    forward = task(tmp_path, "gsm8k", rows)
    texts = [e.turns[0].text for e in perturbed(forward, "test", "typos")]
    (tmp_path / "other").mkdir()
    again = [e.turns[0].text for e in perturbed(task(tmp_path / "other", "gsm8k", rows[::-1]), "test", "typos")]
    assert again[::-1] == texts
    assert [e.turns[0].text for e in perturbed(forward, "test", "typos", seed=1)] != texts
    assert all(f" {i} " in text for i, text in enumerate(texts))
    # Each example has its own random numbers.
    wordings = [e.turns[0].text.partition("Somebody")[0] for e in perturbed(forward, "test", "paraphrase")]
    assert len(set(wordings)) == len(TASKS["gsm8k"].paraphrases)
    assert len({e.turns[0].text.isupper() for e in perturbed(forward, "test", "casing")}) == 2


def test_misspelt_in_one_word_of_seven():
    text = "The sensible engineers measured 1234 distances between Ankara and café Ömür, twice; then rested a little."
    for seed in range(50):
        found = misspelt(text, random.Random(seed).random)
        wrong = [(a, b) for a, b in zip(text.split(), found.split(), strict=True) if a != b]
        assert len(wrong) == 2  # of 12 words with four letters or more
        for right, typo in wrong:
            assert right[0] == typo[0]
            assert abs(len(right) - len(typo)) <= 1
    assert misspelt("a bc 12345, def!", random.Random(0).random) == "a bc 12345, def!"


def test_conversations_and_plain_prompts(tmp_path):
    talk = {"messages": [{"role": "user", "content": "Where is Paris situated?"}, *CHAT["messages"][1:]]}
    [example] = perturbed(task(tmp_path, "chat", [talk]), "test", "typos")
    assert example.turns[0].text != "Where is Paris situated?"
    assert example.turns[1].text == "Hello!"
    path = tmp_path / "plain.jsonl"
    path.write_text('{"prompt": "Capital of France? ", "completion": "Paris"}\n')
    plain = JsonlTask(str(path), test=str(path))
    [example] = perturbed(plain, "test", "casing")
    assert example.turns[0].text in ("CAPITAL OF FRANCE? ", "capital of france? ")
    assert example.turns[1].text == "Paris"


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("gsm8k", "choices", "gsm8k lists no choices"),
        ("boolq", "choices", "boolq lists no choices"),
        ("listops", "typos", "listops asks with no prose"),
        ("chat", "paraphrase", "chat has no other wording"),
        ("gsm8k", "noise", "got 'noise', known are typos, casing, paraphrase, choices"),
    ],
)
def test_what_would_change_nothing_is_refused(tmp_path, name, kind, message):
    row = CHAT if name == "chat" else ROWS[name][0]
    with pytest.raises(ValueError, match=message):
        perturbed(task(tmp_path, name, [row]), "test", kind)


def test_tasks_whose_parts_are_not_known():
    with pytest.raises(ValueError, match="paraphrase needs a task whose parts are known, which JsonlTask is not"):
        perturbed(JsonlTask("x.jsonl"), "test", "paraphrase")
    with pytest.raises(ValueError, match=r"typos needs .* ListOpsTask is not"):
        perturbed(ListOpsTask(), "test", "typos")
