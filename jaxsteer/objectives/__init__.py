"""What training minimises: each objective a pure function of a model, its trees and a batch, in a file of its own."""

from jaxsteer.objectives.objective import Mean, Objective, Summed, batch_of, policy_log_probabilities
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
    "LossFunction",
    "Mean",
    "Objective",
    "Summed",
    "Supervised",
    "batch_of",
    "cross_entropy",
    "mean_loss",
    "policy_log_probabilities",
    "supervised_loss",
]
