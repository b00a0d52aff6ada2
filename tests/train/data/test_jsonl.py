import json

import pytest

from train.data import Example, Keys, Turn, read_jsonl


def write(tmp_path, *lines):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def chat(*turns, **extra):
    return {"messages": [{"role": r, "content": c} for r, c in turns], **extra}


def test_plain_and_chat(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "2+2?", "completion": "4", "id": 9},
        "   ",
        {"prompt": "3+3?", "completion": "It is 6.", "answer": 6},
        chat(
            ("system", ""),
            ("user", "Hi"),
            ("assistant", "Hello ü"),
            ("user", "x"),
            ("assistant", "y"),
            answer="z",
        ),
    )
    assert read_jsonl(path) == [
        Example((Turn("prompt", "2+2?"), Turn("completion", "4")), f"{path}:1"),
        Example((Turn("prompt", "3+3?"), Turn("completion", "It is 6.")), f"{path}:3", "6"),
        Example(
            (
                Turn("system", ""),
                Turn("user", "Hi"),
                Turn("assistant", "Hello ü"),
                Turn("user", "x"),
                Turn("assistant", "y"),
            ),
            f"{path}:4",
            "z",
        ),
    ]


def test_gold_and_context():
    example = Example.of("p", " c \n", "f:1")
    assert example.gold == "c"
    assert example.context == Example.of("p", None, "f:1", "c")
    assert example.context.context == example.context
    assert Example.of("p", "c", "f:1", "a").gold == "a"
    assert Example.of("p", None, "f:1").gold is None


def test_own_keys_and_template(tmp_path):
    path = write(tmp_path, {"question": "q {x}", "answer": "a"}, {"question": "r", "answer": "b"})
    first, _ = read_jsonl(path, Keys("question", "answer"), template="Q: {prompt}\n")
    assert first.turns == (Turn("prompt", "Q: q {x}\n"), Turn("completion", "a"))
    assert first.answer is None  # its key is that of the completion
    assert first.gold == "a"


def test_prompts_only(tmp_path):
    path = write(tmp_path, {"prompt": "p", "answer": 1.5}, chat(("user", "u")), {"prompt": "p", "completion": "c"})
    examples = read_jsonl(path, completions=False)
    assert [len(e.turns) for e in examples] == [1, 1, 2]
    assert examples[0].gold == "1.5"


def test_byte_order_mark(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "p", "completion": "c"}\r\n')
    assert read_jsonl(path)[0].turns[1].text == "c"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p"', "not valid JSON .* column"),
        ("[1, 2]", "got a JSON list, expected one object"),
        ({"completion": "c"}, r"no key 'prompt', got \['completion'\]; expected .*messages"),
        ({"prompt": "p"}, "no key 'completion'"),
        ({"prompt": 3, "completion": "c"}, "'prompt' must be a string, got 3"),
        ({"prompt": "p", "completion": None}, "'completion' must be a string, got None"),
        ({"prompt": "p", "completion": ""}, "'completion' is empty"),
        ({"prompt": "p", "completion": "c", "answer": ["a"]}, "'answer' must be a string or a number"),
        ({"prompt": "p", "completion": "c", "answer": True}, "'answer' must be a string or a number"),
        ({"prompt": "p", "messages": []}, "either a chat or a prompt"),
        ({"messages": []}, "'messages' must be a list of at least one message"),
        ({"messages": "hi"}, "'messages' must be a list"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] must be an object"),
        (
            chat(("user", "u"), ("tool", "t")),
            r"messages\[1\] has role 'tool', allowed are system, user, assistant",
        ),
        (chat(("user", "u")), "ends with role 'user'"),
        (chat(("user", "u"), ("assistant", "")), r"messages\[1\].content' is empty"),
        (chat(("user", ["u"]), ("assistant", "a")), r"messages\[0\].content' must be a string"),
        (chat(("user", "u"), ("system", "s"), ("assistant", "a")), "only as the first message"),
        (
            {
                "messages": [
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": "a", "weight": 0},
                ]
            },
            r"messages\[1\] has \['weight'\], which is not supported",
        ),
    ],
)
def test_refuses_with_file_and_line(tmp_path, line, message):
    path = write(tmp_path, {"prompt": "p", "completion": "c"}, "", line)
    with pytest.raises(ValueError, match=rf"d\.jsonl:3: .*{message}"):
        read_jsonl(path)


@pytest.mark.parametrize("depth", [5_000, 100_000])
@pytest.mark.parametrize("key", ["prompt", "messages", "answer"])
def test_refuses_deep_nesting_with_file_and_line(tmp_path, key, depth):
    good = '{"prompt": "p", "completion": "c"}'
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        nested = opening * depth + "1" + closing * depth
        line = f'{{"{key}": {nested}}}' if key != "answer" else f'{good[:-1]}, "answer": {nested}}}'
        with pytest.raises(ValueError, match=r"d\.jsonl:2: ") as refused:
            read_jsonl(write(tmp_path, good, line))
        assert len(str(refused.value)) < 500


def test_refuses_numbers_that_python_does_not_convert(tmp_path):
    path = write(tmp_path, '{"prompt": "p", "completion": "c", "answer": ' + "9" * 5_000 + "}")
    with pytest.raises(ValueError, match=r"d\.jsonl:1: not valid JSON"):
        read_jsonl(path)


def test_refuses_other_encodings(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "p", "completion": "c"}\n{"prompt": "\xe4", "completion": "c"}\n')
    with pytest.raises(ValueError, match=r"d\.jsonl:2: not UTF-8"):
        read_jsonl(path)


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_refuses_an_empty_file(tmp_path, text):
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"d\.jsonl: no examples; expected"):
        read_jsonl(path)


def test_refuses_a_template_without_a_prompt(tmp_path):
    with pytest.raises(ValueError, match="template"):
        read_jsonl(tmp_path / "d.jsonl", template="Q:")
