"""A linear-Gaussian federation: the second token of a document says where it pulls the adapter of its task."""

from __future__ import annotations

import pyro
import torch

from bora_pyro import TaskData
from bora_pyro.data import TokenSplit
from bora_pyro.likelihoods.base import Likelihood
from tests.tiny import random_weights, tiny_bora

COUNTS = (3, 1, 4)
FIRST = 3  # the token of task 0


class PullByToken(Likelihood):
    """Each document observes all latents of its task with precision 1. It works for some of the tasks as for all of them."""

    def __init__(self, places):
        self.places = places

    def __call__(self, model, weights, batch):
        place = batch.input_ids[:, 1] - FIRST
        squares = [(weights[name][batch.row] - own[place]).flatten(1).square().sum(1) for name, own in self.places.items()]
        pyro.factor("pull", -0.5 * batch.scale * torch.stack(squares).sum())

    def observations(self, documents, tokens):
        return documents


def documents(counts):
    task = [d for d, count in enumerate(counts) for _ in range(count)]
    return TokenSplit.from_documents([[0, FIRST + d, 5] for d in task], task=task, num_tasks=len(counts), pad_token_id=1)


def linear(prior, counts=COUNTS):
    """The model, its documents (training documents alone), and the places y_d."""
    model = tiny_bora(targets=["q_proj"], tasks=len(counts), prior=prior)
    model.likelihood = PullByToken(random_weights(model))
    nothing = documents(counts).subset(torch.arange(0))
    return (
        model,
        TaskData([f"task {d}" for d in range(len(counts))], documents(counts), nothing, nothing),
        model.likelihood.places,
    )


def map_of(places, tau, counts=COUNTS):
    """(θ, Θ) at the MAP by latent, in closed form."""
    found, means = {}, {}
    for name, place in places.items():
        h = torch.tensor(counts).float().view(-1, *[1] * (place.dim() - 1))
        weight = 1 / (1 / tau + 1 / h)
        means[name] = (weight * place).sum(0) / weight.sum(0)
        found[name] = (tau * means[name] + h * place) / (tau + h)
    return found, means
