"""Models in use: decoding (one batch, or continuous batching with an open queue) and likelihoods of given text.

Training and its losses belong elsewhere, and so does everything that opens files or needs a tokenizer.
"""

from jaxsteer.inference.answers import generate_all
from jaxsteer.inference.decoder import Decoder
from jaxsteer.inference.draws import Sampling, Top
from jaxsteer.inference.events import Answer, Event
from jaxsteer.inference.likelihood import Likelihood, score_continuations
from jaxsteer.inference.scheduling import Limits, Request, nonfinite_logits
from jaxsteer.inference.scores import TokenScores, score_tokens
from jaxsteer.inference.token_shift import TokenShift, per_token_shift

__all__ = [
    "Answer",
    "Decoder",
    "Event",
    "Likelihood",
    "Limits",
    "Request",
    "Sampling",
    "TokenScores",
    "TokenShift",
    "Top",
    "generate_all",
    "nonfinite_logits",
    "per_token_shift",
    "score_continuations",
    "score_tokens",
]
