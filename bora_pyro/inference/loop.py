"""The training loop of a fit: its progress, and the code that runs one more epoch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from bora_pyro.data.batch import Batch
from bora_pyro.data.tasks import TaskData
from bora_pyro.data.token_split import Batches, TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.guides.from_steps import FromSteps
from bora_pyro.guides.ivon import IvonGuide
from bora_pyro.inference.best_state import BestState
from bora_pyro.inference.callbacks import Callback, checked_callbacks, load_states, states_of
from bora_pyro.inference.checkpoint import Checkpoint, Checkpoints
from bora_pyro.inference.continuation import RECORD, check_packing, check_record, digests
from bora_pyro.inference.elbo import TemperedELBO
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.folds import Folds
from bora_pyro.inference.learn_tau import LearnTau
from bora_pyro.inference.optimizer import largest_rates
from bora_pyro.inference.options import GLOBAL_MEAN, FitOptions
from bora_pyro.inference.processes import Processes, all_reduce_gradient
from bora_pyro.inference.schedule import CONSTANT, COSINE, epoch_seed, schedule, step_seed
from bora_pyro.inference.spread import collection_of
from bora_pyro.inference.start import first_state, partition_of
from bora_pyro.inference.state import draws_tasks
from bora_pyro.inference.steps import EpochSteps, StepsOfEpoch
from bora_pyro.inference.task_dropout import TaskDropout, check_shares
from bora_pyro.model import BoRA
from bora_pyro.options.field import with_changes


class NonFiniteLossError(InputError):
    """The loss became infinite or NaN; ``fitted`` holds the last good state."""

    def __init__(self, message: str, fitted: Fitted) -> None:
        super().__init__(message)
        self.fitted = fitted


class Loop:
    """The progress of a fit, and the method that runs one more epoch.

    Args:
        model, data, guide, options: as for `fit`.
        callbacks: callbacks that act between the steps; None: :func:`usual_callbacks`.
        processes: the processes that share the work; default: this process alone.
        folder: folder for task rows that do not fit into memory; default: the folder of temporary files.
        partition: the tasks of each process; default: balanced by their tokens.
        continues: the checkpoint to resume from, already checked by `continuation`.
        steps: as for `fit`.
        changes: single options.
    """

    def __init__(
        self,
        model: BoRA,
        data: TaskData,
        guide: AutoGuide,
        options: FitOptions | None = None,
        *,
        callbacks: Sequence[Callback] | None = None,
        processes: Processes | None = None,
        folder: Path | None = None,
        partition: Sequence[Tensor] | None = None,
        continues: Checkpoint | None = None,
        steps: StepsOfEpoch | None = None,
        **changes: Any,
    ) -> None:
        self.options = options = _with_schedule(guide, with_changes(options or FitOptions(), changes))
        self.model, self.data, self.guide = model, data, guide
        self.device, self.elbo = model.backbone.device, TemperedELBO(options.temperature)
        self.observations = model.likelihood.observations_of(data.train)
        self._dropout = TaskDropout(model, options.task_dropout)
        if options.kept_by == GLOBAL_MEAN:
            check_shares("kept_by", GLOBAL_MEAN, model)
        self.callbacks = checked_callbacks(usual_callbacks(model) if callbacks is None else callbacks, model, data)
        self.processes = processes or Processes()
        subsampling = options.task_subsampling if continues is None else draws_tasks(continues)
        self.partition = partition or partition_of(model, data, self.processes, task_subsampling=subsampling)
        self.mine = [self.processes.rank] if self.processes.size > 1 else None
        own = None if self.partition is None else [self.partition[n] for n in self.mine or range(len(self.partition))]
        # one short document: the guide keeps the values of its first run, including the logits
        document = data.train.batches(token_budget=1)[0].to(self.device)
        sums = any(callback.needs_sums for callback in self.callbacks)
        self._steps_of_epoch = steps or self._documents_once
        self.steps_per_epoch = len(self._steps_of_epoch(0))
        #: The steps that the guide is made of; None if it is not made of them.
        self.collection = collection = collection_of(guide, options, self.steps_per_epoch)
        of_state: dict[str, Any] = {"own": own, "folder": folder, "keep_sums": sums, "collection": collection}
        self.state = first_state(model, guide, document, options, **of_state)
        #: Settings that fix the steps of an epoch. A checkpoint within an epoch is only valid for the same settings.
        self.packing = {name: getattr(options, name) for name in ("token_budget", "accumulate", "seed")}
        self.packing |= {"processes": self.processes.size, "steps_per_epoch": self.steps_per_epoch}
        self.total_steps = self.steps_per_epoch * options.epochs
        factors = [callback.gradient_factor for callback in self.callbacks]
        self._rates = largest_rates(options, self.observations, self.steps_per_epoch, factors)
        self.fitted = Fitted(model, guide, data.tasks, chat_template=data.chat_template)
        self.fitted.documents = data.train.documents_per_task
        #: numbers of completed steps and epochs, and the number of the last step
        self.steps_done = self.epoch = self.step_number = 0
        #: The progress within an unfinished epoch, JSON-able; empty between epochs.
        self.within: dict[str, Any] = {}
        #: The report of the epoch so far.
        self.report: dict[str, Any] = {}
        #: Returns what this process requests after a step, as a number. The numbers of all processes are summed.
        self.request: Callable[[], float] = lambda: 0.0
        folds = Folds.of(data.validation, options.tau_documents, learns_tau=bool(model.prior.every))
        self._tau_documents = self._documents_by_part(data.validation, folds.teaching)
        self._best = BestState(
            self.fitted,
            self.state,
            data,
            options,
            processes=self.processes,
            validation=self._documents_by_part(data.validation, folds.choosing),
            train=self._documents_by_part(data.train),
            draws_tasks=self.draws_tasks,
            made_of_steps=collection is not None,
            fail=self._non_finite,
        )
        self.state.keep()
        self.keep_best()
        if continues is not None:
            self.load(continues)

    @property
    def draws_tasks(self) -> bool:
        """Whether a step moves only the tasks of its documents."""
        return self.partition is not None

    def _documents_once(self, epoch: int) -> EpochSteps:
        # the order depends only on the seed and the epoch, so a resumed fit gets the same batches
        return EpochSteps(
            self.data.train,
            token_budget=self.options.token_budget,
            accumulate=self.options.accumulate,
            seed=epoch_seed(self.options.seed, epoch),
            partition=self.partition,
            mine=self.mine,
        )

    def validation_batches(self) -> list[Batches]:
        """Batches of the documents that teach τ with half the token budget, for each part of the tasks of this process."""
        budget, seed = -(-self.options.token_budget // 2), self.options.seed
        return [self.data.validation.batches(token_budget=budget, seed=seed, documents=rows) for rows in self._tau_documents]

    def _documents_by_part(self, split: TokenSplit, among: Tensor | None = None) -> list[Tensor | None]:
        """The documents, all or some, of each part of the tasks that this process has; None: all documents."""
        if self.partition is None:
            return [among]
        parts = [self.partition[number] for number in self.mine or range(len(self.partition))]
        rows = torch.arange(len(split)) if among is None else among
        return [rows[torch.isin(split.task[rows], part)] for part in parts]

    def run_epoch(
        self,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        *,
        on_request: Callable[[float], None] | None = None,
    ) -> dict[str, Any]:
        """Run one pass over the training documents, or the rest of it after a checkpoint, and return the epoch's report.

        Args:
            on_step: called after each step with the report so far.
            on_request: called after a step if a process has a request, with the sum of the numbers that ``request`` returned.
        """
        if not self.within:
            self.state.begin_epoch()
            self.within = {**self.packing, "steps": 0, "totals": [0.0] * 4, "seconds": 0.0, "report": {}}
        within, steps = self.within, self._steps_of_epoch(self.epoch)
        self.report = report = within["report"] | {"epoch": self.epoch + 1, "total": self.total_steps}
        totals, start = torch.tensor(within["totals"], dtype=torch.float64), time.perf_counter() - within["seconds"]
        for number in range(within["steps"], len(steps)):
            self.step_number = step = min(self.epoch * self.steps_per_epoch + number, self.total_steps - 1)
            rate = self.options.learning_rate * schedule(
                step, self.total_steps, self.options.warmup, self.options.schedule or COSINE
            )
            reduced = self.processes.reduced_bytes
            # the seed depends only on the step, so a resumed fit draws the same numbers
            with poutine.seed(rng_seed=step_seed(self.options.seed, self.epoch, number)):
                # Pyro checks shapes and supports in the first step only
                sums = self.step(steps[number], rate, step, validate=step == 0)
                for callback in self.callbacks:
                    callback.after_step(self)
            totals = totals + sums[:4]
            loss, log_likelihood, observations, tokens = totals.tolist()
            report |= {
                "step": step + 1,
                "loss": -log_likelihood / observations,
                "objective": loss / (number + 1),
            }
            report |= {"learning_rate": rate, "training_tokens_per_second": tokens / (time.perf_counter() - start)}
            if self.processes.size > 1:
                report["reduced_bytes"] = self.processes.reduced_bytes - reduced
            if on_step:
                on_step(dict(report))
            self.steps_done += 1
            within |= {"steps": number + 1, "totals": totals.tolist(), "seconds": time.perf_counter() - start, "report": report}
            if on_request and sums[4]:
                on_request(float(sums[4]))
        for callback in self.callbacks:
            callback.after_epoch(self)
        self.epoch, self.within = self.epoch + 1, {}
        return report

    def step(self, batches: Sequence[Batch], rate: float, step: int, *, validate: bool = False) -> Tensor:
        """Take one step on the given batches. The rate of whitened deviations rises and falls with ``rate``.

        Returns:
            (5,) float64, sums over all processes: loss, log-likelihood, observations, predicted tokens, and requests.

        Raises:
            NonFiniteLossError: the loss is not finite; the error holds the best state so far.
        """
        # keep the sums on the device: reading them here would synchronise
        sums = torch.zeros(5, dtype=torch.float32 if self.device.type == "mps" else torch.float64, device=self.device)
        most = self.model.backbone.pass_tokens
        self._dropout.draw()
        for callback in self.callbacks:
            callback.before_passes(self)
        for batch in self.processes.lockstep(part for whole in self.state.begin(batches) for part in whole.parts(most)):
            if batch is None:
                self.model.backbone.dummy_pass(backward=True)
                continue
            counts = [self.model.likelihood.observations_of(batch), int(batch.predicted.sum())]
            loss = self.backward(batch.to(self.device), self._dropout, validate=validate)
            # divide by batch.scale: the log-likelihood of the batch alone, not its estimate for all documents
            sums[:2] += torch.stack([loss, self.elbo.log_likelihood / batch.scale]).to(sums.dtype)
            sums[2:4] += torch.tensor(counts, dtype=sums.dtype).to(self.device, non_blocking=True)
        sums[4] = self.request()
        norm = all_reduce_gradient(self.processes, self.state.shared, self.state.own, sums)
        if not torch.stack([*sums, norm.to(sums)]).isfinite().all():
            raise self._non_finite(f"the loss is not finite at step {step + 1} (epoch {self.epoch + 1})")
        if not isinstance(self.guide, IvonGuide):
            torch.nn.utils.clip_grads_with_norm_([*self.state.shared, *self.state.own], self.options.gradient_clip, norm)
        for callback in self.callbacks:
            callback.before_step(self)
        self.state.step(replace(self._rates, part=rate / self._rates.shared))
        return sums.cpu()

    def backward(self, batch: Batch, model: Callable[[Batch], None] | None = None, *, validate: bool) -> Tensor:
        """Add the batch's part of the gradient of −ELBO per training observation, and return its part of the loss.

        Args:
            batch: the documents.
            model: the Pyro model of them; default: the model of the fit.
            validate: whether Pyro checks shapes and supports.
        """
        with pyro.validation_enabled(validate), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Encountered NaN", category=UserWarning)  # `step` raises an error
            loss = self.elbo.differentiable_loss(model or self.model, self.guide, batch) * batch.share / self.observations
        loss.backward()
        return loss.detach()

    def _non_finite(self, what: str) -> NonFiniteLossError:
        for parameter in (*self.state.shared, *self.state.own):
            parameter.grad = None
        self.finish()
        rate = self.options.learning_rate
        return NonFiniteLossError(
            f"{what}; the state of epoch {self.fitted.best_epoch} is kept. Use a smaller --learning_rate "
            f"(now {rate:g}; try {rate / 3:.1g}), or --precision float32",
            self.fitted,
        )

    def keep_best(self) -> dict[str, float]:
        """Measure the current state, and keep it if it is the best so far (:meth:`BestState.keep`)."""
        return self._best.keep(self.epoch)

    def finish(self) -> None:
        """Restore the guide's best state, with the rows of all tasks in the process of rank 0."""
        self.state.restore()
        self.state.complete(self.processes)

    def save(self, store: Checkpoints) -> None:
        """Write a checkpoint."""
        groups = dict(self.state.save(self.processes))
        if not self.processes.rank:
            groups["callbacks"] = states_of(self.callbacks)
            progress = {"steps": self.steps_done, "epoch": self.epoch, "within": self.within}
            progress |= digests(self.data, self.model.backbone) | {"documents": self.data.train.num_documents}
            progress |= {name: getattr(self.fitted, name) for name in RECORD}
            store.save(self.steps_done, groups, progress)

    def load(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint that `continuation` has checked.

        Raises:
            InputError: the checkpoint cannot be read, or it belongs to another model.
        """
        check_record(checkpoint)
        check_packing(checkpoint, {"steps_per_epoch": self.steps_per_epoch})
        with checkpoint.errors():
            self.state.load(checkpoint, self.processes)
        load_states(self.callbacks, checkpoint.group("callbacks"))
        self.steps_done, self.epoch, self.within = (checkpoint.progress[name] for name in ("steps", "epoch", "within"))
        for name in RECORD:
            setattr(self.fitted, name, checkpoint.progress[name])
        if (
            self.options.kept_by == GLOBAL_MEAN
            and self.fitted.validation_score is not None
            and self.fitted.global_mean_score is None
        ):
            raise InputError(
                f"kept_by is {GLOBAL_MEAN}, but the epochs of checkpoint {str(checkpoint.path)!r} were chosen by the tasks; give "
                "kept_by tasks, or start afresh with --overwrite true"
            )


def _with_schedule(guide: AutoGuide, options: FitOptions) -> FitOptions:
    usual = CONSTANT if isinstance(guide, FromSteps) else COSINE
    return replace(options, schedule=options.schedule or usual)


def usual_callbacks(model: BoRA) -> list[Callback]:
    """The default callbacks: one that learns τ, if the prior learns it, and those of the adapter, router and likelihood."""
    own = (*model.adapter.callbacks(), *model.router.callbacks(), *model.likelihood.callbacks())
    return [*([LearnTau()] if model.prior.every else []), *own]
