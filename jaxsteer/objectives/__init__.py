"""What training minimises: each objective a pure function of a model, its trees and a batch, in a file of its own."""

from jaxsteer.objectives.distillation import Distillation, Taught, counted_kl
from jaxsteer.objectives.grpo import Grpo, Rollouts, group_advantages
from jaxsteer.objectives.keeping import Keeping, Kept
from jaxsteer.objectives.kto import Judged, Kto
from jaxsteer.objectives.objective import Mean, Objective, Summed, batch_of, policy_log_probabilities
from jaxsteer.objectives.preference import Pairs, Preference
from jaxsteer.objectives.supervised import (
    SUPERVISED,
    LossFunction,
    Supervised,
    cross_entropy,
    mean_loss,
    supervised_loss,
)

__all__ = [
    "SUPERVISED",
    "Distillation",
    "Grpo",
    "Judged",
    "Keeping",
    "Kept",
    "Kto",
    "LossFunction",
    "Mean",
    "Objective",
    "Pairs",
    "Preference",
    "Rollouts",
    "Summed",
    "Supervised",
    "Taught",
    "batch_of",
    "counted_kl",
    "cross_entropy",
    "group_advantages",
    "mean_loss",
    "policy_log_probabilities",
    "supervised_loss",
]
