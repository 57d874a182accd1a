"""Predictions of a fitted model: the task of a text, generated text, token probabilities, multiple choice."""
