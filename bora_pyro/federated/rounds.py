"""The rounds of a federation as the server goes through them. It does not know how the clients are reached.

:mod:`bora_pyro.federated.loop` reaches them in one process, :mod:`bora_pyro.federated.remote` over a network.

>>> Arrived().messages
[]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from bora_pyro.federated.aggregate import Tensors
from bora_pyro.federated.message import Message
from bora_pyro.federated.server import Server
from bora_pyro.federated.strategies.bora import tau_of
from bora_pyro.inference.continuation import is_over
from bora_pyro.inference.fitted import tau_by_group
from bora_pyro.inference.schedule import schedule
from bora_pyro.model import BoRA


@dataclass
class Arrived:
    """What came back from clients.

    Attributes:
        messages: the messages that could be read.
        refused: the ``client`` and the ``reason`` of each message that could not be read.
        report: more entries for the report of the round.
    """

    messages: list[Message] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


class Clients(Protocol):
    """The clients of a server, however they are reached.

    Attributes:
        uploaded, downloaded: bytes of the numbers that have travelled since the last report; the rounds set them to 0.
    """

    uploaded: int
    downloaded: int

    def train(self, number: int, asked: Sequence[str]) -> Arrived:
        """Let the clients that are asked take the local steps of a round, and return their messages."""

    def score(self, number: int) -> Arrived:
        """Ask all clients for the sums of their validation documents under the common values."""

    def keep(self, number: int) -> None:
        """Let all clients keep their present values as those of the best round so far."""


@dataclass
class Result:
    """What the rounds have come to.

    Attributes:
        history: the reports of the rounds.
        best_round: the round whose values are kept; 0: the start.
        score: the measure of all validation documents at that round; None without such documents.
        common: the common values of that round, (layers, *shape) by latent.
        tau: the learned τ of that round, by ``tau.<latent>``.
        seconds: duration of all rounds.
    """

    history: list[dict[str, Any]]
    best_round: int
    score: float | None
    common: Tensors
    tau: dict[str, Tensor]
    seconds: float


class Rounds:
    """The rounds of a federation.

    Args:
        server: the server; it changes.
        clients: its clients.
        model: the model whose prior is that of the server. Its likelihood says what is measured.
    """

    def __init__(self, server: Server, clients: Clients, model: BoRA) -> None:
        self.server, self.clients, self.model = server, clients, model

    def run(self, *, on_round: Callable[[dict[str, Any]], None] | None = None) -> Result:
        """Run the rounds until they are over, and keep the best one. The start counts too.

        Args:
            on_round: called after each round with its report.
        """
        options, start = self.server.options, time.perf_counter()
        history: list[dict[str, Any]] = []
        refused = self._score(0)
        best_round, best = 0, self._value()
        common, tau = self._keep(0)
        while not is_over(len(history), best_round, epochs=options.rounds, patience=options.patience):
            number = len(history) + 1
            report = self._round(number)
            report["refused"] = [*refused, *report["refused"]]
            refused = []
            value = self._value()
            if value is not None:
                report[f"validation_{self.model.likelihood.measure.name}"] = value
            if value is None or best is None or value < best:
                best_round, best = number, value
                common, tau = self._keep(number)
            report["seconds"] = time.perf_counter() - start
            history.append(report)
            if on_round:
                on_round(report)
        return Result(history, best_round, best, common, tau, time.perf_counter() - start)

    def _round(self, number: int) -> dict[str, Any]:
        """One round: who trains, what they send, and what the server makes of it."""
        options, server = self.server.options, self.server
        asked = server.draw(number)
        arrived = self.clients.train(number, asked)
        refused = [*arrived.refused, *server.collect(number, asked, arrived.messages)]
        refused += self._score(number)
        steps, total = number * options.local_steps, options.rounds * options.local_steps
        rate = options.learning_rate * schedule(steps - 1, total, options.warmup, options.schedule)
        report: dict[str, Any] = {"epoch": number, "step": steps, "total": total, **arrived.report}
        report |= {"learning_rate": rate, **server.report}
        report |= {"uploaded_bytes": self.clients.uploaded, "downloaded_bytes": self.clients.downloaded, "refused": refused}
        self.clients.uploaded = self.clients.downloaded = 0
        if self.model.prior.every and server.strategy.personal:
            report["tau_path"] = [{"step": steps, "tau": tau_by_group(self.model, {})}]
        return report

    def _score(self, number: int) -> list[dict[str, str]]:
        """Ask the clients for their validation sums, unless they came with the messages of the round."""
        if self.server.strategy.by_turns and number:
            return []
        arrived = self.clients.score(number)
        return [*arrived.refused, *self.server.collect_scores(number, arrived.messages)]

    def _value(self) -> float | None:
        """The measure of the validation documents of all clients, from their sums."""
        if not self.server.validation:
            return None
        log_likelihood, observations = torch.stack([*self.server.validation.values()]).sum(0).tolist()
        return self.model.likelihood.measure.of(log_likelihood, observations)

    def _keep(self, number: int) -> tuple[Tensors, dict[str, Tensor]]:
        """Keep the state of a round as the best so far."""
        self.clients.keep(number)
        common = {name: value.clone() for name, value in self.server.common.items()}
        return common, {name: value.clone() for name, value in tau_of(self.model.prior).items()}


# How many rounds a note lists.
_LISTED = 10


def rounds_text(rounds: Sequence[int]) -> str:
    """Rounds in a note; a long list is cut.

    >>> rounds_text([2]), rounds_text([2, 3])
    ('round 2', 'rounds 2, 3')
    """
    return f"round{'s' * (len(rounds) > 1)} {', '.join(map(str, rounds[:_LISTED]))}" + ", ..." * (len(rounds) > _LISTED)
