"""Amortised Bayesian meta-learning of adapters (ABMLL): inner steps of each task from a global point, outer steps of that point.

>>> import bora_pyro as bp
>>> from bora_pyro.priors import AmortisedNormal
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
>>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
>>> model = bp.BoRA(backbone, len(data.tasks), adapter=bp.LoRA(rank=2), prior=AmortisedNormal())
>>> fitted = meta_fit(model, data, epochs=2, inner_steps=2)
>>> fitted.evaluate(data.test)["test_perplexity"] > 1
True
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from bora_pyro.backbone.texts import check_token_ids
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.guides.task_normal import TaskNormalGuide, task_normal_guide
from bora_pyro.inference.continuation import is_over
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.inner_steps import InnerOptions, InnerSteps, Value, amortised_prior
from bora_pyro.inference.meta_options import FIRST_ORDER, REPTILE, MetaOptions
from bora_pyro.inference.meta_steps import meta_steps
from bora_pyro.inference.optimizer import adamw
from bora_pyro.inference.schedule import epoch_seed, schedule, step_seed
from bora_pyro.model import BoRA
from bora_pyro.options.field import with_changes

#: A number below this part of a float32 number is lost when it is added to it.
_ROUNDING = 2.0**-24


def meta_fit(
    model: BoRA,
    data: TaskData,
    options: MetaOptions | None = None,
    *,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    **changes: Any,
) -> Fitted:
    """Fit the global point (μ₀, σ₀) so that K gradient steps from it adapt each task, as ABMLL does (arXiv 2508.14285).

        >>> import bora_pyro as bp
        >>> from bora_pyro.priors import AmortisedNormal
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
        >>> model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2), prior=AmortisedNormal(scale=0.02))
        >>> fitted = meta_fit(model, data, epochs=1, inner_steps=1, beta=0.5)
        >>> fitted.history[0]["kl"] > 0, fitted.sites()["prior_scale.q_proj.lora_A"].shape
        (True, torch.Size([4, 2, 256]))

    In each meta-step some tasks are drawn. Each one's own q(θ_d) = Normal(μ_d, σ_d²) begins at the global point and takes K
    gradient steps on its documents (`inner_steps`). Then AdamW moves the global point along the gradient of

        Σ_d (E_q[log p(D_d | θ_d)] − β KL(q(θ_d) ‖ Normal(μ₀, σ₀²))) + β log p(μ₀, σ₀)

    at the adapted tasks. With ``outer_gradient="first_order"`` this is the direct gradient, through the KL divergence, plus the
    gradient with respect to (μ_d, σ_d), because these began at the global point. Second derivatives are left out. With
    ``outer_gradient="reptile"`` (and β = 0) it is the mean of the K gradients along which the tasks have moved. The two parts
    of the KL divergence's gradient with respect to the means cancel then: a common shift of all means does not change it. The own
    parameters are not kept from one meta-step to the next.

    After each epoch every task takes its K steps on all its training documents, and the validation documents are scored under the
    means μ_d. The best epoch is kept, with these μ_d and σ_d as the tasks' posteriors.

    Args:
        model: the BoRA model with the prior :class:`~bora_pyro.priors.AmortisedNormal`.
        data: the documents.
        options: the options; default: ``MetaOptions()``.
        on_step: called after each meta-step with the report of the epoch so far.
        on_epoch: called after each epoch with its report.
        changes: single options, for example ``epochs=3``.

    Returns:
        The fit, whose guide is ``task_normal``. Its history has, for each epoch, ``loss`` and ``loss_before`` (nats per training
        observation after and before the inner steps), ``kl`` (nats per task), the mean ``scale`` σ₀, and the validation measure.

    Raises:
        InputError: an option has a value that is not allowed; β is so small that β KL is lost in the rounding of the loss; the
            prior, the router or the adapter is one that inner steps cannot use; there is nothing to train on; or the objective
            is not finite.
    """
    loop = MetaLoop(model, data, options, **changes)
    loop.check_beta()
    return loop.run(on_step=on_step, on_epoch=on_epoch)


class MetaLoop:
    """The progress of a meta-fit. A command checks β with it before it writes anything.

    Args:
        model, data, options, changes: as for :func:`meta_fit`.

    Raises:
        InputError: as for :func:`meta_fit`.
    """

    def __init__(self, model: BoRA, data: TaskData, options: MetaOptions | None = None, **changes: Any) -> None:
        self.options = options = with_changes(options or MetaOptions(), changes)
        options.validate()
        self.model, self.data = model, data
        if data.train.num_tokens == 0:
            raise InputError("the training split has no token to predict; give more or longer documents")
        check_token_ids(model.backbone, data.train, data.validation, data.test)
        _check_no_callbacks(model)
        positivity = amortised_prior(model.prior).positivity
        self.guide: TaskNormalGuide = task_normal_guide(model, scale=1.0, positivity=positivity)
        self.inner = InnerSteps(model, self.guide, inner_options(options))
        self.optimizer = adamw(self.inner.shared)
        self.fitted = Fitted(model, self.guide, data.tasks, chat_template=data.chat_template)
        self.fitted.documents = data.train.documents_per_task
        self.steps_per_epoch = len(self._steps(0))
        self.total_steps = self.steps_per_epoch * options.epochs
        self._best: dict[str, Tensor] = {}

    def _steps(self, epoch: int) -> list[Tensor]:
        given = {name: getattr(self.options, name) for name in ("tasks_per_step", "documents_per_task")}
        return meta_steps(self.data.train, **given, seed=epoch_seed(self.options.seed, epoch))

    def check_beta(self) -> None:
        """Check in the first meta-step, without an outer step, that β KL is not lost in the rounding of the loss.

        Raises:
            InputError: it is lost; the message names the smallest β that counts.
        """
        if not self.options.beta:
            return
        with poutine.seed(rng_seed=step_seed(self.options.seed, 0, 0)):
            _, after, _ = self._adapted(self._steps(0)[0])
        if self.options.beta < (least := smallest_beta(after)):
            raise InputError(
                f"beta is {self.options.beta:g}, and beta KL is lost in the rounding of the loss: the KL divergence is "
                f"{after.kl:.3g} nats, the loss {-after.log_likelihood:.4g}; the smallest beta that counts here is {least:.2g} "
                "(0 is the plain likelihood)"
            )

    def run(
        self,
        *,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
    ) -> Fitted:
        """Run the epochs, and return the fit at its best epoch. The arguments are those of :func:`meta_fit`."""
        fitted, start, epoch = self.fitted, time.perf_counter(), 0
        self._keep_best(0)
        while not is_over(epoch, fitted.best_epoch, epochs=self.options.epochs, patience=self.options.patience):
            report = self._epoch(epoch, on_step)
            epoch += 1
            report |= self._keep_best(epoch)
            fitted.seconds = report["seconds"] = time.perf_counter() - start
            fitted.history.append(report)
            if on_epoch:
                on_epoch(report)
        for name, value in self.guide.named_parameters():
            value.data = self._best[name].to(value.device)
        return fitted

    def _epoch(self, epoch: int, on_step: Callable[[dict[str, Any]], None] | None) -> dict[str, Any]:
        report: dict[str, Any] = {"epoch": epoch + 1, "total": self.total_steps}
        sums, begin = torch.zeros(6, dtype=torch.float64), time.perf_counter()
        for number, rows in enumerate(self._steps(epoch)):
            step = epoch * self.steps_per_epoch + number
            rate = schedule(step, self.total_steps, self.options.warmup, self.options.schedule) * self.options.learning_rate
            with poutine.seed(rng_seed=step_seed(self.options.seed, epoch, number)):
                before, after, counts = self._adapted(rows)
                self._outer_step(after, counts, rate)
            observations, tasks, tokens = float(counts.sum()), len(counts), int(self.data.train.predicted[rows].sum())
            numbers = [before.log_likelihood, after.log_likelihood, after.kl, observations, tasks, tokens]
            sums += torch.tensor(numbers, dtype=torch.float64)
            log_before, log_after, kl, observations, drawn, tokens_read = sums.tolist()
            report |= {"step": step + 1, "loss": -log_after / observations, "loss_before": -log_before / observations}
            report |= {"kl": kl / drawn, "learning_rate": rate}
            report["training_tokens_per_second"] = tokens_read / (time.perf_counter() - begin)
            if on_step:
                on_step(dict(report))
        return report | {"scale": self._mean_scale()}

    def _adapted(self, rows: Tensor) -> tuple[Value, Value, Tensor]:
        """Take the inner steps of the tasks of some rows.

        Returns:
            The objective before them and after them, the latter with the gradients of all parameters; and the number of
            observations of each task.
        """
        inner, train = self.inner, self.data.train
        batch, counts = inner.batch(train, rows), inner.observations(train, rows)
        before = inner.take(batch, counts)
        after = inner.value(batch, [*inner.shared, *inner.own])
        return before or after, after, counts

    def _outer_step(self, after: Value, counts: Tensor, rate: float) -> None:
        for parameter, gradient in zip(self.inner.shared, self.global_gradient(after, counts), strict=True):
            parameter.grad = gradient / float(counts.sum())
        torch.nn.utils.clip_grad_norm_(self.inner.shared, self.options.gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def global_gradient(self, after: Value, counts: Tensor) -> list[Tensor]:
        """The gradient of the objective with respect to ``inner.shared``, without second derivatives, in nats.

        Args:
            after: the objective after the inner steps, with the gradients of ``inner.shared`` and of ``inner.own``.
            counts: the number of observations of each task, (tasks,).
        """
        shared, own = after.gradients[: len(self.inner.shared)], after.gradients[len(self.inner.shared) :]
        found = {id(parameter): gradient for parameter, gradient in zip(self.inner.shared, shared, strict=True)}
        if self.options.outer_gradient == FIRST_ORDER:
            for parameter, number in self.inner.pairs():
                # the own parameter of each task began here: the identity, for the derivative of K steps
                found[id(parameter)] = found[id(parameter)] + own[number].sum(0)
        elif self.options.outer_gradient == REPTILE:
            for parameter, number in self.inner.pairs():
                found[id(parameter)] = found[id(parameter)] + self.inner.mean_gradient(number, counts).sum(0)
        return [found[id(parameter)] for parameter in self.inner.shared]

    def _keep_best(self, epoch: int) -> dict[str, float]:
        """Adapt all tasks to their training documents, score the validation documents, and keep the state if it is the best."""
        fitted, measure = self.fitted, self.model.likelihood.measure
        score = None
        if self.data.validation.num_tokens or epoch in (0, self.options.epochs):
            self.inner.all_tasks(self.data.train, seed=epoch_seed(self.options.seed, 0))
        if self.data.validation.num_tokens:
            (scores,) = evaluate(self.model, self.data.validation, fitted.weights()[0])
            score = scores.value()
            if score is None or math.isnan(score):
                raise InputError(f"the validation {measure.title} is not a number after epoch {epoch}; use a smaller inner_rate")
        if score is None or fitted.validation_score is None or score < fitted.validation_score:
            fitted.best_epoch, fitted.validation_score = epoch, score
            self._best = {name: value.detach().clone() for name, value in self.guide.named_parameters()}
        return {} if score is None else {f"validation_{measure.name}": score}

    def _mean_scale(self) -> float:
        """The geometric mean of σ₀ over all entries."""
        sites = self.fitted.sites()
        taus = [
            self.inner.prior.precision(n, self.model.starts[n], sites).expand_as(self.model.starts[n]) for n in self.inner.latents
        ]
        return float(torch.cat([tau.flatten() for tau in taus]).log().mean().mul(-0.5).exp())


def inner_options(options: MetaOptions) -> InnerOptions:
    """The options of the inner steps of a meta-fit."""
    return InnerOptions(
        steps=options.inner_steps,
        rate=options.inner_rate,
        beta=options.beta,
        beta_global=options.beta_global,
        token_budget=options.token_budget,
    )


def smallest_beta(value: Value) -> float:
    """The smallest β with which β KL is not lost in the rounding of a float32 loss.

    >>> smallest_beta(Value([], 0.0, log_likelihood=-(2.0**24), kl=4.0))
    0.25
    """
    return _ROUNDING * abs(value.log_likelihood) / value.kl if value.kl > 0 else math.inf


def _check_no_callbacks(model: BoRA) -> None:
    """Check that no member changes between steps: a meta-fit resets its tasks in every step."""
    for member in (model.adapter, model.router, model.likelihood):
        if member.callbacks():
            raise InputError(
                f"{member} changes during a fit, which a meta-fit does not do; give an adapter such as lora, or fit by MAP"
            )
