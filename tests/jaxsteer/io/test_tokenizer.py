import numpy as np
import pytest

from jaxsteer.io import load_config, load_model, load_tokenizer
from jaxsteer.io.llama_cpp import PRE_TOKENIZERS
from jaxsteer.io.tokenizer import stop_tokens_from_gguf, tokenizer_from_gguf

BYTES = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
BYTES += [chr(256 + i) for i in range(256 - len(BYTES))]


def metadata(**changes):
    """A byte-level vocabulary: every byte, three merges, three control tokens, one user-defined."""
    said = {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<s>", "</s>", "<|x|>", "<u>", *BYTES, "12", "123", "ab"],
        "tokenizer.ggml.token_type": [3, 3, 3, 4] + [1] * (len(BYTES) + 3),
        "tokenizer.ggml.merges": ["1 2", "12 3", "a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    said |= {f"tokenizer.{k.replace('__', '.')}": v for k, v in changes.items()}
    return {k: v for k, v in said.items() if v is not None}


def tokens(text, **changes):
    tokenizer = tokenizer_from_gguf(metadata(**changes), "file")
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["1", "2", "3", "4", "ab"]),
        ("llama-bpe", ["<s>", "123", "4", "ab"]),
        ("gpt-2", ["123", "4", "ab"]),
        ("default", ["123", "4", "ab"]),
        ("qwen2", ["1", "2", "3", "4", "ab"]),
        ("dbrx", ["123", "4", "ab"]),
        ("smaug-bpe", ["123", "4", "ab"]),
        ("tekken", ["<s>", "1", "2", "3", "4", "ab"]),
        ("llama3", ["<s>", "123", "4", "ab"]),
        ("olmo", ["123", "4", "ab"]),
    ],
)
def test_pre_tokenizers(pre, expected):
    assert tokens("1234ab", ggml__pre=pre) == expected


def test_specials_are_matched_whole_and_only_control_tokens_are_special():
    tokenizer = tokenizer_from_gguf(metadata(), "file")
    ids = tokenizer.encode("a<|x|>b<u></s>")
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<|x|>", "b", "<u>", "</s>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<u>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, None)
    assert tokenizer.model_max_length == 128
    assert len(tokenizer) == 4 + 256 + 3


def test_any_text_comes_back():
    text = "  Größe \u2013 東京 🙂\n\tx = 1234;  "
    for pre in PRE_TOKENIZERS:
        tokenizer = tokenizer_from_gguf(metadata(ggml__pre=pre, ggml__add_bos_token=False), "file")
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_and_eos_are_added_as_the_file_says():
    assert tokens("ab", ggml__add_bos_token=True, ggml__add_eos_token=True) == ["<s>", "ab", "</s>"]
    assert tokens("ab", ggml__pre="llama-bpe", ggml__add_bos_token=False) == ["ab"]


def test_chat_template():
    template = "{% for m in messages %}<|x|>{{ m['content'] }}{% endfor %}"
    tokenizer = tokenizer_from_gguf(metadata(chat_template=template), "file")
    chat = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|x|>ab"


def test_sentencepiece():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "ab", "▁ab", "ba"]
    scores = [0.0] * 259 + [-6.0, -7.0, -8.0, -2.0, -1.0, -3.0]
    said = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = tokenizer_from_gguf(said, "file")
    ids = tokenizer.encode("abba é")
    expected = ["<s>", "▁ab", "ba", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abba é"
    plain = tokenizer_from_gguf(said | {"tokenizer.ggml.add_space_prefix": False}, "file")
    assert plain.convert_ids_to_tokens(plain.encode("ab")) == ["<s>", "ab"]


PHI3_SPECIALS = ["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|tool|>"]


def phi3(**changes):
    """A SentencePiece vocabulary with Phi-3's special tokens, of which the last is user-defined."""
    letters = ["▁", "h", "i", "o", "k", "hi", "▁hi", "ok", "▁ok"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *PHI3_SPECIALS]
    said = {
        "general.architecture": "phi3",
        "general.name": "Phi 3 Mini 4k Instruct",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(n) for n in range(10, 1, -1)] + [-1000.0] * 5,
        "tokenizer.ggml.token_type": [2, 3, 4] + [6] * 256 + [1] * len(letters) + [3, 3, 3, 3, 4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": pieces.index("<|endoftext|>"),
        "tokenizer.ggml.padding_token_id": pieces.index("<|endoftext|>"),
        "tokenizer.ggml.add_bos_token": False,
    }
    return {key: value for key, value in (said | changes).items() if value is not None}


@pytest.mark.parametrize(
    "file",
    [
        {},
        {"general.name": "phi3-mini", "general.architecture": "llama"},
        {"general.name": "Phi-3.5"},
        {"general.name": None},
    ],
)
def test_phi3s_special_tokens_swallow_the_white_space_after_them(file, tmp_path):
    built = tokenizer_from_gguf(phi3(**file), "file")
    built.save_pretrained(tmp_path)
    for tokenizer in (built, load_tokenizer(tmp_path)):
        split = lambda text: tokenizer.convert_ids_to_tokens(tokenizer.encode(text))  # noqa: B023
        turns = ["<|user|>", "▁hi", "<|end|>", "<|assistant|>"]
        assert split("<|user|>\nhi<|end|>\n<|assistant|>\n") == turns
        assert split("<|user|> \n\t hi<|end|><|assistant|>") == turns
        assert split("<|tool|>\nhi</s> ok") == ["<|tool|>", "▁hi", "</s>", "▁ok"]
        for token in ("<unk>", "<s>", "<|endoftext|>"):
            assert split(f"{token}\nhi") == [token, "▁", "<0x0A>", "hi"]


def test_other_special_tokens_leave_white_space_alone():
    tokenizer = tokenizer_from_gguf(phi3(**{"general.architecture": "llama", "general.name": "TinyLlama"}), "file")
    ids = tokenizer.encode("<|user|>\nhi<|end|>\n<|assistant|>\n")
    assert len(ids) == 3 + 3 + 2 + 2  # the specials, and each new line with a space of its own
    assert tokenizer.decode(ids[1:4]) == "\nhi"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["<s>", "▁hi"]),
        ({"tokenizer.ggml.add_space_prefix": False}, ["<s>", "hi"]),
        ({"tokenizer.ggml.add_eos_token": True}, ["<s>", "▁hi", "</s>"]),
        ({"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eos_token_id": 1}, ["<s>", "▁hi", "<s>"]),
    ],
)
def test_what_a_sentencepiece_file_leaves_out(changes, expected):
    """llama.cpp's defaults: token 1 begins a text, 2 ends it, and 0 is unknown."""
    silent = dict.fromkeys(f"tokenizer.ggml.{key}" for key in ("bos_token_id", "eos_token_id", "add_bos_token"))
    said = phi3(**silent | changes)
    tokenizer = tokenizer_from_gguf(said, "file")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hi")) == expected
    assert tokenizer.unk_token == "<unk>"
    assert stop_tokens_from_gguf(said)[0] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("token", "kind", "ends"),
    [
        ("<|im_end|>", 3, True),
        ("<|im_end|>", 1, True),
        ("<|eot_id|>", 4, True),
        ("<end_of_turn>", 4, True),
        ("<|end|>", 1, True),
        ("<|endoftext|>", 1, True),
        ("<eos>", 3, True),
        ("<eos>", 1, False),
        ("<EOT>", 4, False),
        ("<|start|>", 3, False),
    ],
)
def test_tokens_that_end_a_reply_by_their_text(token, kind, ends):
    said = metadata()
    said["tokenizer.ggml.tokens"][2], said["tokenizer.ggml.token_type"][2] = token, kind
    assert stop_tokens_from_gguf(said) == ((1, 2) if ends else (1,))
    tokenizer = tokenizer_from_gguf(said, "file")
    if ends:
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode(f"a{token}b")) == ["a", token, "b"]
        assert tokenizer.decode(tokenizer.encode(f"a{token}b"), skip_special_tokens=True) == "ab"


def test_end_tokens_that_the_file_names_come_first():
    said = metadata(ggml__eot_token_id=3, ggml__eom_token_id=2)
    said["tokenizer.ggml.tokens"][0] = "<|im_end|>"
    assert stop_tokens_from_gguf(said) == (1, 3, 2, 0)


def test_punctuation_is_split_first_by_default():
    """Where llama.cpp's default differs from GPT-2's."""
    assert tokens("a !", ggml__pre="default") == ["a", "Ġ", "!"]
    merges = ["1 2", "12 3", "a b", "Ġ !"]
    words = [*metadata()["tokenizer.ggml.tokens"], "Ġ!"]
    kinds = [*metadata()["tokenizer.ggml.token_type"], 1]
    more = {"ggml__merges": merges, "ggml__tokens": words, "ggml__token_type": kinds}
    assert tokens("a !", ggml__pre="gpt-2", **more) == ["a", "Ġ!"]
    assert tokens("a !", ggml__pre="default", **more) == ["a", "Ġ", "!"]


def test_tokens_without_a_name():
    said = metadata()
    said["tokenizer.ggml.tokens"][3] = ""
    assert tokenizer_from_gguf(said, "file").convert_ids_to_tokens([3]) == ["[EMPTY_3]"]
    said["tokenizer.ggml.tokens"][3] = "ab"
    with pytest.raises(ValueError, match="file: the vocabulary has 'ab' more than once"):
        tokenizer_from_gguf(said, "file")


def test_a_tokenizer_from_elsewhere(golden, write_gguf, tmp_path):
    """For a file whose own is not known."""
    folder = golden / "tiny_llama"
    known = load_tokenizer(write_gguf(folder, load_config(folder)))
    known.save_pretrained(tmp_path / "words")
    bare = write_gguf(folder, load_config(folder), tokenizer=False, name="bare.gguf")
    with pytest.raises(ValueError, match=r"bare\.gguf: no vocabulary .*folder or id as `tokenizer`"):
        load_model(bare)
    model = load_model(bare, tokenizer=tmp_path / "words")
    assert model.tokenizer.encode("ab1<eos>") == known.encode("ab1<eos>") == [8, 5, 0]
    assert model.stop_tokens == (0,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ggml__pre": "deepseek-llm"}, "tokenizer.ggml.pre is 'deepseek-llm'; supported are llama-bpe"),
        ({"ggml__pre": None}, "tokenizer.ggml.pre is None"),
        ({"ggml__model": "t5"}, "tokenizer.ggml.model is 't5'; supported are 'gpt2' and 'llama'. Give the model's"),
        ({"ggml__pre": ["smollm"]}, "tokenizer.ggml.pre is ['smollm']"),
        ({"ggml__tokens": "ab"}, "tokenizer.ggml.tokens is not a list of str"),
        ({"ggml__tokens": ["\udcff"]}, "tokenizer.ggml.tokens holds text that is not UTF-8"),
        ({"ggml__token_type": [1.5] * 263}, "tokenizer.ggml.token_type is not a list of int"),
        ({"ggml__merges": [1]}, "tokenizer.ggml.merges is not a list of str"),
        ({"ggml__unknown_token_id": 999, "ggml__model": "llama"}, "unknown_token_id is 999"),
        ({"chat_template": 7}, "tokenizer.chat_template is 7"),
        ({"ggml__tokens": None}, "no vocabulary"),
        ({"ggml__token_type": [1]}, "263 tokens but 1 token types"),
        ({"ggml__merges": ["q zz"]}, "merges do not fit"),
        ({"ggml__eos_token_id": 999}, "eos_token_id is 999"),
        ({"ggml__model": "llama"}, "scores"),
    ],
)
def test_what_is_not_known_is_refused(changes, words):
    with pytest.raises(ValueError, match="file: ") as error:
        tokenizer_from_gguf(metadata(**changes), "file")
    assert words in str(error.value)


def test_smollm2_tokenizer(smollm2_path, golden):
    """Against ids computed by a plain byte-pair implementation (tests/golden/make_smollm2.py)."""
    tokenizer = load_tokenizer(smollm2_path)
    reference = np.load(golden / "smollm2.npz")
    for i, prompt in enumerate(reference["prompts"]):
        ids = tokenizer.encode(str(prompt))
        assert ids == reference[f"ids/{i}"].tolist()
        assert tokenizer.decode(ids) == str(prompt)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == str(reference["prompts"][1])
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_smollm2_config(smollm2_path):
    config = load_config(smollm2_path)
    assert (config.width, config.layers, config.heads, config.kv_heads) == (576, 30, 9, 3)
    assert (config.norm_eps, config.rope_theta, config.tied_head) == (1e-5, 1e5, True)


@pytest.mark.slow
def test_smollm2_weights(smollm2_path):
    model = load_model(smollm2_path)
    assert model.stop_tokens == (2, 0)  # <|im_end|>, <|endoftext|>
    assert model.base["blocks"]["mlp"]["down"]["kernel"].shape == (30, 1536, 576)
