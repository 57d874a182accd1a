"""The fit: the loop, its steps and its state, task rows, the ELBO, checkpoints, processes, memory, evaluation, adaptation."""
