"""What llama.cpp knows about a GGUF file that the file does not say: its loader's defaults and special cases, as data.

Source: ggml-org/llama.cpp at 00ad355, `llama_vocab::impl::load` and `llm_tokenizer_bpe` in src/llama-vocab.cpp,
`load_hparams` in src/llama-model.cpp, and `load_arch_hparams` in src/models/. `tokenizer_from_gguf` and
`config_from_gguf` read these tables; defaults of keys that a family has of its own are in its `Family.gguf_keys`.

Where we differ on purpose:

- A byte-level file without a token for a role has none; llama.cpp takes token 11, which is Falcon's.
- Special ids outside the vocabulary, and a missing `tokenizer.ggml.pre`, are refused instead of replaced by a default.
- Text comes back as it was: `clean_spaces`, which removes spaces before punctuation when llama.cpp prints, is off.
- Qwen 2 normalises text to NFC, and Phi-3's window is applied, as in the Hugging Face models.
- `</s>` and the other words of ENDS_IF_CONTROL are ordinary text unless the file types them as control tokens: Gemma's
  vocabulary has the HTML tag `</s>`. Tokens for filling in the middle of code do not end a reply.
- `remove_extra_whitespaces`, `treat_whitespace_as_suffix` and `escape_whitespaces` belong to kinds of vocabulary that
  are not supported; a SentencePiece vocabulary always escapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxsteer.io.gguf_file import GgufValue

# The patterns by which byte-level vocabularies split text before merging, from the models' tokenizer.json.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
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


@dataclass(frozen=True)
class PreTokenizer:
    """What follows from `tokenizer.ggml.pre` for a byte-level vocabulary.

    splits       patterns that cut the text one after the other, each keeping what it matches as a piece
    add_bos      whether the beginning token is added, if the file does not say
    whole_first  whether a piece that is in the vocabulary is taken as it is, without merges (`ignore_merges`)
    nfc          whether text is normalised to NFC
    """

    splits: tuple[str, ...]
    add_bos: bool = False
    whole_first: bool = False
    nfc: bool = False


_LLAMA3_BPE = PreTokenizer((_LLAMA3,), add_bos=True, whole_first=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3_BPE),
    **dict.fromkeys(("smaug-bpe", "dbrx"), PreTokenizer((_LLAMA3,))),
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    "tekken": PreTokenizer((_TEKKEN,), add_bos=True, whole_first=True),
    "smollm": PreTokenizer((r"\p{N}", GPT2_SPLIT)),
    **dict.fromkeys(("gpt-2", "olmo"), PreTokenizer((GPT2_SPLIT,))),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]")),
}
"""`tokenizer.ggml.pre` -> its behaviour."""


@dataclass(frozen=True)
class Vocabulary:
    """What follows from `tokenizer.ggml.model`, if the file does not say.

    add_bos, add_eos   whether the beginning and end tokens are added to a text
    add_space_prefix   whether a text, and what follows a special token, begins with a space
    roles              ids of special tokens by the names in the keys
    """

    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    roles: Mapping[str, int] = field(default_factory=dict)


VOCABULARIES: dict[str, Vocabulary] = {
    "llama": Vocabulary(True, False, True, {"bos": 1, "eos": 2, "unknown": 0}),
    "gpt2": Vocabulary(False, False, False),
}
"""`tokenizer.ggml.model` -> its defaults; "llama" is SentencePiece BPE, "gpt2" byte-level BPE."""

NO_VOCABULARY = ("none", "no_vocab")
"""`tokenizer.ggml.model` of files without a tokenizer."""

ENDS = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"}
    | {"<end_of_turn>", "<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>"}  # the last is DeepSeek's
)
"""Tokens that are special and end a reply, whatever their type in the file."""

ENDS_IF_CONTROL = frozenset({"</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"})
"""Tokens that end a reply if the file types them as control tokens."""

EMPTY_TOKEN = "[EMPTY_{i}]"
"""Name of the i-th token if it has none."""


@dataclass(frozen=True)
class StripsAfter:
    """Files whose special tokens swallow the white space that follows them, and the tokens that do not.

    A file is one by its name, in lower case, or by architecture and kind of vocabulary: converters have changed the
    names that they write.
    """

    names: tuple[str, ...]
    architecture: str
    vocabulary: str
    except_for: frozenset[str]

    def applies(self, metadata: Mapping[str, GgufValue]) -> bool:
        """Whether a file with this metadata is one."""
        name = str(metadata.get("general.name", "")).lower()
        kind = metadata.get("general.architecture"), metadata.get("tokenizer.ggml.model")
        return any(part in name for part in self.names) or kind == (self.architecture, self.vocabulary)


PHI3_STRIPS = StripsAfter(("phi-3", "phi3"), "phi3", "llama", frozenset({"<unk>", "<s>", "<|endoftext|>"}))
"""Phi-3: all special and user-defined tokens but three. GGUF has no key for this."""

ROPE_DEFAULTS: dict[str, GgufValue] = {
    "rope.scaling.type": "linear",
    "rope.scaling.factor": 0.0,
    "rope.scale_linear": 0.0,
    "rope.scaling.attn_factor": 1.0,
}
"""Scaling of rotary positions, by keys without the architecture's name; a factor of 0 is one of 1, and under the type
"none" the factor is not used. `rope.scale_linear` is the old name of the factor."""
