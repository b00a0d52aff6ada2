"""Tokenizers from a Hugging Face folder, or built from a GGUF file's metadata, with one interface.

Both are transformers' `PreTrainedTokenizerFast`, of which `Tokenizer` is the part that jaxsteer uses.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from jaxsteer.io.gguf_file import GgufValue

if TYPE_CHECKING:
    import tokenizers

CONTROL, USER_DEFINED, UNKNOWN = 3, 4, 2  # tokenizer.ggml.token_type

# The patterns by which byte-level vocabularies split text before merging, from the models' tokenizer.json.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "llama-bpe": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "dbrx": _LLAMA3,
    "qwen2": _QWEN2,
    "tekken": _TEKKEN,
    **dict.fromkeys(("smollm", "gpt-2", "olmo", "default"), ""),
}
"""`tokenizer.ggml.pre` -> pattern; "" is GPT-2's, which is built into `tokenizers`."""

_WHOLE_FIRST = ("llama-bpe", "tekken")
"""Pre-tokenizers with which a word of the vocabulary is taken as it is, without merges."""

ELSEWHERE = "Give the model's Hugging Face folder or id as `tokenizer`"
"""What to do about an unsupported vocabulary; see `jaxsteer.io.load_model`."""

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
"""A folder with one of these has a tokenizer."""


T = TypeVar("T", str, int, float)


class Tokenizer(Protocol):
    """What jaxsteer asks of a tokenizer: the part of transformers' `PreTrainedTokenizerFast` that it uses."""

    eos_token_id: int | None
    bos_token_id: int | None
    chat_template: str | None
    all_special_ids: list[int]
    special_tokens_map: dict[str, Any]
    backend_tokenizer: tokenizers.Tokenizer

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """The added tokens by their ids; `special` says whether one is a special token."""
        ...

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        """Token ids of a text, or of a list of texts: `tokenizer(text)["input_ids"]`."""

    def decode(self, ids: Any, **options: Any) -> str:
        """The text of a sequence or array of token ids."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """A conversation as text (`tokenize=False`) or token ids."""

    def save_pretrained(self, folder: str | Path, **options: Any) -> Any:
        """Write the tokenizer's files into a folder."""


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """Load a folder's tokenizer through transformers.

    Raises:
        ValueError: the folder has none, or transformers cannot read it.
    """
    if not has_tokenizer(folder):
        raise ValueError(f"{folder}: no tokenizer here; expected one of {', '.join(FILES)}")
    try:
        return _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and its backends raise all kinds of errors
        raise ValueError(f"{folder}: transformers cannot read this tokenizer ({error})") from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in FILES)


def tokenizer_from_gguf(metadata: Mapping[str, GgufValue], where: str) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes.

    Supported vocabularies are "gpt2" (byte-level BPE, split as `tokenizer.ggml.pre` says) and "llama" (SentencePiece
    BPE). Control tokens become special tokens; user-defined ones are matched whole but are not special.

    Args:
        metadata: the file's key/value pairs.
        where: the file, for messages.

    Returns:
        A `transformers.PreTrainedTokenizerFast`.

    Raises:
        ValueError: no vocabulary, a damaged one, or one of an unsupported kind.
    """
    from tokenizers import AddedToken

    keys = {k.removeprefix("tokenizer."): v for k, v in metadata.items() if k.startswith("tokenizer.")}
    tokens = _list_of(keys, "ggml.tokens", str, where)
    if not tokens:
        raise ValueError(f"{where}: no vocabulary (tokenizer.ggml.tokens); {ELSEWHERE}")
    kinds = _list_of(keys, "ggml.token_type", int, where) or [1] * len(tokens)
    model = keys.get("ggml.model")
    if model not in ("gpt2", "llama"):
        raise ValueError(
            f"{where}: tokenizer.ggml.model is {reprlib.repr(model)}; supported are 'gpt2' and 'llama'. {ELSEWHERE}"
        )
    if len(kinds) != len(tokens):
        raise ValueError(f"{where}: {len(tokens)} tokens but {len(kinds)} token types")
    if type(template := keys.get("chat_template", "")) is not str:
        raise ValueError(f"{where}: tokenizer.chat_template is {reprlib.repr(template)}; expected text")

    roles = _special_tokens(keys, tokens, where)
    gpt2 = model == "gpt2"
    built = _byte_level(keys, tokens, where) if gpt2 else _sentencepiece(keys, tokens, kinds, where)
    for token, kind in zip(tokens, kinds, strict=True):
        special = kind == CONTROL or (kind == UNKNOWN and model == "llama")
        if special or kind == USER_DEFINED:
            added = [AddedToken(token, special=special, normalized=False)]
            built.add_special_tokens(added) if special else built.add_tokens(added)
    # llama.cpp's defaults, if the file does not say.
    add_bos = keys.get("ggml.add_bos_token", model == "llama" or keys.get("ggml.pre") == "llama-bpe")
    architecture = metadata.get("general.architecture")
    extra = {}
    if length := metadata.get(f"{architecture}.context_length"):
        extra["model_max_length"] = length
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=built,
        **{f"{role}_token": token for role, token in roles.items() if token is not None},
        add_bos_token=bool(add_bos) and roles["bos"] is not None,
        add_eos_token=bool(keys.get("ggml.add_eos_token", False)) and roles["eos"] is not None,
        chat_template=keys.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **extra,
    )


def _special_tokens(keys: Mapping[str, GgufValue], tokens: list[str], where: str) -> dict[str, str | None]:
    """The tokens that the file gives for transformers' roles: bos, eos, unk and pad."""

    def token_of(role: str) -> str | None:
        i = keys.get(f"ggml.{role}_token_id")
        if i is None:
            return None
        if type(i) is int and 0 <= i < len(tokens):
            return tokens[i]
        raise ValueError(
            f"{where}: tokenizer.ggml.{role}_token_id is {reprlib.repr(i)}, the vocabulary has {len(tokens)} tokens"
        )

    return {"bos": token_of("bos"), "eos": token_of("eos"), "unk": token_of("unknown"), "pad": token_of("padding")}


def _list_of(keys: Mapping[str, GgufValue], key: str, kind: type[T], where: str) -> list[T]:
    """A key's list, or [] without that key.

    Raises:
        ValueError: it is not a list of this type, or its text is not UTF-8.
    """
    value: Any = keys.get(key, [])
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise ValueError(f"{where}: tokenizer.{key} is not a list of {kind.__name__}")
    if kind is str and any(0xD800 <= ord(letter) < 0xE000 for letter in set("".join(value))):
        raise ValueError(f"{where}: tokenizer.{key} holds text that is not UTF-8")
    return value


def stop_tokens_from_gguf(metadata: Mapping[str, GgufValue]) -> tuple[int, ...]:
    """Ids that end a reply: those of the end of text, turn and message that the file gives."""
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(i for i in ids if type(i) is int))


def _byte_level(keys: Mapping[str, GgufValue], tokens: list[str], where: str) -> tokenizers.Tokenizer:
    """Byte-level BPE with the merges of the file."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = keys.get("ggml.pre")
    if not isinstance(pre, str) or pre not in SPLITS:
        raise ValueError(
            f"{where}: tokenizer.ggml.pre is {reprlib.repr(pre)}; supported are {', '.join(SPLITS)}. {ELSEWHERE}"
        )
    merges: list[Any] = [tuple(line.split(" ", 1)) for line in _list_of(keys, "ggml.merges", str, where)]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_FIRST)
    except Exception as error:  # the binding raises plain Exception
        raise ValueError(f"{where}: the merges do not fit the vocabulary ({error})") from None
    tokenizer = Tokenizer(bpe)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if SPLITS[pre]:
        steps.append(pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not SPLITS[pre]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    keys: Mapping[str, GgufValue], tokens: list[str], kinds: list[int], where: str
) -> tokenizers.Tokenizer:
    """SentencePiece BPE: the score of a piece ranks all merges that produce it."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _list_of(keys, "ggml.scores", float, where)
    if len(scores) != len(tokens):
        raise ValueError(f"{where}: a SentencePiece vocabulary needs tokenizer.ggml.scores, one for each token")
    vocab = {token: i for i, token in enumerate(tokens)}
    ranked = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind != 1:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-score, vocab[left], vocab[right], left, right))
    unknown = keys.get("ggml.unknown_token_id", 0)
    assert isinstance(unknown, int)  # checked by the caller
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[entry[3:] for entry in sorted(ranked)],
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space: list[Any] = [normalizers.Replace(" ", "▁")]
    strip: list[Any] = []
    if keys.get("ggml.add_space_prefix", True):
        space.insert(0, normalizers.Prepend("▁"))
        strip.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(space)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _transformers() -> ModuleType:
    """transformers, imported on first use, without its warning that PyTorch is missing: it is not needed here."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers
