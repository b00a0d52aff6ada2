"""Data: text examples, their tokens, and the batches that a step trains on.

read_jsonl / listops.generate -> [Example] -> encode -> [TokenizedExample] -> DataSource(...).batch(step)
                                           -> encode_prompts -> prompt_batches -> generation
"""

from train.data.examples import Example, TokenizedExample, Turn
from train.data.jsonl import Keys, read_jsonl
from train.data.listops import ListOps
from train.data.packing import DataSource, PromptBatch, bucket_length, pack, prompt_batches, stack_rows
from train.data.tokenize import Report, encode, encode_prompts, stop_tokens

__all__ = [
    "DataSource",
    "Example",
    "Keys",
    "ListOps",
    "PromptBatch",
    "Report",
    "TokenizedExample",
    "Turn",
    "bucket_length",
    "encode",
    "encode_prompts",
    "pack",
    "prompt_batches",
    "read_jsonl",
    "stack_rows",
    "stop_tokens",
]
