"""A federated fit in one process: the clients take their turns, and messages are handed over.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
>>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
>>> model = bp.BoRA(backbone, len(data.tasks), adapter=bp.LoRA(rank=2), prior=bp.HierarchicalNormal(tau=100))
>>> fitted = federate(model, data, NoncenteredBoRA(), rounds=2, local_steps=2)
>>> fitted.evaluate(data.test)["test_perplexity"] > 1
True
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bora_pyro.backbone.texts import check_token_ids
from bora_pyro.data.subset import subset
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.federated.client import Client, LocalReport
from bora_pyro.federated.deal import TASK, deal
from bora_pyro.federated.message import VALIDATION, Message
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.privacy import check_private, spent
from bora_pyro.federated.rounds import Arrived, Result, Rounds
from bora_pyro.federated.server import Server
from bora_pyro.federated.strategies.base import Strategy, check_members
from bora_pyro.federated.strategies.bora import begin
from bora_pyro.federated.strategies.bora_noncentered import NoncenteredBoRA
from bora_pyro.guides import make_parameters, map_guide
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import BoRA
from bora_pyro.options.field import with_changes
from bora_pyro.priors import LearnedPrecision

__all__ = ["Federation", "federate"]


def federate(
    model: BoRA,
    data: TaskData,
    strategy: Strategy | None = None,
    options: FederatedOptions | None = None,
    *,
    clients: Mapping[str, Sequence[str]] | None = None,
    on_upload: Callable[[Message], Message | None] = lambda message: message,
    on_round: Callable[[dict[str, Any]], None] | None = None,
    **changes: Any,
) -> Fitted:
    """Fit adapters of tasks whose documents stay with their clients, in one process.

        >>> import bora_pyro as bp
        >>> from bora_pyro.federated.strategies import FFA
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
        >>> model = bp.BoRA(backbone, 2, adapter=bp.FrozenALoRA(rank=2), prior=bp.Pooled())
        >>> fitted = federate(model, data, FFA(), rounds=2, local_steps=1)
        >>> latents = sum(start.numel() for start in model.starts.values())
        >>> fitted.history[1]["uploaded_bytes"] == 2 * (4 * latents + 16)  # B of two clients, and their two validation sums
        True

    In each round the clients that take part get the common values, take their local steps, and send a message
    (:class:`~bora_pyro.federated.client.Client`). The server checks each message and moves the common values
    (:class:`~bora_pyro.federated.server.Server`). Then the validation documents are scored at their clients, which send two sums.
    Unless clients and the server take turns, all clients get the new common values for it, and have them already when the next
    round begins. The best round is kept, and the start counts too.

    The loop is a simulation: it shows what a federation would fit, and what would travel. All documents are in this process.

    Args:
        model: the BoRA model. A learned τ in its prior changes.
        data: the documents of all tasks.
        strategy: what clients learn and the server makes of it; default: ``NoncenteredBoRA()``.
        options: the options; default: ``FederatedOptions()``.
        clients: the tasks of each client by its name (:func:`~bora_pyro.federated.deal.deal`); default: a client for each task.
        on_upload: called with each message of a client before the server gets it; what it returns is what arrives, and None is a
            message that is lost.
        on_round: called after each round with its report.
        changes: single options, for example ``rounds=3``.

    Returns:
        The fit with the guide of a MAP fit. Its history has an entry for each round: ``loss`` (nats per observation in the local
        steps), the measure of the validation documents, ``uploaded_bytes`` and ``downloaded_bytes`` (those before the first round
        are in the first entry), the number of ``clients`` whose message was accepted, the messages that were ``refused``, the
        path of a learned τ, and with privacy what it has cost (:func:`~bora_pyro.federated.privacy.spent`); the loss is then
        None, and the last round is kept. Under a personal strategy
        the fit has θ_d of all tasks, which in a real federation stay at the clients.

    Raises:
        InputError: an option has a value that is not allowed; the strategy cannot fit this model; ``clients`` does not have each
            task once; or a client has no training documents.
    """
    return Federation(model, data, strategy, options, clients=clients, on_upload=on_upload, **changes).run(on_round=on_round)


class Federation:
    """The clients and the server of a fit in one process. A command checks its options with it before it writes anything.

    Args:
        model, data, strategy, options, clients, on_upload, changes: as for :func:`federate`.

    Raises:
        InputError: as for :func:`federate`.
    """

    def __init__(
        self,
        model: BoRA,
        data: TaskData,
        strategy: Strategy | None = None,
        options: FederatedOptions | None = None,
        *,
        clients: Mapping[str, Sequence[str]] | None = None,
        on_upload: Callable[[Message], Message | None] = lambda message: message,
        **changes: Any,
    ) -> None:
        self.options = options = with_changes(options or FederatedOptions(), changes)
        options.validate()
        self.model, self.data, self.strategy, self._on_upload = model, data, strategy or NoncenteredBoRA(), on_upload
        if data.train.num_tokens == 0:
            raise InputError("the training split has no token to predict; give more or longer documents")
        check_token_ids(model.backbone, data.train, data.validation, data.test)
        check_members(model)
        self.strategy.check(model)
        check_private(self.strategy, model.prior, options)
        if self.strategy.personal and isinstance(model.prior, LearnedPrecision) and not data.validation.num_tokens:
            raise InputError(
                f"{model.prior} is learned from validation documents, and there are none; give more documents, or a fixed tau"
            )
        begin(model.prior, model.starts)
        dealt = deal(data.tasks, TASK) if clients is None else {name: [*tasks] for name, tasks in clients.items()}
        if sorted(task for tasks in dealt.values() for task in tasks) != sorted(data.tasks):
            raise InputError(f"clients have not each of the {data.num_tasks} tasks once; give every task to one client")
        self.clients = {name: self._client(name, tasks) for name, tasks in dealt.items()}
        enrolled = [client.enrolment for client in self.clients.values()]
        self.server = Server(self.strategy, model.starts, model.prior, enrolled, options)
        self.downloaded = self.uploaded = 0

    def _client(self, name: str, tasks: Sequence[str]) -> Client:
        weights, places = self.model.likelihood.task_weights, [self.data.tasks.index(task) for task in sorted(set(tasks))]
        own = subset(self.data, tasks)
        task_weights = None if weights is None else weights[places]
        return Client(name, self.model, own, self.strategy, self.options, task_weights=task_weights)

    def run(self, *, on_round: Callable[[dict[str, Any]], None] | None = None) -> Fitted:
        """Run the rounds, and return the fit at its best round. The argument is that of :func:`federate`."""
        found = Rounds(self.server, self, self.model).run(on_round=on_round)
        fitted = fitted_at(found, self.model, self.data, [*self.clients.values()])
        fitted.history, fitted.best_epoch = found.history, found.best_round
        fitted.validation_score, fitted.seconds = found.score, found.seconds
        return fitted

    def train(self, number: int, asked: Sequence[str]) -> Arrived:
        """The messages of the clients that train, and the loss of their steps."""
        begun, arrived, reports = time.perf_counter(), Arrived(), list[LocalReport]()
        for name in asked:
            client = self.clients[name]
            self._download(client)
            client.measure_tau(number)
            reports.append(client.train(number))
            arrived.messages += self._upload(client.message(number))
        seconds = time.perf_counter() - begun
        sums = torch.tensor([[one.log_likelihood, one.observations, one.tokens] for one in reports]).double().sum(0).tolist()
        # with privacy the clients do not tell the loss
        arrived.report = {"loss": -sums[0] / sums[1] if sums[1] else None, "training_tokens_per_second": sums[2] / seconds}
        if self.options.private:
            arrived.report["privacy"] = spent(self.clients.values())
        return arrived

    def score(self, number: int) -> Arrived:
        """The validation sums of all clients under the common values."""
        arrived = Arrived()
        for client in self.clients.values():
            self._download(client)
            arrived.messages += self._upload(Message(client.name, number, {VALIDATION: client.validation_sums()}))
        return arrived

    def keep(self, number: int) -> None:
        """Let all clients keep their values."""
        for client in self.clients.values():
            client.keep()

    def _download(self, client: Client) -> None:
        """Send the common values to a client that has older ones."""
        if client.version < self.server.version:
            message = self.server.message()
            self.downloaded += message.num_bytes
            client.receive(message)

    def _upload(self, message: Message) -> list[Message]:
        self.uploaded += message.num_bytes
        arrived = self._on_upload(message)
        return [] if arrived is None else [arrived]


def fitted_at(found: Result, model: BoRA, data: TaskData, clients: Sequence[Client]) -> Fitted:
    """The kept state as a MAP fit of the clients' tasks.

    Args:
        found: what the rounds have come to; its history is not used.
        model: the model of all these tasks. Its learned τ becomes that of the best round.
        data: the documents of all these tasks.
        clients: the clients, which have kept their values of the best round.
    """
    device = model.backbone.device
    mean = {name: value.to(device) for name, value in found.common.items()}
    theta = {name: value.expand(model.num_tasks, *value.shape).clone() for name, value in mean.items()}
    model.prior.load_state(found.tau)
    for client in clients:
        if client.strategy.personal:
            places = [data.tasks.index(task) for task in client.data.tasks]
            taught = client.counts > 0
            for name, value in client.kept().items():
                theta[name][torch.tensor(places, device=device)[taught]] = value[taught]
    guide = map_guide(model, model.sites_given(theta, mean))
    make_parameters(guide, model)
    fitted = Fitted(model, guide, data.tasks, chat_template=data.chat_template)
    fitted.documents = data.train.documents_per_task
    return fitted
