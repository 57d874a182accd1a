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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyro.infer.autoguide import AutoGuide

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.guides import map_guide
from bora_pyro.inference.checkpoint import Checkpoints
from bora_pyro.inference.continuation import is_over
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.loop import Loop, NonFiniteLossError
from bora_pyro.inference.processes import Processes, is_first
from bora_pyro.inference.state import as_before
from bora_pyro.model import BoRA

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
    *,
    guide: AutoGuide | None = None,
    epochs: int = 6,
    learning_rate: float = 1e-2,
    warmup: float = 0.1,
    token_budget: int = 4096,
    accumulate: int = 1,
    gradient_clip: float = 1.0,
    temperature: float = 1.0,
    patience: int = 3,
    seed: int = 0,
    checkpoints: Path | None = None,
    checkpoint_every: int = 1,
    checkpoint_minutes: float = 10.0,
    keep_checkpoints: int = 2,
    task_subsampling: bool | None = None,
    task_memory: float = 4.0,
    processes: Processes | None = None,
    stop: Callable[[], bool] | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
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
        guide: default: MAP.
        epochs: passes over the training documents; the schedule ends with the last.
        learning_rate: peak of the schedule, for all sites. In the non-centred form deviations are in units of their
            prior's scale, so that one rate suits every τ.
        warmup: fraction of the steps over which the rate rises to its peak; a cosine takes it to 0 afterwards.
        token_budget: tokens of a batch, padding included.
        accumulate: batches whose gradients are averaged for one step.
        gradient_clip: largest norm of the gradient over all parameters (nats a training observation); inf clips nothing.
        temperature: weight of the KL term; 1 is the ELBO, and MAP where the guide is a point.
        patience: stop after that many epochs without a better validation perplexity; 0 never stops early.
        seed: of the order of the documents and of the guide's draws.
        checkpoints: a folder for the state of the loop; where it holds one, the fit goes on from the newest that is whole. On
            one CPU process the result is that of a fit that was never interrupted, bit for bit.
        checkpoint_every: epochs between checkpoints.
        checkpoint_minutes: where an epoch takes longer, also so often within it; inf: never.
        keep_checkpoints: how many of the newest are kept.
        task_subsampling: whether a step moves only Θ and the adapters of the tasks that its documents are of, so that its cost
            does not depend on D; the objective is the same on average. None: with more than 64 tasks, or several processes.
        task_memory: GiB for what belongs to tasks where they are drawn: their adapters, AdamW's moments and the best state.
            Beyond it they lie in memory-mapped files, beside the checkpoints or where temporary files go.
        processes: those that share the work; default: this one alone.
        stop: asked after each step whether to stop there; the state is saved first.
        on_step: called after each step with what there is to report of it.
        on_epoch: called after each epoch, when its validation perplexity is known.

    Returns:
        The guide at the state of lowest validation perplexity (the last where there is no validation document).

    Raises:
        NonFiniteLossError: the loss is not finite; it carries the last good state.
        FitStopped: ``stop`` has said so; it carries the best state so far.
        InputError: there is nothing to train on, or no checkpoint that can be read, or one cannot be written.
    """
    if data.train.num_tokens == 0:
        raise InputError("the training split has no token to predict; give more or longer documents")
    if model.prior.every and data.validation.num_tokens == 0:
        raise InputError(
            f"{model.prior} is learned from validation documents, and there are none; give more documents, or a fixed tau"
        )
    store = None if checkpoints is None else Checkpoints(checkpoints, keep=keep_checkpoints)
    newest = None if store is None else store.newest()
    if store is not None and newest is not None and store.notes and is_first():
        _log.warning("%s; going on from %s", "; ".join(store.notes), newest.path.name)
    if newest is not None:
        task_subsampling = as_before(newest, task_subsampling, processes=1 if processes is None else processes.size)
    loop = Loop(
        model,
        data,
        guide or map_guide(model),
        learning_rate=learning_rate,
        warmup=warmup,
        token_budget=token_budget,
        accumulate=accumulate,
        gradient_clip=gradient_clip,
        temperature=temperature,
        seed=seed,
        epochs=epochs,
        task_subsampling=task_subsampling,
        task_memory=task_memory,
        folder=checkpoints,
        processes=processes,
    )
    if newest is not None:
        loop.load(newest)
    fitted, saved = loop.fitted, time.monotonic()
    start = time.perf_counter() - fitted.seconds

    def request() -> float:
        due = store is not None and not loop.processes.rank and time.monotonic() - saved > 60 * checkpoint_minutes
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
    while not is_over(loop.epoch, fitted.best_epoch, epochs=epochs, patience=patience):
        report = loop.run_epoch(on_step, on_request=act)
        if (perplexity := loop.keep_best()) is not None:
            report["validation_perplexity"] = perplexity
        fitted.seconds = report["seconds"] = time.perf_counter() - start
        fitted.history.append(report)
        if on_epoch:
            on_epoch(report)
        if loop.epoch % checkpoint_every == 0 or loop.epoch == epochs:
            save()
    loop.finish()
    return fitted
