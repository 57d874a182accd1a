"""Use of a fitted posterior: draws of all tasks' adapters, predictions with uncertainty, and generated text.

>>> import bora_pyro as bp
>>> from bora_pyro.guides import normal_guide
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> few = {"num_tasks": 2, "max_tokens": 32, "max_train_documents": 2, "max_eval_documents": 1}
>>> data = bp.load_tasks("builtin:documentation", backbone.tokenizer, **few)
>>> model = bp.BoRA(backbone, len(data.tasks), adapter=bp.LoRA(rank=2), prior=bp.HierarchicalNormal(tau=1000))
>>> posterior = Posterior(bp.fit(model, data, guide=normal_guide(model), epochs=1))
>>> predictions = posterior.predict(["A graph is a set of nodes."], task=data.tasks[0], draws=3)
>>> bool((predictions.epistemic > -1e-6).all()), predictions.log_likelihood.shape  # (draws, texts)
(True, torch.Size([3, 1]))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from bora_pyro.backbone.texts import token_split
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.guides import EnsembleGuide
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import BoRA, Weights
from bora_pyro.predict.answers import ChoicePredictions, answers
from bora_pyro.predict.linearised import LinearisedBoRA
from bora_pyro.predict.mixture import Draws, TokenPredictions, predictive
from bora_pyro.predict.mixture_text import Generated, generate

#: How a draw predicts: with the network, or with its linear expansion around the centre of the posterior.
PREDICT = ("draws", "linearised")


class Posterior:
    """Numbered draws from a fitted guide. The same number always gives the same draw, so draws need not be stored.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2))
        >>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
        >>> posterior = Posterior(bp.fit(model, data, guide=bp.normal_guide(model), epochs=1))
        >>> first, again, other = (posterior.draw(k)["q_proj.lora_A"] for k in (0, 0, 1))
        >>> bool((first == again).all()), bool((first == other).all())
        (True, False)

    Args:
        fitted: a fitted model whose guide has a spread.
        seed: seed of the draws.

    Raises:
        InputError: if the fit is a point estimate.
    """

    def __init__(self, fitted: Fitted, *, seed: int = 0) -> None:
        if isinstance(fitted.guide, AutoDelta):
            raise InputError(
                "this fit is a point estimate (guide 'map') and has no posterior; fit one around it with "
                "scripts/posterior_fit.py --run RUN, or give fit() another guide"
            )
        self.fitted, self.model, self.tasks, self.seed = fitted, fitted.model, fitted.tasks, seed

    def mean(self) -> Weights:
        """θ of all tasks at the centre of the posterior, (D, layers, *shape) by name of the latent."""
        return self.fitted.weights()[0]

    def numbers(self, draws: int) -> range:
        """The numbers of the first ``draws`` draws; if fewer differ, as of an ensemble of K members, those that differ."""
        guide = self.fitted.guide
        return range(min(draws, guide.members) if isinstance(guide, EnsembleGuide) else draws)

    def sites(self, number: int) -> dict[str, Tensor]:
        """The sample sites of draw ``number``; of an ensemble, those of the member with this number."""
        if isinstance(self.fitted.guide, EnsembleGuide):
            return self.fitted.guide.member(number)
        # the seeds of two posteriors are a million apart, so that they share no draw
        with torch.no_grad(), poutine.seed(rng_seed=(self.seed * 1_000_003 + number) % 2**32):
            return {name: value.detach() for name, value in self.fitted.guide().items()}

    def draw(self, number: int) -> Weights:
        """θ of all tasks in draw ``number``, (D, layers, *shape) by name of the latent."""
        return self.model.weights_given(self.sites(number))[0]

    def draws(self, number: int) -> Iterator[Weights]:
        """The first ``number`` draws, made one at a time. An ensemble of K members has K draws at most.

        Raises:
            InputError: if ``number`` is below 1.
        """
        _check_number(number)
        return (self.draw(k) for k in self.numbers(number))

    def deviation_scales(self, *, draws: int = 16) -> Tensor:
        """Posterior scale of each task's deviation relative to the prior: (D,). It is 1 if the documents have no information.

        This is the root mean square over all entries of the posterior standard deviation of √τ (θ_d − Θ). Latents whose prior
        precision is 0 or infinite are left out.

        Args:
            draws: number of draws for the standard deviations, at least 2.

        Raises:
            InputError: if ``draws`` is below 2, or no latent is left.
        """
        if draws < 2:
            raise InputError(f"draws is {draws}; a standard deviation needs 2 or more")
        sums: dict[str, list[Tensor]] = {}
        numbers = self.numbers(draws)
        draws = len(numbers)
        for number in numbers:
            for name, value in self._white_deviations(self.sites(number)).items():
                total = sums.setdefault(name, [torch.zeros_like(value, dtype=torch.float64) for _ in range(2)])
                total[0] += value
                total[1] += value.double().square()
        if not sums:
            raise InputError(f"under {self.model.prior} deviations have no scale of their own; give a tau above 0 and below inf")
        variances = {name: (square - plain.square() / draws) / (draws - 1) for name, (plain, square) in sums.items()}
        entries = sum(value[0].numel() for value in variances.values())
        return (torch.stack([value.flatten(1).sum(1) for value in variances.values()]).sum(0) / entries).clamp(min=0).sqrt()

    def _white_deviations(self, sites: dict[str, Tensor]) -> dict[str, Tensor]:
        theta, mean = self.model.weights_given(sites)
        tau = {name: self.model.prior.precision(name, start, sites) for name, start in self.model.starts.items()}
        finite = {name: value for name, value in tau.items() if bool(((value > 0) & value.isfinite()).all())}
        return {name: value.sqrt() * (theta[name] - mean[name]) for name, value in finite.items()}

    def predictor(self, linearised: bool = False) -> BoRA:
        """The model that predicts with the draws: the network, or its linear expansion around the centre of the posterior.

        Raises:
            InputError: if the linear expansion of an ensemble is asked for, whose members are far from each other.
        """
        if linearised and isinstance(self.fitted.guide, EnsembleGuide):
            raise InputError("an ensemble has no linear expansion: its members are no neighbours of its centre; use the draws")
        return LinearisedBoRA(self.model, self.mean()) if linearised else self.model

    def score(self, split: TokenSplit, *, draws: int = 8, linearised: bool = False, token_budget: int = 4096) -> TokenPredictions:
        """Predict every token of a split of the fit's data under the mixture of ``draws`` draws; as :meth:`predict`."""
        return predictive(self.predictor(linearised), split, self._draws(draws), token_budget=token_budget)

    def answers(
        self, split: TokenSplit, *, draws: int = 8, linearised: bool = False, token_budget: int = 4096
    ) -> ChoicePredictions:
        """Answer the questions of a split under the mixture of ``draws`` draws, if the fit observes answers among options."""
        return answers(self.predictor(linearised), split, self._draws(draws), token_budget=token_budget)

    def predict(
        self,
        texts: str | Sequence[str],
        task: str,
        *,
        draws: int = 8,
        linearised: bool = False,
        max_tokens: int | None = None,
    ) -> TokenPredictions:
        """Predict every token of some texts with the adapter of a task.

        Args:
            texts: one text or several; each is a document.
            task: name of the task.
            draws: K, the number of draws in the mixture. Memory does not grow with it.
            linearised: the draws predict with :class:`~bora_pyro.predict.linearised.LinearisedBoRA`, the expansion of the
                network around the posterior's centre. This is right for the guides from the curvature, such as ``laplace``.
            max_tokens: longer texts are truncated; default: the context of the base.

        Returns:
            The predictions of the mixture, with ``perplexity()``, the ``total``, ``aleatoric`` and ``epistemic`` uncertainty of
            each token, and the ``log_likelihood`` of each text under each draw.

        Raises:
            InputError: if the task is unknown, there is no text, ``draws`` is below 1, or the base has no tokenizer.
        """
        split = self.split_of(texts, task, max_tokens=max_tokens)
        return predictive(self.predictor(linearised), split, self._draws(draws))

    def generate(
        self,
        prompt: str | Sequence[int] | Tensor,
        task: str,
        *,
        how: Literal["mixture", "mean", "draw"] = "mixture",
        draws: int = 8,
        draw: int = 0,
        linearised: bool = False,
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generated:
        """Continue a text with the adapter of a task; see :func:`~bora_pyro.predict.mixture_text.generate`.

        Args:
            prompt: the beginning of the text, as a string or as token ids.
            task: name of the task.
            how: ``mixture`` averages the probabilities of ``draws`` draws at each token. ``mean`` uses the adapter at the
                posterior's centre. ``draw`` uses the draw with the number ``draw``.
            draws: K, the number of draws in the mixture. Time grows with it, memory does not.
            draw: number of the draw for ``how="draw"``.
            linearised: as for :meth:`predict`.
            max_new_tokens: largest number of new tokens.
            temperature: 0 takes the most probable token. Above 0, tokens are sampled.
            seed: seed of the sampled tokens.

        Raises:
            InputError: if the task or ``how`` is unknown, ``draws`` is below 1, or as for ``generate``.
        """
        if how not in ("mixture", "mean", "draw"):
            raise InputError(f"how is {how!r}; allowed: mixture, mean, draw{nearest(str(how), ('mixture', 'mean', 'draw'))}")
        # the mean or a single draw is made once; the draws of a mixture are made again for every token
        model = self.predictor(linearised and how != "mean")
        single = self.mean() if how == "mean" else self.draw(draw) if how == "draw" else None
        chosen: Draws = self._draws(draws) if single is None else lambda: [single]
        return generate(
            model, prompt, draws=chosen, task_index=self.index(task), max_new_tokens=max_new_tokens,
            temperature=temperature, seed=seed,
        )  # fmt: skip

    def split_of(self, texts: str | Sequence[str], task: str, *, max_tokens: int | None = None) -> TokenSplit:
        """Tokenise texts into a split whose documents all belong to one task."""
        d, texts = self.index(task), [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise InputError("there is no text; give one or more")
        return token_split(self.model.backbone, texts, task=[d] * len(texts), num_tasks=len(self.tasks), max_tokens=max_tokens)

    def index(self, task: str) -> int:
        """d, the index of a task.

        Raises:
            InputError: if the task is unknown.
        """
        if task not in self.tasks:
            raise InputError(f"task {shown(task)} is not in this fit, which has {len(self.tasks)}{nearest(task, self.tasks)}")
        return self.tasks.index(task)

    def _draws(self, number: int) -> Draws:
        _check_number(number)
        return lambda: self.draws(number)

    def __repr__(self) -> str:
        return f"Posterior({type(self.fitted.guide).__name__}, {len(self.tasks)} tasks)"


def _check_number(number: int) -> None:
    if number < 1:
        raise InputError(f"draws is {number}; give a whole number from 1 up")
