"""Likelihoods: what is observed of a document."""

from bora_pyro.likelihoods.next_tokens import UNITS, CausalLM, Likelihood, NextTokens, task_weight, with_task_weights

__all__ = ["UNITS", "CausalLM", "Likelihood", "NextTokens", "task_weight", "with_task_weights"]
