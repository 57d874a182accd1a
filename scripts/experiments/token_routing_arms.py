"""The arms of ``compare_token_routing.py``: ways to read a text whose task is unknown, or changes in the text."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
from composite_texts import Texts, composites, until_found
from conflicting_tasks import active_parameters
from torch import Tensor

from bora_pyro.adapters import LoRA, SMoRA
from bora_pyro.data import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.route_fit import gates_of, route_fit, routed_model
from bora_pyro.model import BoRA, Weights
from bora_pyro.predict.gates import read_gates
from bora_pyro.predict.token_filter import TokenLikelihoods, token_likelihoods
from bora_pyro.priors import FrozenAdapters
from bora_pyro.routers import MeteoRA
from bora_pyro.runs.routed_adapters import RoutedAdapters

UNKNOWN, COMPOSITE = "unknown", "composite"
#: Arms that are the filter at some switch rate; None: the rate of maximum likelihood.
FILTERS: dict[str, float | None] = {"filter": None, "tempered filter": None, "whole text": 0.0, "mixture": 1.0}
TEMPERED = "tempered filter"
GATES = {"meteora k=1": 1, "meteora k=2": 2}
#: The temperatures and the switch rates among which the tempered filter is chosen.
TEMPERATURES, RATES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0), (0.0, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
#: How often texts are read to measure the speed, and how many texts.
PASSES, SAMPLE = 3, 24


class Options(Protocol):
    """The options of the comparison that the arms need."""

    texts: int
    segment: int
    epochs: int
    learning_rate: list[str]
    gate_weight: float
    prior: str
    seed: int
    gate_seed: int


class Comparison:
    """The arms over the adapters of a run, or over PEFT folders. Gates are fitted when an arm needs them.

    Args:
        source: the adapters, and the documents of their tasks.
        config: the options.
        pooled: fits of one adapter for all tasks, by the name of their arm.
    """

    def __init__(self, source: RoutedAdapters, config: Options, pooled: Mapping[str, Fitted]) -> None:
        self.fitted, self.data, self.config, self.pooled = source.fitted, source.data, config, pooled
        self.token_budget = source.config.token_budget
        self._gates: dict[int, tuple[Fitted, str]] = {}
        self._read: dict[str, TokenLikelihoods] = {}

    @property
    def arms(self) -> list[str]:
        """The names of all arms."""
        return ["oracle", *FILTERS, *GATES, "average", "theta", "base", *self.pooled]

    @cached_property
    def theta(self) -> tuple[Weights, Weights]:
        """θ of all tasks, and Θ."""
        return self.fitted.weights()

    def gates(self, k: int) -> tuple[Fitted, str]:
        """The gates of MeteoRA with k adapters for each token, at the rate with the best validation score, and this rate."""
        if k not in self._gates:
            config, best = self.config, math.inf
            for rate in config.learning_rate:
                options = FitOptions(
                    epochs=config.epochs, learning_rate=float(rate), seed=config.gate_seed, gradient_norm=False,
                    token_budget=self.token_budget,
                )  # fmt: skip
                found = route_fit(self.fitted, self.data, MeteoRA(k), options, gate_weight=config.gate_weight)
                score = found.validation_score
                assert score is not None
                print(
                    f"gates, k = {k}, rate {rate}: validation {score:.3f}, epoch {found.best_epoch}", file=sys.stderr, flush=True
                )
                if score < best:
                    best, self._gates[k] = score, (found, rate)
        return self._gates[k]

    def texts(self, kind: str, *, validation: bool = False) -> Texts | None:
        """The texts of a kind, from test documents, or the same from validation documents; None if there are none."""
        split = self.data.validation if validation else self.data.test
        if kind == UNKNOWN:
            return Texts.of_documents(split)
        tasks, context = int(kind.removeprefix(f"{COMPOSITE}-")), self.fitted.model.backbone.context
        if context is not None and tasks * self.config.segment + 1 > context:
            return None
        config = self.config
        return composites(split, tasks, segment=config.segment, number=config.texts, seed=config.seed + validation)

    def likelihoods(self, kind: str, *, validation: bool = False) -> TokenLikelihoods | None:
        """The likelihoods of the tokens of the texts of a kind under each adapter, read once; None if there are no texts."""
        name = f"{kind}{' validation' * validation}"
        if name not in self._read and (texts := self.texts(kind, validation=validation)) is not None and len(texts.split):
            self._read[name] = token_likelihoods(self.fitted, texts.split, prior=self.config.prior)
        return self._read.get(name)

    def row(self, kind: str, arm: str, texts: Texts) -> dict[str, Any]:
        """The numbers of an arm on the texts of a kind."""
        tokens = texts.split.num_tokens
        found = self._of_arm(kind, arm, texts)
        total = found.pop("log_likelihood")
        own = self.likelihoods(kind)
        assert own is not None
        ratio = math.exp((oracle(own, texts) - total) / tokens)
        row: dict[str, Any] = {
            "text": kind,
            "arm": arm,
            "perplexity": math.exp(-total / tokens),
            "ratio": ratio,
            "tokens": tokens,
        }
        return row | found | self.costs(arm)

    def _of_arm(self, kind: str, arm: str, texts: Texts) -> dict[str, Any]:
        if arm == "oracle" or arm in FILTERS:
            return self._of_likelihoods(kind, arm, texts)
        if arm in GATES:
            routed, rate = self.gates(GATES[arm])
            weights = routed.weights()[0]
            (scores,) = evaluate(routed.model, texts.split, weights)
            # the gates at the token before say which adapters predict a token
            readings = read_gates(routed.model, weights, texts.split)
            best = [p.argmax(1)[places(texts.split, text) - 1] for text, p in enumerate(readings.probabilities)]
            found = {"log_likelihood": float(scores.log_likelihood.sum()), "learning_rate": rate, "best_epoch": routed.best_epoch}
            return found | until_found(best, texts)
        model, of_arm = self.adapter(arm)
        (scores,) = evaluate(model, texts.split, of_arm)
        return {"log_likelihood": float(scores.log_likelihood.sum())}

    def _of_likelihoods(self, kind: str, arm: str, texts: Texts) -> dict[str, Any]:
        """The oracle, or the filter at some switch rate."""
        likelihoods = self.likelihoods(kind)
        assert likelihoods is not None
        if arm == "oracle":
            return {"log_likelihood": oracle(likelihoods, texts)}
        rate, temperature = FILTERS[arm], 1.0
        if rate is None:
            held_out = self.likelihoods(kind, validation=True)
            if held_out is None:
                raise InputError(
                    f"there are no validation texts of kind {kind} to choose the switch rate with; give a run with more"
                )
            rate = held_out.best_switch_rate()
            if arm == TEMPERED:
                pairs = [(value, heat) for value in RATES for heat in TEMPERATURES]
                rate, temperature = max(
                    pairs, key=lambda pair: float(held_out.at(pair[0], temperature=pair[1]).log_evidence.sum())
                )
        filtered = likelihoods.at(rate, temperature=temperature)
        best = [row.argmax(1) for row in filtered.predicted]
        found = {"log_likelihood": float(filtered.log_evidence.sum()), "switch_rate": rate, "temperature": temperature}
        return found | until_found(best, texts)

    def adapter(self, arm: str) -> tuple[BoRA, Weights | None]:
        """The model and the weights of an arm that reads every token in the same way."""
        model, (theta, mean) = self.fitted.model, self.theta
        if arm in self.pooled:
            return self.pooled[arm].model, self.pooled[arm].weights()[0]
        if arm == "average":
            even = self._routed(MeteoRA(model.num_tasks, execution="dense"))
            return even, theta | gates_of({name: self._rows(start) for name, start in even.starts.items()})
        of_mean = {name: value[None].expand_as(theta[name]) for name, value in mean.items()}
        return model, None if arm == "base" else of_mean

    def costs(self, arm: str) -> dict[str, float]:
        """Tokens a second, and the numbers of the adapters: those that a token is multiplied by, and all."""
        model, tasks = self.fitted.model, self.fitted.model.num_tasks
        one = sum(start.numel() for start in model.starts.values())
        gates = tasks * sum(slot.in_features * slot.layers for slot in model.backbone.slots)
        active, total = {
            "oracle": (one, tasks * one),
            **dict.fromkeys(FILTERS, (tasks * one, tasks * one)),
            **{name: (k * one + gates, tasks * one + gates) for name, k in GATES.items()},
            "average": (tasks * one, tasks * one),
            "theta": (one, one),
            "base": (0, 0),
        }.get(arm) or self._numbers_of_pooled(arm)
        return {"active_parameters": active, "total_parameters": total, "tokens_per_second": self.speeds[arm]}

    def _numbers_of_pooled(self, arm: str) -> tuple[int, int]:
        model = self.pooled[arm].model
        total = sum(start.numel() for start in model.starts.values())
        known = isinstance(model.adapter, LoRA | SMoRA)
        return active_parameters(model.adapter, model.backbone) if known else total, total

    @cached_property
    def speeds(self) -> dict[str, float]:
        """Tokens a second of each arm on some test documents, the best of several passes. All filters read alike.

        The arms take turns. On a CPU the time is that of the processor, which other processes do not use. The gates are random,
        so that each adapter is chosen as often.
        """
        split = self.data.test.subset(torch.arange(min(SAMPLE, len(self.data.test))))
        arms = [arm for arm in self.arms if arm not in FILTERS or arm == "filter"]
        readers, best = {arm: self._reader(arm, split) for arm in arms}, dict.fromkeys(arms, math.inf)
        clock = time.process_time if self.fitted.model.backbone.device.type == "cpu" else time.perf_counter
        for _ in range(PASSES):
            for arm, read in readers.items():
                start = clock()
                read()
                best[arm] = min(best[arm], clock() - start)
        found = {arm: split.num_tokens / seconds for arm, seconds in best.items()}
        return found | dict.fromkeys(FILTERS, found["filter"])

    def _reader(self, arm: str, split: TokenSplit) -> Callable[[], object]:
        if arm == "filter":
            return lambda: token_likelihoods(self.fitted, split, prior=self.config.prior).at(0.01).log_evidence
        if arm == "oracle":
            return lambda: evaluate(self.fitted.model, split, self.theta[0])
        if arm in GATES:
            routed = self._routed(MeteoRA(GATES[arm]))
            generator = torch.Generator().manual_seed(0)
            gates = gates_of({name: self._rows(start) for name, start in routed.starts.items()})
            random = {name: torch.randn(value.shape, generator=generator).to(value.device) for name, value in gates.items()}
            return lambda: evaluate(routed, split, self.theta[0] | random)
        model, of_arm = self.adapter(arm)
        return lambda: evaluate(model, split, of_arm)

    def _routed(self, router: MeteoRA) -> BoRA:
        return routed_model(self.fitted.model, FrozenAdapters(*self.theta), router)

    def _rows(self, start: Tensor) -> Tensor:
        """Zeros for each task."""
        return torch.zeros(self.fitted.model.num_tasks, *start.shape, device=self.fitted.model.backbone.device)


def places(split: TokenSplit, text: int) -> Tensor:
    """The places of the predicted tokens of a text."""
    return (split.labels(text) >= 0).nonzero()[:, 0]


def oracle(likelihoods: TokenLikelihoods, texts: Texts) -> float:
    """log p of all tokens, each under the adapter of its task, in nats."""
    every = likelihoods.log_likelihood[:, :, 0]
    return sum(float(every[n, : len(task)].gather(1, task[:, None]).sum()) for n, task in enumerate(texts.task))
