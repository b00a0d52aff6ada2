"""A new Llama with random weights, to pretrain: `jaxsteer create models/small --layers 6 --width 256`.

For experiments on a base model of one's own: train it with `jaxsteer sft --train-base --plan`, then steer it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxsteer.io import load_tokenizer, save_hf
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.transformer import init_base
from jaxsteer.ranges import Count, Seed, check_ranges
from jaxsteer.steering import count_parameters
from train.cli import run_main
from train.display.console import print_facts

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class CreateConfig:
    """Write a new model with random weights."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder for the model, in Hugging Face's format; it must not exist, or be empty."""
    layers: Count = 6
    """Number of blocks."""
    width: Count = 256
    """Width of the residual stream; a multiple of the heads."""
    heads: Count = 4
    """Number of attention heads."""
    kv_heads: Count | None = None
    """Number of heads of keys and values, which must divide the heads; None: as many."""
    mlp_width: Count | None = None
    """Width of the MLP; None: 8/3 of the residual stream's, rounded up to a multiple of 32."""
    max_length: Count = 1024
    """Maximum number of tokens of a text."""
    tie_head: bool = True
    """Use the embedding as the output's too."""
    tokenizer: str | None = None
    """Folder or Hugging Face id to take the tokenizer from; None: one token for each byte, with ChatML messages."""
    seed: Seed = 0
    """Random seed of the weights."""

    def check(self) -> None:
        """Reject sizes that no model has, and a folder that holds something.

        Raises:
            ValueError: names the option.
        """
        check_ranges(self)
        if self.width % (2 * self.heads):
            raise ValueError(
                f"--width {self.width}: must be a multiple of {2 * self.heads}, twice the number of --heads"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"--kv-heads {self.kv_heads}: must divide --heads {self.heads}")
        place = Path(self.folder)
        if place.exists() and not (place.is_dir() and not any(place.iterdir())):
            raise ValueError(f"{self.folder}: there is something already; give another folder")

    def model_config(self, vocab_size: int) -> ModelConfig:
        """Its sizes, given the number of tokens."""
        return ModelConfig(
            vocab_size=vocab_size,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_dim=self.width // self.heads,
            mlp_width=self.mlp_width or -(-8 * self.width // 96) * 32,
            tied_head=self.tie_head,
            max_length=self.max_length,
        )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, after those that end a text and enclose messages."""
    pieces = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIALS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIALS[0])
    fast.chat_template = CHATML
    return fast


def main() -> None:
    """Write the model, and print what it is."""
    config = tyro.cli(CreateConfig, prog="jaxsteer create", description=__doc__)
    config.check()
    tokenizer: Any = byte_tokenizer() if config.tokenizer is None else load_tokenizer(config.tokenizer)
    sizes = config.model_config(len(tokenizer))
    base = jax.jit(init_base, static_argnums=0)(sizes, jax.random.key(config.seed))
    save_hf(config.folder, sizes, base, "llama", tokenizer)
    print_facts(
        {
            "model": config.folder,
            "parameters": f"{count_parameters(base):,}",
            "sizes": f"{sizes.layers} layers, width {sizes.width}, {sizes.heads} heads, MLP {sizes.mlp_width}, "
            f"{sizes.vocab_size:,} tokens",
            "next": f"jaxsteer sft jsonl --task.train texts.jsonl --model {config.folder} --train-base --plan",
        }
    )


if __name__ == "__main__":
    run_main(main)
