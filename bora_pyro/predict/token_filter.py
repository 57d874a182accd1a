"""The task of each token of a text, where the task is unknown or changes in the text: generative routing by tokens.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
>>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
>>> fitted = bp.fit(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2), prior=bp.HierarchicalNormal(tau=1)), data, epochs=4)
>>> found = token_filter(fitted, "ada prefers document", switch_rate=0.02)
>>> [segment.task for segment in found.segments[0]], found.smoothed[0].shape[1]
(['ada'], 2)
>>> alike = bp.infer_task(fitted, "ada prefers document")  # a text of one task
>>> torch.allclose(found.likelihoods.at(0.0).log_evidence, alike.log_evidence, atol=1e-4)
True

The model is a hidden Markov model. The task of the first token is drawn from p(d). Before each later token a task is drawn anew
from p(d) with probability ρ, the switch rate. The emissions are the likelihoods that the adapters give each token. Nothing is
trained: with ρ = 0 this is :func:`~bora_pyro.predict.infer_task.infer_task`, and with ρ = 1 every token is a mixture of the tasks
by p(d).

**What is assumed about the context.** Every adapter reads the whole text: p(w_t | w_<t, d_t) is the probability under θ_d with
the hidden states of a text that d alone has read from its beginning. So the tokens before a switch are the context, but not the
hidden states of the task that wrote them. This needs one forward pass a task. Under another assumption, a new context after each
switch, it would need one for each task and each place of a switch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from scipy import optimize
from torch import Tensor

from bora_pyro.data.batch import IGNORED
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.inference.fitted import Fitted
from bora_pyro.likelihoods import NextTokens
from bora_pyro.model import BoRA, Weights
from bora_pyro.predict.infer_task import (
    NONE_OF_THEM,
    UNKNOWN,
    check_single_adapters,
    log_prior_of,
    tasks_per_pass,
    text_split,
)
from bora_pyro.predict.posterior import Posterior
from bora_pyro.predict.task_chain import TaskChain
from bora_pyro.predict.unknown_task import unknown_draws

#: The smallest switch rate above 0 that is tried: one switch in 100,000 tokens.
LEAST_RATE = 1e-5


@dataclass(frozen=True)
class Segment:
    """Tokens of a text that follow one another and are of one task.

    Attributes:
        task: name of the task.
        start, end: position of the first token in the text, and the position behind the last one. The start of the text belongs
            to the first segment.
        probability: mean over its predicted tokens of p(task | whole text).
    """

    task: str
    start: int
    end: int
    probability: float


@dataclass(frozen=True, eq=False)
class TokenLikelihoods:
    """log p(token | the tokens before it, θ_d) of each token of some texts under each adapter: what the filter needs.

    Attributes:
        tasks: names of the candidates. If ``unknown`` is True, the last one is none of the tasks.
        log_likelihood: (texts, tokens, draws, states) float64, in nats, of the predicted tokens of each text; 0 behind its end. A
            state is a task, or a draw of the adapter of an unknown task.
        candidate: (states,) int64, the candidate of each state.
        log_prior: (states,) float64, log p(state).
        split: the texts.
        unknown: whether the last candidate is none of the tasks.
    """

    tasks: list[str]
    log_likelihood: Tensor
    candidate: Tensor
    log_prior: Tensor
    split: TokenSplit
    unknown: bool = False

    def at(self, switch_rate: float | None = None, *, temperature: float = 1.0) -> TokenFilter:
        """The filter at a switch rate.

        Args:
            switch_rate: ρ, the probability that the task is drawn anew before a token; None: :meth:`best_switch_rate`.
            temperature: T. Tasks are weighted by their likelihoods to the power 1/T.

        Raises:
            InputError: if the rate or the temperature is out of range.
        """
        rate = self.best_switch_rate() if switch_rate is None else switch_rate
        return TokenFilter(self, TaskChain(self.log_prior, rate, temperature))

    def log_evidence(self, switch_rate: float) -> float:
        """log p(all texts) at a switch rate, in nats."""
        return float(TaskChain(self.log_prior, switch_rate).filter(self.log_likelihood)[1].sum())

    def best_switch_rate(self) -> float:
        """The switch rate of maximum likelihood for these texts, from 0 to 1.

        The likelihood may have several maxima. The best rate of a grid, 0 and 5 rates in each factor of 10 from
        ``LEAST_RATE`` to 1, is refined between its neighbours.
        """
        steps = round(-5 * math.log10(LEAST_RATE))
        grid = [10 ** (-k / 5) for k in range(steps, -1, -1)]
        found = {rate: self.log_evidence(rate) for rate in [0.0, *grid]}
        best = max(found, key=lambda rate: found[rate])
        place = grid.index(best) if best else 0
        low, high = grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)]
        refined = optimize.minimize_scalar(
            lambda x: -self.log_evidence(math.exp(x)), bounds=(math.log(low), math.log(high)), method="bounded",
            options={"xatol": 1e-3},
        )  # fmt: skip
        return float(math.exp(refined.x)) if -refined.fun > found[best] else best


@dataclass(frozen=True, eq=False)
class TokenFilter:
    """The tasks of the tokens of some texts at one switch rate.

    All lists have one tensor for each text, with a row for each of its predicted tokens.

    Attributes:
        likelihoods: the likelihoods of the tokens.
        chain: the prior of the tasks of the tokens, with the switch rate.
    """

    likelihoods: TokenLikelihoods
    chain: TaskChain

    @property
    def tasks(self) -> list[str]:
        """Names of the candidates."""
        return self.likelihoods.tasks

    @property
    def switch_rate(self) -> float:
        """ρ."""
        return self.chain.switch_rate

    @cached_property
    def _filtered(self) -> tuple[Tensor, Tensor]:
        return self.chain.filter(self.likelihoods.log_likelihood)

    @cached_property
    def _smoothed(self) -> Tensor:
        """(texts, tokens, candidates) p(d_t | whole text)."""
        return self._by_candidate(self.chain.smooth(self.likelihoods.log_likelihood, self._filtered[0]))

    def _by_candidate(self, log_p: Tensor) -> Tensor:
        """The probabilities of the candidates, (texts, tokens, candidates), from those of draws and states."""
        p = log_p.exp().sum(2)
        return p.new_zeros(*p.shape[:2], len(self.tasks)).index_add_(2, self.likelihoods.candidate, p)

    def _rows(self, padded: Tensor) -> list[Tensor]:
        return [row[:length] for row, length in zip(padded, self.likelihoods.split.predicted.tolist(), strict=True)]

    @property
    def predicted(self) -> list[Tensor]:
        """(tokens, candidates) p(d_t | tokens before t): the weights by which the next token is predicted."""
        return self._rows(self._by_candidate(self._filtered[0]))

    @property
    def smoothed(self) -> list[Tensor]:
        """(tokens, candidates) p(d_t | whole text), by forward and backward recursion."""
        return self._rows(self._smoothed)

    @property
    def log_prob(self) -> list[Tensor]:
        """(tokens,) log Σ_d p(d_t | tokens before t) p(token t | tokens before t, θ_d), in nats."""
        return self._rows(self._filtered[1])

    @property
    def log_evidence(self) -> Tensor:
        """(texts,) log p(text) in nats: the sum of ``log_prob``. At temperature 1 it is the marginal likelihood of the text."""
        return self._filtered[1].sum(1)

    @property
    def perplexity(self) -> float:
        """exp of the mean of −``log_prob`` over the predicted tokens of all texts."""
        return math.exp(min(-float(self.log_evidence.sum()) / self.likelihoods.split.num_tokens, 700.0))

    @cached_property
    def best_path(self) -> list[Tensor]:
        """(tokens,) int64, the most probable sequence of candidates; with draws, the one of the most probable draw and path."""
        path, _ = self.chain.path(self.likelihoods.log_likelihood, self.likelihoods.split.predicted)
        return [self.likelihoods.candidate[row] for row in self._rows(path)]

    @property
    def segments(self) -> list[list[Segment]]:
        """The segments of each text on its most probable path, in order."""
        return [self._segments(text, path) for text, path in enumerate(self.best_path)]

    def _segments(self, text: int, path: Tensor) -> list[Segment]:
        split = self.likelihoods.split
        places = (split.labels(text) != IGNORED).nonzero()[:, 0]
        of_path = self._smoothed[text, : len(path)].gather(1, path[:, None])[:, 0]
        bounds = [0, *(path.diff().nonzero()[:, 0] + 1).tolist(), len(path)]
        found = []
        for first, last in pairwise(bounds):
            start = 0 if first == 0 else int(places[first])
            end = int(split.lengths[text]) if last == len(path) else int(places[last])
            found.append(Segment(self.tasks[int(path[first])], start, end, float(of_path[first:last].mean())))
        return found


def token_filter(
    fitted: Fitted,
    texts: str | Sequence[str] | TokenSplit,
    *,
    switch_rate: float | None = None,
    temperature: float = 1.0,
    prior: str | Mapping[str, float] = "documents",
    unknown: float = 0.0,
    unknown_samples: int = 8,
    draws: int | None = None,
    max_tokens: int | None = None,
    token_budget: int = 8192,
    seed: int = 0,
) -> TokenFilter:
    """Infer the task of each token: p(d_t | tokens before t), p(d_t | whole text) and the most probable segments.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
        >>> fitted = bp.fit(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2)), data, epochs=1)
        >>> found = token_filter(fitted, ["a tree", "a node of it"], switch_rate=1.0, prior={"ada": 3, "bob": 1})
        >>> found.predicted[1][-1].round(decimals=6).tolist()  # at this rate the tokens before say nothing
        [0.75, 0.25]

    The arguments besides ``switch_rate`` and ``temperature`` are those of :func:`token_likelihoods`.

    Args:
        fitted: the fitted model.
        texts: texts, or tokenised documents.
        switch_rate: ρ, the probability that the task is drawn anew from p(d) before a token, from 0 (one task a text) to 1. None:
            the rate of maximum likelihood for these texts.
        temperature: T. Tasks are weighted by their likelihoods to the power 1/T.
        prior: p(d).
        unknown: prior probability of a task that is none of the fit.
        unknown_samples: number of draws of the adapter of an unknown task.
        draws: K, the number of posterior draws; None: the centre of the guide alone.
        max_tokens: longer texts are cut.
        token_budget: tokens of a forward pass, padding included.
        seed: seed of the draws.

    Raises:
        InputError: as for :func:`token_likelihoods`, or if the rate or the temperature is out of range.
    """
    TaskChain(torch.zeros(1), 0.0 if switch_rate is None else switch_rate, temperature)  # checked before the passes
    found = token_likelihoods(
        fitted, texts, prior=prior, unknown=unknown, unknown_samples=unknown_samples, draws=draws, max_tokens=max_tokens,
        token_budget=token_budget, seed=seed,
    )  # fmt: skip
    return found.at(switch_rate, temperature=temperature)


def token_likelihoods(
    fitted: Fitted,
    texts: str | Sequence[str] | TokenSplit,
    *,
    prior: str | Mapping[str, float] = "documents",
    unknown: float = 0.0,
    unknown_samples: int = 8,
    draws: int | None = None,
    max_tokens: int | None = None,
    token_budget: int = 8192,
    seed: int = 0,
) -> TokenLikelihoods:
    """Read texts with the adapter of every task, and keep the likelihood of each token.

    A draw of the posterior holds for a whole text, whatever switches there are: θ_d is one vector. An unknown task that follows
    another one after a switch is a new one, with an adapter of its own.

    Args:
        fitted: the fitted model.
        texts: texts, or tokenised documents, whose tasks are ignored. A switch can only come before a predicted token.
        prior: p(d), as for :func:`~bora_pyro.predict.infer_task.infer_task`.
        unknown: prior probability of a task that is none of the fit, from 0 (not considered) to below 1.
        unknown_samples: number of draws of the adapter of an unknown task, from
            :func:`~bora_pyro.predict.unknown_task.prior_of_unknown`.
        draws: K, the number of posterior draws; None: the centre of the guide alone.
        max_tokens: longer texts are cut; default and maximum: the context of the base.
        token_budget: tokens of a forward pass, padding included.
        seed: seed of the draws.

    Raises:
        InputError: if there is no text; a number is out of range; draws are asked of a point estimate; or as for
            :func:`~bora_pyro.predict.infer_task.infer_task`.
    """
    check_single_adapters(fitted.model, "the filter by tokens")
    if not 0 <= unknown < 1:
        raise InputError(f"unknown is {unknown}; give the probability of a task that is none of the fit, from 0 to below 1")
    if unknown and unknown_samples < 1:
        raise InputError(f"unknown_samples is {unknown_samples}; give a whole number from 1 up")
    split = texts if isinstance(texts, TokenSplit) else text_split(fitted, texts, max_tokens)
    if not len(split):
        raise InputError("there is no text; give one or more")
    log_prior = log_prior_of(fitted, prior)
    names, candidate = list(fitted.tasks), torch.arange(len(fitted.tasks))
    budget = {"token_budget": token_budget}
    if draws is None:
        weights = fitted.weights_of()
        parts = []
        for index in torch.arange(len(names)).split(tasks_per_pass(split, token_budget)):
            parts.append(_by_token(fitted.model, split, weights(index)[0], index, **budget))
        found = torch.cat(parts, -1)[:, :, None]
    else:
        of_draws = Posterior(fitted, seed=seed).draws(draws)
        found = torch.stack([_by_token(fitted.model, split, theta, candidate, **budget) for theta in of_draws], 2)
    if unknown:
        model, theta = unknown_draws(fitted, unknown_samples, seed=seed)
        own = _by_token(model, split, theta, torch.arange(unknown_samples), **budget)
        found = torch.cat([found, own[:, :, None].expand(-1, -1, found.shape[2], -1)], -1)
        candidate = torch.cat([candidate, torch.full((unknown_samples,), len(names))])
        share = torch.full((unknown_samples,), math.log(unknown / unknown_samples), dtype=torch.float64)
        log_prior = torch.cat([log_prior + math.log1p(-unknown), share])
        names.append(UNKNOWN if UNKNOWN not in names else NONE_OF_THEM)
    return TokenLikelihoods(names, found, candidate, log_prior, split, unknown > 0)


@torch.inference_mode()
def _by_token(model: BoRA, split: TokenSplit, theta: Weights, tasks: Tensor, *, token_budget: int) -> Tensor:
    """log p(token | the tokens before it, θ) of each predicted token under each adapter: (texts, tokens, adapters) float64.

    The rows of a forward pass are pairs of a text and an adapter.
    """
    adapters, device = len(tasks), model.backbone.device
    result = torch.zeros((len(split), int(split.predicted.max()), adapters), dtype=torch.float64)
    for batch in split.batches(token_budget=max(1, token_budget // adapters)):
        rows = len(batch.index)
        input_ids, labels = (value.repeat_interleave(adapters, 0).to(device) for value in (batch.input_ids, batch.labels))
        adapter = torch.arange(adapters, device=device).repeat(rows)
        change = model.change(theta, adapter, tasks.to(device)[adapter])
        log_prob = NextTokens(model.backbone.lazy_logits(input_ids, change)).token_log_probs(labels)
        log_prob = log_prob.double().cpu().view(rows, adapters, -1)
        for text, of_text, own in zip(batch.index.tolist(), log_prob, batch.labels[:, 1:] != IGNORED, strict=True):
            result[text, : int(own.sum())] = of_text[:, :-1][:, own].mT
    return result
