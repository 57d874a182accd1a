"""The options of a fit from rewards. The configuration of the command inherits them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bora_pyro.errors import InputError
from bora_pyro.inference.options import OPTIMISATION, FitOptions
from bora_pyro.likelihoods.policy import MOST_ADVANTAGE
from bora_pyro.likelihoods.reward import RATIOS
from bora_pyro.options.field import changed, check_fields, option
from bora_pyro.options.seed import Seeded

#: The heading of these options in ``--help``.
REWARD = "rollouts and rewards"
#: What a reward is compared with: the other texts of its prompt in the same step, or the newest rewards of the prompt.
GROUP, BUFFER = BASELINES = ("group", "buffer")


@dataclass(kw_only=True)
class RewardOptions(Seeded):
    """Options of :func:`~bora_pyro.rewards.fit.reward_fit`.

    >>> RewardOptions(epochs=3).samples
    8
    >>> RewardOptions(samples=1).validate()
    Traceback (most recent call last):
    bora_pyro.errors.InputError: samples is 1 with baseline group: one text has no other to compare with; give 2 or more, or ...
    """

    samples: int = option(8, "texts that the model writes behind each prompt of a step", group=REWARD, least=1)
    prompts_per_step: int = option(8, "prompts of a step, of any tasks", group=REWARD, least=1)
    new_tokens: int = option(32, "largest number of tokens of a text", group=REWARD, least=1)
    inner_steps: int = option(1, "optimiser steps with the same texts", group=REWARD, least=1)
    baseline: str = option(
        GROUP,
        "what a reward is compared with: the texts of the same prompt in the step (group); or the newest rewards of the prompt, "
        "over several steps (buffer)",
        group=REWARD,
        choices=BASELINES,
    )
    buffer_size: int = option(32, "rewards of a prompt that the buffer keeps", group=REWARD, least=2)
    buffer_least: int = option(
        16, "with fewer rewards of a prompt in the buffer, all rewards of the step are its baseline", group=REWARD, least=2
    )
    most_advantage: float = option(
        MOST_ADVANTAGE, "largest advantage, in standard deviations of the rewards", group=REWARD, positive=True
    )
    clip: float = option(0.2, "epsilon of PPO: probabilities count up to a ratio of 1 +- epsilon", group=REWARD, positive=True)
    ratio: str = option("token", "what that ratio is of: each token, or the whole text", group=REWARD, choices=RATIOS)
    kl_weight: float = option(0.0, "weight of the divergence from the base, per token (the prior is the anchor)", group=REWARD)
    validation_samples: int = option(
        4, "texts behind each validation or test prompt, whose mean reward chooses the epoch", group=REWARD, least=1
    )

    epochs: int = option(10, "largest number of passes over the training prompts", group=OPTIMISATION, least=1)
    learning_rate: float = changed(FitOptions, "learning_rate", 3e-3)
    warmup: float = changed(FitOptions, "warmup", 0.1)
    schedule: str | None = changed(FitOptions, "schedule", None)
    deviation_reach: float = changed(FitOptions, "deviation_reach", 4.0)
    average: bool = changed(
        FitOptions,
        "average",
        False,
        "reward the mean of the steps beside the last step after each epoch, and keep the better one; takes a second validation",
    )
    token_budget: int = changed(FitOptions, "token_budget", 4096)
    gradient_clip: float = changed(FitOptions, "gradient_clip", 1.0)
    patience: int = option(
        5, "stop after this many epochs without a larger validation reward; 0 never stops early", group=OPTIMISATION, least=0
    )
    checkpoint_every: int = changed(FitOptions, "checkpoint_every", 1)
    checkpoint_minutes: float = changed(FitOptions, "checkpoint_minutes", 10.0)
    keep_checkpoints: int = changed(FitOptions, "keep_checkpoints", 2)

    def validate(self) -> None:
        """Check every value.

        Raises:
            InputError: one line with the value and what is allowed.
        """
        check_fields(self)
        if not 0 <= self.kl_weight < math.inf:
            raise InputError(f"kl_weight is {self.kl_weight}; give a finite number from 0 (no divergence) up")
        if self.baseline == GROUP and self.samples < 2:
            raise InputError(
                f"samples is {self.samples} with baseline {GROUP}: one text has no other to compare with; give 2 or more, or "
                f"--baseline {BUFFER}"
            )
        if self.baseline == BUFFER and self.samples * self.prompts_per_step < 2:
            raise InputError("samples and prompts_per_step are 1: one text has no other to compare with; give more of one")
        if self.buffer_least > self.buffer_size:
            raise InputError(
                f"buffer_least is {self.buffer_least}, and buffer_size is {self.buffer_size}; give {self.buffer_size} or less"
            )
        self.fit_options.validate()

    @property
    def fit_options(self) -> FitOptions:
        """The options of the loop. A step changes all tasks, and no gradient norm of documents is measured."""
        names = (
            "epochs", "learning_rate", "warmup", "schedule", "deviation_reach", "average", "token_budget", "gradient_clip",
            "patience", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "seed",
        )  # fmt: skip
        return FitOptions(**{name: getattr(self, name) for name in names}, task_subsampling=False, gradient_norm=False)
