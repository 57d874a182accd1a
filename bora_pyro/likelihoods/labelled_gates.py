"""Texts and the task of each token are observed: the objective of gates that choose adapters (MeteoRA).

>>> LabelledGates(gate_weight=50)
LabelledGates(gate_weight=50, token_weight=1)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
from pyro import poutine
from torch import Tensor

from bora_pyro.data.batch import Batch
from bora_pyro.errors import InputError
from bora_pyro.likelihoods.base import LanguageModel, Likelihood
from bora_pyro.likelihoods.distribution import NextTokens


class GatedRouter(Protocol):
    """The part of a router that this likelihood uses."""

    def recorded_change(self, model: Any, weights: Mapping[str, Tensor], gates: dict[str, Tensor] | None) -> Any:
        """How the adapters change the layers. The gates of each layer, (rows, tokens, D), are put into ``gates``."""


class LabelledGates(Likelihood):
    """Each layer's gates say of which task a token is, and the routed model says which token comes next.

        >>> LabelledGates(gate_weight=0.0)
        Traceback (most recent call last):
        bora_pyro.errors.InputError: gate_weight is 0.0; give a finite number above 0, such as 50

    For a document of task d the log-likelihood is

        a Σ_i log LLM(w_{i+1} | w_{1:i}, gates) + (b/M) Σ_i Σ_m log Categorical(d | softmax(G_m x_{m,i}))

    with the token weight a and the gate weight b. The first sum is over predicted tokens. The second is over all tokens that are
    read, a prompt and the first token too, and over the M adapted layers. So both weights are per token: b is that of the mean
    over the layers. MeteoRA's loss is the mean token loss plus 50 times the mean of this cross-entropy: a = 1 and b = 50.

    A label is of a token, but the tokens of a training document have one task, that of the document.

    Args:
        gate_weight: b, above 0.
        token_weight: a, 0 or more. With 0 the labels alone teach the gates.

    Raises:
        InputError: a weight is out of range.

    Source: Xu et al., "MeteoRA", ICLR 2025 (arXiv 2405.13053); the factor 50 is that of the released code.
    """

    def __init__(self, gate_weight: float = 50.0, token_weight: float = 1.0) -> None:
        if not 0 < gate_weight < math.inf:
            raise InputError(f"gate_weight is {gate_weight}; give a finite number above 0, such as 50")
        if not 0 <= token_weight < math.inf:
            raise InputError(f"token_weight is {token_weight}; give a finite number from 0 up, such as 1")
        self.gate_weight, self.token_weight = float(gate_weight), float(token_weight)

    def __call__(self, model: LanguageModel, weights: dict[str, Tensor] | None, batch: Batch) -> None:
        self.check(batch)
        routed: Any = model
        gates: dict[str, Tensor] = {}
        change = routed.router.recorded_change(routed, weights, gates)
        logits = routed.backbone.lazy_logits(batch.input_ids, change, layout=batch.layout)
        scale = batch.scale if self.task_weights is None else batch.scale * self.task_weight(batch.task)
        read = batch.attention_mask.bool()
        label = batch.task[:, None].expand_as(read)
        with pyro.plate("documents", len(batch.labels), dim=-1):
            if self.token_weight:
                with poutine.scale(scale=scale * self.token_weight):
                    pyro.sample("tokens", NextTokens(logits), obs=batch.labels)
            with poutine.scale(scale=scale * self.gate_weight / len(gates)):
                for name, of_layer in gates.items():
                    # a base may lie on several devices
                    of_layer = of_layer.to(label.device)
                    pyro.sample(f"gate.{name}", dist.Categorical(logits=of_layer).mask(read).to_event(1), obs=label)

    def observations(self, documents: float, tokens: float) -> float:
        return tokens

    def __repr__(self) -> str:
        return f"LabelledGates(gate_weight={self.gate_weight:g}, token_weight={self.token_weight:g}{self._weights_text()})"
