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

import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuide
from torch import Tensor

from bora_pyro.checkpoint import load_checkpoint, load_optimizer_tensors, optimizer_tensors, save_checkpoint
from bora_pyro.data.batches import Batch
from bora_pyro.data.tasks import TaskData
from bora_pyro.document_gradients import document_gradients
from bora_pyro.elbo import TemperedELBO
from bora_pyro.errors import InputError
from bora_pyro.evaluate import evaluate
from bora_pyro.fitted import Fitted
from bora_pyro.guides import map_guide
from bora_pyro.model import BoRA


class NonFiniteLossError(InputError):
    """The loss became infinite or NaN; ``fitted`` holds the last good state."""

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
    checkpoint: Path | None = None,
    checkpoint_every: int = 1,
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
    loop.restore_best()
    return fitted


# What a checkpoint keeps of a `Fitted`, beside the guide's state.
_RECORD = ("history", "best_epoch", "validation_perplexity", "seconds")


# Before the names of what the prior has learned, in the state of a fit.
_PRIOR = "prior/"


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
    ) -> None:
        self.model, self.data, self.guide, self.seed = model, data, guide, seed
        self.learning_rate, self.warmup, self.gradient_clip = learning_rate, warmup, gradient_clip
        self.token_budget, self.accumulate = token_budget, accumulate
        self.device = model.backbone.device
        self.elbo = TemperedELBO(temperature)
        self.observations = model.likelihood.observations(data.train.num_documents, data.train.num_tokens)
        batches = self._batches(0)
        # creates the guide's parameters; one document, for the guide keeps what the model made of it, the logits included
        with torch.no_grad(), poutine.seed(rng_seed=seed):
            guide(data.train.batches(token_budget=1)[0].to(self.device))
        self.parameters = dict(guide.named_parameters())
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=learning_rate, weight_decay=0.0, eps=1e-12, fused=True)
        self.steps_per_epoch = math.ceil(len(batches) / accumulate)
        self.total_steps = self.steps_per_epoch * epochs
        self.fitted = Fitted(model, guide, data.tasks)
        self.epoch, self.best_state = 0, self._copy()
        self.keep_best()

    def _batches(self, epoch: int) -> Sequence[Batch]:
        # the order of an epoch depends on the seed and the epoch alone: a resumed fit sees the same batches
        return self.data.train.batches(token_budget=self.token_budget, seed=_epoch_seed(self.seed, epoch))

    def run_epoch(self, on_step: Callable[[dict[str, Any]], None] | None) -> dict[str, Any]:
        """One pass over the training documents; returns what there is to report of it."""
        batches = self._batches(self.epoch)
        steps = [range(i, min(i + self.accumulate, len(batches))) for i in range(0, len(batches), self.accumulate)]
        report: dict[str, Any] = {"epoch": self.epoch + 1, "total": self.total_steps}
        losses, log_likelihood, documents, tokens, start = 0.0, 0.0, 0, 0, time.perf_counter()
        with poutine.seed(rng_seed=_epoch_seed(self.seed, self.epoch)):
            for number, members in enumerate(steps):
                step = min(self.epoch * self.steps_per_epoch + number, self.total_steps - 1)
                rate = self.learning_rate * _schedule(step, self.total_steps, self.warmup)
                loss = 0.0
                for position in members:
                    batch = batches[position]
                    loss += self.backward(batch.to(self.device), len(members), validate=step == 0)
                    # what the batch itself has: the scale to all documents taken off again
                    log_likelihood += self.elbo.log_likelihood.item() / batch.scale
                    documents += len(batch.task)
                    tokens += int(batch.attention_mask.sum()) - len(batch.task)
                self.step(rate, loss, step)
                if self.model.prior.every and (step + 1) % self.model.prior.every == 0:
                    self.learn_prior((step + 1) // self.model.prior.every - 1)
                    report.setdefault("tau_path", []).append({"step": step + 1, "tau": self.fitted.tau_by_group()})
                losses += loss
                report |= {
                    "step": step + 1,
                    "loss": -log_likelihood / self.model.likelihood.observations(documents, tokens),
                    "objective": losses / (number + 1),
                }
                report |= {"learning_rate": rate, "training_tokens_per_second": tokens / (time.perf_counter() - start)}
                if on_step:
                    on_step(dict(report))
        self.epoch += 1
        return report

    def backward(self, batch: Batch, members: int, *, validate: bool) -> float:
        """Add a batch's gradient of −ELBO a training observation; returns its part of the loss."""
        # Pyro checks shapes and supports in the first step; the others need it not
        with pyro.validation_enabled(validate), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Encountered NaN", category=UserWarning)  # an error, in _step
            loss = self.elbo.differentiable_loss(self.model, self.guide, batch) / (self.observations * members)
        loss.backward()
        return loss.item()

    def step(self, rate: float, loss: float, step: int) -> None:
        """Clip the gradient and take AdamW's step; a loss that is not finite ends the fit at the best state so far."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.gradient_clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._non_finite(f"the loss is not finite at step {step + 1} (epoch {self.epoch + 1})")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def learn_prior(self, update: int) -> None:
        """Show the prior the validation documents whose turn it is."""
        # half a batch, twice as often: the same cost, and a slope that is never far from the present state
        batches = self.data.validation.batches(token_budget=-(-self.token_budget // 2), seed=self.seed)
        batch = batches[update % len(batches)].to(self.device)
        theta, mean = self.fitted.weights()
        gradients = document_gradients(self.model, theta, batch)
        self.model.prior.learn(theta, mean, gradients, batch.task)

    def _non_finite(self, what: str) -> NonFiniteLossError:
        self.restore_best()
        return NonFiniteLossError(
            f"{what}; the state of epoch {self.fitted.best_epoch} is kept. Use a smaller --learning_rate "
            f"(now {self.learning_rate:g}; try {self.learning_rate / 3:.1g}), or --precision float32",
            self.fitted,
        )

    def _validation_perplexity(self) -> float | None:
        if not self.data.validation.num_tokens:
            return None
        (scores,) = evaluate(self.model, self.data.validation, self.fitted.weights()[0])
        return scores.perplexity()

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
            self.best_state, self.fitted.best_epoch, self.fitted.validation_perplexity = self._copy(), self.epoch, perplexity
        return perplexity

    @torch.no_grad()
    def _draws_give_numbers(self) -> bool:
        """Whether the model gives finite logits of one short document under a draw; the validation looks at the centre alone."""
        if isinstance(self.guide, AutoDelta):
            return True
        with poutine.seed(rng_seed=self.seed):
            theta, _ = self.model.weights_given(self.guide())
        document = self.data.train.batches(token_budget=1)[0].to(self.device)
        return bool(self.model.logits(document, theta).isfinite().all())

    def restore_best(self) -> None:
        """Put the guide into the state of lowest validation perplexity."""
        self._restore(self.best_state)

    def save(self, file: Path) -> None:
        """Write a checkpoint."""
        tensors = {"parameters": self._copy(), "optimizer": optimizer_tensors(self.optimizer), "best": self.best_state}
        fitted = {name: getattr(self.fitted, name) for name in _RECORD}
        save_checkpoint(file, tensors, {"epoch": self.epoch} | fitted)

    def load(self, file: Path) -> None:
        """Go on from a checkpoint."""
        tensors, progress = load_checkpoint(file)
        shapes = {name: value.shape for name, value in self.parameters.items()}
        found = [
            {name: value.shape for name, value in tensors.get(group, {}).items() if not name.startswith(_PRIOR)}
            for group in ("parameters", "best")
        ]
        if found != [shapes, shapes]:
            raise InputError(
                f"checkpoint {str(file)!r} is of another model (other tasks, rank, targets or prior); "
                "give the options of the run that it belongs to, or start afresh with --overwrite true"
            )
        self._restore(tensors["parameters"])
        load_optimizer_tensors(self.optimizer, tensors.get("optimizer", {}))
        self.best_state, self.epoch = tensors["best"], progress["epoch"]
        for name in _RECORD:
            setattr(self.fitted, name, progress[name])

    def _copy(self) -> dict[str, Tensor]:
        parameters = {name: value.detach().clone() for name, value in self.parameters.items()}
        return parameters | {f"{_PRIOR}{name}": value for name, value in self.model.prior.state().items()}

    @torch.no_grad()
    def _restore(self, state: dict[str, Tensor]) -> None:
        for name, value in self.parameters.items():
            value.copy_(state[name])
        prior = {name.removeprefix(_PRIOR): value for name, value in state.items() if name.startswith(_PRIOR)}
        self.model.prior.load_state({name: value.to(self.device) for name, value in prior.items()})


def _schedule(step: int, total: int, warmup: float) -> float:
    """Linear warm-up over ``warmup`` of the steps, then a cosine to 0: a factor of the peak rate."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * 100_003 + epoch) % 2**32  # NumPy, which Pyro seeds too, takes no larger one
