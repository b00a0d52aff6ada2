"""The figures that a run measures of its model, as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Figure(NamedTuple):
    """How a figure is shown: what it is called, and its format."""

    title: str
    form: str

    def text(self, value: float) -> str:
        """A value as text."""
        return self.form.format(value).replace("%", " %")


FIGURES: Mapping[str, Figure] = {
    "loss": Figure("loss", "{:.4f}"),
    "perplexity": Figure("perplexity", "{:.4g}"),
    "token_accuracy": Figure("tokens right", "{:.1%}"),
    "accuracy": Figure("accuracy", "{:.1%}"),
    "pair_accuracy": Figure("pairs right", "{:.1%}"),
    "pair_ranking": Figure("chosen answer likelier", "{:.1%}"),
    "margin": Figure("margin", "{:.4f}"),
    "teacher_kl": Figure("KL from the teacher", "{:.4f}"),
}
"""What evaluations give, by their names without "validation_"."""

_USUAL = ("validation_loss", "perplexity", "token_accuracy", "accuracy", "low", "high")


def without_split(figures: Mapping[str, float]) -> dict[str, float]:
    """The same figures by names that do not say of which split."""
    return {name.removeprefix("validation_"): value for name, value in figures.items()}


def described(results: Mapping[str, float]) -> str:
    """An evaluation in words."""
    loss, perplexity = results["validation_loss"], results["perplexity"]
    likely = 100 * results["token_accuracy"]
    text = f"validation loss {loss:.4f} (perplexity {perplexity:.4g}, {likely:.1f} % of tokens right)"
    if "accuracy" in results:
        rate, low, high = (100 * results[name] for name in ("accuracy", "low", "high"))
        text += f", accuracy {rate:.1f} % (95 %: {low:.1f} to {high:.1f})"
    for name, value in results.items():
        if name in FIGURES and name not in _USUAL:
            text += f", {FIGURES[name].title} {FIGURES[name].text(value)}"
    return text


def changes(stages: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """What became of the figures that all of some evaluations have, as text by their titles."""
    return {
        figure.title: " -> ".join(figure.text(stage[name]) for stage in stages)
        for name, figure in FIGURES.items()
        if stages and all(name in stage for stage in stages)
    }
