"""BoRA in a federation whose clients move Θ as well as the deviations of their tasks."""

from __future__ import annotations

from typing import ClassVar

from bora_pyro.federated.strategies.base import Enrolment, Strategy
from bora_pyro.federated.strategies.bora import FederatedBoRA


class NoncenteredBoRA(FederatedBoRA):
    """The MAP of BoRA with θ_d = Θ + δ_d: a client moves a copy of Θ and its δ_d together, the server averages the copies.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> NoncenteredBoRA().check(bp.BoRA(backbone, 2, prior=bp.HierarchicalNormal(tau=100)))

    The joint density is Π_d p(D_d | Θ + δ_d) Normal(δ_d | 0, I/τ). No prior holds Θ, so documents move it as far as the learning
    rate allows, in the first round too. Under :class:`~bora_pyro.federated.strategies.bora.FederatedBoRA` Θ follows the θ_d,
    which a large τ holds where Θ was. The δ_d and their prior stay at the client.

    The server weighs the copies of Θ by the clients' observations, as federated averaging does (McMahan et al., 2017, arXiv
    1602.05629). With one local step of plain gradient descent on all documents, the new Θ is exactly that of a step of the
    central fit, and the rounds stand still at its MAP. With more local steps the copies drift apart, and they stand still near
    it. An absent client has no part in the round.

    A learned τ is learned from the same sums as under ``FederatedBoRA``. With privacy, the gradient of Θ is the sum over tasks of
    the noisy gradients that move the δ_d, so that it costs nothing more.
    """

    moves_mean: ClassVar[bool] = True

    def weight(self, client: Enrolment, by: str) -> float:
        return Strategy.weight(self, client, by)
