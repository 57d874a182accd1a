"""Distil a mixture of adapters into one adapter a task: fit it to the mixture's next-token distributions.

The student is fitted on the training documents of its task, but not to their next tokens. At each token i of a document of task d
it lowers

    KL(p̄(· | w_{1:i}) ‖ LLM(· | w_{1:i}; θ_d)),  p̄ = (1/K) Σ_k LLM(· | w_{1:i}; θ_d⁽ᵏ⁾)

(Hinton et al., 2015, with temperature 1; of an ensemble, as in Bucila et al., 2006). A token thus teaches a whole distribution.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor

from bora_pyro.adapters import LoRA
from bora_pyro.backbone.head import divergences
from bora_pyro.data.batch import IGNORED, Batch
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.guides import map_guide
from bora_pyro.inference.fit import fit
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.options import FitOptions
from bora_pyro.likelihoods.base import LanguageModel, Likelihood
from bora_pyro.model import BoRA, Weights
from bora_pyro.predict.mixture import Draws
from bora_pyro.priors import Independent


class MixtureTokens(Likelihood):
    """The negative KL divergence from the next-token distributions of a mixture, Σ_d Σ_n Σ_i −KL(p̄ ‖ LLM(θ_d)), as an objective.

    Held-out documents still score a fit by the probability of their own tokens.

    Args:
        teacher: the model of the mixture, on the base of the fit.
        draws: returns θ of all tasks under each member of the mixture, the same ones each time.
        task_weights: as for :class:`~bora_pyro.likelihoods.CausalLM`.
    """

    def __init__(self, teacher: LanguageModel, draws: Draws, *, task_weights: Tensor | None = None) -> None:
        self._teacher, self._draws = teacher, draws
        self.task_weights = self.with_task_weights(task_weights).task_weights

    def __call__(self, model: LanguageModel, weights: dict[str, Tensor] | None, batch: Batch) -> None:
        self.check(batch)
        observed = torch.zeros_like(batch.labels, dtype=torch.bool)
        observed[:, :-1] = batch.labels[:, 1:] != IGNORED
        with torch.no_grad():
            # the mixture has a row for each task of the model, not only for those that a step draws
            every = replace(batch, tasks=None)
            mixture = [self._teacher.lazy_logits(every, draw) for draw in self._draws()]
        found = divergences(model.lazy_logits(batch, weights), mixture, observed).sum(-1)
        pyro.factor("mixture", -batch.scale * (self.task_weight(batch.task) * found).sum())

    def observations(self, documents: float, tokens: float) -> float:
        return tokens

    def __repr__(self) -> str:
        return f"MixtureTokens({self._weights_text().removeprefix(', ')})"


def distil(teacher: BoRA, data: TaskData, draws: Draws, start: Weights, *, alpha: float, **options: Any) -> Fitted:
    """Fit an adapter of each task to the predictions of a mixture on the training documents of the task.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
        >>> models = [bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2), seed=seed) for seed in (0, 1)]
        >>> members = [bp.fit(model, data, epochs=2).weights()[0] for model in models]
        >>> fitted = distil(models[0], data, lambda: members, members[0], alpha=2.0, epochs=3, learning_rate=1e-3)
        >>> divergences = [epoch["loss"] for epoch in fitted.history]  # nats per token
        >>> fitted.model.adapter.rank, divergences[-1] < divergences[0]
        (2, True)

    The adapters of different tasks are independent of each other: what they share, they have from the mixture. The epoch with the
    lowest validation perplexity is kept, and the start counts as epoch 0.

    Args:
        teacher: the model of the mixture. The student has the same base, and the same weights of the tasks.
        data: the documents.
        draws: returns θ of all tasks under each member of the mixture.
        start: LoRA matrices where the students begin, (D, layers, *shape) by name. They set the rank.
        alpha: α of the students; they change a layer by (α/r) B A.
        options: options of the fit (:class:`~bora_pyro.inference.options.FitOptions`).

    Returns:
        The fit, with ``weights()`` of rank r and ``best_epoch`` 0 if no epoch was better than the start.

    Raises:
        InputError: there are no validation documents, or as for ``fit``.
    """
    if not data.validation.num_tokens:
        raise InputError("there is no validation document, and they decide what distilling is worth; give more documents")
    rank = next(value for name, value in start.items() if name.endswith(".lora_A")).shape[-2]
    student = BoRA(
        teacher.backbone,
        teacher.num_tasks,
        adapter=LoRA(rank, alpha=alpha),
        prior=Independent(),
        likelihood=MixtureTokens(teacher, draws, task_weights=teacher.likelihood.task_weights),
    )
    means = {name: value.mean(0) for name, value in start.items()}
    guide = map_guide(student, student.sites_given(start, means))
    return fit(student, data, FitOptions(gradient_norm=False), guide=guide, **options)
