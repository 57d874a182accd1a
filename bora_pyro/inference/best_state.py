"""Which state of a fit is kept: after each epoch the validation documents are measured, and the best state so far stays.

The start of a MAP fit counts too, so a fit is never worse than its start. The start of a guide with a spread does not: its scales
are not those of the documents, and its draws would be useless.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from bora_pyro.data.batch import loaded_tasks
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.guides.from_steps import FromSteps
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.options import GLOBAL_MEAN, FitOptions
from bora_pyro.inference.processes import Processes
from bora_pyro.inference.state import FitState
from bora_pyro.inference.validation import draw_is_finite, validation_score
from bora_pyro.model import Weights


class BestState:
    """Measures the current state of a fit and the mean of its steps, and keeps the best one so far.

    Args:
        fitted: gets the kept epoch, whether its state is a mean, and its scores.
        state: the state of the fit.
        data: the documents.
        options: the options of the fit.
        processes: the processes of the fit.
        validation: the validation documents that choose, for each part of the tasks of this process; None: all.
        train: the training documents in the same form. The first one of the first part tests a draw of the guide.
        draws_tasks: whether a step moves only the tasks of its documents.
        made_of_steps: whether the guide is made of the steps. The mean of the steps alone counts then.
        fail: makes the error to raise if a measure or a draw is not finite.
    """

    def __init__(
        self,
        fitted: Fitted,
        state: FitState,
        data: TaskData,
        options: FitOptions,
        *,
        processes: Processes,
        validation: Sequence[Tensor | None],
        train: Sequence[Tensor | None],
        draws_tasks: bool,
        made_of_steps: bool,
        fail: Callable[[str], InputError],
    ) -> None:
        self.fitted, self.state, self.data, self.options, self.processes = fitted, state, data, options, processes
        self.validation, self.train, self.made_of_steps, self.fail = validation, train, made_of_steps, fail
        self.draws_tasks, self.by_global_mean = draws_tasks, options.kept_by == GLOBAL_MEAN
        self.start_counts = isinstance(fitted.guide, AutoDelta)

    def keep(self, epoch: int) -> dict[str, float]:
        """Compute the measure of the validation documents, and keep the state if it is the lowest so far.

        Args:
            epoch: number of epochs that are done; 0: the start.

        Returns:
            For the measure perplexity: ``validation_perplexity``, the lower one of ``validation_perplexity_last``, of the current
            state, and ``validation_perplexity_averaged``, of the mean of the steps; empty if there are no validation documents.
        """
        (last, of_mean), name = self._scores(), f"validation_{self.fitted.model.likelihood.measure.name}"
        if last is not None and math.isnan(last):
            when = f"after epoch {epoch}" if epoch else "before the first step: the base model gives NaN"
            raise self.fail(f"the {name.replace('_', ' ')} is not a number {when}")
        if not self._draw_is_finite():
            raise self.fail(f"a draw of the guide gives NaN or inf logits after epoch {epoch}: its scales diverge")
        # without validation documents, the last epoch is the best
        if not self.made_of_steps and (epoch or self.start_counts):
            self._keep_if_best(epoch, last, of_mean, averaged=False)
        report = {} if last is None else {name: last, f"{name}_last": last}
        report |= {} if of_mean is None else {f"{name}_global_mean": of_mean}
        if epoch and (self.made_of_steps or (self.options.average and last is not None)):
            with self.state.averaged():
                averaged, averaged_of_mean = self._scores()
                if (averaged is None or math.isfinite(averaged)) and self._draw_is_finite():
                    self._keep_if_best(epoch, averaged, averaged_of_mean, averaged=True)
                    if last is not None and averaged is not None:
                        report |= {name: averaged if self.made_of_steps else min(last, averaged), f"{name}_averaged": averaged}
                    if of_mean is not None and averaged_of_mean is not None:
                        better = averaged_of_mean if self.made_of_steps else min(of_mean, averaged_of_mean)
                        report[f"{name}_global_mean"] = better
        return report

    def score(self) -> float | None:
        """The measure of the validation documents under the adapters of their tasks; None if there are none."""
        return self._measure(self.state.adapters())

    def _measure(self, adapters: Weights | Callable[[Tensor], Weights]) -> float | None:
        return validation_score(self.fitted.model, self.data.validation, adapters, self.validation, self.processes)

    def _scores(self) -> tuple[float | None, float | None]:
        """The measure under the tasks' adapters, and under Θ if that counts."""
        return self.score(), self._measure(self.state.global_mean()) if self.by_global_mean else None

    def _keep_if_best(self, epoch: int, score: float | None, of_mean: float | None, *, averaged: bool) -> None:
        fitted = self.fitted
        now, best = (of_mean, fitted.global_mean_score) if self.by_global_mean else (score, fitted.validation_score)
        if now is None or best is None or now < best:
            fitted.best_epoch, fitted.averaged = epoch, averaged
            fitted.validation_score, fitted.global_mean_score = score, of_mean
            if epoch:  # the start is kept as it is
                self.state.keep()

    def _draw_is_finite(self) -> bool:
        guide, device = self.fitted.guide, self.fitted.model.backbone.device
        if isinstance(guide, AutoDelta | FromSteps):
            return True  # the validation uses the guide's centre, which is its only value
        document = self.data.train.batches(token_budget=1, documents=self.train[0])[0]
        if self.draws_tasks:
            (document,) = self.state.begin([replace(document, tasks=loaded_tasks(document.task.unique()))])
        return draw_is_finite(self.fitted.model, guide, document.to(device), self.processes, seed=self.options.seed)
