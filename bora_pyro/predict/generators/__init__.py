"""Generators of adapters: methods that predict the adapter of a new task from its vector, learned from other tasks.

>>> sorted(METHODS)
['cvae', 'mean', 'nearest', 'ridge']
"""

from bora_pyro.predict.generators.base import Method
from bora_pyro.predict.generators.cvae import CVAE
from bora_pyro.predict.generators.mean import Mean
from bora_pyro.predict.generators.nearest import Nearest
from bora_pyro.predict.generators.ridge import Ridge

#: Methods by the name that a configuration gives them.
METHODS: dict[str, type[Method]] = {"cvae": CVAE, "ridge": Ridge, "nearest": Nearest, "mean": Mean}

__all__ = ["CVAE", "METHODS", "Mean", "Method", "Nearest", "Ridge"]
