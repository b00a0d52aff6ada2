"""What `jaxsteer chat` shows of what steering did."""

import re

from chat_session import Session


def test_why_shows_the_last_exchange(session, tmp_path):
    shown, _ = session.type("xy", "ab", "/why", f"/why {tmp_path / 'tokens.png'}")
    assert "‖Δh‖ / ‖h‖ of each token" in shown
    assert "\nab<|im_end|>" in shown
    assert "xy" not in shown.partition("‖Δh‖")[2]
    assert re.search(r"layers 0 to 2: [▁-█]{3} largest \d", shown)
    assert (tmp_path / "tokens.png").stat().st_size > 0
    every, _ = session.type("/why all")
    rows = re.findall(r"^│ +(\d+) │ (\S+)", every, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert [text for _, text in rows[:3]] == ["'a'", "'b'", "'<|im_end|>'"]
    one, _ = session.type("/why 2")
    assert one.startswith("token 2, 'b' of the prompt")
    assert "likeliest tokens in its place" in one


def test_why_follows_the_answer_and_not_the_settings(session):
    session.type("ab")
    steered, _ = session.type("/why")
    assert session.type("/strength 0", "/why")[0] == steered
    zero, _ = session.type("/retry", "/why")
    assert "(largest 0.0000)" in zero
    would, notes = session.type("/base", "/retry", "/strength 1", "/why")
    assert "talk against base" in would
    assert "error" not in notes


def test_answers_can_be_coloured_as_they_come(engine):
    shown, _ = Session(engine, terminal=True, show_shift=True).type("ab", "/base", "/retry")
    answer, coloured = shown.split("\n")[:2]
    assert "\x1b[" not in answer
    assert re.search(r"\x1b\[[\d;]*48;2;", coloured)
    assert shown.count("48;2;") == coloured.count("48;2;")
