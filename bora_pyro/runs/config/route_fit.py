"""The configuration of a fit of gates over the adapters of a finished run.

>>> config = parse_config(RouteFitConfig, ["runs/demo", "--k", "1"]).with_gates()
>>> config.run, config.k, config.gate_weight
('runs/demo', 1, 50.0)
>>> config = parse_config(RouteFitConfig, ["runs/routed", "--add", "peft/sales", "--data", "sales.csv"])
>>> config.run, config.add, config.data
('runs/routed', 'peft/sales', 'sales.csv')
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bora_pyro.data.options import DATA
from bora_pyro.errors import InputError, shown
from bora_pyro.inference.options import OPTIMISATION, RUN, FitOptions
from bora_pyro.likelihoods import LabelledGates
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import by_heading, changed, check_fields, option
from bora_pyro.routers import GATED_ROUTERS, MeteoRA
from bora_pyro.routers.meteora import EXECUTIONS, GATHERED
from bora_pyro.runs.config.groups import BaseOptions, RunOptions, check_device
from bora_pyro.runs.config.new_documents import NewDocuments

__all__ = ["RouteFitConfig", "parse_config"]

ROUTER, ADDED = "router", "an adapter for finished gates"
#: What the gates are where neither the options nor a routed run say it.
USUAL_GATES: dict[str, Any] = {
    "k": 2, "temperature": 1.0, "execution": GATHERED, "gate_weight": 50.0, "token_weight": 1.0, "gate_scale": 1.0,
}  # fmt: skip


@by_heading("options", ADDED, DATA, ROUTER, OPTIMISATION, RUN)
@dataclass(kw_only=True)
class RouteFitConfig(NewDocuments):
    """Fit gates over the adapters of a finished run (MeteoRA): each token is read by k of them, and a text needs no task.

    With ``--add`` the run has gates already: adapters of new tasks join them, and only their own gates are fitted.
    """

    run: str = option("", "folder of a finished fit, its output_dir; or leave it out and give --adapters", positional=True)
    adapters: str | None = option(None, "folder with a PEFT folder for each task, of adapters that were trained elsewhere")
    fit_config: str | None = option(
        None, "with --adapters: YAML file of map-fit's options that name the base and documents of the same tasks"
    )
    same_base: bool = option(
        True, "with --adapters or --add: refuse adapters that name a base model other than that of the documents or the run"
    )

    add: str | None = option(
        None,
        "PEFT folder of the adapter of a new task, or a folder or a run with one for each new task: the gates of RUN stay as "
        "they are, and --data has the documents of the new tasks (default: none; the gates of all tasks are fitted)",
        group=ADDED,
        filled=True,
    )
    data: str | list[str] = option(
        "", "with --add: the documents of the new tasks, in any form that map_fit.py reads (default: none)", group=DATA
    )

    router: str = option("meteora", f"the kind of gates: {', '.join(GATED_ROUTERS)}", group=ROUTER, choices=tuple(GATED_ROUTERS))
    k: int | None = option(
        None, "number of adapters that read a token (default: 2; with --add that of the run)", group=ROUTER, least=1
    )
    temperature: float | None = option(
        None,
        "a higher one makes the weights of the k adapters more equal; it does not change which ones (default: 1; with --add that "
        "of the run)",
        group=ROUTER,
        positive=True,
    )
    execution: str | None = option(
        None,
        "gathered: only the products of the chosen adapters; dense: those of all adapters; the results are the same (default: "
        "gathered; with --add as in the run)",
        group=ROUTER,
        choices=EXECUTIONS,
    )
    gate_weight: float | None = option(
        None,
        "weight of the task of a token in the objective, per token, as a mean over the layers (default: 50; with --add that of "
        "the run)",
        group=ROUTER,
        positive=True,
    )
    token_weight: float | None = option(
        None,
        "weight of the text itself in the objective, per token; 0: the tasks alone (default: 1; with --add that of the run)",
        group=ROUTER,
    )
    gate_scale: float | None = option(
        None,
        "standard deviation of the Normal prior of the gates (default: 1; with --add that of the run)",
        group=ROUTER,
        positive=True,
    )
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
        if (self.adapters is not None or self.add is not None) and self.draws:
            raise InputError(f"draws is {self.draws}, but adapters from PEFT folders have no posterior; leave draws out")
        self._check_add()
        check_fields(self)
        check_device(self.device)
        self.build_router()
        self.build_likelihood()

    def _check_add(self) -> None:
        """Check that there are documents of new tasks if adapters are added, and else that there are none."""
        if self.add is not None:
            if self.adapters is not None:
                raise InputError("adapters and add are both given; give --add with the folder of a run that has gates")
            super().validate()
            return
        for field in dataclasses.fields(NewDocuments):
            if (value := getattr(self, field.name)) != field.default:
                raise InputError(
                    f"{field.name} is {shown(value)}, but it speaks of the documents of new tasks; give their adapters with "
                    "--add, or leave it out"
                )

    def with_gates(self, of_run: RouteFitConfig | None = None) -> RouteFitConfig:
        """The configuration with values of all options of the gates.

        Args:
            of_run: the configuration of a routed run to which adapters are added. Its gates stay as they are.

        Raises:
            InputError: an option is given and differs from that of the run.
        """
        values = {name: getattr(self, name) for name in USUAL_GATES}
        usual = USUAL_GATES if of_run is None else dataclasses.asdict(of_run.with_gates())
        for name, value in values.items():
            if of_run is not None and value not in (None, usual[name]):
                raise InputError(
                    f"{name} is {value}, but the gates of the run in {self.run} were fitted with {usual[name]}; leave it out"
                )
        return dataclasses.replace(self, **{name: usual[name] if value is None else value for name, value in values.items()})

    def build_router(self) -> MeteoRA:
        """The router."""
        whole = self.with_gates()
        values: dict[str, Any] = {name: getattr(whole, name) for name in ("k", "temperature", "execution")}
        return GATED_ROUTERS[self.router](**values)

    def build_likelihood(self) -> LabelledGates:
        """What the gates are fitted to."""
        whole = self.with_gates()
        assert whole.gate_weight is not None
        assert whole.token_weight is not None
        return LabelledGates(whole.gate_weight, whole.token_weight)
