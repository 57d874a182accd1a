"""Fits from rewards: the adapted model writes, a function says how good each text is, the prior keeps tasks near each other."""

from bora_pyro.rewards.fit import RewardFit, reward_fit
from bora_pyro.rewards.functions import REWARDS, ClassProbability, Length, LogLikelihood, RegexCount
from bora_pyro.rewards.judge import Reward, TextJudge, checked_reward
from bora_pyro.rewards.options import RewardOptions
from bora_pyro.rewards.prompts import PromptTexts

__all__ = [
    "REWARDS", "ClassProbability", "Length", "LogLikelihood", "PromptTexts", "RegexCount", "Reward", "RewardFit", "RewardOptions",
    "TextJudge", "checked_reward", "reward_fit",
]  # fmt: skip
