"""Let held-out documents choose what a guide leaves open after its fit, such as the scale of its draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bora_pyro.data.token_split import TokenSplit
from bora_pyro.guides.held_out import Settles
from bora_pyro.inference.fitted import Fitted
from bora_pyro.predict.posterior import Posterior


class HeldOutMixture:
    """The documents of a split under the mixture of a guide's draws (:class:`~bora_pyro.guides.held_out.HeldOut`).

    Args:
        fitted: a fitted model whose guide has a spread.
        split: the documents.
        draws: number of draws of the mixture.
        linearised: how the draws predict, as for `Posterior.predict`.
        seed: seed of the draws.
    """

    def __init__(self, fitted: Fitted, split: TokenSplit, *, draws: int = 8, linearised: bool = False, seed: int = 0) -> None:
        self._posterior, self._split = Posterior(fitted, seed=seed), split
        self._prediction: dict[str, Any] = {"draws": draws, "linearised": linearised}
        self.documents = torch.tensor(split.documents_per_task)
        of_tokens = torch.zeros(split.num_tasks, dtype=torch.int64).index_add(0, split.task, split.predicted)
        self.tokens = of_tokens if split.correct is None else self.documents

    def nll(self) -> Tensor:
        """−log-probability of the documents of each task under the mixture, token by token or answer by answer: (D,) float64."""
        predict = self._posterior.score if self._split.correct is None else self._posterior.answers
        found = predict(self._split, **self._prediction)
        return torch.zeros(len(self.tokens), dtype=torch.float64).index_add(0, found.task, -found.log_prob.double())


def settle(fitted: Fitted, split: TokenSplit, **mixture: Any) -> dict[str, Any]:
    """Let the documents of a split choose what the guide of a fit leaves open. A guide that leaves nothing open stays as it is.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data, model = bp.load_tasks(bp.table(table), backbone.tokenizer), bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=1))
        >>> fitted = bp.fit(model, data, guide=bp.swag_guide(model, scales="0.5,1"), epochs=2)
        >>> bp.settle(fitted, data.validation, draws=2)
        {'scale': ..., 'scales': {'0.5': ..., '1.0': ...}, 'notes': [...]}

    Args:
        fitted: the fit, whose guide is changed.
        split: documents that the fit was not trained on, usually the validation documents.
        mixture: ``draws``, ``linearised`` and ``seed`` of the mixture that predicts them, as for `HeldOutMixture`.

    Returns:
        What was chosen, JSON-able; empty if there was nothing to choose.

    Raises:
        InputError: the guide needs held-out documents, and there are none.
    """
    return fitted.guide.settle(HeldOutMixture(fitted, split, **mixture)) if isinstance(fitted.guide, Settles) else {}
