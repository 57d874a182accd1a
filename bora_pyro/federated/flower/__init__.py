"""The link over Flower: the only place that imports ``flwr``, which is an optional package.

The server offers Flower's Fleet API, and the clients connect to it as SuperNodes do: HTTPS with a certificate of the server, and
a key of each client that signs its requests. Two parts of Flower are left out on purpose:

- Flower's Control API. In a stock SuperLink it lies on the same port, and without an account service anybody who reaches the port
  may register keys and start runs.
- Flower's app bundles. A stock SuperNode runs the code that the server sends it. Here a client runs nothing but its own
  installation.
"""

from __future__ import annotations

import importlib.util
import os

from bora_pyro.errors import InputError


def check_flower() -> None:
    """Check that Flower is installed, and keep it from sending usage data.

    Raises:
        InputError: it is not.
    """
    if importlib.util.find_spec("flwr") is None:
        raise InputError(
            "a federated fit between processes needs Flower, which is not installed; run make federated, or "
            "pip install 'bora_pyro[federated]'"
        )
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_LOG_LEVEL", "ERROR")
