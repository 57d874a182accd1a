"""The configuration of a federated fit.

>>> config = parse_config(FederatedConfig, ["--strategy", "ffa", "--clients", "4"])
>>> config.dealt, config.resolved.adapter, config.map_fit.tau
(4, 'lora_frozen_a', inf)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Self

from bora_pyro.adapters import ADAPTERS, FrozenALoRA, LoRA
from bora_pyro.data.options import DataOptions
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError, shown
from bora_pyro.federated.deal import TASK, deal
from bora_pyro.federated.options import FEDERATION, FederatedOptions
from bora_pyro.federated.privacy import TAU_HAS_NO_NOISE
from bora_pyro.federated.privacy_options import PRIVACY
from bora_pyro.federated.spread import BOUNDS, spread
from bora_pyro.federated.strategies import FFA, STRATEGIES
from bora_pyro.inference.options import RUN
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import by_heading, changed, check_fields, option, part_of
from bora_pyro.runs.config.groups import HEADINGS, LEARNED, BaseOptions, PriorOptions, RunOptions, SourceOptions
from bora_pyro.runs.config.map_fit import MapFitConfig

__all__ = ["FederatedConfig", "parse_config"]


@dataclass(kw_only=True)
class FederationOptions(FederatedOptions, BaseOptions):
    """What a federated fit is, whether it is simulated or runs between processes: base, adapter, prior and rounds."""

    strategy: str = option(
        "bora_noncentered",
        "what clients learn: an adapter for each task around a common Theta, with copies of Theta that the server averages "
        "(bora_noncentered), or by turns with the server (bora); or one adapter for all, whose B is averaged under a fixed A "
        "(ffa), whose A and B are averaged apart (fedit), or whose B A is averaged and cut to the rank (exact_product)",
        group=FEDERATION,
        choices=tuple(STRATEGIES),
    )
    tau: float | str = changed(
        PriorOptions,
        "tau",
        LEARNED,
        "under bora, precision of the prior theta_d ~ Normal(Theta, I/tau): learned, or a number (the other strategies have one "
        "adapter for all clients)",
        expects="learned, or a number",
    )
    tau_per: str = changed(
        PriorOptions,
        "tau_per",
        "site",
        "what gets a tau of its own when tau is learned; a site is one factor of one kind of layer",
        choices=("site", "layer", "model"),
    )
    tau_start: float = changed(PriorOptions, "tau_start", 100.0)
    likelihood: str = changed(PriorOptions, "likelihood", "causal_lm")
    likelihood_option: list[str] | None = changed(PriorOptions, "likelihood_option", None)
    likelihood_unit: str = changed(PriorOptions, "likelihood_unit", "tokens")
    option_score: str | None = changed(PriorOptions, "option_score", None)
    threads: int | None = changed(RunOptions, "threads", None)

    def validate(self) -> None:
        """Check every value that can be checked without the data and the model.

        Raises:
            InputError: one line with the value and what is allowed.
        """
        check_fields(self)
        part_of(self, FederatedOptions).validate()
        if self.shard_base:
            raise InputError("shard_base is true, but a federated fit runs in one process; leave it out")
        personal = STRATEGIES[self.strategy].personal
        if not personal and self.tau not in (LEARNED, math.inf):
            raise InputError(
                f"tau is {self.tau:g}, but strategy {self.strategy} has one adapter for all clients; leave tau out, or give "
                "--strategy bora"
            )
        if personal and self.tau in (0, math.inf):
            raise InputError(
                f"tau is {self.tau:g}, a limit that strategy {self.strategy} does not have; give learned or a number, or "
                "--strategy ffa for one adapter for all clients"
            )
        if personal and self.private and self.tau == LEARNED:
            raise InputError(TAU_HAS_NO_NOISE)
        self.map_fit.validate()

    @property
    def resolved(self) -> Self:
        """The configuration with the adapter and the τ of its strategy, as it is written into the run folder."""
        if STRATEGIES[self.strategy].personal:
            return self
        frozen = STRATEGIES[self.strategy] is FFA and ADAPTERS.get(self.adapter) is LoRA
        name = next(name for name, adapter in ADAPTERS.items() if adapter is FrozenALoRA)
        return dataclasses.replace(self, tau=math.inf, adapter=name if frozen else self.adapter)

    @property
    def map_fit(self) -> MapFitConfig:
        """The configuration of a MAP fit with the same documents, base, adapter and prior."""
        names = {field.name for field in dataclasses.fields(self)} & {field.name for field in dataclasses.fields(MapFitConfig)}
        resolved = self.resolved
        return MapFitConfig(**{name: getattr(resolved, name) for name in names})


@by_heading(*HEADINGS[:-2], FEDERATION, PRIVACY, *HEADINGS[-2:])
@dataclass(kw_only=True)
class FederatedConfig(FederationOptions, DataOptions, SourceOptions):
    """Simulate a federated fit: clients keep the documents of their tasks, and a server sees only tensors. No checkpoints."""

    clients: str = option(
        TASK,
        "which client has which tasks: task, a client for each task; or a number N, the tasks are shuffled by the seed and dealt "
        "to N clients",
        group=FEDERATION,
        expects="task, or a whole number from 1 up",
    )
    dirichlet: float | None = option(
        None,
        "with a number of clients: spread the documents of each task over the clients by proportions from a Dirichlet of this "
        "concentration, in place of whole tasks; what a client has is then one task; a small value is skewed (default: whole "
        "tasks)",
        group=FEDERATION,
        positive=True,
    )
    task_weights: str | None = changed(PriorOptions, "task_weights", None)
    export_adapters: bool = changed(MapFitConfig, "export_adapters", True)
    output_dir: str = changed(RunOptions, "output_dir", "runs/federated")
    overwrite: bool = changed(RunOptions, "overwrite", False)
    resume: bool = option(
        False, "not possible: a federated fit has no checkpoints; start it again with --overwrite true", group=RUN
    )

    def validate(self) -> None:
        """Check every value that can be checked without the data and the model.

            >>> FederatedConfig(strategy="ffa", tau=100.0).validate()
            Traceback (most recent call last):
            bora_pyro.errors.InputError: tau is 100, but strategy ffa has one adapter for all clients; leave tau out, or give ...

        Raises:
            InputError: one line with the value and what is allowed.
        """
        if self.resume:
            raise InputError("resume is true, but a federated fit has no checkpoints; start it again with --overwrite true")
        super().validate()
        check_no_groups(self.task_group_column)
        if self.dealt != TASK and (not isinstance(self.dealt, int) or self.dealt < 1):
            raise InputError(f"clients is {shown(self.clients)}; give task (a client for each task), or a whole number from 1 up")
        if self.dirichlet is not None and (not isinstance(self.dealt, int) or self.dealt < 2):
            raise InputError(
                f"dirichlet is {self.dirichlet:g}, which spreads documents over a number of clients, and clients is "
                f"{shown(self.clients)}; give a whole number from 2 up, or leave dirichlet out"
            )
        if self.dirichlet is not None and not BOUNDS[0] <= self.dirichlet <= BOUNDS[1]:
            raise InputError(f"dirichlet is {self.dirichlet:g}; give a number between {BOUNDS[0]:g} and {BOUNDS[1]:g}")
        if self.dirichlet is not None and self.task_weights is not None:
            raise InputError("dirichlet and task_weights are both given, and clients have documents of several tasks; give one")

    @property
    def dealt(self) -> int | str:
        """``clients`` as `deal` takes it: a number, or the text."""
        return int(self.clients) if self.clients.isascii() and self.clients.isdigit() else self.clients

    def regroup(self, data: TaskData) -> TaskData:
        """The documents by the tasks of the fit: with ``dirichlet`` a task is what a client has; else as they are."""
        if self.dirichlet is None:
            return data
        assert isinstance(self.dealt, int)
        return spread(data, self.dealt, self.dirichlet, seed=self.seed_of_split)

    def deal(self, data: TaskData) -> dict[str, list[str]]:
        """The tasks of each client.

        Args:
            data: what `regroup` has returned.

        Raises:
            InputError: there are more clients than tasks.
        """
        return deal(data.tasks, TASK if self.dirichlet is not None else self.dealt, seed=self.seed)


def check_not_private(config: FederationOptions) -> None:
    """Check that a fit between processes asks for no privacy.

    Raises:
        InputError: it does. A client that starts again would have to go on counting its private steps, which is not built.
    """
    if config.private:
        name = "epsilon" if config.epsilon is not None else "noise_multiplier"
        raise InputError(
            f"{name} is {getattr(config, name):g}, but private steps of a client that comes back are not counted between "
            "processes yet; leave it out, or simulate the fit (bora federated)"
        )


def check_no_groups(column: str | None) -> None:
    """Check that the tasks have no groups.

    Raises:
        InputError: a column names them.
    """
    if column is not None:
        raise InputError(f"task_group_column is {shown(column)}, and federated fits have no groups of tasks")
