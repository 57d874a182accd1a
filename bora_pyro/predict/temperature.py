"""Temperature scaling (Guo et al., 2017): one number, found on held-out documents, that makes probabilities softer or sharper.

    p_T(v) ∝ exp(z_v / T),

where z are the logits of the next token, or the scores of the options of a question. It is the plainest calibration of a point
estimate, so posteriors are compared with it. The most probable token or option stays the same.

A mixture of draws can have a temperature too. Its z are the logarithms of the averaged probabilities: the draws are pooled before
they are calibrated, because calibrated members give a pool that is too unsure (Rahaman and Thiery, 2021, arXiv 2007.08792).

>>> import bora_pyro as bp
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
>>> split = bp.data.TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[1, 0], num_tasks=2)
>>> temperature = temperature_of(model, split, None)  # of the base alone
>>> as_it_is, scaled = (predict_scaled(model, split, None, value) for value in (1.0, temperature))
>>> scaled.perplexity() < as_it_is.perplexity(), scaled.correct.equal(as_it_is.correct)
(True, True)
>>> draws = lambda: [None, None]  # a mixture of two equal draws
>>> abs(temperature_of(model, split, draws) / temperature - 1) < 1e-3
True
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bora_pyro.backbone.head import LazyLogits
from bora_pyro.data.batch import IGNORED, Batch
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.model import BoRA, Weights
from bora_pyro.predict.answers import ChoicePredictions, answers
from bora_pyro.predict.mixture import Draws, TokenPredictions, predictive

#: The limits of T, Newton's largest step in log T, and the precision of log T at which it ends.
LEAST, MOST, STEP, PRECISION = 0.01, 100.0, 1.0, 1e-5


class TemperatureScaled(BoRA):
    """A model with given weights, or a mixture of draws, whose logits are divided by T, for predictions of tokens.

    The logits of a mixture are the logarithms of its probabilities.

    Args:
        model: the model.
        draws: the weights of each draw; one draw is no mixture.
        temperature: T.

    Raises:
        InputError: T is not a finite number above 0.
    """

    def __init__(self, model: BoRA, draws: Draws, temperature: float) -> None:
        _check(temperature)
        vars(self).update(vars(model))
        self.scaled, self.draws, self.temperature = model, draws, temperature

    def logits(self, batch: Batch, weights: Weights | None) -> Tensor:
        """Logits of a batch over T, (rows, tokens, vocabulary); ``weights`` are those of the draws."""
        # in float32: a base in bfloat16 has logits that a factor near 1 would be rounded away from
        return _mixture_logits(self.scaled, batch, self.draws).float() / self.temperature

    def lazy_logits(self, batch: Batch, weights: Weights | None) -> Tensor | LazyLogits:
        """As ``logits``: a head with a bias gives no other way."""
        return self.logits(batch, weights)


def predict_scaled(
    model: BoRA, split: TokenSplit, weights: Weights | Draws | None, temperature: float, *, token_budget: int = 4096
) -> TokenPredictions | ChoicePredictions:
    """Predict what the model's likelihood observes of a split, every answer or every token, at the temperature T.

    Args:
        model: the BoRA model.
        split: the documents or questions.
        weights: θ of all tasks, (D, layers, *shape) by name; None: the base alone; or a function that returns the draws of a
            mixture. The predictions of tokens are then those of one scaled mixture, without an epistemic part.
        temperature: T.
        token_budget: tokens of a batch, padding included.

    Raises:
        InputError: T is not a finite number above 0; or as for `predictive` and `answers`.
    """
    _check(temperature)
    draws = _draws(weights)
    if not model.likelihood.reads_options:
        return predictive(TemperatureScaled(model, draws, temperature), split, lambda: [None], token_budget=token_budget)
    found = answers(model, split, draws, token_budget=token_budget)
    log_p = (found.probabilities.log() / temperature).log_softmax(-1)
    return ChoicePredictions.mixture(log_p[None], found.log_likelihood, found.task, found.label)


@torch.inference_mode()
def temperature_of(model: BoRA, split: TokenSplit, weights: Weights | Draws | None, *, token_budget: int = 4096) -> float:
    """The temperature with the lowest negative log-likelihood of a split, from 0.01 to 100.

    The negative log-likelihood is convex in β = 1/T. Its derivatives are Σ (E z − z_observed) and Σ Var z, where the moments are
    those of p_T. Newton's method finds β in some passes over the split.

    Args:
        model: the BoRA model.
        split: the held-out documents or questions.
        weights: θ of all tasks; None: the base alone; or a function that returns the draws of a mixture.
        token_budget: tokens of a batch, padding included.

    Raises:
        InputError: nothing is predicted in the split.
    """
    if not split.num_tokens:
        raise InputError("there are no held-out documents to find a temperature on; give a split that has some")
    of_answers: list[tuple[Tensor, Tensor]] = []  # one pass is enough for them
    draws = _draws(weights)
    if model.likelihood.reads_options:
        found = answers(model, split, draws, token_budget=token_budget)
        of_answers = [(found.probabilities.log(), found.label)]
    log_t = 0.0
    for _ in range(50):
        logits = of_answers or _tokens(model, split, draws, token_budget)
        slope, curvature = (sum(parts) for parts in zip(*(_derivatives(*each, log_t) for each in logits), strict=True))
        # d/d log T = −β d/dβ, and Newton's step of β is taken in log T, where it cannot leave the positive numbers
        move = max(-STEP, min(STEP, slope / (curvature * math.exp(-log_t)) if curvature else math.copysign(STEP, slope)))
        log_t, before = min(max(log_t + move, math.log(LEAST)), math.log(MOST)), log_t
        if abs(log_t - before) < PRECISION:
            break
    return math.exp(log_t)


def _derivatives(logits: Tensor, label: Tensor, log_t: float) -> tuple[float, float]:
    """The first two derivatives of the negative log-likelihood in β, for logits (predictions, outcomes) and labels."""
    beta, finite = math.exp(-log_t), logits.isfinite()
    z = torch.where(finite, logits, 0.0).double()
    p = (beta * logits).double().softmax(-1)
    mean = (p * z).sum(-1)
    variance = (p * (z - mean[:, None]).square()).sum(-1)
    return float((mean - z.gather(1, label[:, None])[:, 0]).sum()), float(variance.sum())


def _draws(weights: Weights | Draws | None) -> Draws:
    if weights is not None and not isinstance(weights, dict):
        return weights
    point: list[Weights | None] = [weights]
    return lambda: point


def _mixture_logits(model: BoRA, batch: Batch, draws: Draws) -> Tensor:
    """The logits of one draw, or the logarithms of the averaged probabilities of several: (rows, tokens, vocabulary)."""
    first: Tensor | None = None
    mean, number = torch.zeros(()), 0
    for weights in draws():
        logits = model.logits(batch, weights)
        number += 1
        if first is None:
            first = logits
            continue
        if number == 2:
            mean = first.float().softmax(-1)
        mean = mean.add_(logits.float().softmax(-1))
    if first is None:
        raise InputError("0 draws given; a prediction needs 1 or more")
    return first if number == 1 else (mean / number).log()


def _tokens(model: BoRA, split: TokenSplit, draws: Draws, token_budget: int) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in split.batches(token_budget=token_budget):
        own = batch.to(model.backbone.device)
        predicted = own.labels[:, 1:] != IGNORED
        yield _mixture_logits(model, own, draws)[:, :-1][predicted].float(), own.labels[:, 1:][predicted]


def _check(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature is {temperature}; give a finite number above 0")
