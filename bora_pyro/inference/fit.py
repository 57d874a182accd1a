"""Fitting a guide: AdamW on the ELBO, warm-up and cosine schedule, early stopping on validation perplexity.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
>>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
>>> model = bp.BoRA(backbone, len(data.tasks), prior=bp.HierarchicalNormal(tau=100))
>>> fitted = bp.fit(model, data, epochs=2)
>>> fitted.evaluate(data.test)["test_perplexity"] > 1
True
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyro.infer.autoguide import AutoGuide

from bora_pyro.backbone.texts import check_token_ids
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.guides import map_guide
from bora_pyro.inference.callbacks import Callback
from bora_pyro.inference.checkpoint import Checkpoints
from bora_pyro.inference.continuation import Continuation, is_over
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.loop import Loop, NonFiniteLossError
from bora_pyro.inference.optimum import measure_end, measure_start
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.processes import Processes, is_first
from bora_pyro.inference.steps import StepsOfEpoch
from bora_pyro.model import BoRA
from bora_pyro.options.field import with_changes

__all__ = ["FitStopped", "NonFiniteLossError", "fit"]

_log = logging.getLogger(__name__)
# A process requests a stop with this number, and a checkpoint with 1. The requests of all processes are summed.
_STOP = 2.0


class FitStopped(Exception):
    """A fit stopped on request, and its state is saved; ``fitted`` holds the best state so far."""

    def __init__(self, message: str, fitted: Fitted) -> None:
        super().__init__(message)
        self.fitted = fitted


def fit(
    model: BoRA,
    data: TaskData,
    options: FitOptions | None = None,
    *,
    guide: AutoGuide | None = None,
    callbacks: Sequence[Callback] | None = None,
    checkpoints: Path | Continuation | None = None,
    processes: Processes | None = None,
    steps: StepsOfEpoch | None = None,
    stop: Callable[[], bool] | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    **changes: Any,
) -> Fitted:
    """Fit a guide to the model by stochastic variational inference with AdamW.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
        >>> fitted = fit(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2)), data, epochs=3, learning_rate=0.03)
        >>> perplexities = [epoch["validation_perplexity"] for epoch in fitted.history]
        >>> len(perplexities), perplexities[-1] < perplexities[0]
        (3, True)

    The objective is −ELBO in nats per training observation (a token or a document, depending on the likelihood). Each batch gives
    an unbiased estimate of it. AdamW's weight decay is 0, because it would be a second prior, around 0.

    Args:
        model: the BoRA model.
        data: tokenised tasks; the validation split decides which epoch is kept.
        options: epochs, learning rate, batches, ...; default: ``FitOptions()``.
        guide: the guide; default: MAP.
        callbacks: callbacks that act between the steps. Default: one that learns τ, if the prior learns it, and the callbacks of
            the adapter, the router and the likelihood (:func:`~bora_pyro.inference.loop.usual_callbacks`). With an empty list,
            τ is not learned.
        checkpoints: a folder for checkpoints of the loop. If it has checkpoints, the fit resumes from the newest undamaged one.
            With one CPU process the result equals that of an uninterrupted fit, bit for bit. A ``Continuation`` is a folder that
            has already been checked.
        processes: the processes that share the work; default: this process alone.
        steps: returns the steps of an epoch, for objectives whose batches do not come from a table of documents. Default: every
            training document once (:class:`~bora_pyro.inference.steps.EpochSteps`).
        stop: called after each step. If it returns true, the fit saves its state and stops.
        on_step: called after each step with the report of the epoch so far.
        on_epoch: called after each epoch with its report, including the validation perplexity.
        changes: single options, for example ``epochs=3``.

    Returns:
        The fit at the state of lowest validation perplexity, or at the last state if there are no validation documents.

    Raises:
        NonFiniteLossError: the loss is not finite; the error holds the last good state.
        FitStopped: ``stop`` returned true; the exception holds the best state so far.
        InputError: an option does not exist or has a value that is not allowed; there is nothing to train on; a document has a
            token that the base cannot read; there are checkpoints and none is usable; or a checkpoint cannot be written.
    """
    options = with_changes(options or FitOptions(), changes)
    options.validate()
    if data.train.num_tokens == 0:
        raise InputError("the training split has no token to predict; give more or longer documents")
    check_token_ids(model.backbone, data.train, data.validation, data.test)
    processes = processes or Processes()
    if isinstance(checkpoints, Path):
        checkpoints = Continuation.find(checkpoints, data, model.backbone, options, processes=processes.size)
    newest = None if checkpoints is None else checkpoints.checkpoint
    if checkpoints is not None and newest is not None and checkpoints.store.notes and is_first():
        _log.warning("%s; going on from %s", "; ".join(checkpoints.store.notes), newest.path.name)
    loop = Loop(
        model,
        data,
        guide or map_guide(model),
        options,
        callbacks=callbacks,
        processes=processes,
        folder=None if checkpoints is None else checkpoints.store.folder,
        continues=newest,
        steps=steps,
    )
    measure = options.gradient_norm and steps is None  # steps of another kind need not come from the training documents
    return _run(loop, options, measure, None if checkpoints is None else checkpoints.store, stop, on_step, on_epoch)


def _run(
    loop: Loop,
    options: FitOptions,
    measure: bool,
    store: Checkpoints | None,
    stop: Callable[[], bool] | None,
    on_step: Callable[[dict[str, Any]], None] | None,
    on_epoch: Callable[[dict[str, Any]], None] | None,
) -> Fitted:
    """Run epochs until the fit is over; write checkpoints if there is a store for them."""
    fitted = loop.fitted
    if measure:
        measure_start(loop)
    saved = time.monotonic()
    start = time.perf_counter() - fitted.seconds

    def request() -> float:
        minutes = (time.monotonic() - saved) / 60
        due = store is not None and not loop.processes.rank and minutes > options.checkpoint_minutes
        return _STOP * (stop is not None and stop()) + due

    def save() -> None:
        nonlocal saved
        if store is not None:
            loop.save(store)
        saved = time.monotonic()

    def act(requested: float) -> None:
        fitted.seconds = time.perf_counter() - start
        save()
        if requested >= _STOP:
            done, total = loop.steps_done, loop.total_steps
            loop.finish()
            raise FitStopped(f"stopped after step {done} of {total}, in epoch {loop.epoch + 1}", fitted)

    loop.request = request
    while not is_over(loop.epoch, fitted.best_epoch, epochs=options.epochs, patience=options.patience):
        report = loop.run_epoch(on_step, on_request=act)
        report |= loop.keep_best()
        fitted.seconds = report["seconds"] = time.perf_counter() - start
        fitted.history.append(report)
        if on_epoch:
            on_epoch(report)
        if loop.epoch % options.checkpoint_every == 0 or loop.epoch == options.epochs:
            save()
    if measure:
        measure_end(loop)
    loop.finish()
    return fitted
