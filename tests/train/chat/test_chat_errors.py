"""What a chat cannot do is said in a sentence, and the chat goes on."""

import json
import re
from pathlib import Path

import pytest
from chat_session import Session

from train.chat.settings import Settings


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["/strenght 1"], "no command /strenght (did you mean strength?)"),
        (["/ hello"], "no command /"),
        (["/undo 3"], "/undo takes nothing more, got '3'"),
        (["/strength post_blok=1"], "/strength post_blok=1: no slot 'post_blok' (did you mean post_block?)"),
        (["/strength much"], "/strength much: neither a number nor SLOT=NUMBER\n"),
        (["/strength nan"], "/strength nan: must be a finite number"),
        (["/adapter tlak"], "no model 'tlak' (did you mean talk?)"),
        (["/temperature -1"], "/temperature -1: give a number of at least 0"),
        (["/temperature inf"], "/temperature inf: give a number of at least 0"),
        (["/top_p 0"], "/top_p 0: give a number above 0"),
        (["/top_k 1.5"], "/top_k 1.5: give a whole number"),
        (["/seed -1"], "/seed -1: give a whole number from 0"),
        (["/max 0"], "/max 0: give a whole number of at least 1"),
        (["/max 128"], "/max 128: answers have up to 127 tokens here"),
        (["/mode talk"], "/mode talk: give chat, completion or auto"),
        (["/adapter plain", "/system be brief"], "/system: completions have no system message"),
        (["/save"], "/save: give a file"),
        (["ab", "/save talk.txt"], "talk.txt: conversations are saved as JSON"),
        (["ab", "/save no/such/a.json"], "there is no folder no/such"),
        (["ab", "/save own.json"], "own.json: exists and holds no conversation"),
        (["/load missing.json"], "missing.json: no such file"),
        (["/load own.json"], "own.json: not a conversation that /save wrote"),
        (["/load open.json"], "open.json: the last message has no answer"),
        (["/load odd.json"], "odd.json: messages[0].role must be"),
        (["/load ids.json"], "ids.json: has token ids that tiny does not have"),
        (["ab", "/why 1000"], "/why 1000: the last exchange has tokens 1 to"),
        (["ab", "/why him"], "/why him: give the number of a token"),
        (["ab", "/why no/such/a.png"], "there is no folder no/such"),
        (["a\udcffb"], "the message: not valid Unicode"),
        (['"""', "ab"], 'a message that began with """ has no """ at its end'),
        (["x" * 150], "no answer fits into the context of 128"),
    ],
)
def test_errors_are_a_sentence_and_the_chat_goes_on(lines, message, session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    talk = lambda *messages, model="m": json.dumps({"format": "jaxsteer chat 1", "model": model, "messages": messages})
    Path("own.json").write_text('{"mine": 1}')
    Path("open.json").write_text(talk({"role": "user", "content": "a"}))
    Path("odd.json").write_text(talk({"role": "robot", "content": "a"}))
    asked, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tokens": [999]}
    Path("ids.json").write_text(talk(asked, answer, model="tiny"))
    _, notes = session.type("/max 2", *lines)
    assert re.search(f"^error: .*{re.escape(message)}", notes, re.MULTILINE)
    assert notes.count("error") == 1
    assert session.chat.failed
    assert Path("own.json").read_text() == '{"mine": 1}'
    shown, notes = session.type("/max 2", "ab")
    assert shown
    assert "error" not in notes


def test_only_the_base_model_is_here(engine):
    session = Session(engine)
    session.chat._settings = Settings(max_new_tokens=2)
    shown, notes = session.type("ab", "/strength 1", "/base", "/compare", "/why")
    assert session.chat.prompt == "base > "
    assert shown
    assert notes.count("error: only the base model is here") == 4


def test_what_fills_the_context_is_said(session, asked):
    _, notes = session.type("/max 100", "x" * 60)
    assert asked[0].max_new_tokens < 100
    assert f"ended after {asked[0].max_new_tokens} tokens; that is all the context has room for" in notes
    _, notes = session.type("ab")
    assert "shorten it with /undo, begin anew with /reset" in notes
    assert "--context (the model reads up to 512)" in notes
    assert len(asked) == 1
    _, notes = session.type("/reset", "/max 2", "ab")
    assert "ended after 2 tokens; /max N allows more" in notes


def test_a_failure_of_the_model_is_no_end(session, engine, monkeypatch, tmp_path):
    """Steering that is too strong gives no logits to draw from."""
    session.type("ab")
    _, notes = session.type("/strength 1e38", "cd", "/why")
    assert "non-finite logits" in notes
    assert len(session.conversation(tmp_path)) == 2
    assert session.type("/strength 1", "cd")[0]
