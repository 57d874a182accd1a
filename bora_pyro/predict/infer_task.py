"""Inference of the task of a text: p(d | text) ∝ p(d) p(text | θ_d), exact under the model.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
>>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
>>> fitted = bp.fit(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2), prior=bp.HierarchicalNormal(tau=1)), data, epochs=4)
>>> found = infer_task(fitted, ["ada prefers nothing", "bob prefers it"])
>>> found.best, found.probabilities.shape
(['ada', 'bob'], torch.Size([2, 2]))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from scipy import optimize
from torch import Tensor

from bora_pyro.backbone.texts import token_split
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.inference.fitted import Fitted
from bora_pyro.likelihoods import NextTokens
from bora_pyro.model import BoRA, Weights
from bora_pyro.predict.unknown_task import unknown_draws

#: The name of the candidate "none of the tasks": the first one, or the second one if a task has the first name.
UNKNOWN, NONE_OF_THEM = "unknown", "none of the tasks"
PRIORS = ("documents", "flat")


@dataclass(frozen=True)
class TaskCalibration:
    """Parameters that calibrate p(d | text) ∝ p(d) p(text | θ_d)^(1/T) exp(b_d).

    >>> TaskCalibration(temperature=4.0, bias={"ada": 0.5})
    TaskCalibration(temperature=4.0, bias={'ada': 0.5})

    Attributes:
        temperature: T. The model treats the tokens of a text as independent evidence for a task. They are not, so p(d | text) is
            overconfident at T = 1.
        bias: b_d by name of the task, 0 for tasks without an entry. Adapters of tasks with many or general documents give a high
            likelihood to every text. Without a bias the other tasks would rarely be inferred. Biases that were fitted have the
            mean 0, which is also the bias of a text of no task.

    Raises:
        InputError: if the temperature is not a finite number above 0, or a bias is not finite.
    """

    temperature: float = 1.0
    bias: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; give a finite number above 0")
        for name, value in self.bias.items():
            if not math.isfinite(value):
                raise InputError(f"the bias of task {shown(name)} is {value}; give a finite number")


@dataclass(frozen=True)
class TaskProbabilities:
    """p(d | text) of several texts.

    Attributes:
        tasks: names of the candidates. If ``unknown`` is True, the last one is none of the tasks.
        log_likelihood: (texts, candidates) float64, log p(text | θ_d) in nats.
        log_prior: (candidates,) float64, log p(d).
        tokens: (texts,) number of predicted tokens of each text.
        calibration: temperature and biases of the likelihoods.
        unknown: whether the last candidate is none of the tasks.

    Raises:
        InputError: if the calibration has a bias of a task that is not a candidate.
    """

    tasks: list[str]
    log_likelihood: Tensor
    log_prior: Tensor
    tokens: Tensor
    calibration: TaskCalibration = TaskCalibration()
    unknown: bool = False

    def __post_init__(self) -> None:
        for name in self.calibration.bias:
            if name not in self.known:
                raise InputError(
                    f"the bias of task {shown(name)} is of none of the {len(self.known)} candidates{nearest(name, self.known)}"
                )

    @property
    def known(self) -> list[str]:
        """The candidates that are tasks of the fit."""
        return self.tasks[: len(self.tasks) - self.unknown]

    @property
    def log_prob(self) -> Tensor:
        """(texts, candidates) log p(d | text), with one temperature for all candidates. The bias of ``unknown`` is 0."""
        known = [self.calibration.bias.get(task, 0.0) for task in self.known]
        bias = torch.tensor(known + [0.0] * self.unknown, dtype=torch.float64)
        return (self.log_likelihood / self.calibration.temperature + self.log_prior + bias).log_softmax(1)

    @property
    def probabilities(self) -> Tensor:
        """(texts, candidates) p(d | text)."""
        return self.log_prob.exp()

    @property
    def best(self) -> list[str]:
        """The most probable task of each text."""
        return [self.tasks[d] for d in self.log_prob.argmax(1).tolist()]

    @property
    def log_evidence(self) -> Tensor:
        """(texts,) log p(text) = log Σ_d p(d) p(text | θ_d), in nats: the marginal likelihood of a text of unknown task.

        For each token this averages the tasks' predictions with weights p(d | the tokens before). It ignores the calibration.
        """
        return (self.log_likelihood + self.log_prior).logsumexp(1)

    def at(self, calibration: TaskCalibration | float) -> TaskProbabilities:
        """A copy with another calibration. A number is a temperature without biases."""
        calibration = calibration if isinstance(calibration, TaskCalibration) else TaskCalibration(calibration)
        return replace(self, calibration=calibration)

    def calibrate(self, task: Tensor) -> TaskCalibration:
        """Fit T and b_d to texts of known task, with the priors b_d ~ Normal(0, 1) and log T ~ Normal(0, 2).

        Use documents that no adapter was fitted to. Temperature scaling is from Guo et al. (ICML 2017, On Calibration of Modern
        Neural Networks). The biases are those of Platt scaling, shrunk towards 0 by their prior.

        Args:
            task: (texts,) int64, the index of each text's true task.

        Returns:
            The mode of the posterior of T and b. There the mean of b is 0. No text here is of the candidate ``unknown``, so it is
            not used; :attr:`log_prob` has the same T for it.

        Raises:
            InputError: if there is not one task per text, an index is not that of a known task, or a task has p(d) = 0.
        """
        known = len(self.known)
        if task.shape != self.tokens.shape or not len(task) or not 0 <= int(task.min()) <= int(task.max()) < known:
            raise InputError(
                f"{len(task)} tasks of {len(self.tokens)} texts given; give the index of each, from 0 to {known - 1}"
            )
        if (impossible := task[self.log_prior[task].isinf()]).numel():
            raise InputError(f"a text is of task {self.tasks[int(impossible[0])]!r}, whose p(d) is 0; give it a prior above 0")
        evidence, prior = self.log_likelihood[:, :known].log_softmax(1), self.log_prior[:known]

        def loss(values: Any) -> tuple[float, Any]:
            """The negative log posterior of (log T, b) up to a constant, and its gradient."""
            x = torch.tensor(values, requires_grad=True)
            logits = evidence * torch.exp(-x[0]) + prior + x[1:]
            value = F.cross_entropy(logits, task, reduction="sum") + x[0].square() / 8 + x[1:].square().sum() / 2
            (gradient,) = torch.autograd.grad(value, x)
            return value.item(), gradient.numpy()

        with torch.enable_grad():
            result = optimize.minimize(
                loss,
                torch.zeros(known + 1, dtype=torch.float64).numpy(),
                jac=True,
                method="L-BFGS-B",
                options={"ftol": 1e-15, "gtol": 1e-8, "maxiter": 1000, "maxcor": 30},
            )
        log_temperature, *bias = result.x.tolist()
        return TaskCalibration(math.exp(log_temperature), dict(zip(self.tasks, bias, strict=False)))

    def table(self, *, most: int = 3) -> pd.DataFrame:
        """The ``most`` most probable candidates of each text with their probabilities, and p(unknown), one row per text."""
        values, index = self.probabilities.topk(min(most, len(self.tasks)), dim=1)
        columns = {}
        for rank in range(values.shape[1]):
            columns[f"task {rank + 1}"] = [self.tasks[d] for d in index[:, rank].tolist()]
            columns[f"p {rank + 1}"] = values[:, rank].tolist()
        if self.unknown:
            columns["p unknown"] = self.probabilities[:, -1].tolist()
        return pd.DataFrame(columns)


def infer_task(
    fitted: Fitted,
    texts: str | Sequence[str] | TokenSplit,
    *,
    prior: str | Mapping[str, float] = "documents",
    unknown: float = 0.0,
    calibration: TaskCalibration | float = 1.0,
    draws: int = 8,
    max_tokens: int | None = None,
    token_budget: int = 8192,
    seed: int = 0,
) -> TaskProbabilities:
    """Compute p(d | text) ∝ p(d) p(text | θ_d) with θ at the centre of the guide.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
        >>> fitted = bp.fit(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2)), data, epochs=1)
        >>> found = infer_task(fitted, "a tree", prior={"ada": 3, "bob": 1}, unknown=0.5)
        >>> found.tasks, [round(p, 3) for p in found.log_prior.exp().tolist()]
        (['ada', 'bob', 'unknown'], [0.375, 0.125, 0.5])

    The rows of a forward pass are pairs of a text and a task.

    Args:
        fitted: the fitted model.
        texts: texts, or tokenised documents, whose tasks are ignored.
        prior: p(d). ``documents`` is proportional to the tasks' numbers of training documents, ``flat`` is equal for all tasks.
            Numbers by name of the task are scaled to sum to 1; tasks without a number get 0.
        unknown: prior probability that a text belongs to none of the tasks, from 0 (not considered) to below 1. Its likelihood
            is the prior predictive ∫ p(text | θ) p(θ) dθ, averaged over ``draws`` draws from
            :func:`~bora_pyro.predict.unknown_task.prior_of_unknown`.
        calibration: the result of :meth:`TaskProbabilities.calibrate` on held-out documents, or a temperature alone.
        draws: number of draws for the prior predictive.
        max_tokens: longer texts are truncated; default and maximum: the context of the base.
        token_budget: tokens of a forward pass, padding included.
        seed: seed of the draws.

    Raises:
        InputError: if there is no text, the prior or one of its tasks is unknown, a probability is out of range, the base has no
            tokenizer, the calibration is for other tasks, the fit is one to answers among options, or its router reads a text by
            the adapters of all tasks.
    """
    check_single_adapters(fitted.model, "infer_task")
    if not 0 <= unknown < 1:
        raise InputError(f"unknown is {unknown}; give the probability of a text of no task, from 0 to below 1")
    if unknown and draws < 1:
        raise InputError(f"draws is {draws}; give a whole number from 1 up")
    split = texts if isinstance(texts, TokenSplit) else text_split(fitted, texts, max_tokens)
    if not len(split):
        raise InputError("there is no text; give one or more")
    log_prior = log_prior_of(fitted, prior)
    names, weights = list(fitted.tasks), fitted.weights_of()
    parts = []
    for index in torch.arange(len(names)).split(tasks_per_pass(split, token_budget)):
        parts.append(log_likelihoods(fitted.model, split, weights(index)[0], token_budget=token_budget, tasks=index))
    log_likelihood = torch.cat(parts, 1)
    if unknown:
        model, theta = unknown_draws(fitted, draws, seed=seed)
        by_draw = log_likelihoods(model, split, theta, token_budget=token_budget)
        log_likelihood = torch.cat([log_likelihood, by_draw.logsumexp(1, keepdim=True) - math.log(draws)], 1)
        log_prior = torch.cat([log_prior + math.log1p(-unknown), torch.tensor([math.log(unknown)], dtype=torch.float64)])
        names.append(UNKNOWN if UNKNOWN not in names else NONE_OF_THEM)
    return TaskProbabilities(names, log_likelihood, log_prior, split.predicted, unknown=unknown > 0).at(calibration)


@torch.inference_mode()
def log_likelihoods(
    model: BoRA, split: TokenSplit, theta: Weights, *, token_budget: int = 8192, tasks: Tensor | None = None
) -> Tensor:
    """log p(document | θ) of each document under each adapter: (documents, adapters) float64, in nats.

    Args:
        model: the BoRA model.
        split: the documents.
        theta: θ of each adapter, (adapters, layers, *shape) by name of the latent.
        token_budget: tokens of a forward pass, padding included. Its rows are pairs of a document and an adapter.
        tasks: (adapters,) the task of each adapter, for masks that differ between tasks; default: all tasks of the model.
    """
    adapters = len(next(iter(theta.values())))
    result = torch.empty((len(split), adapters), dtype=torch.float64)
    device = model.backbone.device
    for batch in split.batches(token_budget=max(1, token_budget // adapters)):
        rows = len(batch.index)
        input_ids, labels = (value.repeat_interleave(adapters, 0).to(device) for value in (batch.input_ids, batch.labels))
        adapter = torch.arange(adapters, device=device).repeat(rows)
        task = adapter if tasks is None else tasks.to(device)[adapter]
        log_prob = NextTokens(model.backbone.lazy_logits(input_ids, model.change(theta, adapter, task))).log_prob(labels)
        result[batch.index] = log_prob.double().cpu().view(rows, adapters)
    return result


def check_single_adapters(model: BoRA, what: str) -> None:
    """Check that each task's adapter alone says how likely a text is, which ``what`` needs.

    Raises:
        InputError: the likelihood observes answers among options, or the router reads a text by the adapters of all tasks.
    """
    model.likelihood.check_texts(what)
    if model.router.reads_all_tasks:
        raise InputError(
            f"{model.router} reads a text by the adapters of all tasks, whatever its task; {what} needs a run with the router "
            "by_task"
        )


def tasks_per_pass(split: TokenSplit, token_budget: int) -> int:
    """Number of tasks per forward pass of one text."""
    return max(1, min(64, token_budget // int(split.lengths.max())))


def text_split(fitted: Fitted, texts: str | Sequence[str], max_tokens: int | None) -> TokenSplit:
    """Tokenise one text or several, whose tasks are unknown."""
    if not isinstance(texts, Iterable):
        raise InputError(f"texts is {shown(texts)}; give a text, or a list of texts")
    texts = [texts] if isinstance(texts, str) else list(texts)
    return token_split(fitted.model.backbone, texts, task=[0] * len(texts), num_tasks=len(fitted.tasks), max_tokens=max_tokens)


def log_prior_of(fitted: Fitted, prior: str | Mapping[str, float]) -> Tensor:
    """log p(d) of each task: (D,) float64."""
    if isinstance(prior, Mapping):
        for name, value in prior.items():
            if name not in fitted.tasks:
                raise InputError(
                    f"task {shown(name)} is not in this fit, which has {len(fitted.tasks)}{nearest(name, fitted.tasks)}"
                )
            if not 0 <= value < math.inf:
                raise InputError(f"the prior of task {shown(name)} is {value}; give a finite number from 0 up")
        numbers = torch.tensor([float(prior.get(name, 0.0)) for name in fitted.tasks], dtype=torch.float64)
    elif prior == "documents":
        if not fitted.documents:
            raise InputError("the fit has no numbers of training documents; give prior='flat', or a number by task")
        numbers = torch.tensor(fitted.documents, dtype=torch.float64)
    elif prior == "flat":
        numbers = torch.ones(len(fitted.tasks), dtype=torch.float64)
    else:
        raise InputError(f"prior is {prior!r}; allowed: {', '.join(PRIORS)}, or a number by task{nearest(str(prior), PRIORS)}")
    if not numbers.sum() > 0:
        raise InputError("the prior gives every task 0; give at least one a number above 0")
    return (numbers / numbers.sum()).log()
