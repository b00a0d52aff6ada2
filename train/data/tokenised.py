"""The training examples of a recipe, tokenised."""

from __future__ import annotations

from pathlib import Path

from jaxsteer.io import Tokenizer
from jaxsteer.io.tokenizer import beginning_of
from train.data.encoding import Encoding, Report
from train.data.records import Recipe
from train.data.shards import Watch, tokenise_records, unwatched
from train.data.store import TokenStore, within


def tokenised(
    recipe: Recipe, tokenizer: Tokenizer, encoding: Encoding, cache: Path, watch: Watch = unwatched
) -> tuple[TokenStore, Report]:
    """The examples of a recipe, each at most as long as the encoding allows, and statistics of them.

    Examples are tokenised whole and part by part, so another maximum length, or other shares of a mixture, find the
    same files.

    Args:
        recipe: the examples.
        tokenizer: a fast transformers tokenizer.
        encoding: how they are tokenised.
        cache, watch: as in `tokenise_records`.

    Raises:
        ValueError: as `train.data.encode`; or the recipe has no examples.
    """
    parts = [tokenise_records(part.records, tokenizer, encoding, cache, watch=watch) for part in recipe.parts]
    for part, (_, tally) in zip(recipe.parts, parts, strict=True):
        part.records.conclude(tally)
    index = recipe.index([sum(map(len, columns)) for columns, _ in parts])
    if not len(index):
        raise ValueError("no examples to tokenise")
    columns = [each for columns, _ in parts for each in columns]
    prefixes = [part.prefix for part, (some, _) in zip(recipe.parts, parts, strict=True) for _ in some]
    return within(TokenStore(columns, prefixes, index), encoding, len(beginning_of(tokenizer)))
