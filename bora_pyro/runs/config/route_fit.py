"""The configuration of a fit of gates over the adapters of a finished run.

>>> config = parse_config(RouteFitConfig, ["runs/demo", "--k", "1"])
>>> config.run, config.k, config.gate_weight
('runs/demo', 1, 50.0)
"""

from __future__ import annotations

from dataclasses import dataclass

from bora_pyro.errors import InputError
from bora_pyro.inference.options import OPTIMISATION, RUN, FitOptions
from bora_pyro.likelihoods import LabelledGates
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import by_heading, changed, check_fields, option
from bora_pyro.routers import GATED_ROUTERS, MeteoRA
from bora_pyro.routers.meteora import EXECUTIONS, GATHERED
from bora_pyro.runs.config.groups import BaseOptions, RunOptions, check_device

__all__ = ["RouteFitConfig", "parse_config"]

ROUTER = "router"


@by_heading("options", ROUTER, OPTIMISATION, RUN)
@dataclass(kw_only=True)
class RouteFitConfig:
    """Fit gates over the adapters of a finished run (MeteoRA): each token is read by k of them, and a text needs no task."""

    run: str = option("", "folder of a finished fit, its output_dir; or leave it out and give --adapters", positional=True)
    adapters: str | None = option(None, "folder with a PEFT folder for each task, of adapters that were trained elsewhere")
    fit_config: str | None = option(
        None, "with --adapters: YAML file of map-fit's options that name the base and documents of the same tasks"
    )
    same_base: bool = option(True, "with --adapters: refuse adapters that name a base model other than base_model")

    router: str = option("meteora", f"the kind of gates: {', '.join(GATED_ROUTERS)}", group=ROUTER, choices=tuple(GATED_ROUTERS))
    k: int = option(2, "number of adapters that read a token", group=ROUTER, least=1)
    temperature: float = option(
        1.0,
        "a higher one makes the weights of the k adapters more equal; it does not change which ones",
        group=ROUTER,
        positive=True,
    )
    execution: str = option(
        GATHERED,
        "gathered: only the products of the chosen adapters; dense: those of all adapters; the results are the same",
        group=ROUTER,
        choices=EXECUTIONS,
    )
    gate_weight: float = option(
        50.0, "weight of the task of a token in the objective, per token, as a mean over the layers", group=ROUTER, positive=True
    )
    token_weight: float = option(1.0, "weight of the text itself in the objective, per token; 0: the tasks alone", group=ROUTER)
    gate_scale: float = option(1.0, "standard deviation of the Normal prior of the gates", group=ROUTER, positive=True)
    draws: int = option(
        0,
        "if the run has a posterior: fit the gates to this many draws of the adapters beside the centre, and store them; 0: the "
        "centre alone",
        group=ROUTER,
        least=0,
    )

    epochs: int = changed(FitOptions, "epochs", 6)
    learning_rate: float = changed(FitOptions, "learning_rate", 1e-2)
    token_budget: int | None = changed(
        FitOptions, "token_budget", None, "tokens of a batch, padding included (default: as in the run)"
    )
    patience: int = changed(FitOptions, "patience", 3)
    seed: int = changed(
        FitOptions, "seed", 0, "seed of the order of the documents and of the draws; the split is that of the run"
    )

    trust_remote_code: bool = changed(BaseOptions, "trust_remote_code", False, group=RUN)
    device: str = changed(BaseOptions, "device", "auto")
    threads: int | None = changed(RunOptions, "threads", None)
    output_dir: str = changed(RunOptions, "output_dir", "runs/routed", "folder of the new run")
    overwrite: bool = changed(RunOptions, "overwrite", False)

    def validate(self) -> None:
        """Check every value that can be checked without the run.

            >>> RouteFitConfig(run="runs/demo", token_weight=-1.0).validate()
            Traceback (most recent call last):
            bora_pyro.errors.InputError: token_weight is -1.0; give a finite number from 0 up, such as 1

        Raises:
            InputError: one line with the value and what is allowed.
        """
        if bool(self.run.strip()) == (self.adapters is not None):
            given = "both are given" if self.run.strip() else "neither is given"
            raise InputError(
                f"a run or --adapters: {given}; name the folder of a fit, as in route_fit.py runs/map_fit, or --adapters"
            )
        if (self.adapters is None) != (self.fit_config is None):
            raise InputError("adapters and fit_config belong together; give both, or the folder of a run alone")
        if self.adapters is not None and self.draws:
            raise InputError(f"draws is {self.draws}, but adapters from PEFT folders have no posterior; leave draws out")
        check_fields(self)
        check_device(self.device)
        self.build_router()
        self.build_likelihood()

    def build_router(self) -> MeteoRA:
        """The router."""
        return GATED_ROUTERS[self.router](self.k, self.temperature, self.execution)

    def build_likelihood(self) -> LabelledGates:
        """What the gates are fitted to."""
        return LabelledGates(self.gate_weight, self.token_weight)
