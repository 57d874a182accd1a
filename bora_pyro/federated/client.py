"""A client: the documents of its tasks, its own state, and the steps that it takes. It knows no transport.

>>> import bora_pyro as bp
>>> from bora_pyro.federated.options import FederatedOptions
>>> from bora_pyro.federated.strategies import FFA
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> table = [{"task": name, "text": f"document {n}"} for name in "ab" for n in range(9)]
>>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
>>> model = bp.BoRA(backbone, 2, adapter=bp.FrozenALoRA(rank=2), prior=bp.Pooled())
>>> client = Client("ada", model, data, FFA(), FederatedOptions(local_steps=2))
>>> client.train(1).observations, sorted(client.message(1).tensors)[0]
(80.0, 'q_proj.lora_B')
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.nn import Parameter

from bora_pyro.data.batch import Batch
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError, shown
from bora_pyro.federated.aggregate import Tensors
from bora_pyro.federated.message import TAU_SUMS, VALIDATION, Expected, Message, check_message
from bora_pyro.federated.options import SGD, FederatedOptions
from bora_pyro.federated.private_gradient import PrivateGradient
from bora_pyro.federated.strategies.base import Enrolment, Strategy
from bora_pyro.federated.strategies.bora import begin, slope_sums, tau_of
from bora_pyro.guides.curvature import document_gradients
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.optimizer import BETAS, EPS, LARGEST
from bora_pyro.inference.schedule import epoch_seed, schedule, step_seed
from bora_pyro.inference.steps import EpochSteps
from bora_pyro.model import BoRA, Weights
from bora_pyro.priors import LearnedPrecision


@dataclass(frozen=True)
class LocalReport:
    """What the steps of a client in a round were like; it stays at the client, and only a loop in one process reads it.

    Attributes:
        log_likelihood: of the documents of all steps, in nats; 0 if they are private.
        observations: of these documents; 0 if they are private.
        tokens: predicted tokens of these documents; their expected number if they are private.
    """

    log_likelihood: float
    observations: float
    tokens: int


class Client:
    """A client of a federation, with the documents of its tasks and a state that stays with it.

    Its values are the adapter's latents: one adapter, (layers, *shape), or under a ``personal`` strategy θ_d of each of its
    tasks, (tasks, layers, *shape). They begin at the adapter's start, which every client builds from the same seed. If the
    strategy ``moves_mean``, the values are the deviations δ_d, which begin at 0, and beside them is the client's own copy of Θ,
    which begins each round at the common one. The state is all of these, AdamW's moments, and the place in the order of the
    documents. A client that is absent keeps all of it.

    Args:
        name: the name of the client.
        model: the BoRA model, of which the client uses the base, the adapter and the likelihood. The number of its tasks does
            not matter.
        data: the documents of the client's tasks alone.
        strategy: what it learns.
        options: the options of the fit.
        task_weights: the factors of its tasks' log-likelihoods, (tasks,); None: 1 for all.

    Raises:
        InputError: the client has no training documents.
    """

    def __init__(
        self,
        name: str,
        model: BoRA,
        data: TaskData,
        strategy: Strategy,
        options: FederatedOptions,
        *,
        task_weights: Tensor | None = None,
    ) -> None:
        self.name, self.data, self.strategy, self.options = name, data, strategy, options
        if data.train.num_tokens == 0:
            raise InputError(
                f"client {shown(name)} has no training documents; leave its tasks out, or deal tasks to fewer clients"
            )
        self.model = _own_model(model, data, task_weights)
        device = model.backbone.device
        #: What makes its steps private; None: they are not.
        self.private = PrivateGradient(name, data.train, options) if options.private else None
        if self.private is not None:  # nothing of the validation documents leaves the client
            self.data = replace(data, validation=data.validation.subset(torch.arange(0)))
        counts = [self._observations(torch.tensor([d])) for d in range(data.num_tasks)]
        #: N_d of each task, (tasks,): observations, or documents if the steps are private.
        self.counts = torch.tensor(counts, dtype=torch.float32, device=device)
        self.common: Tensors = {name: start.clone() for name, start in model.starts.items()}
        if strategy.personal:
            begin(self.model.prior, model.starts)
            own = {name: start.expand(data.num_tasks, *start.shape) for name, start in model.starts.items()}
            own = {name: torch.zeros_like(value) for name, value in own.items()} if strategy.moves_mean else own
        else:
            own = self.common
        self.values = {name: Parameter(value.clone(memory_format=torch.contiguous_format)) for name, value in own.items()}
        #: The client's copy of Θ, if the strategy moves it.
        self.mean = {name: Parameter(start.clone()) for name, start in model.starts.items()} if strategy.moves_mean else {}
        self.version = 0
        # a group for each latent: their rates may differ
        groups = [{"params": [value]} for value in self.parameters.values()]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=0.0, eps=EPS, fused=True)
        self._tau_sums = torch.zeros(0)
        self._steps_taken, self._epoch = 0, -1
        self._order: EpochSteps | None = None
        self._kept: Tensors = {}

    @property
    def enrolment(self) -> Enrolment:
        """What the server is told before the first round."""
        return Enrolment(self.name, self.data.train.num_documents, float(self.counts.sum()), int((self.counts > 0).sum()))

    @property
    def parameters(self) -> dict[str, Parameter]:
        """All that the client learns, by name: its values, and its copy of Θ as ``prior_mean.<latent>``."""
        return self.values | {f"prior_mean.{name}": value for name, value in self.mean.items()}

    def expected(self) -> dict[str, Expected]:
        """The form of a message from the server: the common values, and τ if it is learned."""
        tensors = self.common | (tau_of(self.model.prior) if self.strategy.personal else {})
        return {name: Expected.like(value) for name, value in tensors.items()}

    def receive(self, message: Message) -> None:
        """Take over the common values, and τ. The client's own θ_d stay, or its deviations if the strategy moves Θ.

        Raises:
            RefusedMessage: the message is not what the client expects.
        """
        check_message(message, self.expected(), number=message.number)
        device = self.model.backbone.device
        self.common = {name: message.tensors[name].to(device) for name in self.common}
        self.model.prior.load_state(
            {name: value.to(device) for name, value in message.tensors.items() if name.startswith("tau.")}
        )
        self.version = message.number
        with torch.no_grad():
            for name, value in self.values.items():
                if not self.strategy.personal:
                    value.copy_(self.common[name])
                elif self.strategy.by_turns:  # a task without documents has the adapter of the prior mean
                    value[self.counts == 0] = self.common[name]

    def begin_at_common(self) -> None:
        """Let θ_d of each task begin at Θ: for a client that has lost its state and returns to a fit that goes on."""
        with torch.no_grad():
            for name, value in self.values.items():
                value.copy_(torch.zeros_like(value) if self.strategy.moves_mean else self.common[name])

    def train(self, number: int) -> LocalReport:
        """Take the local steps of a round.

        Args:
            number: the round, from 1.
        """
        options, total = self.options, self.options.rounds * self.options.local_steps
        sums = torch.zeros(3, dtype=torch.float64)
        with torch.no_grad():
            for name, mean in self.mean.items():
                mean.copy_(self.common[name])
        for place in range(options.local_steps):
            step = (number - 1) * options.local_steps + place
            rate = options.learning_rate * schedule(step, total, options.warmup, options.schedule)
            if self.private is None:
                batches = self._next_documents()
                with poutine.seed(rng_seed=step_seed(options.seed, self._epoch, self._steps_taken)):
                    sums += self._gradient(batches)
            else:
                theta = {name: value.detach() for name, value in self._theta().items()}
                for name, value in self.private(self.model, theta, personal=self.strategy.personal).items():
                    self.values[name].grad = -value
                    if name in self.mean:
                        self.mean[name].grad = -value.sum(0)
                sums[2] += self.private.expected_tokens
            self._per_observation()
            self._clip()
            self._step(rate)
            self._steps_taken += 1
        log_likelihood, observations, tokens = sums.tolist()
        return LocalReport(log_likelihood, observations, int(tokens))

    def message(self, number: int) -> Message:
        """What the client sends after its steps: its values, or its Θ, or the mean of its θ_d and sums of validation documents.

        Args:
            number: the round.
        """
        values = {name: value.detach() for name, value in (self.mean or self.values).items()}
        if self.strategy.by_turns:
            taught = self.counts > 0
            tensors = {name: value[taught].mean(0).cpu() for name, value in values.items()}
            tensors[VALIDATION] = self.validation_sums()
        else:
            tensors = {name: value.cpu().clone() for name, value in values.items()}
        if self.strategy.personal and isinstance(self.model.prior, LearnedPrecision):
            tensors[TAU_SUMS] = self._tau_sums
        return Message(self.name, number, tensors)

    def validation_sums(self) -> Tensor:
        """The total log-likelihood of the client's validation documents, and their number of observations: (2,) float64."""
        if not self.data.validation.num_tokens:
            return torch.zeros(2, dtype=torch.float64)
        (scores,) = evaluate(self.model, self.data.validation, self.theta())
        return scores.sums().double().cpu()

    def measure_tau(self, number: int) -> None:
        """Compute the sums for τ at the present θ_d and Θ, before the steps of a round, from one batch of validation documents.

        The batches come in turn, as in a central fit. Without validation documents the sums are 0.
        """
        prior = self.model.prior
        if not (self.strategy.personal and isinstance(prior, LearnedPrecision)):
            return
        starts, validation = self.model.starts, self.data.validation
        batches = validation.batches(token_budget=-(-self.options.token_budget // 2), seed=self.options.seed)
        if not len(batches):
            self._tau_sums = slope_sums(prior, starts).cpu()
            return
        batch = batches[(number - 1) % len(batches)].to(self.model.backbone.device)
        theta, rows = self.theta(), batch.row[batch.first_rows]
        gradients = document_gradients(self.model, theta, batch)
        deviations = {name: (value - self.common[name]).index_select(0, rows) for name, value in theta.items()}
        self._tau_sums = slope_sums(prior, starts, (deviations, gradients, batch.task[batch.first_rows])).cpu()

    def theta(self) -> Weights:
        """θ of the client's tasks, (tasks, layers, *shape) by latent. If the strategy moves Θ, it is around the common Θ."""
        if self.strategy.moves_mean:
            return {name: self.common[name] + value.detach() for name, value in self.values.items()}
        return {name: value.detach() for name, value in self._theta().items()}

    def _theta(self) -> Weights:
        """θ of the client's tasks as a function of what it learns."""
        if self.mean:
            return {name: self.mean[name] + value for name, value in self.values.items()}
        values: Tensors = {**self.values}
        return values if self.strategy.personal else _for_tasks(values, self.data.num_tasks)

    def keep(self) -> None:
        """Keep the present θ_d, or the one adapter, as those of the best round."""
        values = self.theta() if self.strategy.personal else self.values
        self._kept = {name: value.detach().clone() for name, value in values.items()}

    def kept(self) -> Tensors:
        """The values of the best round."""
        return self._kept

    def go_on(self, *, steps: int, epoch: int, version: int) -> None:
        """Go on at a place in the order of the documents: after ``steps`` steps, in an epoch, with the values of a round."""
        self._steps_taken, self._epoch, self.version = steps, epoch, version
        self._order = self._epoch_order() if steps else None

    def _observations(self, tasks: Tensor) -> float:
        train = self.data.train
        own = train.subset(torch.isin(train.task, tasks).nonzero()[:, 0])
        if self.private is not None:  # each document counts once, so that numbers of tokens stay at the client
            return float(self.model.likelihood.task_weight(own.task[own.first_pieces]).sum())
        return self.model.likelihood.observations_of(own)

    def _next_documents(self) -> list[Batch]:
        """The documents of the next step. An epoch goes on where the last round of this client has stopped."""
        if self._order is None or self._steps_taken % len(self._order) == 0:
            self._epoch += 1
            self._order = self._epoch_order()
        return self._order[self._steps_taken % len(self._order)]

    def _epoch_order(self) -> EpochSteps:
        seed = epoch_seed(self.options.seed, self._epoch)
        return EpochSteps(self.data.train, token_budget=self.options.token_budget, seed=seed)

    def _gradient(self, batches: list[Batch]) -> Tensor:
        """Set the gradients of −log p of all documents, estimated from those of a step; (3,) sums as in the report."""
        sums, model = torch.zeros(3, dtype=torch.float64), self.model
        for batch in (part for whole in batches for part in whole.parts(model.backbone.pass_tokens)):
            batch = batch.to(model.backbone.device)
            log_likelihood = _log_likelihood(model, self._theta(), batch) * batch.share
            (-log_likelihood).backward()
            observed = float(log_likelihood.detach()) / (batch.scale * batch.share)
            sums += torch.tensor([observed, model.likelihood.observations_of(batch), int(batch.predicted.sum())]).double()
        return sums

    @torch.no_grad()
    def _per_observation(self) -> None:
        """Add the gradients of the prior under a personal strategy, and divide by the observations."""
        for parameter in self.parameters.values():
            if parameter.grad is None:  # a layer that no token has used
                parameter.grad = torch.zeros_like(parameter)
        for mean in self.mean.values():
            assert mean.grad is not None
            mean.grad /= self.counts.sum()
        for name, value in self.values.items():
            assert value.grad is not None
            if self.strategy.personal:
                value.grad += self._tau(name) * (value if self.mean else value - self.common[name])
                taught = _rows(self.counts > 0, value)
                value.grad.copy_(torch.where(taught, value.grad / _rows(self.counts.clamp(min=1e-30), value), 0.0))
            else:
                value.grad /= self.counts.sum()

    def _clip(self) -> None:
        """Bound the norm of the gradient over all latents, under a personal strategy that of each task and that of Θ."""
        torch.nn.utils.clip_grad_norm_(self.mean.values(), self.options.gradient_clip)
        gradients = [value.grad for value in self.values.values() if value.grad is not None]
        if not self.strategy.personal:
            torch.nn.utils.clip_grad_norm_(self.values.values(), self.options.gradient_clip)
            return
        norms = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
        factor = (self.options.gradient_clip / norms.clamp(min=1e-30)).clamp(max=1.0)
        for gradient in gradients:
            gradient *= _rows(factor, gradient)

    @torch.no_grad()
    def _step(self, rate: float) -> None:
        """Take a step. Under a personal strategy it is shortened where the prior alone would carry a deviation too far."""
        for (name, value), group in zip(self.parameters.items(), self._optimizer.param_groups, strict=True):
            of_task = self.strategy.personal and name in self.values
            if self.options.optimizer == SGD:
                assert value.grad is not None
                if of_task:
                    # along the gradient per observation, a step of N_d/τ leads to Θ if there are no documents
                    own_rate = torch.minimum(value.new_tensor(rate), _rows(self.counts, value) / self._tau(name))
                    value.sub_(own_rate * value.grad)
                else:
                    value.sub_(rate * value.grad)
                continue
            group["lr"] = rate
            if of_task:  # AdamW moves an entry by about its rate: some of the prior's standard deviation
                part, tau = rate / self.options.learning_rate, float(self._tau(name).log().mean().exp())
                group["lr"] = min(rate, part * LARGEST * tau**-0.5)
        if self.options.optimizer != SGD:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _tau(self, name: str) -> Tensor:
        return self.model.prior.precision(name, self.common[name])


def _own_model(model: BoRA, data: TaskData, task_weights: Tensor | None) -> BoRA:
    """The same base, adapter and likelihood for the tasks of one client, with a prior of its own that holds τ."""
    own = copy.copy(model)
    own.num_tasks, own.prior = data.num_tasks, copy.deepcopy(model.prior)
    own.likelihood = model.likelihood.with_task_weights(task_weights)
    return own


def _log_likelihood(model: BoRA, theta: Weights, batch: Batch) -> Tensor:
    """An unbiased estimate of log p(all documents | θ) from a batch."""
    with pyro.validation_enabled(False):
        return poutine.trace(model.likelihood).get_trace(model, theta, batch).log_prob_sum()


def _for_tasks(values: Tensors, tasks: int) -> Weights:
    return {name: value.expand(tasks, *value.shape) for name, value in values.items()}


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """(tasks,) as a factor of a tensor (tasks, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))
