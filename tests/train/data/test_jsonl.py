import json

import numpy as np
import pytest
from tiny_tokenizer import tiny_tokenizer

from train.data import Encoding, Example, Keys, Reading, Turn, encode, read_jsonl
from train.data.jsonl import ALPACA_TEMPLATE, notes_of, read_rows, tally_of
from train.data.records import Listed


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
        ({"prompt": "p", "completion": None}, "'completion' must be a string, got null"),
        ({"prompt": "p", "completion": ""}, "'completion' is empty"),
        ({"prompt": "p", "completion": "c", "answer": ["a"]}, "'answer' must be a text or a number, got \\['a'\\]"),
        ({"prompt": "p", "completion": "c", "answer": {"a": 1}}, "'answer' must be a text or a number"),
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
                    {"role": "assistant", "content": "a", "train": False},
                ]
            },
            r"messages\[1\] has \['train'\], which is not supported; .*\"weight\": 0",
        ),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 0}]},
            "every assistant message has weight 0",
        ),
        (
            {"messages": [{"role": "user", "content": "u", "weight": 2}, {"role": "assistant", "content": "a"}]},
            r"messages\[0\].weight is 2, but only assistant",
        ),
        (chat(("assistant", "a"), ("user", "u"), ("assistant", "b")), "'messages' begins with the assistant"),
        ({"conversations": [{"from": "human", "value": "u"}, {"from": "tool", "value": "a"}]}, "role 'tool', allowed"),
        ({"conversations": [{"from": "human", "value": "u"}]}, "'conversations' ends with role 'user'"),
        ({"instruction": "i", "input": 3, "output": "o"}, "'input' must be a string, got 3"),
        ({"instruction": "i", "output": ""}, "'output' is empty"),
        ({"instruction": "i"}, r"no key 'prompt', got \['instruction'\]"),
        ({"text": ["a"]}, r"'text' must be a string, got \['a'\]"),
        ({"text": "a\0b"}, "'text': has a NUL character"),
        ({"prompt": "p", "completion": "c", "weight": "much"}, "'weight' must be a finite number, .*got 'much'"),
        ('{"prompt": "p", "completion": "c", "weight": NaN}', "'weight' must be a finite number, .*got nan"),
        ({"prompt": "p", "completion": "c", "weight": True}, "'weight' must be a finite number, .*got True"),
        ({"prompt": "p", "completion": "c", "weight": 1e39}, "'weight' must be a finite number, .*got 1e\\+39"),
        ('{"prompt": "a\\ud83d", "completion": "c"}', r"not valid text: \\ud83d is half of a surrogate pair"),
        ('{"prompt": "a", "completion": "c", "x": {"b": ["\\udc00"]}}', r"not valid text: \\udc00"),
        ("[", r"a JSON list over several lines; .*jq -c"),
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


def test_refuses_a_template_without_a_prompt():
    with pytest.raises(ValueError, match="template"):
        Reading(template="Q:")


def texts(example):
    return [tuple(turn) for turn in example.turns]


def test_plain_texts_weights_and_messages_of_weight_0(tmp_path):
    talk = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in talk]
    messages[1]["weight"] = 0
    path = write(
        tmp_path, {"text": "All of it.", "weight": -0.5}, {"messages": messages}, {"prompt": "p", "completion": "c"}
    )
    text, chat, plain = read_jsonl(path)
    assert texts(text) == [("text", "All of it.")]
    assert [example.weight for example in (text, chat, plain)] == [-0.5, 1, 1]
    assert (chat.turn_weights, plain.turn_weights) == ((1, 0, 1, 1), ())
    assert texts(chat) == talk


def test_sharegpt_by_its_key(tmp_path):
    said = [("system", "s"), ("human", "h"), ("gpt", "g")]
    path = write(tmp_path, {"conversations": [{"from": who, "value": text} for who, text in said], "id": "x"})
    [example] = read_jsonl(path)
    assert texts(example) == [("system", "s"), ("user", "h"), ("assistant", "g")]


# As in the code of Alpaca's authors (train.py, PROMPT_DICT); the line break before the response is their data set's.
ALPACA_WORDS = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd {input}.\n\n### Input:\n1 {prompt}\n\n"
    "### Response:\n"
)


def test_alpaca_by_its_keys(tmp_path):
    path = write(
        tmp_path,
        {"instruction": "Add {input}.", "input": "1 {prompt}", "output": "3", "text": "Below ..."},
        '{"instruction": "Sing.", "input": NaN, "output": "la"}',
    )
    first, second = read_jsonl(path)
    assert texts(first) == [("prompt", ALPACA_WORDS), ("completion", "3")]
    assert second.turns[0].text == ALPACA_TEMPLATE.replace("{prompt}", "Sing.")
    asked = read_jsonl(path, chat=True)
    assert texts(asked[0]) == [("user", "Add {input}.\n\n1 {prompt}"), ("assistant", "3")]
    assert texts(asked[1])[0] == ("user", "Sing.")
    own = read_jsonl(path, template="Q: {prompt}\nA: ")
    assert own[1].turns[0].text == "Q: Sing.\nA: "
    # The names of the keys may be given instead.
    assert texts(read_jsonl(path, Keys("instruction", "output"))[1])[0] == ("prompt", "Sing.")


@pytest.mark.parametrize(
    ("value", "gold"),
    [("6", "6"), ("6", "6.0"), ("0.5", "0.50"), ("0.00001", "1e-5"), ("True", "true"), ("-3", "-3.0"), (" x", '" x"')],
)
def test_numbers_and_booleans_have_one_form(tmp_path, value, gold):
    [example] = read_jsonl(write(tmp_path, f'{{"prompt": "p", "completion": "c", "answer": {gold}}}'))
    assert example.answer == value


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    assert read_jsonl(write(tmp_path, {"text": "\N{GRINNING FACE}"}))[0].turns[0].text == "\N{GRINNING FACE}"


def described(path):
    rows = read_rows(path, Keys())
    halves = [tally_of(some, Keys()) for some in (rows[:2], rows[2:])]
    return notes_of(halves[0] + halves[1], Reading(), len(rows))


def test_what_a_reader_of_a_file_should_know(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "p", "completion": "c", "wieght": 2, "id": 1},
        {"prompt": "p", "completion": "c", "weight": 0.5, "answer": 7, "id": 2, "url": None},
        {"text": "t"},
        {"instruction": "i", "output": "o"},
        {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g", "weigth": 0}]},
    )
    assert described(path) == [
        "1 ShareGPT conversations (conversations)",
        "1 Alpaca instructions (instruction, output, input), asked in the words of Alpaca's own prompt",
        "1 plain texts (text), learned as a whole",
        "1 of 5 lines have a 'weight' in the loss, from 0.5 to 0.5",
        "1 of 5 lines have an 'answer'",
        "not used: 'id' in 2, 'wieght' in 1 (did you mean 'weight'?), "
        "'weigth (of a message)' in 1 (did you mean 'weight'?)",
    ]
    assert described(write(tmp_path, {"prompt": "p", "completion": "c"})) == []


def test_the_weights_of_lines_and_messages_reach_the_tokens(tmp_path):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"), ("assistant", "f")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[3]["weight"] = 0
    tokenizer = tiny_tokenizer()
    path = write(tmp_path, {"messages": messages, "weight": 0.5}, {"messages": messages[:2]})
    rows, report = encode(read_jsonl(path), tokenizer, Encoding(chat=True))
    spans = [tokenizer.decode(row.ids[row.weights > 0]) for row in rows]
    assert spans == ["b<|im_end|>f<|im_end|>", "b<|im_end|>"]
    assert [set(row.weights.tolist()) for row in rows] == [{0, 0.5}, {0, 1}]
    # What is a completion, and so what positions=completion steers, is as without weights.
    assert tokenizer.decode(rows[0].ids[rows[0].completion]) == "b<|im_end|>d<|im_end|>f<|im_end|>"
    assert report.supervised == sum(np.count_nonzero(row.weights) for row in rows)


def test_the_key_of_examples_knows_the_weights_of_messages():
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
    examples = [Example(turns, "f:1"), Example(turns, "f:1", turn_weights=(1, 0, 1, 1))]
    assert len({Listed([example]).key for example in examples}) == 2
