"""Tokenizers from a Hugging Face folder, or built from a GGUF file's metadata, with one interface.

Both are transformers' `PreTrainedTokenizerFast`, of which `Tokenizer` is the part that jaxsteer uses.
"""

from __future__ import annotations

import os
import reprlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from jaxsteer.io.files import read_json
from jaxsteer.io.gguf_file import GgufValue
from jaxsteer.io.llama_cpp import (
    EMPTY_TOKEN,
    ENDS,
    ENDS_IF_CONTROL,
    PHI3_STRIPS,
    PRE_TOKENIZERS,
    VOCABULARIES,
    Vocabulary,
)

if TYPE_CHECKING:
    import tokenizers

CONTROL, USER_DEFINED, UNKNOWN = 3, 4, 2  # tokenizer.ggml.token_type

ELSEWHERE = "Give the model's Hugging Face folder or id as `tokenizer`"
"""What to do about an unsupported vocabulary; see `jaxsteer.io.load_model`."""

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
"""A folder with one of these has a tokenizer."""


T = TypeVar("T", str, int, float)


class Tokenizer(Protocol):
    """What jaxsteer asks of a tokenizer: the part of transformers' `PreTrainedTokenizerFast` that it uses."""

    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    chat_template: str | None
    all_special_ids: list[int]
    special_tokens_map: dict[str, Any]
    backend_tokenizer: tokenizers.Tokenizer

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """The added tokens by their ids; `special` says whether one is a special token."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """The ids of all tokens, added ones included."""

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        """Token ids of a text, or of a list of texts: `tokenizer(text)["input_ids"]`."""

    def decode(self, ids: Any, **options: Any) -> str:
        """The text of a sequence or array of token ids."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """A conversation as text (`tokenize=False`) or token ids."""

    def save_pretrained(self, folder: str | Path, **options: Any) -> Any:
        """Write the tokenizer's files into a folder."""


def beginning_of(tokenizer: Tokenizer) -> list[int]:
    """The ids that a tokenizer puts before every text.

    Raises:
        ValueError: with special tokens, a text has other ids of its own.
    """
    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("x")["input_ids"]
    for i in range(len(whole) - len(plain) + 1):
        if whole[i : i + len(plain)] == plain:
            return list(whole[:i])
    raise ValueError(f"the tokenizer gives {plain} for 'x' alone, but {whole} with special tokens")


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """Load a folder's tokenizer through transformers.

    Raises:
        ValueError: the folder has none, or transformers cannot read it.
    """
    if not has_tokenizer(folder):
        raise ValueError(f"{folder}: no tokenizer here; expected one of {', '.join(FILES)}")
    try:
        transformers = _transformers()
        config, file = None, folder / "config.json"
        if file.is_file() and read_json(file).get("model_type") not in transformers.CONFIG_MAPPING:
            config = transformers.PreTrainedConfig()  # of a type that transformers does not know, and would warn about
        # The folder's own code is not run, and nobody is asked whether to run it.
        return transformers.AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and its backends raise all kinds of errors
        raise ValueError(f"{folder}: transformers cannot read this tokenizer ({error})") from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in FILES)


def tokenizer_from_gguf(metadata: Mapping[str, GgufValue], where: str) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes.

    Supported vocabularies are "gpt2" (byte-level BPE, split as `tokenizer.ggml.pre` says) and "llama" (SentencePiece
    BPE). Control tokens, and those that end a reply, become special tokens; user-defined ones are matched whole but are
    not special. What the file does not say is as in `jaxsteer.io.llama_cpp`.

    Args:
        metadata: the file's key/value pairs.
        where: the file, for messages.

    Returns:
        A `transformers.PreTrainedTokenizerFast`.

    Raises:
        ValueError: no vocabulary, a damaged one, or one of an unsupported kind.
    """
    keys = {k.removeprefix("tokenizer."): v for k, v in metadata.items() if k.startswith("tokenizer.")}
    tokens = _list_of(keys, "ggml.tokens", str, where)
    if not tokens:
        raise ValueError(f"{where}: no vocabulary (tokenizer.ggml.tokens); {ELSEWHERE}")
    kinds = _list_of(keys, "ggml.token_type", int, where) or [1] * len(tokens)
    model = keys.get("ggml.model")
    if not isinstance(model, str) or model not in VOCABULARIES:
        raise ValueError(
            f"{where}: tokenizer.ggml.model is {reprlib.repr(model)}; supported are 'gpt2' and 'llama'. {ELSEWHERE}"
        )
    if len(kinds) != len(tokens):
        raise ValueError(f"{where}: {len(tokens)} tokens but {len(kinds)} token types")
    tokens = [token or EMPTY_TOKEN.format(i=i) for i, token in enumerate(tokens)]
    if repeated := [token for token, count in Counter(tokens).items() if count > 1]:
        raise ValueError(f"{where}: the vocabulary has {reprlib.repr(repeated[0])} more than once. {ELSEWHERE}")
    if type(template := keys.get("chat_template", "")) is not str:
        raise ValueError(f"{where}: tokenizer.chat_template is {reprlib.repr(template)}; expected text")

    defaults = VOCABULARIES[model]
    roles = _special_tokens(keys, defaults, tokens, where)
    if model == "gpt2":
        built = _byte_level(keys, tokens, where)
        add_bos = defaults.add_bos or PRE_TOKENIZERS[str(keys["ggml.pre"])].add_bos
    else:
        built = _sentencepiece(keys, tokens, kinds, where)
        add_bos = defaults.add_bos
    _add_whole(built, tokens, kinds, strips=PHI3_STRIPS.applies(metadata))
    extra = {}
    if length := metadata.get(f"{metadata.get('general.architecture')}.context_length"):
        extra["model_max_length"] = length
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=built,
        **{f"{role}_token": token for role, token in roles.items() if token is not None},
        add_bos_token=bool(keys.get("ggml.add_bos_token", add_bos)) and roles["bos"] is not None,
        add_eos_token=bool(keys.get("ggml.add_eos_token", defaults.add_eos)) and roles["eos"] is not None,
        chat_template=keys.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **extra,
    )


def _add_whole(built: tokenizers.Tokenizer, tokens: list[str], kinds: list[int], *, strips: bool) -> None:
    """Add the tokens that are matched whole, which swallow the white space that follows them if `strips`."""
    from tokenizers import AddedToken

    special: list[AddedToken] = []
    plain: list[AddedToken] = []
    for token, kind in zip(tokens, kinds, strict=True):
        is_special = kind in (CONTROL, UNKNOWN) or token in ENDS
        if is_special or kind == USER_DEFINED or (strips and token == "</s>"):
            rstrip = strips and token not in PHI3_STRIPS.except_for
            added = AddedToken(token, special=is_special, normalized=False, rstrip=rstrip)
            (special if is_special else plain).append(added)
    built.add_special_tokens(special)
    built.add_tokens(plain)


def _special_tokens(
    keys: Mapping[str, GgufValue], defaults: Vocabulary, tokens: list[str], where: str
) -> dict[str, str | None]:
    """The tokens of transformers' roles: bos, eos, unk and pad."""

    def token_of(role: str) -> str | None:
        i = keys.get(f"ggml.{role}_token_id")
        if i is None:
            default = defaults.roles.get(role)
            return None if default is None or default >= len(tokens) else tokens[default]
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
    """Ids that end a reply: the end of text, turn and message that the file gives, then tokens that say so."""
    model = metadata.get("tokenizer.ggml.model")
    defaults = VOCABULARIES[model].roles if isinstance(model, str) and model in VOCABULARIES else {}
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id", defaults.get(name)) for name in ("eos", "eot", "eom")]
    tokens, kinds = (metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if isinstance(tokens, list):
        kinds = kinds if isinstance(kinds, list) else [CONTROL] * len(tokens)
        pairs = enumerate(zip(tokens, kinds, strict=False))
        ids += [i for i, (token, kind) in pairs if token in ENDS or (token in ENDS_IF_CONTROL and kind == CONTROL)]
    return tuple(dict.fromkeys(i for i in ids if type(i) is int))


def _byte_level(keys: Mapping[str, GgufValue], tokens: list[str], where: str) -> tokenizers.Tokenizer:
    """Byte-level BPE with the merges of the file."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = keys.get("ggml.pre")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"{where}: tokenizer.ggml.pre is {reprlib.repr(pre)}; supported are {known}. {ELSEWHERE}")
    kind = PRE_TOKENIZERS[pre]
    merges: list[Any] = [tuple(line.split(" ", 1)) for line in _list_of(keys, "ggml.merges", str, where)]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=kind.whole_first)
    except Exception as error:  # the binding raises plain Exception
        raise ValueError(f"{where}: the merges do not fit the vocabulary ({error})") from None
    tokenizer = Tokenizer(bpe)
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in kind.splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
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
    unknown = keys.get("ggml.unknown_token_id", VOCABULARIES["llama"].roles["unknown"])
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
    if keys.get("ggml.add_space_prefix", VOCABULARIES["llama"].add_space_prefix):
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
