"""What is told of rollouts, and settings that no GRPO run could have."""

from dataclasses import replace

import numpy as np
import pytest

from train.config.grpo import GrpoConfig, PolicyLoss
from train.run.from_rewards import told_of
from train.run.rollouts import Sampled
from train.tasks.rewards import parse_rewards


def test_what_is_told_of_rollouts():
    answer = lambda reward, tokens, ended: Sampled(
        0, np.zeros(tokens, np.int32), "", (reward, 1.0), reward + 0.5, ended, np.full(tokens, -2.0, np.float32)
    )
    told = told_of(
        [[answer(0, 1, True), answer(1, 3, False)], [answer(1, 2, True)] * 2],
        parse_rewards(["exact", "0.5*format"], "number"),
    )
    assert told == {
        "reward": 1.25, "reward_spread": 0.25, "reward_exact": 0.75, "reward_format": 1.0, "answer_length": 2.0,
        "truncated": 0.25, "equal_groups": 0.5, "entropy": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"group": 1}, "--group must be at least 2, got 1"),
        ({"prompts": 0}, "--prompts must be at least 1"),
        ({"updates": 0}, "--updates must be at least 1"),
        ({"temperature": 0.0}, "--temperature must be above 0"),
        ({"show_rollouts": -1}, "--show-rollouts must be at least 0"),
        ({"grad_accumulation": 2}, "--grad-accumulation 2: rollouts are divided"),
        ({"updates": 4}, "--steps must be a multiple of --updates 4, got 6"),
        ({"updates": 3}, "--checkpoint-every must be a multiple of --updates 3, got 2"),
    ],
)
def test_settings_that_no_run_could_have(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(GrpoConfig(steps=6, checkpoint_every=2), **changed)


def test_policies_that_no_loss_has():
    for wrong in ({"scale": "x"}, {"average": "x"}, {"clip_low": 1.5}, {"beta": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", "-")):
            PolicyLoss(**wrong)
