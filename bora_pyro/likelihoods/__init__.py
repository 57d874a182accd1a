"""Likelihoods: what is observed of a document."""

from bora_pyro.likelihoods.base import LanguageModel, Likelihood
from bora_pyro.likelihoods.choice import OPTION_SCORES, AnswerScores, Choice
from bora_pyro.likelihoods.distribution import NextTokens
from bora_pyro.likelihoods.dpo import DPO
from bora_pyro.likelihoods.labelled_gates import LabelledGates
from bora_pyro.likelihoods.measure import MEASURES, PERPLEXITY, Measure, measure_of
from bora_pyro.likelihoods.next_tokens import UNITS, CausalLM
from bora_pyro.likelihoods.reward import RewardObjective
from bora_pyro.likelihoods.scores import Scores

#: Likelihoods by the name that a configuration gives them.
LIKELIHOODS: dict[str, type[Likelihood]] = {"causal_lm": CausalLM, "choice": Choice, "dpo": DPO}

__all__ = [
    "DPO", "LIKELIHOODS", "MEASURES", "OPTION_SCORES", "PERPLEXITY", "UNITS", "AnswerScores", "CausalLM", "Choice",
    "LabelledGates", "LanguageModel", "Likelihood", "Measure", "NextTokens", "RewardObjective", "Scores", "measure_of",
]  # fmt: skip
