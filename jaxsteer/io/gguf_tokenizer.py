"""A tokenizer as GGUF metadata: the pairs of the file that it is from, or those built from a Hugging Face tokenizer.

What is built is read again with `tokenizer_from_gguf` and compared on probe texts before it is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsteer.io.gguf_file import GgufValue
from jaxsteer.io.llama_cpp import GPT2_SPLIT, NO_VOCABULARY, PRE_TOKENIZERS
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.tokenizer import CONTROL, UNKNOWN, USER_DEFINED, Tokenizer, stop_tokens_from_gguf, tokenizer_from_gguf

NORMAL, UNUSED, BYTE = 1, 5, 6  # tokenizer.ggml.token_type

PROBES = (
    "The quick brown fox can't jump 3.14159 or 1234567 times, it's 20 °C!",
    "def f(x):\n    return x  # twice\n\n\n\ttab, three   spaces ",
    " leading space, trailing\n",
    "Ünïcödé 中文字符 ひらがな кириллица العربية 🚀🙂 e\u0301",
    "https://example.org/a_b?c=1&d=[2]{3}<4> ==> \\n 'S 'LL we'Ve $5.00 100%",
    "",
)
"""Texts on which a tokenizer and its description must agree, besides those with each of its added tokens."""

AS_HF = "Export to a Hugging Face folder instead (--to hf)"


def vocabulary_to_gguf(loaded: LoadedModel) -> dict[str, GgufValue]:
    """The metadata of a model's tokenizer: every key begins with "tokenizer.".

    Raises:
        ValueError: a tokenizer that GGUF cannot describe.
    """
    if loaded.tokenizer is None:
        pairs: dict[str, GgufValue] = {"tokenizer.ggml.model": NO_VOCABULARY[0]}
        return pairs | _ends(loaded.stop_tokens, pairs)
    rows = loaded.config.vocab_size
    if loaded.vocabulary:
        return _filled(loaded.vocabulary, rows)
    pairs = _filled(_built(loaded.tokenizer, loaded.name), rows)
    pairs |= _ends(loaded.stop_tokens, pairs)
    _check(loaded.tokenizer, pairs, loaded.name)
    return pairs


def _filled(pairs: Mapping[str, GgufValue], rows: int) -> dict[str, GgufValue]:
    """The pairs with a token for each row of the embedding, as llama.cpp demands; those that are added are unused."""
    filler: dict[str, str | int | float] = {"tokens": "[PAD{i}]", "token_type": UNUSED, "scores": -10_000.0}
    filled = dict(pairs)
    for name, value in filler.items():
        items = filled.get(f"tokenizer.ggml.{name}")
        if isinstance(items, list):
            more: list[GgufValue] = [
                value.format(i=i) if isinstance(value, str) else value for i in range(len(items), rows)
            ]
            filled[f"tokenizer.ggml.{name}"] = [*items[:rows], *more]
    return filled


def _ends(stop_tokens: Sequence[int], pairs: Mapping[str, GgufValue]) -> dict[str, GgufValue]:
    """The keys that make every stop token one, as far as there are keys: end of text, of turn and of message."""
    ends: dict[str, GgufValue] = {}
    for name in ("eos", "eot", "eom"):
        known = stop_tokens_from_gguf({**pairs, **ends})
        missing = [i for i in stop_tokens if i not in known]
        eos = pairs.get("tokenizer.ggml.eos_token_id")
        if missing and (name != "eos" or eos is None or eos not in stop_tokens):
            ends[f"tokenizer.ggml.{name}_token_id"] = missing[0]
    return ends


def _built(tokenizer: Tokenizer, where: str) -> dict[str, GgufValue]:
    """The pairs of a Hugging Face tokenizer, with the tokens that it has."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise ValueError(
            f"{where}: its tokenizer is of kind {model['type']}; GGUF files are written of plain BPE. {AS_HF}"
        )
    vocab: dict[str, int] = model["vocab"] | {token["content"]: token["id"] for token in state["added_tokens"]}
    tokens, kinds = [f"[PAD{i}]" for i in range(max(vocab.values()) + 1)], [UNUSED] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        tokens[i], kinds[i] = token, NORMAL
    for added in state["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        kind = _pieces(tokens, kinds, merges, model.get("unk_token"), state)
    else:
        kind = {"model": "gpt2", "pre": _pre(state, where), "merges": [" ".join(merge) for merge in merges]}
    said = kind | {"tokens": tokens, "token_type": kinds} | _special(tokenizer, where)
    pairs: dict[str, GgufValue] = {f"tokenizer.ggml.{key}": value for key, value in said.items()}
    if isinstance(tokenizer.chat_template, str):
        pairs["tokenizer.chat_template"] = tokenizer.chat_template
    return pairs


def _pieces(
    tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]], unknown: str | None, state: dict[str, Any]
) -> dict[str, Any]:
    """The pairs of a SentencePiece vocabulary, whose pieces are scored by the first merge that makes them.

    `tokens` and `kinds` are completed: bytes, the unknown token, and user-defined tokens, which match plain text.
    """
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault("".join(merge), rank)
    scores = [-float(first.get(token, len(merges))) for token in tokens]
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[i] = BYTE
        elif token == unknown:
            kinds[i] = UNKNOWN
        elif kinds[i] == USER_DEFINED:
            tokens[i] = token.replace("▁", " ")
    return {"model": "llama", "scores": scores, "add_space_prefix": _prefixes_space(state)}


def _prefixes_space(state: dict[str, Any]) -> bool:
    """Whether a text gets a space before it."""
    steps = _steps(state["normalizer"], "normalizers") + _steps(state["pre_tokenizer"], "pretokenizers")
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _pre(state: dict[str, Any], where: str) -> str:
    """The name under which llama.cpp knows how a byte-level tokenizer splits text."""
    splits: list[str] = []
    steps = _steps(state["pre_tokenizer"], "pretokenizers")
    plain = bool(steps) and steps[-1]["type"] == "ByteLevel" and not steps[-1]["add_prefix_space"]
    for step in steps:
        kind = step["type"]
        if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
            splits.append(step["pattern"]["Regex"])
        elif kind == "Digits" and step["individual_digits"]:
            splits.append(r"\p{N}")
        elif kind == "ByteLevel" and step["use_regex"]:
            splits.append(GPT2_SPLIT)
        elif kind != "ByteLevel":
            plain = False
    normal = [step["type"] for step in _steps(state["normalizer"], "normalizers")]
    whole_first = bool(state["model"].get("ignore_merges"))
    for name, known in PRE_TOKENIZERS.items():
        if (
            plain
            and known.splits == tuple(splits)
            and known.whole_first == whole_first
            and normal == ["NFC"] * known.nfc
        ):
            return name
    raise ValueError(
        f"{where}: llama.cpp has no name that is known here for how its tokenizer splits text ({splits}, normalised by "
        f"{normal or 'nothing'}, whole words first: {whole_first}). {AS_HF}"
    )


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a sequence in tokenizer.json, or the one step, or none."""
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]


def _special(tokenizer: Tokenizer, where: str) -> dict[str, Any]:
    """The ids of special tokens, and which of them are added to a text."""
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {role: getattr(tokenizer, f"{name}_token_id", None) for role, name in roles.items()}
    plain, whole = (tokenizer("x", add_special_tokens=add)["input_ids"] for add in (False, True))
    bos, eos = whole[:1] == [ids["bos"]] != plain[:1], whole[-1:] == [ids["eos"]] != plain[-1:]
    if [*([ids["bos"]] if bos else []), *plain, *([ids["eos"]] if eos else [])] != whole:
        raise ValueError(f"{where}: its tokenizer adds other tokens to a text than beginning and end. {AS_HF}")
    said: dict[str, Any] = {f"{role}_token_id": i for role, i in ids.items() if i is not None}
    return said | {"add_bos_token": bos, "add_eos_token": eos}


def _check(tokenizer: Tokenizer, pairs: Mapping[str, GgufValue], where: str) -> None:
    """Raise a ValueError if the description does not give the tokenizer's own ids on the probe texts."""
    described = tokenizer_from_gguf(pairs, where)
    whole = [str(token).replace("▁", " ") for token in tokenizer.added_tokens_decoder.values()]
    for text in [*PROBES, *(f"a{token}b {token} c" for token in whole)]:
        ours, theirs = tokenizer(text)["input_ids"], described(text)["input_ids"]
        if ours != theirs:
            raise ValueError(
                f"{where}: GGUF cannot describe its tokenizer: {text!r} becomes {theirs} instead of {ours}. {AS_HF}"
            )
