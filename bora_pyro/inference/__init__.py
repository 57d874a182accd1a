"""Fitting a model: the training loop, its steps and state, the ELBO, checkpoints, processes, memory, evaluation, adaptation."""
