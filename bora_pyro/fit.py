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

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyro.infer.autoguide import AutoGuide

from bora_pyro.checkpoint import Checkpoint
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.fit_state import draws_tasks
from bora_pyro.fitted import Fitted
from bora_pyro.guides import map_guide
from bora_pyro.loop import Loop, NonFiniteLossError
from bora_pyro.model import BoRA
from bora_pyro.processes import Processes

__all__ = ["NonFiniteLossError", "fit"]


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
    checkpoint: Path | None = None,
    checkpoint_every: int = 1,
    task_subsampling: bool | None = None,
    task_memory: float = 4.0,
    processes: Processes | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> Fitted:
    """Fit a guide to the model by stochastic variational inference with AdamW.

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
        checkpoint: a file that holds the loop's state; where it exists, the fit goes on from it.
        checkpoint_every: epochs between checkpoints.
        task_subsampling: whether a step moves only Θ and the adapters of the tasks that its documents are of, so that its cost
            does not depend on D; the objective is the same on average. None: with more than 64 tasks, or several processes.
        task_memory: GiB for what belongs to tasks where they are drawn: their adapters, AdamW's moments and the best state.
            Beyond it they lie in memory-mapped files, beside the checkpoint or where temporary files go.
        processes: those that share the work; default: this one alone.
        on_step: called after each step with what there is to report of it.
        on_epoch: called after each epoch, when its validation perplexity is known.

    Returns:
        The guide at the state of lowest validation perplexity (the last where there is no validation document).

    Raises:
        NonFiniteLossError: the loss is not finite; it carries the last good state.
        InputError: there is nothing to train on, or a checkpoint that cannot be read.
    """
    if data.train.num_tokens == 0:
        raise InputError("the training split has no token to predict; give more or longer documents")
    if model.prior.every and data.validation.num_tokens == 0:
        raise InputError(
            f"{model.prior} is learned from validation documents, and there are none; give more documents, or a fixed tau"
        )
    if task_subsampling is None and checkpoint is not None and checkpoint.exists():
        task_subsampling = draws_tasks(Checkpoint(checkpoint))
        if not task_subsampling and processes is not None and processes.size > 1:
            raise InputError(
                f"checkpoint {str(checkpoint)!r} is of one process that moves all tasks in every step; go on with it in one "
                "process, or start afresh with --overwrite true"
            )
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
        folder=None if checkpoint is None else checkpoint.parent,
        processes=processes,
    )
    if checkpoint is not None and checkpoint.exists():
        loop.load(checkpoint)
    fitted = loop.fitted
    start = time.perf_counter() - fitted.seconds
    while loop.epoch < epochs and not (patience and loop.epoch - fitted.best_epoch >= patience):
        report = loop.run_epoch(on_step)
        if (perplexity := loop.keep_best()) is not None:
            report["validation_perplexity"] = perplexity
        fitted.seconds = report["seconds"] = time.perf_counter() - start
        fitted.history.append(report)
        if on_epoch:
            on_epoch(report)
        if checkpoint is not None and (loop.epoch % checkpoint_every == 0 or loop.epoch == epochs):
            loop.save(checkpoint)
    loop.finish()
    return fitted
