"""The inner steps of ABMLL: every task goes a few gradient steps from the global point towards its own documents.

>>> import bora_pyro as bp
>>> from bora_pyro.guides import task_normal_guide
>>> from bora_pyro.priors import AmortisedNormal
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 3, adapter=bp.LoRA(rank=1), prior=AmortisedNormal())
>>> split = bp.data.TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[2, 0], num_tasks=3)
>>> inner = InnerSteps(model, task_normal_guide(model, scale=1.0), InnerOptions(steps=2))
>>> inner.all_tasks(split)  # task 1 has no documents: it stays at the global point
>>> theta, mean = model.weights_given(inner.guide.median())
>>> [bool((theta["v_proj.lora_B"][d] == mean["v_proj.lora_B"]).all()) for d in range(3)]
[False, True, False]
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.nn import Parameter

from bora_pyro.data.batch import Batch, loaded_tasks
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.guides.base import make_parameters
from bora_pyro.guides.task_normal import LOC, RAW_SCALE, TaskNormalGuide
from bora_pyro.inference.elbo import TemperedELBO
from bora_pyro.inference.task_rows import MANY_TASKS
from bora_pyro.model import BoRA
from bora_pyro.priors import AmortisedNormal, ByLatent, Prior


@dataclass(frozen=True)
class InnerOptions:
    """How the inner steps are taken; the names are those of ``MetaOptions``, without ``inner_``."""

    steps: int = 5
    rate: float = 0.3
    beta: float = 1e-3
    beta_global: float | None = None
    token_budget: int = 4096


@dataclass(frozen=True)
class Value:
    """The objective of some tasks at one point, and its gradient.

    Attributes:
        gradients: of the parameters that were asked for, of Σ_d (−E_q log p(D_d | θ_d) + β KL_d) − β log p(μ₀, σ₀) in nats.
        objective: that sum.
        log_likelihood: Σ_d log p(D_d | θ_d) under a draw θ_d ~ q, in nats.
        kl: Σ_d KL(q(θ_d) ‖ p(θ_d | μ₀, σ₀)) without β, in nats.
    """

    gradients: list[Tensor]
    objective: float
    log_likelihood: float
    kl: float


class InnerSteps:
    """K gradient steps of the own parameters (μ_d, σ_d) of some tasks, all tasks in one batch.

    A task's objective is −E_q[log p(D_d | θ_d)] + β KL(q(θ_d) ‖ p(θ_d | μ₀, σ₀)) with q(θ_d) = Normal(μ_d, σ_d²): the task's part
    of the meta-ELBO of Zhang, Snell & Griffiths (2025). The expectation is estimated by one draw a pass, the KL divergence is
    exact. A step is along the gradient per observation of the task, so a task is not changed by the others in the batch. The
    steps are taken on the tensors themselves, so no graph of an earlier step is kept. A step is shortened where the prior alone
    would carry an entry beyond its centre. This happens if β/(σ₀² N_d) is large: under a large β, or with few observations.

    Args:
        model: the BoRA model, with the prior ``AmortisedNormal``.
        guide: its guide ``task_normal``, with the same ``positivity``. Its tensors of tasks hold those of the last call.
        options: the options.

    Raises:
        InputError: the prior is another one, or the router reads the adapters of all tasks.
    """

    def __init__(self, model: BoRA, guide: TaskNormalGuide, options: InnerOptions) -> None:
        self.model, self.guide, self.options = model, guide, options
        self.prior = amortised_prior(model.prior)
        if model.router.reads_all_tasks:
            raise InputError(f"{model.router} reads a token by all tasks; inner steps need the router by_task")
        self.elbo = TemperedELBO(options.beta, shared_temperature=options.beta_global)
        if guide.prototype_trace is None:
            make_parameters(guide, model)
        self.latents = [name for name in model.starts if f"theta.{name}" in guide.prototype_trace.nodes]
        self.own = [guide.parameter(kind, f"theta.{name}") for name in self.latents for kind in (LOC, RAW_SCALE)]
        own = {id(parameter) for parameter in self.own}
        #: The global point (μ₀, σ₀), and the values of latents that an adapter shares between tasks.
        self.shared = [parameter for parameter in guide.parameters() if id(parameter) not in own]

    def start_of(self, number: int) -> Tensor:
        """The value at which the parameter ``own[number]`` of every task starts: (layers, *shape)."""
        name, of_scale = self.latents[number // 2], number % 2
        if not of_scale:
            return self.guide.parameter(LOC, f"prior_mean.{name}").detach()
        if self.prior.learned:
            return self.guide.parameter(LOC, f"prior_scale.{name}").detach()
        return self.guide.raw(torch.full_like(self.model.starts[name], self.prior.scale))

    def pairs(self) -> list[tuple[Parameter, int]]:
        """Each parameter of the global point, with the number in ``own`` of the parameter that starts at it."""
        found = [(self.guide.parameter(LOC, f"prior_mean.{name}"), 2 * place) for place, name in enumerate(self.latents)]
        if self.prior.learned:
            scales = [(self.guide.parameter(LOC, f"prior_scale.{name}"), 2 * n + 1) for n, name in enumerate(self.latents)]
            found += scales
        return found

    def batch(self, split: TokenSplit, rows: Tensor) -> Batch:
        """The documents in some rows of a split as one batch, with the tasks that they are of."""
        whole = len(rows) * int(split.lengths[rows].max())
        [batch] = split.batches(token_budget=whole, documents=rows)
        return replace(batch, tasks=loaded_tasks(batch.task.unique()))

    def observations(self, split: TokenSplit, rows: Tensor) -> Tensor:
        """The number of observations of each task in some rows, (tasks,), for tasks in ascending order."""
        task = split.task[rows]
        counts = [self.model.likelihood.observations_of(split.subset(rows[task == d])) for d in task.unique().tolist()]
        return torch.tensor(counts, device=self.model.backbone.device)

    def value(self, batch: Batch, parameters: Sequence[Tensor]) -> Value:
        """The objective of the batch's tasks and its gradient, in as many passes as ``token_budget`` asks for.

        Raises:
            InputError: the objective is not finite.
        """
        gradients, sums = [torch.zeros_like(value) for value in parameters], torch.zeros(3, dtype=torch.float64)
        for part in batch.parts(min(self.options.token_budget, self.model.backbone.pass_tokens)):
            with pyro.validation_enabled(False), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Encountered NaN", category=UserWarning)
                loss = self.elbo.differentiable_loss(self.model, self.guide, part.to(self.model.backbone.device)) * part.share
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, gradient in zip(gradients, found, strict=True):
                if gradient is not None:
                    total += gradient
            log_likelihood, kl = self.elbo.log_likelihood * part.share, self.elbo.kl_of_tasks * part.share
            sums += torch.stack([loss.detach(), log_likelihood, kl]).cpu().double()
        if not bool(sums.isfinite().all()):
            raise InputError(
                f"the objective is not finite in the inner steps; use a smaller inner_rate (now {self.options.rate:g}; try "
                f"{self.options.rate / 3:.1g}), or a smaller learning_rate"
            )
        return Value(gradients, *sums.tolist())

    def reset(self, tasks: int) -> None:
        """Give the guide the own parameters of so many tasks, all at the global point."""
        for number, parameter in enumerate(self.own):
            start = self.start_of(number)
            parameter.grad = None
            parameter.data = start.expand(tasks, *start.shape).clone(memory_format=torch.contiguous_format)

    def take(self, batch: Batch, observations: Tensor) -> Value | None:
        """Reset the own parameters of the batch's tasks, and take the K steps.

        Args:
            batch: the documents of the tasks (`batch`).
            observations: the number of observations of each task, (tasks,).

        Returns:
            The objective at the global point, before the first step; None without steps.
        """
        assert batch.tasks is not None
        self.reset(len(batch.tasks.index))
        before: Value | None = None
        for _ in range(self.options.steps):
            value = self.value(batch, self.own)
            before = before or value
            with torch.no_grad():
                for number, (parameter, gradient) in enumerate(zip(self.own, value.gradients, strict=True)):
                    parameter.sub_(self._step(number, observations) * gradient)
        return before

    @torch.no_grad()
    def mean_gradient(self, number: int, observations: Tensor) -> Tensor:
        """The mean of the K gradients in nats along which ``own[number]`` of each task has moved, (tasks, layers, *shape)."""
        way = self.start_of(number) - self.own[number]
        return way / (self.options.steps * self._step(number, observations))

    def _step(self, number: int, observations: Tensor) -> Tensor:
        """The step along the gradient in nats of ``own[number]``: rate/N_d, and no more than leads to the prior's centre.

        The KL term alone has the curvature β/σ₀² in μ_d, and at most 2β in the raw scale at σ_d = σ₀. A longer step would
        overshoot the centre, and from twice this length on, the steps would diverge.
        """
        start = self.start_of(number)
        rate = self.options.rate / observations.to(start).view(-1, *[1] * start.dim())
        if not self.options.beta:
            return rate
        if number % 2:
            return rate.clamp(max=0.5 / self.options.beta)
        variance = self.guide.scale_of(self.start_of(number + 1)).square()
        return torch.minimum(rate, variance / self.options.beta)

    def all_tasks(self, split: TokenSplit, *, seed: int = 0) -> None:
        """Take the K steps of all tasks on all their documents. Then the guide holds all tasks.

        Tasks without documents stay at the global point. Some tasks at a time are adapted together.

        Args:
            split: the documents.
            seed: seed of the draws.
        """
        tasks = split.task.unique()
        adapted: list[list[Tensor]] = []
        with poutine.seed(rng_seed=seed):
            for some in tasks.split(MANY_TASKS) if self.options.steps and len(tasks) else ():
                rows = torch.isin(split.task, some).nonzero()[:, 0]
                self.take(self.batch(split, rows), self.observations(split, rows))
                adapted.append([parameter.detach() for parameter in self.own])
        self.reset(self.model.num_tasks)
        for number, parameter in enumerate(self.own if adapted else ()):
            parameter.data[tasks.to(parameter.device)] = torch.cat([chunk[number] for chunk in adapted])


def amortised_prior(prior: Prior) -> AmortisedNormal:
    """The prior ``AmortisedNormal`` itself, also where an adapter has latents that all tasks share.

    Raises:
        InputError: it is another prior.
    """
    own = prior.other if isinstance(prior, ByLatent) else prior
    if not isinstance(own, AmortisedNormal):
        raise InputError(f"the prior is {own}; inner steps need a mean and a scale of each entry: give AmortisedNormal()")
    return own
