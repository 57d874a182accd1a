"""The arms of ``compare_federated.py``, and how one is fitted and scored.

>>> arms = arms_of(["pooled", "fedit"], clients=["task"], ranks=[8], local_steps=[1, 10], epsilons=[math.inf, 3.0])
>>> [arm.name for arm in arms]
['pooled r8', 'fedit task r8 E1', 'fedit task r8 E1 eps3', 'fedit task r8 E10', 'fedit task r8 E10 eps3']

``fedit``, ``ffa``, ``exact_product`` and ``bora`` are the strategies of ``bora federated``. ``bora_fixed`` is bora with a given
τ, and ``bora_rate_3`` has the server rate 3. Three arms have no rounds: ``alone`` (an adapter for each client, τ = 0), ``pooled``
(one adapter for all documents in one place) and ``hierarchy`` (BoRA with a learned τ, all documents in one place). One of their
steps reads as many tokens as one step of all clients together, and they take as many steps as a client.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bora_pyro.data import TaskData
from bora_pyro.data.split_names import SPLITS
from bora_pyro.data.subset import subset, tasks_to_leave_out
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.federated.deal import TASK
from bora_pyro.federated.loop import Federation
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.strategies import STRATEGIES
from bora_pyro.inference.adapt import adapt
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fit import fit
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.options import FitOptions
from bora_pyro.model import BoRA
from bora_pyro.options.field import part_of
from bora_pyro.priors import Independent, LearnedPrecision, Prior, prior_from_tau
from bora_pyro.runs.build import adapter_of, build_run
from bora_pyro.runs.config.federated import FederatedConfig

FIXED, SERVER_RATE = "bora_fixed", "bora_rate_3"
ALONE, POOLED, HIERARCHY = CENTRAL = ("alone", "pooled", "hierarchy")
PRIVATE = ("ffa", "fedit")
NAMES = ("fedit", "ffa", "exact_product", "bora", "bora_noncentered", FIXED, SERVER_RATE, *CENTRAL)
#: How clients are made, besides a number of clients to which whole tasks are dealt.
DIRICHLET = "dirichlet"


@dataclass(frozen=True)
class Arm:
    """A strategy in one cell of the grid.

    Attributes:
        kind: one of ``NAMES``.
        clients: ``task``, ``dirichlet``, or a number.
        rank: the rank r.
        local_steps: E; None for arms without rounds.
        epsilon: ε; inf: no privacy.
    """

    kind: str
    clients: str
    rank: int
    local_steps: int | None = None
    epsilon: float = math.inf

    @property
    def name(self) -> str:
        """Its name in the table."""
        parts = [self.kind, *([self.clients] if self.kind != POOLED else []), f"r{self.rank}"]
        parts += [] if self.local_steps is None else [f"E{self.local_steps}"]
        return " ".join([*parts, *([] if math.isinf(self.epsilon) else [f"eps{self.epsilon:g}"])])


def arms_of(
    kinds: Sequence[str],
    *,
    clients: Sequence[str],
    ranks: Sequence[int],
    local_steps: Sequence[int],
    epsilons: Sequence[float],
) -> list[Arm]:
    """The arms of a grid, each once."""

    def every() -> Iterator[Arm]:
        for kind in kinds:
            for how in clients if kind != POOLED else [TASK]:
                for rank in ranks:
                    if kind in CENTRAL:
                        yield Arm(kind, how, rank)
                        continue
                    for steps in local_steps:
                        yield from (Arm(kind, how, rank, steps, e) for e in epsilons if math.isinf(e) or kind in PRIVATE)

    return list(dict.fromkeys(every()))


@dataclass(frozen=True)
class Setting:
    """What all fits of a seed share.

    Attributes:
        options: the options of ``bora federated``, without those of the arms.
        total_steps: steps of a client in the whole fit.
        dirichlet: number of clients and concentration of the skewed clients.
        tau: τ of ``bora_fixed``.
        private: the options of the private arms.
        new_tasks: number of tasks that are left out.
        adapt_steps: steps of a new client; 0: new clients get no adapter of their own.
        adapt_rates: learning rates of these steps; the validation documents of the new clients choose.
    """

    options: FederatedConfig
    total_steps: int
    dirichlet: tuple[int, float]
    tau: float
    private: dict[str, Any]
    new_tasks: int
    adapt_steps: int
    adapt_rates: tuple[float, ...]

    def of(self, arm: Arm, rate: float) -> FederatedConfig:
        """The options of ``bora federated`` for an arm; for an arm without rounds those of its documents and its adapter."""
        strategy = arm.kind.removesuffix("_fixed").removesuffix("_rate_3") if arm.kind not in CENTRAL else "fedit"
        steps = arm.local_steps or 1
        own: dict[str, Any] = {"strategy": strategy, "rank": arm.rank, "learning_rate": rate}
        own |= {"local_steps": steps, "rounds": self.total_steps // steps, "clients": arm.clients}
        if arm.clients == DIRICHLET:
            own |= {"clients": str(self.dirichlet[0]), "dirichlet": self.dirichlet[1]}
        if arm.kind == FIXED:
            own["tau"] = self.tau
        if arm.kind == SERVER_RATE:
            own["server_rate"] = 3.0
        if not math.isinf(arm.epsilon):
            own |= self.private | {"epsilon": arm.epsilon, "noise_seed": self.options.seed}
        return dataclasses.replace(self.options, **own).resolved


class Fits:
    """The base, the documents, and the fits of one seed."""

    def __init__(self, setting: Setting) -> None:
        self.setting, seed = setting, setting.options.seed
        self.built, self.data = build_run(setting.options.map_fit, quiet=True)
        left_out = tasks_to_leave_out(self.data, setting.new_tasks, seed=seed)
        self.new = subset(self.data, left_out)
        self.old = subset(self.data, [task for task in self.data.tasks if task not in left_out])
        self._dealt: dict[tuple[str, str], TaskData] = {}
        for what, data in (("in the fits", self.old), ("new clients", self.new)):
            numbers = ", ".join(f"{getattr(data, name).num_documents} {name}" for name in SPLITS)
            print(f"seed {seed}, {what}: {data.num_tasks} tasks ({', '.join(data.tasks)}); documents: {numbers}", file=sys.stderr)

    def row(self, arm: Arm, rate: float) -> dict[str, Any]:
        """Fit an arm and score it."""
        config = self.setting.of(arm, rate)
        data = self._regrouped(config)
        dealt = config.deal(data)
        fitted, row = self.central(arm, config, data, len(dealt)) if arm.kind in CENTRAL else self.federated(config, data, dealt)
        validation = fitted.evaluate(data.validation, name="validation")["validation_perplexity"]
        scores = fitted.evaluate(data.test)
        row |= {name: scores[name] for name in ("test_perplexity", "base_test_perplexity")}
        row |= {"validation_perplexity": validation, "best_round": fitted.best_epoch, "seconds": fitted.seconds}
        row |= {"kind": arm.kind, "split": arm.clients, "clients": len(dealt), "rank": arm.rank}
        row |= {"local_steps": arm.local_steps, "tau": fitted.tau(), "train_documents": data.train.num_documents}
        row |= {"test_tokens": data.test.num_tokens, "new_test_tokens": self.new.test.num_tokens}
        return row | self.of_new(arm, fitted) | {"arm": arm.name, "documents_digest": self.data.digest}

    def _regrouped(self, config: FederatedConfig) -> TaskData:
        """The documents by the tasks of a fit; the note on how they were spread is printed once."""
        key = (config.clients, str(config.dirichlet))
        if key not in self._dealt:
            self._dealt[key] = config.regroup(self.old)
            if config.dirichlet is not None:
                print(f"note: {self._dealt[key].notes[-1]}", file=sys.stderr)
        return self._dealt[key]

    def model(self, config: FederatedConfig, prior: Prior, tasks: int) -> BoRA:
        """The model before a fit."""
        likelihood = self.built.likelihood.with_task_weights(None)
        return BoRA(
            self.built.backbone, tasks, adapter=adapter_of(config.map_fit), prior=prior, likelihood=likelihood, seed=config.seed
        )

    def federated(self, config: FederatedConfig, data: TaskData, dealt: dict[str, list[str]]) -> tuple[Fitted, dict[str, Any]]:
        """A federated fit, as ``bora federated`` makes it."""
        if isinstance(config.tau, str):
            prior: Prior = LearnedPrecision(config.tau_per, config.tau_start)
        else:
            prior = prior_from_tau(config.tau)
        model, options = self.model(config, prior, data.num_tasks), part_of(config, FederatedOptions)
        fitted = Federation(model, data, STRATEGIES[config.strategy](), options, clients=dealt).run()
        history = fitted.history
        row: dict[str, Any] = {"rounds": len(history), "lost": max((entry.get("lost", 0.0) for entry in history), default=0.0)}
        row |= {name: sum(entry[name] for entry in history) for name in ("uploaded_bytes", "downloaded_bytes")}
        if options.private:
            spent = history[-1]["privacy"]
            noise = [client["noise_multiplier"] for client in spent["clients"].values()]
            row |= {"epsilon": spent["epsilon"], "delta": spent["delta"], "noise_multiplier": max(noise)}
        return fitted, row

    def central(self, arm: Arm, config: FederatedConfig, data: TaskData, clients: int) -> tuple[Fitted, dict[str, Any]]:
        """A fit of all documents in one place."""
        priors: dict[str, Prior] = {ALONE: Independent(), POOLED: prior_from_tau(math.inf)}
        priors[HIERARCHY] = LearnedPrecision(config.tau_per, config.tau_start)
        budget = config.token_budget * clients
        steps = len(data.train.batches(token_budget=budget, seed=config.seed))
        options = dataclasses.replace(
            part_of(config.map_fit, FitOptions), token_budget=budget, epochs=-(-self.setting.total_steps // steps), patience=0,
            gradient_norm=False,
        )  # fmt: skip
        return fit(self.model(config, priors[arm.kind], data.num_tasks), data, options), {}

    def of_new(self, arm: Arm, fitted: Fitted) -> dict[str, float | None]:
        """Perplexities of the test documents of new clients: under the base, the common adapter, and their own."""
        common = fitted.model.starts if arm.kind == ALONE else fitted.weights()[1]
        begin = copy.copy(fitted.model)
        begin.num_tasks, begin.prior, begin.starts = self.new.num_tasks, Independent(), dict(common)
        rows = {name: value.expand(self.new.num_tasks, *value.shape) for name, value in common.items()}
        row = {"new_base": _perplexity(begin, self.new.test, None)}
        row["new_common"] = None if arm.kind == ALONE else _perplexity(begin, self.new.test, rows)
        if self.setting.adapt_steps:
            own = min((self.adapted(arm, fitted, begin, rate) for rate in self.setting.adapt_rates), key=_validation)
            row["new_adapted"] = _perplexity(own.model, self.new.test, own.weights()[0])
        return row

    def adapted(self, arm: Arm, fitted: Fitted, begin: BoRA, rate: float) -> Fitted:
        """Adapters of the new clients, fitted to their training documents.

        Their validation documents choose the epoch, and the start counts too.

        Under ``bora`` and ``hierarchy`` Θ and τ of the fit are the prior. The others have no τ: the adapters begin at the common
        one, those of ``alone`` at the usual start, and nothing holds them there.
        """
        steps, seed, budget = self.setting.adapt_steps, self.setting.options.seed, self.setting.options.token_budget
        options: dict[str, Any] = {"learning_rate": rate, "token_budget": budget, "seed": seed, "patience": 0}
        if arm.kind != ALONE and not math.isinf(fitted.tau()):
            return adapt(fitted, self.new, steps=steps, **options)
        epochs = -(-steps // len(self.new.train.batches(token_budget=budget, seed=seed)))
        return fit(begin, self.new, epochs=epochs, gradient_norm=False, **options)


def _validation(fitted: Fitted) -> float:
    assert fitted.validation_score is not None
    return fitted.validation_score


def _perplexity(model: BoRA, split: TokenSplit, theta: dict[str, Tensor] | None) -> float | None:
    (scores,) = evaluate(model, split, theta)
    return scores.perplexity()
