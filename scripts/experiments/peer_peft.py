"""The arms of ``compare_peers.py`` through PEFT: which adapters are trained on which documents, and from which start."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from peer_lora import Batches, Best, Lora
from peer_names import with_names
from peer_options import SOUPS, THROUGH_PEFT
from peer_outcome import Outcome, folder_bytes, one
from torch import Tensor

from bora_pyro.adapters import LoRA
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.model import BoRA, Weights
from bora_pyro.priors import Pooled
from bora_pyro.runs.config.map_fit import MapFitConfig


class Peft:
    """The arms through PEFT of one seed and learning rate."""

    def __init__(self, template: BoRA, data: TaskData, config: MapFitConfig) -> None:
        self.data, self.config, self.backbone = data, config, template.backbone
        self.starts = template.starts
        self.scaling = 1.0 if config.alpha is None else config.alpha / config.rank

    def lora(self, rank: int) -> Lora:
        """A new adapter. At the rank of the other arms it begins where they begin, at a start like PEFT's own."""
        lora = Lora(self.backbone, rank=rank, alpha=self.scaling * rank, seed=self.config.seed)
        if rank == self.config.rank:
            lora.load(self.starts)
            lora.start = {name: value.clone() for name, value in lora.weights().items()}
        self.plain = BoRA(self.backbone, self.data.num_tasks, adapter=LoRA(rank, self.scaling * rank), prior=Pooled())
        return lora

    def for_all(self, weights: Weights) -> Weights:
        """One adapter as that of every task."""
        return {name: value.expand(self.data.num_tasks, *value.shape) for name, value in weights.items()}

    def score(self, data: TaskData, task: int | None = None) -> Callable[[Weights], float]:
        """A function that returns the validation perplexity of one adapter, on all documents or on those of a task."""
        documents = None if task is None else (data.validation.task == task).nonzero()[:, 0]

        def perplexity(weights: Weights) -> float:
            [scores] = evaluate(self.plain, data.validation, self.for_all(weights), documents=documents)
            found = scores.perplexity(task)
            return math.inf if found is None or math.isnan(found) else found

        return perplexity

    def one(self, arm: str, *, rank: int | None = None, data: TaskData | None = None, epochs: int | None = None) -> Outcome:
        """One LoRA for all tasks."""
        rank, epochs, start = rank or self.config.rank, epochs or self.config.epochs, time.perf_counter()
        lora, documents = self.lora(rank), data or self.data
        batches = Batches.of(documents.train, self.data.train, self.config, range(epochs), None)
        best, tokens = lora.train(batches, self.score(documents), self.config)
        seconds = time.perf_counter() - start
        difference = lora.difference(documents.train.document(0)[None])
        self.last = lora
        return Outcome(
            arm, self.plain, self.for_all(best.weights), best.perplexity, lora.parameters, lora.folder_bytes(), tokens, seconds,
            best.epoch, float(best.averaged), {"logit_difference": difference, "rank": rank}, data,
        )  # fmt: skip

    def each(self, arm: str, *, first: int = 0, start_at: Weights | None = None, lora: Lora | None = None) -> Outcome:
        """One LoRA a task, each trained on its rows of every batch, and stopped by its own validation documents.

        Args:
            arm: the name of the arm.
            first: the first epoch; the order of the documents goes on from there.
            start_at: the adapter from which every task starts; default: PEFT's start, the same for all tasks.
            lora: the adapter to use; default: a new one.
        """
        start, lora = time.perf_counter(), lora or self.lora(self.config.rank)
        found, tokens = list[Best](), 0
        for task in range(self.data.num_tasks):
            lora.load(start_at or lora.start)
            batches = Batches.of(self.data.train, self.data.train, self.config, range(first, self.config.epochs), task)
            best, seen = lora.train(batches, self.score(self.data, task), self.config)
            found.append(best)
            tokens += seen
        seconds, number = time.perf_counter() - start, len(found)
        theta = {name: torch.stack([best.weights[name] for best in found]) for name in lora.start}
        return Outcome(
            arm, self.plain, theta, self.of_all(self.plain, theta), number * lora.parameters, number * lora.folder_bytes(),
            tokens, seconds, sum(best.epoch for best in found) / number, sum(best.averaged for best in found) / number,
            {"logit_difference": lora.difference(self.data.train.document(0)[None]), "rank": self.config.rank},
        )  # fmt: skip

    def of_all(self, model: BoRA, theta: Weights) -> float:
        """Validation perplexity of the adapters of all tasks."""
        found = evaluate(model, self.data.validation, theta)[0].perplexity()
        return math.inf if found is None else found

    def soups(self, each: Outcome) -> list[Outcome]:
        """The mean of the tasks' adapters: of (A, B), and of the changes B A, which is an adapter of rank D r."""
        assert each.theta is not None
        number, lora = self.data.num_tasks, each.theta
        mean = {name: value.mean(0) for name, value in lora.items()}
        # ΔW = (α/r) Σ_d B_d A_d / D: the factors side by side
        wide = {
            name: value.transpose(0, 1).flatten(1, 2) if name.endswith("lora_A") else _side_by_side(value) / number
            for name, value in lora.items()
        }
        rank = number * self.config.rank
        whole: Any = BoRA(self.backbone, number, adapter=LoRA(rank, self.scaling * rank), prior=Pooled())
        found = []
        for arm, model, weights in zip(SOUPS, (each.model, whole), (mean, wide), strict=True):
            theta = self.for_all(weights)
            change: dict[str, Any] = {"arm": arm, "model": model, "theta": theta, "validation": self.of_all(model, theta)}
            change |= {"adapter_bytes": folder_bytes(model, weights), "more": {"rank": model.adapter.rank}}
            found.append(dataclasses.replace(each, **change))
        return found

    def one_then_each(self, arm: str) -> Outcome:
        """Half of the epochs one LoRA for all tasks, then one a task from there. Each half has a schedule of its own."""
        epochs = self.config.epochs
        if epochs < 2:
            raise InputError(f"epochs is {epochs}; {arm} divides the epochs in two: give 2 or more")
        half = -(-epochs // 2)
        first = self.one(arm, epochs=half)
        assert first.theta is not None
        second = self.each(arm, first=half, start_at=one(first.theta, 0), lora=self.last)
        second.tokens, second.seconds = first.tokens + second.tokens, first.seconds + second.seconds
        second.epoch = first.epoch + second.epoch
        return second

    def task_id(self, arm: str) -> Outcome:
        """One LoRA, and the name of the task as the first line of each document."""
        return self.one(arm, data=with_names(self.data, self.backbone))

    def big(self, arm: str) -> Outcome:
        """One LoRA with as many parameters as one a task, as far as the layers have room for its rank."""
        room = min(min(slot.in_features, slot.out_features) for slot in self.backbone.slots)
        return self.one(arm, rank=min(self.data.num_tasks * self.config.rank, room))


def _side_by_side(value: Tensor) -> Tensor:
    """(D, layers, out, r) -> (layers, out, D r)."""
    return value.permute(1, 2, 0, 3).flatten(2)


#: The arms through PEFT: a function of :class:`Peft` and the name of the arm.
PEFT_ARMS: dict[str, Callable[[Peft, str], Outcome]] = dict(
    zip(THROUGH_PEFT, (Peft.one, Peft.each, Peft.one_then_each, Peft.task_id, Peft.big), strict=True)
)
