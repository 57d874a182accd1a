"""Task dropout: some documents of each step are read with Θ alone, so that Θ is a good adapter by itself.

Under the hierarchy, Θ is trained only together with the tasks' deviations: the documents of a task say what Θ + δ_d should be. A
task without documents has no deviation and gets Θ alone, which no document has ever been read with. With task dropout, each task
loses its deviation in a step with probability p. Its documents of that step then say what Θ alone should be.

>>> import bora_pyro as bp
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
>>> split = bp.data.TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[0, 1], num_tasks=2)
>>> dropout = TaskDropout(model, probability=0.5)
>>> dropout.draw()
>>> dropout(split.batches()[0])  # as model(batch), a Pyro model
"""

from __future__ import annotations

import torch
from pyro import poutine

from bora_pyro.data.batch import Batch
from bora_pyro.errors import InputError
from bora_pyro.model import BoRA


class TaskDropout:
    """A model in which tasks lose their deviations: the same sites and priors, but θ_d is Θ in the likelihood of those tasks.

    Args:
        model: the model.
        probability: p, with which each task loses its deviation in a step; from 0 to below 1.

    Raises:
        InputError: Θ is no parameter of the model, but the average over the tasks.
    """

    def __init__(self, model: BoRA, probability: float) -> None:
        if probability:
            check_shares("task_dropout", probability, model)
        self.model, self.probability = model, probability
        self.dropped = torch.zeros(model.num_tasks, dtype=torch.bool)

    def draw(self) -> None:
        """Draw the tasks that lose their deviations until the next call, from torch's generator of random numbers on the CPU."""
        if self.probability:
            self.dropped = torch.rand(self.model.num_tasks) < self.probability

    def __call__(self, batch: Batch) -> None:
        """Run the model on one batch of documents."""
        if not self.dropped.any():
            return self.model(batch)
        with poutine.trace() as sampled:
            theta = self.model.weights(batch)
        sites = {name: node["value"] for name, node in sampled.trace.nodes.items() if node["type"] == "sample"}
        dropped = self.dropped if batch.tasks is None else self.dropped[batch.tasks.index.cpu()]
        for name, mean in self.model.prior.means(sites, theta).items():
            of_row = dropped.to(mean.device).view(-1, *[1] * mean.dim())
            theta[name] = torch.where(of_row, mean, theta[name])
        self.model.likelihood(self.model, theta, batch)


def check_shares(option: str, value: float | str, model: BoRA) -> None:
    """Check that Θ is a parameter of the model, and whole in every task, for an option of a fit that is about Θ.

    Raises:
        InputError: Θ is the average over the tasks, or tasks have masks of their own.
    """
    if any(model.prior.averages(name) for name in model.starts):
        raise InputError(f"{option} is {value}, but under {model.prior} the tasks have no common Theta; leave {option} out")
    if model.tensors.masks_by_task:
        raise InputError(
            f"{option} is {value}, which reads documents with Theta alone, and {model.adapter} cuts Theta to the rank of each "
            f"task; leave {option} out"
        )
