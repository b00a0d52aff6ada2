"""Conversations as a user of `jaxsteer chat` has them, with the base model beside or without."""

import io
import json
import re

from chat_session import Session, text_of
from rich.console import Console

from jaxsteer.inference.draws import Sampling
from train.chat.screen import InTurn, visible


def test_a_conversation_is_put_to_the_model_as_a_whole(session, engine, asked, tmp_path):
    first, _ = session.type("/system be brief", "ab")
    session.type("cd")
    answer = session.conversation(tmp_path)[2]["content"]
    assert first == answer + "\n"
    start = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(asked[0], engine) == start
    assert text_of(asked[1], engine).startswith(start + answer)
    assert text_of(asked[1], engine).endswith("<|im_start|>user\ncd<|im_end|>\n<|im_start|>assistant\n")


def test_completions_stand_alone_in_the_template_of_the_training(session, engine, asked):
    session.type("ab", "/adapter plain", "cd", "/mode chat", "ef", "/mode auto", "/base", "gh")
    assert [text_of(request, engine) for request in asked[1::2]] == ["cd>", "gh>"]
    chat = text_of(asked[2], engine)
    assert "ab<|im_end|>" in chat
    assert "cd" not in chat
    assert [request.adapter for request in asked] == ["talk", "plain", "plain", None]
    assert [request.max_new_tokens for request in asked] == [8] * 4


def test_strength_turns_the_steering(session, asked, tmp_path):
    session.type("ab", "/strength 0", "/retry")
    at_0 = session.conversation(tmp_path)[1]
    session.type("/base", "/retry")
    base = session.conversation(tmp_path)[1]
    session.type("/base", "/strength 0.5", "/strength lora=2", "/retry", "/strength 1", "/retry")
    steered = session.conversation(tmp_path)[1]
    assert [request.strength for request in asked] == [
        {}, {"lora": 0, "post_block": 0}, {}, {"lora": 2, "post_block": 0.5}, {}
    ]  # fmt: skip
    assert at_0["content"] == base["content"] != steered["content"]
    assert (at_0["model"], at_0["strength"]) == ("talk", {"lora": 0, "post_block": 0})
    assert (base["model"], steered["model"]) == (None, "talk")


def test_the_prompt_says_who_answers(session):
    prompt = lambda *lines: (session.type(*lines), session.chat.prompt)[1]
    assert prompt() == "talk > "
    assert prompt("/strength 0.5") == "talk 0.5 > "
    assert prompt("/strength lora=1", "/temperature 0.7") == "talk post_block=0.5 T=0.7 > "
    assert prompt("/adapter plain", "/temperature 0") == "plain completion > "
    assert prompt("/base") == "base completion > "
    assert prompt("/strength 2", "/mode chat") == "plain 2 > "


def test_draws_depend_on_the_seed_and_the_number_of_the_answer(session, asked):
    session.type("/temperature 1", "/top_k 9", "/top_p 0.5", "/seed 3", "ab", "/retry", "/seed 3", "/retry")
    assert [request.seed for request in asked] == [3 << 32, 3 << 32 | 1, 3 << 32]
    assert {request.sampling for request in asked} == {Sampling(1.0, 9, 0.5)}


def test_undo_reset_and_history(session, tmp_path):
    shown, notes = session.type("ab", "cd", "/undo", "/history")
    assert "1 message left" in notes
    assert "> ab" in shown
    assert "> cd" not in shown
    _, notes = session.type("/reset", "/history", "/undo", "/retry", "/why")
    assert notes.count("nothing has been said yet") == 4


def test_a_saved_conversation_goes_on(session, engine, asked, tmp_path):
    session.type("/system be brief", "ab", "/adapter plain", "/strength 0.5", "cd", f"/save {tmp_path / 'a.json'}")
    other = Session(engine)
    _, notes = other.type(f"/load {tmp_path / 'a.json'}", f"/save {tmp_path / 'b.json'}", "ef")
    assert notes.startswith("2 messages\n")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert "be brief" not in text_of(asked[-1], engine)  # the last message was asked without
    assert "ab<|im_end|>" in text_of(asked[-1], engine)
    shown, _ = other.type("/undo", "/why")
    assert "plain 0.5 against base" in shown
    saved = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps(saved | {"model": "another"}))
    elsewhere, notes = other.type(f"/load {tmp_path / 'c.json'}", "/why")
    assert notes == "2 messages, with another base model: another\n"
    assert "plain 0.5 against base" in elsewhere


# ---- base and steered


def test_compare_keeps_the_answer_of_the_adapter(session, asked, tmp_path):
    shown, _ = session.type("ab", "/compare", "/compare cd")
    messages = session.conversation(tmp_path)
    assert [each["content"] for each in messages[::2]] == ["ab", "cd"]
    assert {each["model"] for each in messages[1::2]} == {"talk"}
    assert [request.adapter for request in asked] == ["talk", None, "talk", None, "talk"]
    assert shown.count("base:\n") == shown.count("talk:\n") == 2
    assert shown.endswith(f"talk:\n{messages[3]['content']}\n")


def test_answers_stand_side_by_side_where_there_is_room(engine):
    shown, _ = Session(engine, width=120, terminal=True).type("/strength 0.5", "/compare ab")
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert re.search(r"base {20,}talk 0\.5", plain)


def test_answers_in_turn_wait_for_each_other():
    console = Console(file=io.StringIO(), width=80)
    display = InTurn(console, ["one", "two"])
    for number, text in ((1, "b"), (0, "a"), (1, "c")):
        display.add(number, text)
    display.end(1)
    assert console.file.getvalue() == "one:\na"
    display.end(0)
    assert console.file.getvalue() == "one:\na\ntwo:\nbc\n"


def test_answers_cannot_control_the_terminal():
    assert visible("a\x1b[2J\tb\n\x07") == "a\\x1b[2J\tb\n\\x07"
