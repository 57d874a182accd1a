"""One sequence of tasks under one method, in a process of its own (``compare_continual.py``).

    python scripts/experiments/continual_arms.py --arm osft --learning_rate 0.01 --result sequence.json

The methods:

- ``osft``: :func:`~bora_pyro.exchange.continual.continual_fit`: each adapter leaves the base's leading directions alone.
- ``sequential``: the same without preserved directions: LoRA after LoRA, each merged.
- ``o_lora``: as ``sequential``, with a penalty on what the rows of A have in common with those of earlier tasks: the idea of
  O-LoRA (Wang et al., 2023, arXiv 2310.14152). Earlier rows are the right singular vectors of the merged changes.
- ``online_bayes``: one LoRA for all tasks. Its posterior after a task is the prior of the next: a Normal around the MAP whose
  precision is that of the prior plus the diagonal Fisher information (online Laplace; elastic weight consolidation is the same
  with other weights). It begins with precision ``--prior_precision``.
- ``pooled``: one LoRA for all tasks at once, which no sequence can know: what is lost by the sequence.

What is written: the losses of the validation and test documents of each task after each stage, in nats per token.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from bora_pyro import BoRA, Fitted, Given, Independent, InputError, LoRA, Pooled, evaluate, fit
from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.backbone.slots import Slot
from bora_pyro.data import TaskData
from bora_pyro.data.subset import subset
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import check_one_of
from bora_pyro.exchange.continual import continual_fit
from bora_pyro.files.atomic import replace_file
from bora_pyro.guides.curvature import diagonal_fisher
from bora_pyro.inference.options import FitOptions
from bora_pyro.model import Weights
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option, part_of
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.map_fit import MapFitConfig

ARMS = ("osft", "sequential", "o_lora", "online_bayes", "pooled")


@dataclass(kw_only=True)
class SequenceOptions:
    """What all sequences of a comparison share."""

    fit_config: str = option("results/averaged_documentation.yaml", "YAML file of the options that all fits share")
    data: str | None = option(None, "the documents (default: as in fit_config)")
    order: list[str] = option(["utils", "generators", "drawing", "classes", "algorithms"], "the tasks in their order", whole=True)
    penalty: float = option(0.5, "strength of o_lora's penalty", positive=True)
    prior_precision: float = option(1.0, "precision of online_bayes's first prior", positive=True)
    preserve_from: float = option(0.3, "osft: the share of the directions that the first task leaves alone")
    preserve_to: float = option(0.7, "osft: the share that the last task leaves alone")
    threads: int = option(1, "CPU threads", least=1)

    def fit(self, **changes: Any) -> MapFitConfig:
        """The options of the fits."""
        if not Path(self.fit_config).is_file():
            raise InputError(f"fit_config {self.fit_config} does not exist; give a YAML file of map_fit.py's options")
        given = {"data": self.data, "threads": self.threads} | changes
        pairs = ((f"--{name}", str(value)) for name, value in given.items() if value is not None)
        return parse_config(MapFitConfig, ["--config", self.fit_config, *(word for pair in pairs for word in pair)])


@dataclass(kw_only=True)
class ArmConfig(SequenceOptions):
    """Fit one sequence of tasks under one method."""

    arm: str = option("osft", "the method", choices=ARMS)
    learning_rate: float = option(0.01, "AdamW's largest learning rate", positive=True)
    seed: int = option(0, "seed of the split, the starts and the order of the documents", least=0)
    result: str = option("sequence.json", "the JSON file to write", filled=True)

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)


@dataclass(frozen=True)
class OrthogonalLoRA(LoRA):
    """LoRA whose log-density falls with the squared products of the rows of A and the rows that earlier tasks have used.

    Args:
        earlier: orthonormal rows (k, in) by path of a layer; layers without earlier rows have none.
        penalty: the strength, in nats.
    """

    earlier: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    penalty: float = 0.5

    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        start = super().start(slot, weight, generator)
        return Start(start.latents, fixed={"earlier": self.earlier[slot.paths[0]]})

    def log_factor(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return -self.penalty * (tensors["lora_A"] @ tensors["earlier"].mT).square().sum((-2, -1))


class Sequence:
    """The tasks, the base, and the options of one method."""

    def __init__(self, config: ArmConfig) -> None:
        self.config = config
        whole = config.fit(learning_rate=config.learning_rate, seed=config.seed)
        model, data = build_run(whole, quiet=True)
        self.backbone: Backbone = model.backbone
        self.data: TaskData = subset(data, config.order)
        self.places = [self.data.tasks.index(task) for task in config.order]
        self.rank, self.options = whole.rank, vars(part_of(whole, FitOptions))
        self.judge = BoRA(self.backbone, self.data.num_tasks, adapter=LoRA(rank=1), prior=Independent())
        self.seconds = 0.0

    def losses(self, model: BoRA, weights: Weights | None) -> dict[str, list[float]]:
        """Losses of the validation and test documents of the tasks in their order, all read with one adapter or none."""
        every = None if weights is None else {name: v.expand(self.data.num_tasks, *v.shape) for name, v in weights.items()}

        def of(split: TokenSplit) -> list[float]:
            (scores,) = evaluate(model, split, every)
            return [math.log(scores.perplexity(d) or math.nan) for d in self.places]

        return {"validation": of(self.data.validation), "test": of(self.data.test)}

    def alone(self, task: str, model: BoRA) -> Fitted:
        """A fit of one task."""
        fitted = fit(model, subset(self.data, [task]), **self.options)
        self.seconds += fitted.seconds
        return fitted

    def merged(self) -> Iterator[dict[str, list[float]]]:
        """The losses after each stage of ``osft``, ``sequential`` or ``o_lora``."""
        config, earlier = self.config, dict[str, Tensor]()
        first, last = (config.preserve_from, config.preserve_to) if config.arm == "osft" else (0.0, 0.0)
        steps = max(1, len(config.order) - 1)
        for t, task in enumerate(config.order):
            adapter = LoRA(rank=self.rank)
            if earlier:
                adapter = OrthogonalLoRA(rank=self.rank, earlier=earlier, penalty=config.penalty)
            share, before = first + (last - first) * t / steps, self._weights()
            done = continual_fit(self.backbone, self.data, order=[task], adapter=adapter, preserve=(share, share), **self.options)
            self.seconds += done.stages[0].seconds
            if config.arm == "o_lora":
                earlier = self._rows(before, earlier)
            yield self.losses(self.judge, None)

    def _weights(self) -> dict[str, Tensor]:
        slots = self.backbone.slots
        return {path: self.backbone.weight(slot, n).clone() for slot in slots for n, path in enumerate(slot.paths)}

    def _rows(self, before: Mapping[str, Tensor], earlier: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows that the tasks so far have used. Those of the newest one are its change's right singular vectors."""
        found = {}
        for path, weight in self._weights().items():
            rows = torch.linalg.svd(weight - before[path], full_matrices=False)[2][: self.rank]
            found[path] = torch.cat([earlier[path], rows]) if path in earlier else rows
        return found

    def online_bayes(self) -> Iterator[dict[str, list[float]]]:
        """The losses after each stage, with one adapter whose prior is the posterior of the task before."""
        model = BoRA(self.backbone, 1, adapter=LoRA(rank=self.rank), prior=Given({}, {}), seed=self.config.seed)
        mean = dict(model.starts)
        precision = {name: torch.full_like(value, self.config.prior_precision) for name, value in mean.items()}
        for task in self.config.order:
            model.prior = Given(mean, precision)
            fitted = self.alone(task, model)
            theta, _ = fitted.weights()
            fisher = diagonal_fisher(model, theta, subset(self.data, [task]).train)
            mean = {name: value[0].clone() for name, value in theta.items()}
            precision = {name: value + fisher[name][0] for name, value in precision.items()}
            yield self.losses(model, mean)

    def pooled(self) -> Iterator[dict[str, list[float]]]:
        """The losses of one adapter that is fitted to all tasks at once."""
        model = BoRA(self.backbone, self.data.num_tasks, adapter=LoRA(rank=self.rank), prior=Pooled(), seed=self.config.seed)
        fitted = fit(model, self.data, **self.options)
        self.seconds += fitted.seconds
        yield self.losses(model, fitted.weights()[1])

    def stages(self) -> Iterator[dict[str, list[float]]]:
        """The losses after each stage of the method."""
        check_one_of("arm", self.config.arm, ARMS)
        if self.config.arm in ("online_bayes", "pooled"):
            return self.online_bayes() if self.config.arm == "online_bayes" else self.pooled()
        return self.merged()


def main(argv: list[str]) -> int:
    """Fit the sequence and write the losses."""
    try:
        config = parse_config(ArmConfig, argv, prog="continual_arms.py")
        torch.set_num_threads(config.threads)
        begin, sequence = time.perf_counter(), Sequence(config)
        found = {"base": sequence.losses(sequence.judge, None), "stages": list(sequence.stages())}
        about = {"seconds": time.perf_counter() - begin, "fit_seconds": sequence.seconds, "digest": sequence.data.digest}
        text = json.dumps(found | about | {"order": config.order})
        replace_file(Path(config.result), lambda file: file.write_text(text, encoding="utf-8"))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_script(main)
