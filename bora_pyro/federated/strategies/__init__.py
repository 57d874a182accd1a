"""Strategies of federated fits: what clients learn, and what the server makes of it."""

from bora_pyro.federated.strategies.base import Strategy
from bora_pyro.federated.strategies.bora import FederatedBoRA
from bora_pyro.federated.strategies.bora_noncentered import NoncenteredBoRA
from bora_pyro.federated.strategies.exact_product import ExactProduct
from bora_pyro.federated.strategies.fedit import FedIT
from bora_pyro.federated.strategies.ffa import FFA

#: Strategies by the name that a configuration gives them.
STRATEGIES: dict[str, type[Strategy]] = {
    "bora": FederatedBoRA, "bora_noncentered": NoncenteredBoRA, "ffa": FFA, "fedit": FedIT, "exact_product": ExactProduct,
}  # fmt: skip

__all__ = ["FFA", "STRATEGIES", "ExactProduct", "FedIT", "FederatedBoRA", "NoncenteredBoRA", "Strategy"]
