"""The result of a fit: the guide at its best state, the adapters, and how well they predict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from bora_pyro.data.batch import loaded_tasks
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.guides.base import task_sites
from bora_pyro.inference.evaluate import Scores, evaluate
from bora_pyro.inference.processes import Processes
from bora_pyro.model import BoRA, Weights

# Number of tasks whose adapters are computed at one time.
_CHUNK = 64


@dataclass
class Fitted:
    """A fitted model: the guide at its best state, and the history of the fit.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
        >>> fitted = bp.fit(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2)), data, epochs=1)
        >>> theta, mean = fitted.weights()
        >>> theta["q_proj.lora_B"].shape, mean["q_proj.lora_B"].shape, fitted.documents
        (torch.Size([2, 4, 256, 2]), torch.Size([4, 256, 2]), [5, 5])

    Attributes:
        model, guide: the model and its guide.
        tasks: names of the tasks; the position is the task's index d.
        history: one entry per epoch (loss in nats per training observation, the measure of the validation documents, tokens per
            second, ...; also the path of τ, if the prior learns it).
        best_epoch: the epoch whose state was kept; 0 is the start.
        averaged: whether that state is the mean of the steps up to then, and not the last of them.
        validation_score: the likelihood's measure (perplexity) of the validation documents for the state that was kept; None if
            there are no such documents.
        global_mean_score: the same measure of the same state under Θ alone; None if it has not chosen the epoch (``kept_by``).
        seconds: time in training steps and validation.
        gradient_norms: the norm of the objective's gradient at the ``start`` and the ``end`` (`optimum`); empty if not measured.
        documents: N_d, the number of training documents of each task; empty if unknown.
        chat_template: the template of the training documents, if they are chats; prompts are formatted with it too.
    """

    model: BoRA
    guide: AutoGuide
    tasks: list[str]
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    averaged: bool = False
    validation_score: float | None = None
    global_mean_score: float | None = None
    seconds: float = 0.0
    gradient_norms: dict[str, Any] = field(default_factory=dict)
    documents: list[int] = field(default_factory=list)
    chat_template: str | None = None

    @property
    def validation_perplexity(self) -> float | None:
        """``validation_score``, if it is a perplexity; otherwise None."""
        return self.validation_score if self.model.likelihood.measure.exponential else None

    def sites(self) -> dict[str, Tensor]:
        """The guide's central value of every sample site; for MAP, the estimate itself."""
        return {name: value.detach() for name, value in self.guide.median().items()}

    def weights(self) -> tuple[Weights, Weights]:
        """θ of all tasks, (D, layers, *shape), and Θ, (layers, *shape), by name of the latent."""
        device = self.model.backbone.device
        # with many tasks the values may lie in a file, and therefore on the CPU
        return self.model.weights_given({name: value.to(device) for name, value in self.sites().items()})

    def weights_of(self) -> Callable[[Tensor], tuple[Weights, Weights]]:
        """A function that returns θ of given tasks, (n,) in ascending order, and Θ.

        It serves fits with more tasks than fit into memory at once.
        """
        if len(self.tasks) <= _CHUNK:
            theta, mean = self.weights()
            return lambda index: ({name: value.index_select(0, index.to(value.device)) for name, value in theta.items()}, mean)
        sites, of_tasks = self.sites(), task_sites(self.guide)

        def some(index: Tensor) -> tuple[Weights, Weights]:
            device = self.model.backbone.device
            rows = {name: sites[name].index_select(0, index.to(sites[name].device)).to(device) for name in of_tasks}
            return self.model.weights_given(sites | rows, loaded_tasks(index.to(device)))

        averages: Weights = {}
        names = [name for name in self.model.starts if self.model.prior.averages(name)]
        for index in torch.arange(len(self.tasks)).split(_CHUNK) if names else ():
            theta, _ = some(index)
            for name in names:
                share = theta[name].sum(0) / len(self.tasks)
                averages[name] = averages[name] + share if name in averages else share

        def weights(index: Tensor) -> tuple[Weights, Weights]:
            theta, mean = some(index)
            return theta, mean | averages

        return weights

    def each_task(self) -> Iterator[tuple[int, Weights, Weights]]:
        """Yield each task's index d, its θ_d and Θ, both (layers, *shape) by name."""
        weights = self.weights_of()
        for index in torch.arange(len(self.tasks)).split(_CHUNK):
            theta, mean = weights(index)
            for row, d in enumerate(index.tolist()):
                yield d, {name: value[row] for name, value in theta.items()}, mean

    def deviation_norms(self) -> Tensor:
        """‖θ_d − Θ‖ over all latents of a task: (D,)."""
        norms = []
        for _, theta, mean in self.each_task():
            norms.append(torch.stack([(theta[name] - mean[name]).square().sum() for name in theta]).sum().sqrt())
        return torch.stack(norms)

    def tau(self) -> float:
        """τ; if it differs between groups of weights, the harmonic mean over the entries of one task's adapter.

        It is the single τ under which the prior expects the same squared distance of a task's adapter from Θ, since that is the
        sum of 1/τ over the entries. Groups in which the tasks hardly differ have a large τ, and count for little. Latents that
        all tasks share have an infinite τ. They are left out, unless all latents are shared.
        """
        starts, sites = self.model.starts, self.sites()
        taus = {name: self.model.prior.precision(name, start, sites) for name, start in starts.items()}
        return mean_tau(taus, entries_of(self.model))

    def tau_group(self) -> float | None:
        """τ_g, the precision of the groups' means around Θ, as ``tau``; None under a prior without groups of tasks."""
        prior, starts = self.model.prior, self.model.starts
        if not prior.groups:
            return None
        taus = {name: prior.group_precision(name, start) for name, start in starts.items()}
        return mean_tau(taus, entries_of(self.model))

    def tau_by_group(self) -> dict[str, Any]:
        """τ of each latent: a number, or a list if it differs between layers or tasks."""
        return tau_by_group(self.model, self.sites())

    def evaluate(
        self,
        split: TokenSplit,
        *,
        name: str = "test",
        processes: Processes | None = None,
        numbers: Callable[[Scores, int | None], dict[str, float | None]] = lambda scores, task: scores.numbers(task),
    ) -> dict[str, Any]:
        """How well the base and the adapted model predict a split, over all documents and by task, as in ``metrics.json``.

        Args:
            split: the documents.
            name: the split's name, in the names of the results.
            processes: the processes of the fit. If each holds a part of the base, the others call ``help_evaluate`` meanwhile.
            numbers: returns the numbers of scores, over all documents or over those of one task; default: `Scores.numbers`.
        """
        weights, lockstep = self.weights_of(), (processes or Processes()).lockstep
        documents = split.documents_per_task
        base, adapted = evaluate(self.model, split, None, lambda index: weights(index)[0], lockstep=lockstep)

        def named(task: int | None) -> dict[str, Any]:
            found = {f"{name}_{key}": value for key, value in numbers(adapted, task).items()}
            return found | {f"base_{name}_{key}": value for key, value in numbers(base, task).items()}

        tasks = [{"name": task, f"{name}_documents": documents[d]} | named(d) for d, task in enumerate(self.tasks)]
        return named(None) | {"tasks": tasks}

    def help_evaluate(self, split: TokenSplit, processes: Processes) -> None:
        """Help another process to evaluate a split: run this process's part of the base as often as the other one needs it."""
        if processes.sharded_base:
            nothing = torch.zeros(0, dtype=torch.int64)
            evaluate(self.model, split, None, None, documents=nothing, lockstep=processes.lockstep)


def entries_of(model: BoRA) -> dict[str, int]:
    """The number of active entries of each latent, over all tasks."""
    return {name: int(model.tensors.active(name, model.num_tasks).sum()) for name in model.starts}


def mean_tau(taus: Mapping[str, Tensor], entries: Mapping[str, int]) -> float:
    """The harmonic mean of τ over the entries of an adapter; latents whose τ is infinite everywhere are left out.

        >>> mean_tau({"A": torch.tensor(1e4), "B": torch.tensor(25.0)}, {"A": 8, "B": 32})
        31.23...

    Args:
        taus: τ of each latent, of any shape.
        entries: the number of entries of each latent, in one adapter or in all.
    """
    own = {name: tau.detach().cpu().double() for name, tau in taus.items() if not bool(tau.isinf().all())}
    variance = sum(entries[name] * float((1 / tau).mean()) for name, tau in own.items())
    return sum(entries[name] for name in own) / variance if variance else math.inf


def tau_by_group(model: BoRA, sites: Mapping[str, Tensor]) -> dict[str, Any]:
    """τ of each latent for given values of the sample sites: a number, or a list if it differs between layers or tasks.

    If each entry has its own, it is the harmonic mean over the entries of each layer.
    """
    found: dict[str, Any] = {}
    for name, start in model.starts.items():
        value = model.prior.precision(name, start, sites)
        if value.shape == start.shape and start[0].numel() > 1:
            value = value.flatten(1).double().reciprocal().mean(1).reciprocal()
        found[name] = value.item() if value.dim() == 0 else value.flatten().tolist()
    return found
