"""The SVI loop: AdamW on the ELBO, warm-up and cosine, early stopping on validation perplexity.

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

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.guides import map_guide
from bora_pyro.inference.callbacks import Callback
from bora_pyro.inference.checkpoint import Checkpoints
from bora_pyro.inference.continuation import Continuation, is_over
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.loop import Loop, NonFiniteLossError
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.processes import Processes, is_first
from bora_pyro.inference.steps import StepsOfEpoch
from bora_pyro.model import BoRA
from bora_pyro.options.field import with_changes

__all__ = ["FitStopped", "NonFiniteLossError", "fit"]

_log = logging.getLogger(__name__)
# What a process adds to the sum of requests to have all stop; a checkpoint that is due adds 1.
_STOP = 2.0


class FitStopped(Exception):
    """A fit was asked to stop and has, its state saved; ``fitted`` holds the best state so far."""

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

    The objective is −ELBO in nats a training observation (a token or a document, as the likelihood says), estimated without
    bias from each batch. AdamW's weight decay is 0: it would be a second prior, around 0.

    Args:
        model: the BoRA model.
        data: tokenised tasks; the validation split decides which epoch is kept.
        options: epochs, learning rate, batches, ...; default: ``FitOptions()``.
        guide: default: MAP.
        callbacks: what acts between the steps; default: τ is learned where the prior has something to learn, and whatever the
            adapter, the router and the likelihood bring (:func:`~bora_pyro.inference.loop.usual_callbacks`). An empty list:
            nothing, so that τ stays as it is.
        checkpoints: a folder for the state of the loop. Where it holds checkpoints, the fit goes on from the newest that is
            whole. On one CPU process the result is that of a fit that was never interrupted, bit for bit. A ``Continuation`` is
            such a folder that has been checked already.
        processes: those that share the work; default: this one alone.
        steps: gives the steps of an epoch, for objectives whose batches are no table of documents; default: every training
            document once (:class:`~bora_pyro.inference.steps.EpochSteps`).
        stop: asked after each step whether to stop there; the state is saved first.
        on_step: called after each step with what there is to report of it.
        on_epoch: called after each epoch, when its validation perplexity is known.
        changes: single options, as ``epochs=3``.

    Returns:
        The guide at the state of lowest validation perplexity (the last where there is no validation document).

    Raises:
        NonFiniteLossError: the loss is not finite; it carries the last good state.
        FitStopped: ``stop`` has said so; it carries the best state so far.
        InputError: an option that does not exist or has no such value; there is nothing to train on; there are checkpoints and
            none can be used, or one cannot be written.
    """
    options = with_changes(options or FitOptions(), changes)
    options.validate()
    if data.train.num_tokens == 0:
        raise InputError("the training split has no token to predict; give more or longer documents")
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
    return _run(loop, options, None if checkpoints is None else checkpoints.store, stop, on_step, on_epoch)


def _run(
    loop: Loop,
    options: FitOptions,
    store: Checkpoints | None,
    stop: Callable[[], bool] | None,
    on_step: Callable[[dict[str, Any]], None] | None,
    on_epoch: Callable[[dict[str, Any]], None] | None,
) -> Fitted:
    """Epoch after epoch until the fit is over, with checkpoints where there is a place for them."""
    fitted, saved = loop.fitted, time.monotonic()
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
        if (perplexity := loop.keep_best()) is not None:
            report["validation_perplexity"] = perplexity
        fitted.seconds = report["seconds"] = time.perf_counter() - start
        fitted.history.append(report)
        if on_epoch:
            on_epoch(report)
        if loop.epoch % options.checkpoint_every == 0 or loop.epoch == options.epochs:
            save()
    loop.finish()
    return fitted
