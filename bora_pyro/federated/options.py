"""The options of a federated fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bora_pyro.errors import InputError
from bora_pyro.federated.aggregate import AGGREGATES
from bora_pyro.federated.privacy_options import PrivacyOptions
from bora_pyro.inference.options import FitOptions
from bora_pyro.options.field import changed, check_fields, option
from bora_pyro.options.seed import Seeded

#: The heading of these options in ``--help``.
FEDERATION = "rounds and clients"
#: The optimisers of a client, and what weighs a client.
ADAMW, SGD = OPTIMIZERS = ("adamw", "sgd")
OBSERVATIONS, DOCUMENTS = WEIGHTS = ("observations", "documents")


@dataclass(kw_only=True)
class FederatedOptions(PrivacyOptions, Seeded):
    """Options of :func:`~bora_pyro.federated.loop.federate`.

        >>> FederatedOptions(rounds=3).local_steps
        5
        >>> FederatedOptions(participation=0.0).validate()
        Traceback (most recent call last):
        bora_pyro.errors.InputError: participation is 0.0; give the fraction of the clients in a round, above 0 and up to 1

    The help of each field is its documentation, here and on the command line. Decided here:

    - A client's ``weights`` are its training observations by default: tokens, or documents under ``likelihood_unit documents``.
      With them, one step of plain gradient descent at every client is one step on the documents of all.
    - The learning rate rises and falls over the local steps of all rounds, as in ``fit``. A client that misses rounds has the
      rate of the present round.
    - AdamW's moments stay at the client from one round to the next, and they do not travel.
    """

    rounds: int = option(20, "largest number of rounds", group=FEDERATION, least=1)
    local_steps: int = option(5, "E: steps of a client in a round", group=FEDERATION, least=1)
    participation: float = option(
        1.0, "fraction of the clients that train in a round; they are drawn by the seed", group=FEDERATION
    )
    optimizer: str = option(
        ADAMW, "how a client steps: adamw, or plain gradient descent (sgd)", group=FEDERATION, choices=OPTIMIZERS
    )
    weights: str = option(
        OBSERVATIONS,
        "what weighs a client in the server's mean: its training observations, or its documents; under bora each task counts "
        "the same instead",
        group=FEDERATION,
        choices=WEIGHTS,
    )
    server_rate: float = option(
        1.0,
        "how far the server goes from the common values towards the mean of the clients; above 1 it goes beyond, which helps "
        "bora under a large tau",
        group=FEDERATION,
        positive=True,
    )
    clip: float = option(
        math.inf, "largest norm of a client's update in a round; a longer one is shortened; inf: none", group=FEDERATION
    )
    aggregate: str = option(
        AGGREGATES[0],
        "how the server aggregates: mean, or trimmed_mean, which leaves out the largest and smallest values of each entry and "
        "weighs all clients the same",
        group=FEDERATION,
        choices=AGGREGATES,
    )
    trim: float = option(0.2, "fraction of the clients that trimmed_mean leaves out at each end", group=FEDERATION)

    learning_rate: float = changed(FitOptions, "learning_rate", 1e-2, "largest learning rate of a client's steps")
    warmup: float = changed(FitOptions, "warmup", 0.1)
    schedule: str = changed(
        FitOptions,
        "schedule",
        "cosine",
        "how the learning rate goes on after the warm-up: it falls to 0 (cosine) or stays (constant)",
    )
    token_budget: int = changed(FitOptions, "token_budget", 4096)
    gradient_clip: float = changed(
        FitOptions,
        "gradient_clip",
        1.0,
        "largest norm of a client's gradient per observation, under bora of each of its tasks; inf: no clipping",
    )
    patience: int = changed(
        FitOptions, "patience", 5, "stop after this many rounds without a better validation perplexity; 0 never stops early"
    )

    def validate(self) -> None:
        """Check every value.

        Raises:
            InputError: one line with the value and what is allowed.
        """
        check_fields(self)
        self.check_privacy()
        if not 0 < self.participation <= 1:
            raise InputError(
                f"participation is {self.participation}; give the fraction of the clients in a round, above 0 and up to 1"
            )
        if not 0 <= self.trim < 0.5:
            raise InputError(f"trim is {self.trim}; give a fraction from 0 to below 0.5")
        for name in ("clip", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; give a number above 0, or inf for no clipping")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"warmup is {self.warmup}; give a fraction of the steps, from 0 to 1")
