"""Likelihoods: what is observed of a document."""

from bora_pyro.likelihoods.base import LanguageModel, Likelihood
from bora_pyro.likelihoods.distribution import NextTokens
from bora_pyro.likelihoods.next_tokens import UNITS, CausalLM

#: Likelihoods by the name that a configuration gives them.
LIKELIHOODS: dict[str, type[Likelihood]] = {"causal_lm": CausalLM}

__all__ = ["LIKELIHOODS", "UNITS", "CausalLM", "LanguageModel", "Likelihood", "NextTokens"]
