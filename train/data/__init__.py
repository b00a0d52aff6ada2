"""Data: text examples, their tokens, and the batches that a training step consumes.

What turns text into batches, for any task, belongs here: reading prompts and conversations, the ListOps generator,
encoding, packing, and the files of tokenised data. What a task asks and how its answers are scored belongs in
`train.tasks`; placing batches on devices, in `train.devices`.

    a task's Recipe               -> tokenised      -> TokenStore         -> DataSource(...).batch(step)
    read_jsonl / listops.generate -> encode         -> [TokenizedExample] -> the loss of references
                                  -> encode_prompts -> [TokenizedExample] -> generation
"""

from jaxsteer.batches import pack, stack_rows
from train.data.chat import depends_on_date
from train.data.encoding import Encoding, LossOn, OnLong, Report
from train.data.examples import Example, Split, TokenizedExample, Turn, digest_of
from train.data.jsonl import Keys, Reading, read_jsonl
from train.data.listops import ListOps
from train.data.packing import DataSource, RowOrder
from train.data.source import StepSource
from train.data.store import TokenStore
from train.data.tokenize import encode, encode_prompts, stop_tokens

__all__ = [
    "DataSource",
    "Encoding",
    "Example",
    "Keys",
    "ListOps",
    "LossOn",
    "OnLong",
    "Reading",
    "Report",
    "RowOrder",
    "Split",
    "StepSource",
    "TokenStore",
    "TokenizedExample",
    "Turn",
    "depends_on_date",
    "digest_of",
    "encode",
    "encode_prompts",
    "pack",
    "read_jsonl",
    "stack_rows",
    "stop_tokens",
]
