"""A tokenizer small enough to build in a test: one token a byte, ChatML specials and template."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END_OF_TEXT, IM_START, IM_END = 0, 1, 2


def tiny_tokenizer(
    *,
    bos: bool = False,
    eos: str | None = "<|endoftext|>",
    template: str | None = CHATML,
    merges: Sequence[tuple[str, str]] = (),
) -> PreTrainedTokenizerFast:
    """Byte-level BPE: ids 0 to 2 are <|endoftext|>, <|im_start|>, <|im_end|>, then 256 bytes, then merges.

    bos puts <|im_start|> before every text that is tokenised with special tokens.
    """
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", IM_START)]
        )
    names = {"eos_token": eos} if eos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    return fast


ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' </s>' }}"
    "{% else %}{{ '<s>[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
MARKS = ("first", "always", "prepend")
"""How a SentencePiece tokenizer marks the beginning of a text: its first word, that of every part between special
tokens, or the same by a normalizer, as in files converted for llama.cpp."""


def sentencepiece_tokenizer(mark: str = "first", template: str = ZEPHYR) -> PreTrainedTokenizerFast:
    """Characters with merges, bytes for others, `▁` for a space: ids 1 and 2 are <s> and </s>; <s> begins a text."""
    specials = ["<unk>", "<s>", "</s>"]
    merges = [("y", "e"), ("ye", "s"), ("▁", "y"), ("▁", "ye"), ("▁", "yes"), ("n", "o"), ("▁", "n"), ("▁", "no")]
    letters = [*"▁abeinosty<>|[]/.?!ISTNTruxm", *(a + b for a, b in merges)]
    pieces = dict.fromkeys([*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *letters])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if mark == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=mark, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    return fast
