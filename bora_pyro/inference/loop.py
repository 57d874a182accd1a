"""The loop of a fit: where it stands, and how it goes one epoch further."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuide
from torch import Tensor

from bora_pyro.data.batch import Batch, loaded_tasks
from bora_pyro.data.tasks import TaskData
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.guides.base import begins_at_sites
from bora_pyro.guides.curvature import document_gradients
from bora_pyro.inference.checkpoint import Checkpoint, Checkpoints
from bora_pyro.inference.continuation import check_packing, check_same, digests
from bora_pyro.inference.elbo import TemperedELBO
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.processes import Processes, all_reduce_gradient, partition_tasks
from bora_pyro.inference.state import AllTasks, DrawnTasks, FitState
from bora_pyro.inference.steps import EpochSteps
from bora_pyro.inference.task_rows import MANY_TASKS, set_up
from bora_pyro.likelihoods.next_tokens import task_weight
from bora_pyro.model import BoRA, Weights


class NonFiniteLossError(InputError):
    """The loss became infinite or NaN; ``fitted`` holds the last good state."""

    def __init__(self, message: str, fitted: Fitted) -> None:
        super().__init__(message)
        self.fitted = fitted


# What a checkpoint keeps of a `Fitted`, beside the guide's state, and of what types it is.
_RECORD = {
    "history": (list,),
    "best_epoch": (int,),
    "validation_perplexity": (float, int, type(None)),
    "seconds": (float, int),
}


class Loop:
    """Where a fit stands, and how it goes one epoch further; the arguments are those of `fit`."""

    def __init__(
        self,
        model: BoRA,
        data: TaskData,
        guide: AutoGuide,
        *,
        learning_rate: float,
        warmup: float,
        token_budget: int,
        accumulate: int,
        gradient_clip: float,
        seed: int,
        epochs: int,
        temperature: float = 1.0,
        task_subsampling: bool | None = False,
        task_memory: float = 4.0,
        folder: Path | None = None,
        processes: Processes | None = None,
        partition: Sequence[Tensor] | None = None,
    ) -> None:
        self.model, self.data, self.guide, self.seed = model, data, guide, seed
        self.learning_rate, self.warmup, self.gradient_clip = learning_rate, warmup, gradient_clip
        self.token_budget, self.accumulate = token_budget, accumulate
        self.device = model.backbone.device
        self.elbo = TemperedELBO(temperature)
        self.observations = self._observations(data.train.task, data.train.predicted)
        self.processes = processes or Processes()
        if task_subsampling is None:
            task_subsampling = self.processes.size > 1 or model.num_tasks > MANY_TASKS
        if not task_subsampling and self.processes.size > 1:
            raise InputError(
                "task_subsampling is false, but several processes share the tasks; leave it out, or start one process"
            )
        if partition is None and self.processes.size > 1:
            partition = partition_tasks(data.train.tokens_per_task, self.processes.size)
        self.partition = partition or ([torch.arange(model.num_tasks)] if task_subsampling else None)
        self.mine = [self.processes.rank] if self.processes.size > 1 else None
        own = None
        if self.partition is not None:
            own = torch.cat([self.partition[n] for n in self.mine or range(len(self.partition))]).unique()
        # the guide keeps what the model made of the batch that it first sees, the logits included: one document
        document = data.train.batches(token_budget=1)[0].to(self.device)
        self.state: FitState
        with torch.no_grad(), poutine.seed(rng_seed=seed):
            if own is None:
                guide(document)
                self.state = AllTasks(model, guide)
            else:
                budget = task_memory * 2**30
                numbers = sum(start.numel() for start in model.starts.values())
                all_rows = 16 * numbers * model.num_tasks <= budget or begins_at_sites(guide)
                set_up(model, guide, document, all_rows=all_rows)
                place = Path(tempfile.gettempdir()) if folder is None else folder
                self.state = DrawnTasks(model, guide, own=own, budget=budget, folder=place)
        self.steps_per_epoch = len(self._steps(0))
        #: What the steps of an epoch depend on, and how many they are.
        self.packing = {"token_budget": token_budget, "accumulate": accumulate, "seed": seed, "processes": self.processes.size}
        self.packing["steps_per_epoch"] = self.steps_per_epoch
        self.total_steps = self.steps_per_epoch * epochs
        self.fitted = Fitted(model, guide, data.tasks, chat_template=data.chat_template)
        self.fitted.documents = data.train.documents_per_task
        #: The steps that are done, and the epochs.
        self.steps_done = self.epoch = 0
        #: Where the epoch stands that has begun and not ended, JSON-able; empty between epochs.
        self.within: dict[str, Any] = {}
        #: What this process would have happen after a step, as a number that is added up over all.
        self.request: Callable[[], float] = lambda: 0.0
        self._held_out = self._documents_of_mine(data.validation)
        # half a batch, twice as often: the same cost, and a slope that is never far from the present state
        self._looks = [
            data.validation.batches(token_budget=-(-token_budget // 2), seed=seed, documents=documents)
            for documents in self._held_out
        ]
        self.state.keep()
        self.keep_best()

    def _steps(self, epoch: int) -> EpochSteps:
        # the order of an epoch depends on the seed and the epoch alone: a resumed fit sees the same batches
        return EpochSteps(
            self.data.train,
            token_budget=self.token_budget,
            accumulate=self.accumulate,
            seed=_epoch_seed(self.seed, epoch),
            partition=self.partition,
            mine=self.mine,
        )

    def _documents_of_mine(self, split: TokenSplit) -> list[Tensor | None]:
        """The documents of each share that this process works at; None: all."""
        if self.partition is None:
            return [None]
        chosen = self.mine or range(len(self.partition))
        return [torch.isin(split.task, self.partition[number]).nonzero()[:, 0] for number in chosen]

    def run_epoch(
        self,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        *,
        on_request: Callable[[float], None] | None = None,
    ) -> dict[str, Any]:
        """One pass over the training documents, or what a checkpoint has left of it; returns what there is to report of it.

        Args:
            on_step: called after each step with the report so far.
            on_request: called after a step of which some process has requested something, with the sum of what ``request`` gave.
        """
        if not self.within:
            self.state.begin_epoch()
            self.within = {**self.packing, "steps": 0, "totals": [0.0] * 4, "seconds": 0.0, "report": {}}
        within, steps = self.within, self._steps(self.epoch)
        report: dict[str, Any] = within["report"] | {"epoch": self.epoch + 1, "total": self.total_steps}
        totals, start = torch.tensor(within["totals"], dtype=torch.float64), time.perf_counter() - within["seconds"]
        for number in range(within["steps"], len(steps)):
            step = min(self.epoch * self.steps_per_epoch + number, self.total_steps - 1)
            rate = self.learning_rate * _schedule(step, self.total_steps, self.warmup)
            reduced = self.processes.reduced_bytes
            # of the step alone, so that one from a checkpoint draws what it would have drawn
            with poutine.seed(rng_seed=_step_seed(self.seed, self.epoch, number)):
                # Pyro checks shapes and supports in the first step; the others need it not
                sums = self.step(steps[number], rate, step, validate=step == 0)
                if self.model.prior.every and (step + 1) % self.model.prior.every == 0:
                    self.learn_prior((step + 1) // self.model.prior.every - 1)
                    report.setdefault("tau_path", []).append({"step": step + 1, "tau": self._tau()})
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
        self.epoch, self.within = self.epoch + 1, {}
        return report

    def step(self, batches: Sequence[Batch], rate: float, step: int, *, validate: bool = False) -> Tensor:
        """Take one step on some batches.

        A loss that is not finite ends the fit at the best state so far.

        Returns:
            (5,) float64: loss, log-likelihood, observations and predicted tokens of the step, and what was requested, in all
            processes.
        """
        # on the device until the end: what is asked of it earlier would have to wait for it
        sums = torch.zeros(5, dtype=torch.float32 if self.device.type == "mps" else torch.float64, device=self.device)
        most = self.model.backbone.pass_tokens
        for batch in self.processes.lockstep(part for whole in self.state.begin(batches) for part in whole.parts(most)):
            if batch is None:
                self.model.backbone.dummy_pass(backward=True)
                continue
            counts = [self._observations(batch.task, batch.predicted), int(batch.predicted.sum())]
            loss = self.backward(batch.to(self.device), validate=validate)
            # of the log-likelihood what the batch itself has: the scale to all documents taken off again
            sums[:2] += torch.stack([loss, self.elbo.log_likelihood / batch.scale]).to(sums.dtype)
            sums[2:4] += torch.tensor(counts, dtype=sums.dtype).to(self.device, non_blocking=True)
        sums[4] = self.request()
        norm = all_reduce_gradient(self.processes, self.state.shared, self.state.own, sums)
        if not torch.stack([*sums, norm.to(sums)]).isfinite().all():
            raise self._non_finite(f"the loss is not finite at step {step + 1} (epoch {self.epoch + 1})")
        parameters = [value for value in (*self.state.shared, *self.state.own) if value.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parameters, self.gradient_clip, norm)
        self.state.step(rate)
        return sums.cpu()

    def _observations(self, task: Tensor, predicted: Tensor) -> float:
        """How many observations some documents are, of these tasks, with so many predicted tokens each; as their tasks weigh."""
        weight = task_weight(self.model.likelihood, task).double()
        return self.model.likelihood.observations(weight.sum().item(), (weight * predicted).sum().item())

    def backward(self, batch: Batch, *, validate: bool) -> Tensor:
        """Add a batch's gradient of −ELBO a training observation; returns its part of the loss."""
        with pyro.validation_enabled(validate), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Encountered NaN", category=UserWarning)  # an error, in `step`
            loss = self.elbo.differentiable_loss(self.model, self.guide, batch) * batch.share / self.observations
        loss.backward()
        return loss.detach()

    def learn_prior(self, update: int) -> None:
        """Show the prior the validation documents whose turn it is."""
        # nothing at first, for a process without validation documents takes part too
        nothing = {name: start.new_zeros((0, *start.shape)) for name, start in self.model.starts.items()}
        deviations, gradients, tasks = [nothing], [nothing], [torch.zeros(0, dtype=torch.int64, device=self.device)]
        totals = self.state.totals(self.processes)
        for batch in self.processes.lockstep(look[update % len(look)] for look in self._looks if len(look)):
            if batch is None:
                self.model.backbone.dummy_pass(backward=True)
                continue
            if self.partition is not None:
                batch = replace(batch, tasks=loaded_tasks(batch.task.unique()))
            batch, theta, average = self.state.view(batch, totals)
            batch = batch.to(self.device)
            gradients.append(document_gradients(self.model, theta, batch))
            deviations.append({name: (value - average[name]).index_select(0, batch.row) for name, value in theta.items()})
            tasks.append(batch.task)
        self.model.prior.learn(_joined(deviations), _joined(gradients), torch.cat(tasks), all_reduce=self.processes.all_reduce)

    def _tau(self) -> dict[str, Any]:
        """τ by latent as a path of it is kept: where more than a few tasks have one each, the geometric mean.

        What all tasks share has an infinite τ, and no path.
        """
        tau = self.fitted.tau_by_group(self.state.sites())
        tau = {name: value for name, value in tau.items() if value != math.inf}
        many = {name: value for name, value in tau.items() if isinstance(value, list) and len(value) > MANY_TASKS}
        return tau | {name: math.exp(sum(map(math.log, value)) / len(value)) for name, value in many.items()}

    def _non_finite(self, what: str) -> NonFiniteLossError:
        for parameter in (*self.state.shared, *self.state.own):
            parameter.grad = None
        self.finish()
        return NonFiniteLossError(
            f"{what}; the state of epoch {self.fitted.best_epoch} is kept. Use a smaller --learning_rate "
            f"(now {self.learning_rate:g}; try {self.learning_rate / 3:.1g}), or --precision float32",
            self.fitted,
        )

    def _validation_perplexity(self) -> float | None:
        if not self.data.validation.num_tokens:
            return None
        if self.processes.size == 1:
            (scores,) = evaluate(self.model, self.data.validation, self.state.adapters())
            return scores.perplexity()
        (scores,) = evaluate(
            self.model,
            self.data.validation,
            self.state.adapters(),
            documents=self._held_out[0],
            lockstep=self.processes.lockstep,
        )
        log_likelihood, tokens = self.processes.all_reduce(
            torch.stack([scores.log_likelihood.sum(), scores.tokens.sum().double()])
        )
        return math.exp(min(-float(log_likelihood) / float(tokens), 700.0))

    def keep_best(self) -> float | None:
        """Measure the validation perplexity; keep the state if it is the lowest so far, the start included."""
        perplexity = self._validation_perplexity()
        if perplexity is not None and math.isnan(perplexity):
            when = f"after epoch {self.epoch}" if self.epoch else "before the first step: the base model gives no numbers"
            raise self._non_finite(f"the validation perplexity is not a number {when}")
        if not self._draws_give_numbers():
            raise self._non_finite(f"a draw of the guide gives no numbers after epoch {self.epoch}: its scales diverge")
        best = self.fitted.validation_perplexity
        # with nothing to choose by, the last epoch counts as the best
        if perplexity is None or best is None or perplexity < best:
            self.fitted.best_epoch, self.fitted.validation_perplexity = self.epoch, perplexity
            if self.epoch:  # the start is kept as it is
                self.state.keep()
        return perplexity

    @torch.no_grad()
    def _draws_give_numbers(self) -> bool:
        """Whether the model gives finite logits of one short document under a draw; the validation looks at the centre alone."""
        if isinstance(self.guide, AutoDelta):
            return True
        document = self.data.train.batches(token_budget=1, documents=self._documents_of_mine(self.data.train)[0])[0]
        if self.partition is not None:
            (document,) = self.state.begin([replace(document, tasks=loaded_tasks(document.task))])
        document = document.to(self.device)
        with poutine.seed(rng_seed=self.seed):
            theta, _ = self.model.weights_given(self.guide(document), document.tasks)
        finite = self.model.logits(document, theta).isfinite().all()
        return not self.processes.all_reduce((~finite).float().reshape(1).cpu()).any()

    def finish(self) -> None:
        """Put the guide into its best state, with the rows of all tasks, in the process of rank 0."""
        self.state.restore()
        self.state.complete(self.processes)

    def save(self, store: Checkpoints) -> None:
        """Write a checkpoint."""
        groups = self.state.save(self.processes)
        if not self.processes.rank:
            progress = {"steps": self.steps_done, "epoch": self.epoch, "within": self.within}
            progress |= digests(self.data, self.model.backbone)
            progress |= {name: getattr(self.fitted, name) for name in _RECORD}
            store.save(self.steps_done, groups, progress)

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: it cannot be read, or is of another model, other documents, another base, or an epoch of other steps.
        """
        checkpoint.check_progress({"steps": (int,), "epoch": (int,), "within": (dict,)} | _RECORD)
        check_same(checkpoint.progress, self.data, self.model.backbone, what=f"checkpoint {str(checkpoint.path)!r}")
        check_packing(checkpoint, self.packing)
        with checkpoint.errors():
            if not all(isinstance(entry["training_tokens_per_second"], float | int) for entry in checkpoint.progress["history"]):
                raise ValueError("its history has an epoch without a speed")
            if (within := checkpoint.progress["within"]) and not (
                isinstance(within["steps"], int)
                and isinstance(within["seconds"], float)
                and isinstance(within["report"], dict)
                and len(within["totals"]) == 4
                and all(isinstance(total, float) for total in within["totals"])
            ):
                raise ValueError("what it says of the epoch that has begun is not what a fit writes")
            self.state.load(checkpoint, self.processes)
        self.steps_done, self.epoch, self.within = (checkpoint.progress[name] for name in ("steps", "epoch", "within"))
        for name in _RECORD:
            setattr(self.fitted, name, checkpoint.progress[name])


def _joined(parts: list[Weights]) -> Weights:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _schedule(step: int, total: int, warmup: float) -> float:
    """Linear warm-up over ``warmup`` of the steps, then a cosine to 0: a factor of the peak rate."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * 100_003 + epoch) % 2**32  # NumPy, which Pyro seeds too, takes no larger one


def _step_seed(seed: int, epoch: int, number: int) -> int:
    return (_epoch_seed(seed, epoch) * 65_537 + number) % 2**32
