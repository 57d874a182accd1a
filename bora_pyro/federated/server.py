"""The server: it sees tensors of clients, never a document, and it knows no transport.

>>> from bora_pyro.federated.options import FederatedOptions
>>> from bora_pyro.federated.strategies import FFA
>>> from bora_pyro.federated.strategies.base import Enrolment
>>> from bora_pyro.priors import Pooled
>>> clients = [Enrolment("ada", 1, 10.0, 1), Enrolment("bob", 3, 30.0, 1)]
>>> server = Server(FFA(), {"q.lora_B": torch.zeros(1, 2, 1)}, Pooled(), clients, FederatedOptions())
>>> messages = [Message(name, 1, {"q.lora_B": torch.full((1, 2, 1), value)}) for name, value in (("ada", 4.0), ("bob", 8.0))]
>>> server.collect(1, ["ada", "bob"], messages)
[]
>>> server.common["q.lora_B"].flatten().tolist()
[7.0, 7.0]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bora_pyro.errors import InputError, shown
from bora_pyro.federated.aggregate import LEAST_TRIMMED, TRIMMED_MEAN, Tensors, check_trim, clipped, trimmed_mean, weighted_mean
from bora_pyro.federated.message import SERVER, TAU_SUMS, VALIDATION, Expected, Message, RefusedMessage, check_message
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.strategies.base import Enrolment, Strategy
from bora_pyro.federated.strategies.bora import are_slope_sums, learn_from, slope_sums, tau_of
from bora_pyro.federated.strategies.exact_product import ExactProduct
from bora_pyro.priors import LearnedPrecision, Prior


class Server:
    """The state of a federation that the server holds: the common values, τ, and what it remembers of each client.

    Args:
        strategy: what it makes of the clients' values.
        starts: the adapter's start, (layers, *shape) by latent, which every client has too.
        prior: the prior; a learned τ in it changes.
        clients: what is known of each client.
        options: the options of the fit.

    Raises:
        InputError: two clients have one name; or the options ask for a robust aggregate that does not exist for a learned τ, or
            that leaves out no client.
    """

    def __init__(
        self,
        strategy: Strategy,
        starts: Mapping[str, Tensor],
        prior: Prior,
        clients: Sequence[Enrolment],
        options: FederatedOptions,
    ) -> None:
        self.strategy, self.prior, self.options, self._starts = strategy, prior, options, starts
        self.clients = {client.name: client for client in clients}
        if len(self.clients) < len(clients):
            raise InputError("two clients have the same name; give each a name of its own")
        self._learns = strategy.personal and isinstance(prior, LearnedPrecision)
        if options.aggregate == TRIMMED_MEAN:
            check_trim(options.trim, self.participants)
            if self._learns:
                raise InputError("aggregate is trimmed_mean, which the sums for a learned tau do not have; give a number for tau")
        #: Θ, or the adapter of all tasks: (layers, *shape) by latent.
        self.common: Tensors = {name: start.cpu().clone() for name, start in starts.items()}
        #: The round whose common values these are; 0: the start, which every client has.
        self.version = 0
        #: The validation sums that the server has last accepted of each client.
        self.validation: dict[str, Tensor] = {}
        #: Numbers of the last round for its report.
        self.report: dict[str, Any] = {}
        self._remembered: dict[str, Tensors] = {}

    @property
    def participants(self) -> int:
        """How many clients train in a round: a fraction of them, at least one."""
        return max(1, round(self.options.participation * len(self.clients)))

    @property
    def _learned(self) -> LearnedPrecision:
        assert isinstance(self.prior, LearnedPrecision)
        return self.prior

    def draw(self, number: int) -> list[str]:
        """The names of the clients that train in a round, in the order of the clients; the seed and the round decide."""
        generator = torch.Generator().manual_seed((self.options.seed * 100_003 + number) % 2**32)
        chosen = torch.randperm(len(self.clients), generator=generator)[: self.participants].sort().values
        names = [*self.clients]
        return [names[place] for place in chosen.tolist()]

    def message(self) -> Message:
        """The common values, and τ if it is learned: what a client gets whose values are older."""
        tensors = self.common | ({name: value.cpu() for name, value in tau_of(self.prior).items()} if self._learns else {})
        return Message(SERVER, self.version, {name: value.clone() for name, value in tensors.items()})

    def expected(self) -> dict[str, Expected]:
        """The form of the message of a client after its steps."""
        forms = {name: Expected.like(value) for name, value in self.common.items()}
        if self.strategy.by_turns:
            forms |= self.expected_scores()
        if self._learns:
            forms[TAU_SUMS] = Expected.like(slope_sums(self._learned, self._starts))
        return forms

    @staticmethod
    def expected_scores() -> dict[str, Expected]:
        """The form of a message with the sums of a client's validation documents."""
        return {VALIDATION: Expected((2,), torch.float64)}

    def collect(self, number: int, asked: Sequence[str], messages: Iterable[Message]) -> list[dict[str, str]]:
        """Take the messages of a round, and move the common values and τ. A message that is not as expected is left out.

        ``report`` then has the number of ``clients`` whose message was accepted, the ``largest_update`` before it was shortened,
        and whether the common values have ``moved``. They stay without a message, with fewer than three for a trimmed mean, and
        if the mean is too large for its type.

        Args:
            number: the round.
            asked: the clients that were asked to train.
            messages: what came back; a client may be missing.

        Returns:
            The ``client`` and the ``reason`` of each message that was refused.
        """
        refused, accepted = self._checked(number, asked, messages, self.expected())
        self.report = {"clients": len(accepted), "moved": False}
        if not accepted:
            return refused
        values, norms = {}, []
        for name, message in accepted.items():
            own = {latent: message.tensors[latent] for latent in self.common}
            values[name], norm = clipped(own, self.common, self.options.clip)
            norms.append(norm)
            if name in self.validation and VALIDATION in message.tensors:
                self.validation[name] = message.tensors[VALIDATION]
        self.report["largest_update"] = max(norms)
        if self.strategy.by_turns:
            values = self._remembered = self._remembered | values
        if self.options.aggregate == TRIMMED_MEAN and len(values) < LEAST_TRIMMED:
            return refused  # two clients have no middle: rather nothing than a mean that one of them decides
        if not self._move(values):
            return refused
        if self._learns:
            sums = [message.tensors[TAU_SUMS] for message in accepted.values()]
            if any(bool(one.any()) for one in sums):  # there is something to learn from
                learn_from(self._learned, self._starts, sums)
        self.version = number
        return refused

    def collect_scores(self, number: int, messages: Iterable[Message]) -> list[dict[str, str]]:
        """Take the validation sums of all clients under the common values; as ``collect``.

        The clients that answer before the first round, number 0, are those that count, so that the rounds can be compared. If
        sums of one of them are missing later, its last ones count.
        """
        refused, accepted = self._checked(number, [*self.clients], messages, self.expected_scores())
        counted = [name for name in accepted if not number or name in self.validation]
        self.validation |= {name: accepted[name].tensors[VALIDATION] for name in counted}
        return refused

    def _checked(
        self, number: int, asked: Sequence[str], messages: Iterable[Message], expected: Mapping[str, Expected]
    ) -> tuple[list[dict[str, str]], dict[str, Message]]:
        refused: list[dict[str, str]] = []
        accepted: dict[str, Message] = {}
        for message in messages:
            try:
                if message.sender not in asked:
                    raise RefusedMessage(f"{shown(message.sender)}, round {number}: this client was not asked")
                if message.sender in accepted:
                    raise RefusedMessage(f"{shown(message.sender)}, round {number}: this client has sent a message already")
                check_message(message, expected, number=number)
                if VALIDATION in expected and float(message.tensors[VALIDATION][1]) < 0:
                    raise RefusedMessage(f"{shown(message.sender)}, round {number}: a negative number of validation documents")
                of_tau = message.tensors[TAU_SUMS] if TAU_SUMS in expected else None
                if of_tau is not None and not are_slope_sums(self._learned, of_tau):
                    raise RefusedMessage(f"{shown(message.sender)}, round {number}: no documents have such sums for tau")
                accepted[message.sender] = message
            except RefusedMessage as error:
                refused.append({"client": message.sender, "reason": str(error)})
        return refused, accepted

    def _move(self, values: Mapping[str, Tensors]) -> bool:
        """Move the common values towards the mean of the clients', unless the result is too large for its type."""
        strategy, options = self.strategy, self.options
        of_clients = [strategy.averaged(value) for value in values.values()]
        if options.aggregate == TRIMMED_MEAN:
            mean = trimmed_mean(of_clients, options.trim)
        else:
            mean = weighted_mean(of_clients, [strategy.weight(self.clients[name], options.weights) for name in values])
        if options.server_rate != 1:
            before = strategy.averaged(self.common)
            mean = {name: before[name].lerp(value, options.server_rate) for name, value in mean.items()}
        merged = strategy.merged(mean, self.common)
        if not all(bool(value.isfinite().all()) for value in merged.values()):
            return False
        if isinstance(strategy, ExactProduct):
            self.report["lost"] = strategy.lost(mean, merged)
        self.common, self.report["moved"] = merged, True
        return True
