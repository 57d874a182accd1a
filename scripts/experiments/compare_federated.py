"""Compare strategies of federated fits, each client alone, and all documents in one place.

    python scripts/experiments/compare_federated.py --output results/federated_documentation.csv

The arms are those of ``federated_arms.py``, in a grid of clients, ranks, local steps E and ε. Every arm takes the same number of
steps of a client (``--total_steps``), in total_steps / E rounds, so fewer local steps mean more messages. Every fit is that of
``bora federated`` (for the central arms of ``bora map-fit``) with the options of ``--fit_config``. Each arm has its own best
learning rate by validation documents (``arm_table.py``); the test documents are only reported.

Some tasks (``--new_tasks``) are in no fit. They are new clients: ``new_common`` is the perplexity of their test documents under
the common adapter, or Θ, without any step; ``new_adapted`` that after a fit to their own training documents, from Θ with the
prior of the fit (bora, hierarchy), or from the common adapter without a prior (the others).

``uploaded_bytes`` and ``downloaded_bytes`` are those of all clients in all rounds. ``lost`` is the largest part of the mean B A
that the cut to the rank has left out in a round. ``epsilon`` is what the noise has cost; with it the last round is kept, and the
validation documents choose the learning rate alone, which ε does not cover. The noise has a seed, so that the table can be made
again: the numbers are those of the mechanism, and no adapter of them should be given away.

Rows that the table has are not computed again, so a grid can be filled in parts with the same output.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from arm_table import KEYS, BestRates, RateOptions, Run, run_table
from federated_arms import DIRICHLET, NAMES, Arm, Fits, Setting, arms_of

from bora_pyro.diagnostics.sweep_table import number_text
from bora_pyro.errors import InputError, check_one_of
from bora_pyro.federated.deal import TASK
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option
from bora_pyro.runs.config.federated import FederatedConfig
from bora_pyro.runs.stored_options import NOT_OF_RESULT

COLUMNS = [
    *KEYS, "kind", "split", "clients", "rank", "local_steps", "rounds", "train_documents", "test_tokens", "validation_perplexity",
    "test_perplexity", "base_test_perplexity", "new_test_tokens", "new_base", "new_common", "new_adapted", "uploaded_bytes",
    "downloaded_bytes", "best_round", "lost", "tau", "epsilon", "delta", "noise_multiplier", "seconds", "documents_digest",
    "options",
]  # fmt: skip
#: Options of a fit that an arm, or the comparison, sets itself.
OF_ARM = (
    "strategy", "clients", "dirichlet", "rank", "alpha", "adapter", "learning_rate", "rounds", "local_steps", "tau",
    "server_rate", "epsilon", "noise_multiplier", "delta", "sample_rate", "document_clip", "noise_seed", "start_from",
    "task_weights",
)  # fmt: skip


@dataclass(kw_only=True)
class FederatedTableConfig(RateOptions):
    """Compare strategies of federated fits, each client alone, and all documents in one place."""

    fit_config: str = option("results/federated_documentation.yaml", "YAML file of the options that all fits share")
    arms: list[str] = option([*NAMES], f"which arms (default: {' '.join(NAMES)})")
    clients: list[str] = option(
        [TASK, DIRICHLET],
        "how clients are made: task, dirichlet, or a number of clients with whole tasks (default: task dirichlet)",
    )
    ranks: list[str] = option(["2", "8", "16"], "ranks of the adapter (default: 2 8 16)")
    local_steps: list[str] = option(["1", "10", "50"], "local steps of a round (default: 1 10 50)")
    epsilons: list[str] = option(
        ["inf", "8", "3", "1"], "epsilon of the fits of ffa and fedit; inf: no privacy, as all other arms (default: inf 8 3 1)"
    )
    total_steps: int = option(50, "steps of a client in the whole fit", least=1)
    dirichlet_clients: int = option(8, "number of the skewed clients", least=2)
    dirichlet: float = option(0.3, "concentration of the Dirichlet; a small one is skewed", positive=True)
    tau: float = option(1.0, "tau of bora_fixed", positive=True)
    sample_rate: float = option(0.2, "sample_rate of the private fits", positive=True)
    document_clip: float = option(1.0, "document_clip of the private fits", positive=True)
    new_tasks: int = option(2, "number of tasks that are left out as new clients", least=1)
    adapt: bool = option(True, "also fit adapters of the new clients; rows without have no new_adapted")
    adapt_steps: int = option(20, "steps of a new client", least=1)
    adapt_rates: list[str] = option(["0.03"], "learning rates of these steps (default: 0.03)", positive=True)
    rates: list[str] = option(["0.003", "0.01", "0.03", "0.1"], "the grid of learning rates (default: 0.003 0.01 0.03 0.1)")
    threads: int = option(1, "CPU threads", least=1)
    output: str = option("results/federated_documentation.csv", "the table, one row a fit; fits that it has are not repeated")

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)
        self.check_rates()
        for name in self.arms:
            check_one_of("arm", name, NAMES)
        for name in ("ranks", "local_steps"):
            for text in getattr(self, name):
                _whole(name, text)
        for how in self.clients:
            if how not in (TASK, DIRICHLET):
                _whole("clients", how, f"{TASK}, {DIRICHLET} or ")
        for text in self.local_steps:
            if self.total_steps % int(text):
                raise InputError(f"local_steps has {text}, which does not divide total_steps, {self.total_steps}; give a divisor")
        for text in self.epsilons:
            _above_zero("epsilons", text)
        if not Path(self.fit_config).is_file():
            raise InputError(f"fit_config {self.fit_config} does not exist; give a YAML file of federated.py's options")
        usual, shared = FederatedConfig(), self.fit(0)
        for name in OF_ARM:
            if (value := getattr(shared, name)) != getattr(usual, name):
                raise InputError(f"{self.fit_config} has {name} {value}, which is that of an arm; leave it out")
        for arm in self.grid():
            self.setting(0).of(arm, float(self.rates[0])).validate()

    def fit(self, seed: int) -> FederatedConfig:
        """What the fits of a seed share."""
        given = {"config": self.fit_config, "seed": seed, "threads": self.threads}
        return parse_config(FederatedConfig, [word for name, value in given.items() for word in (f"--{name}", str(value))])

    def setting(self, seed: int) -> Setting:
        """The setting of a seed."""
        return Setting(
            self.fit(seed),
            self.total_steps,
            (self.dirichlet_clients, self.dirichlet),
            self.tau,
            {"sample_rate": self.sample_rate, "document_clip": self.document_clip},
            self.new_tasks,
            self.adapt_steps if self.adapt else 0,
            tuple(map(float, self.adapt_rates)),
        )

    def grid(self) -> list[Arm]:
        """The arms that are asked for."""
        numbers = {name: [int(text) for text in getattr(self, name)] for name in ("ranks", "local_steps")}
        return arms_of(self.arms, clients=self.clients, epsilons=[float(text) for text in self.epsilons], **numbers)

    def of_result(self) -> dict[str, Any]:
        """The options that all rows of a table share."""
        shared, usual = self.fit(0), FederatedConfig()
        names = [field.name for field in dataclasses.fields(shared) if field.name not in NOT_OF_RESULT]
        found = {name: getattr(shared, name) for name in names if getattr(shared, name) != getattr(usual, name)}
        found["data"] = [Path(name).name for name in (shared.data if isinstance(shared.data, list) else [shared.data])]
        own = ("total_steps", "dirichlet_clients", "dirichlet", "tau", "sample_rate", "document_clip", "new_tasks", "adapt_steps")
        return found | {name: getattr(self, name) for name in (*own, "adapt_rates")}


def _whole(name: str, text: str, others: str = "") -> None:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise InputError(f"{name} has {text!r}; give {others}whole numbers from 1 up")


def _above_zero(name: str, text: str) -> None:
    try:
        usable = float(text) > 0
    except ValueError:
        usable = False
    if not usable:
        raise InputError(f"{name} has {text!r}; give numbers above 0, or inf")


class Comparison(BestRates):
    """The table. A fit takes less than a minute, so the base and the documents are loaded once a seed, in this process."""

    def __init__(self, config: FederatedTableConfig) -> None:
        self.config, self.known = config, {arm.name: arm for arm in config.grid()}
        self.made: dict[int, Fits] = {}
        super().__init__(config, [*self.known], config.output, columns=COLUMNS, options=config.of_result())

    def run_all(self) -> None:
        for arm in self.arms:  # one after another, so that the first ones are done if the comparison is interrupted
            while runs := [run for run in self.next_runs_of(arm) if run not in self.failed]:
                for run in runs:
                    self.run(run)

    def run(self, run: Run) -> None:
        """Do a fit."""
        if run.seed not in self.made:
            self.made[run.seed] = Fits(self.config.setting(run.seed))
        try:
            row = self.made[run.seed].row(self.known[run.arm], float(run.rate))
        except InputError as error:
            self.fail(run, str(error))
        else:
            self.add(run, [row])

    def summary(self) -> str:
        """All arms of the table at their best rates, in Markdown."""
        names = [
            "arm",
            "rate",
            "validation",
            "test",
            "new: common",
            "new: adapted",
            "MB up",
            "MB down",
            "best round",
            "lost",
            "ε",
        ]
        names += ["noise", "fits"]
        lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        arms = [*dict.fromkeys(self.table.arm)]
        for arm in arms:
            rows = self.chosen(arm)
            if len(rows):
                lines.append(f"| {' | '.join([arm, *cells(rows)])} |")
        first = self.table.iloc[0]
        note = (
            f"base: test {float(first.base_test_perplexity):.2f} ({int(first.test_tokens)} tokens), new clients "
            f"{float(first.new_base):.2f} ({int(first.new_test_tokens)} tokens)"
        )
        return "\n".join([*lines, note, *self.at_ends(self.arms)])


def cells(rows: pd.DataFrame) -> list[str]:
    """An arm's cells of the summary: means over seeds."""
    first = rows.iloc[0]

    def mean(name: str, digits: int = 2, scale: float = 1.0) -> str:
        values = pd.to_numeric(rows[name]).dropna()
        return "–" if not len(values) else f"{values.mean() / scale:.{digits}f}"

    found = [number_text(first["learning_rate"]), mean("validation_perplexity"), mean("test_perplexity"), mean("new_common")]
    found += [mean("new_adapted"), mean("uploaded_bytes", 1, 1e6), mean("downloaded_bytes", 1, 1e6), mean("best_round", 0)]
    lost = "–" if first["kind"] != "exact_product" else mean("lost")
    return [*found, lost, mean("epsilon"), mean("noise_multiplier"), str(len(rows))]


def main(argv: list[str]) -> int:
    """Run the comparison, and print its table."""
    transformers.utils.logging.disable_progress_bar()

    def make() -> Comparison:
        config = parse_config(FederatedTableConfig, argv, prog="compare_federated.py")
        torch.set_num_threads(config.threads)
        return Comparison(config)

    return run_table(make)


if __name__ == "__main__":
    run_script(main)
