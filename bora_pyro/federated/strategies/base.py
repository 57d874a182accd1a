"""The base class of strategies. A strategy says what clients learn, and what the server makes of it.

A new strategy is one file with a subclass of :class:`Strategy`, and one line in ``bora_pyro/federated/strategies/__init__.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bora_pyro.errors import InputError
from bora_pyro.federated.aggregate import Tensors
from bora_pyro.model import BoRA
from bora_pyro.priors import Pooled


@dataclass(frozen=True)
class Enrolment:
    """What the server knows of a client before the first round.

    Attributes:
        name: the client.
        documents: number of its training documents.
        observations: number of its training observations: tokens or documents, as the likelihood counts them.
        tasks: number of its tasks that have training documents.
    """

    name: str
    documents: int
    observations: float
    tasks: int


class Strategy(ABC):
    """What the clients of a federation learn, and what the server makes of their values.

        >>> from bora_pyro.federated.strategies import FFA
        >>> FFA()
        FFA()

    A client trains values of the adapter's latents, (layers, *shape) each, and sends them. The server averages ``averaged`` of
    them, and ``merged`` turns the average into the values that the clients get next.

    Attributes:
        personal: whether each task keeps an adapter θ_d of its own at its client, near the common Θ. The client then sends the
            mean of its θ_d, and the server remembers the last one of each client. Otherwise all tasks have the common adapter.
        moves_mean: under a personal strategy, whether a client moves Θ too: it learns Θ and the deviations of its tasks, and it
            sends its Θ, which the server averages. θ_d is then the common Θ and the deviation of the task.
    """

    personal: ClassVar[bool] = False
    moves_mean: ClassVar[bool] = False

    @property
    def by_turns(self) -> bool:
        """Whether clients move their θ_d alone, and the server then moves Θ."""
        return self.personal and not self.moves_mean

    @abstractmethod
    def check(self, model: BoRA) -> None:
        """Check that the strategy can fit a model.

        Raises:
            InputError: its adapter or its prior is not one of this strategy; the message names one that is.
        """

    def weight(self, client: Enrolment, by: str) -> float:
        """The weight of a client in the server's mean.

        Args:
            client: the client.
            by: ``observations`` or ``documents``.
        """
        return client.observations if by == "observations" else float(client.documents)

    def averaged(self, values: Mapping[str, Tensor]) -> Tensors:
        """What the server averages, from a client's values: by default the values themselves."""
        return dict(values)

    def merged(self, mean: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Tensors:
        """The common values from the average: the inverse of ``averaged``, if there is one.

        Args:
            mean: the average of ``averaged``.
            before: the common values of this round.
        """
        return dict(mean)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def check_pooled(strategy: Strategy, model: BoRA) -> None:
    """Check that all tasks have one adapter, as they do under a strategy that is not personal.

    Raises:
        InputError: the prior is another one.
    """
    if not isinstance(model.prior, Pooled):
        raise InputError(f"{strategy} fits one adapter for all clients, and the prior is {model.prior}; give Pooled() (tau inf)")


def check_latents(strategy: Strategy, model: BoRA, latents: set[str], advice: str) -> None:
    """Check that a layer of the model has just these latents.

    Raises:
        InputError: it has others.
    """
    found = {name.rpartition(".")[-1] for name in model.starts}
    if found != latents:
        raise InputError(
            f"{strategy} averages {' and '.join(sorted(latents))}, and {model.adapter} has {', '.join(sorted(found))}; {advice}"
        )


def check_members(model: BoRA) -> None:
    """Check that the model has nothing that changes between steps, and nothing that one client cannot compute alone.

    Raises:
        InputError: a member does, or latents have entries that are masked.
    """
    for member in (model.adapter, model.router, model.likelihood):
        if member.callbacks():
            raise InputError(f"{member} changes during a fit, which a federated fit does not do; give an adapter such as lora")
    if model.router.reads_all_tasks:
        raise InputError(
            f"{model.router} reads a token by the adapters of all tasks, which no client has; give the router by_task"
        )
    if model.tensors.masks:
        raise InputError(f"{model.adapter} masks entries of its latents, which a federated fit does not do; give lora")
    if model.factor is not None:
        raise InputError(f"{model.adapter} adds a factor to the prior, which a federated fit does not have; give lora")
    if model.adapter.shared or model.router.shared:
        names = ", ".join((*model.adapter.shared, *model.router.shared))
        raise InputError(f"all tasks share {names}, which a federated fit does not do; give an adapter such as lora")
