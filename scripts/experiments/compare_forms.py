"""Compare the convergence of the centred and the non-centred form of the same model.

    python scripts/experiments/compare_forms.py --fit_config results/documentation.yaml --taus 100 1000 --output results/forms.csv

Both forms have the same MAP. ``centered`` samples θ_d itself. Its learning rate follows the paper's rule: a coefficient times τ
(``--coefficients``; the paper's is 1e-5). ``noncentered`` samples the whitened deviation, with the same learning rates for every
τ (``--learning_rates``). Each arm runs all its epochs at every rate of its grid, and the lowest validation perplexity chooses
its rate. Arms that the output already has are not run again.

All fits have the options of ``--fit_config``. The arms override ``tau``, ``prior_form``, ``learning_rate``, ``seed``, and
``patience``, which is 0.

The table has a row for each epoch and one for the start (epoch 0):

- ``learning_rate``: the option of ``map_fit.py``; for ``centered`` the coefficient, so AdamW's peak rate is this times τ;
- ``step``, ``epoch``: number of steps and epochs done;
- ``objective``: −ELBO in nats a training observation, the mean over the epoch's steps; missing at the start. In both forms it
  uses the density of θ_d. The density of √τ (θ_d − Θ) differs from it by a constant, ½ log τ an entry, which is subtracted;
- ``validation_perplexity``, ``test_perplexity``: perplexities after that epoch. The test split is only reported.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import transformers
from fit_options import check_usual

from bora_pyro.data import TaskData
from bora_pyro.diagnostics.sweep_table import number_text
from bora_pyro.errors import InputError
from bora_pyro.files.atomic import replace_file
from bora_pyro.guides import map_guide
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fit import NonFiniteLossError, fit
from bora_pyro.inference.options import FitOptions
from bora_pyro.model import BoRA
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option, part_of
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.stored_options import check_options, fit_options, options_json

COLUMNS = ["form", "tau", "learning_rate", "step", "epoch", "objective", "validation_perplexity", "test_perplexity"]
Arm = tuple[str, str, str]  # form, tau, learning rate


@dataclass(kw_only=True)
class FormsConfig:
    """Compare the centred form, with a learning rate proportional to tau, with the non-centred form."""

    fit_config: str = option("results/documentation.yaml", "YAML of map_fit.py's options that all arms share")
    data: str | None = option(None, "the documents (default: what fit_config names)")
    taus: list[str] = option(["100", "1000"], "precisions of the prior, above 0 and below inf (default: 100 1000)", positive=True)
    learning_rates: list[str] = option(
        ["0.003", "0.01", "0.03"], "the non-centred form's grid of learning rates (default: 0.003 0.01 0.03)", positive=True
    )
    coefficients: list[str] = option(
        ["1e-5", "3e-5", "1e-4", "3e-4"],
        "the centred form's grid: learning rate divided by tau (default: 1e-5, the paper's, 3e-5 1e-4 3e-4)",
        positive=True,
    )
    seed: int = option(0, "seed of the split, the start and the order of the documents")
    threads: int | None = option(None, "CPU threads (default: torch's own choice)")
    output: str = option("results/forms.csv", "the table; arms that it has are not run again")

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)
        if not Path(self.fit_config).is_file():
            raise InputError(f"fit_config {self.fit_config} does not exist; give a YAML file of map_fit.py's options")


def arms(config: FormsConfig) -> list[Arm]:
    """Both forms at every τ and every rate of their own grid."""
    grids = {"noncentered": config.learning_rates, "centered": config.coefficients}
    return [(form, number_text(tau), number_text(rate)) for tau in config.taus for form, grid in grids.items() for rate in grid]


def run_arm(config: FormsConfig, arm: Arm) -> pd.DataFrame:
    """Fit one arm through all its epochs. Returns a row for the start and one for each epoch."""
    form, tau, rate = arm
    options = {"tau": tau, "prior_form": form, "learning_rate": rate, "seed": config.seed, "patience": 0}
    options |= {name: value for name in ("data", "threads") if (value := getattr(config, name)) is not None}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    run = parse_config(MapFitConfig, ["--config", config.fit_config, *words])
    check_usual(run, ["start_from"], file=config.fit_config, why="all arms have the usual start")
    model, data = build_run(run, quiet=True)
    if not (data.validation.num_tokens and data.test.num_tokens):
        raise InputError(
            "the validation or the test split has no document; both are needed, to choose the learning rate and to report"
        )
    guide = map_guide(model)
    shift = _whitening(model, data) if form == "noncentered" else 0.0
    peak = run.learning_rate * (float(tau) if form == "centered" else 1.0)
    rows: list[dict[str, Any]] = []

    def record(report: dict[str, float]) -> None:
        theta, _ = model.weights_given(guide.median())
        ([validation], [test]) = (evaluate(model, split, theta) for split in (data.validation, data.test))
        scores: dict[str, Any] = {"validation_perplexity": validation.perplexity(), "test_perplexity": test.perplexity()}
        objective = report["objective"] - shift if "objective" in report else None
        where: dict[str, Any] = {"step": report["step"], "epoch": report["epoch"], "objective": objective}
        rows.append({"form": form, "tau": tau, "learning_rate": rate} | where | scores)

    guide(data.train.batches(token_budget=run.token_budget)[0].to(model.backbone.device))  # creates the guide's parameters
    record({"step": 0, "epoch": 0})
    try:
        fit(model, data, part_of(run, FitOptions), guide=guide, learning_rate=peak, on_epoch=record)
    except NonFiniteLossError as error:
        print(f"note: {form}, tau {tau}, rate {rate}: {error}", file=sys.stderr)
    return pd.DataFrame(rows, columns=COLUMNS)


def _whitening(model: BoRA, data: TaskData) -> float:
    """Sum of ½ log τ over all entries of all tasks' deviations, in nats a training observation."""
    logs = (model.prior.precision(name, start).log().mean() * start.numel() for name, start in model.starts.items())
    observations = model.likelihood.observations(data.train.num_documents, data.train.num_tokens)
    return 0.5 * model.num_tasks * float(sum(logs)) / observations


def best_arms(table: pd.DataFrame) -> pd.DataFrame:
    """The row with the lowest validation perplexity for each form and τ."""
    chosen = table.sort_values("validation_perplexity").drop_duplicates(["tau", "form"])
    return chosen.sort_values(["tau", "form"], key=lambda column: column.astype(float) if column.name == "tau" else column)


def summary(table: pd.DataFrame) -> str:
    """A Markdown table of each form and τ at its best learning rate and epoch."""
    lines = [
        "| form | τ | learning rate | validation perplexity | test perplexity | epoch | step |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, row in best_arms(table).iterrows():
        perplexities = f"{row.validation_perplexity:.2f} | {row.test_perplexity:.2f}"
        rate = f"{row.learning_rate} τ" if row.form == "centered" else row.learning_rate
        lines.append(f"| {row.form} | {row.tau} | {rate} | {perplexities} | {row.epoch} | {row.step} |")
    return "\n".join(lines)


def read_table(output: Path) -> pd.DataFrame:
    """Read the table of an earlier call; an empty table if there is none."""
    if not output.exists():
        return pd.DataFrame(columns=COLUMNS)
    table = pd.read_csv(output, dtype={"tau": str, "learning_rate": str})
    if [name for name in table if name != "options"] != COLUMNS:
        raise InputError(f"output {output} has the columns {', '.join(table.columns)}; give another file for the table")
    return table


def run_all(config: FormsConfig) -> pd.DataFrame:
    """Run the arms that the table does not have, and return the rows of the configured arms."""
    output = Path(config.output)
    table = read_table(output)
    words = [word for name in ("data",) if (value := getattr(config, name)) is not None for word in (f"--{name}", str(value))]
    shared = parse_config(MapFitConfig, ["--config", config.fit_config, *words])
    options = fit_options(shared, without=("tau", "prior_form", "learning_rate", "patience")) | {"seed": config.seed}
    check_options(table, options, output=output)
    done = set(zip(table.form, table.tau, table.learning_rate, strict=True))
    for arm in arms(config):
        if arm in done:
            continue
        rows = run_arm(config, arm).assign(options=options_json(options))
        table = rows if table.empty else pd.concat([table, rows], ignore_index=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, functools.partial(table.to_csv, index=False, lineterminator="\n"))
        last = rows.iloc[-1]
        print(f"{arm[0]}  tau {arm[1]}  rate {arm[2]}: test perplexity {last.test_perplexity:.2f} at the end", flush=True)
    asked = set(arms(config))
    return table[[arm in asked for arm in zip(table.form, table.tau, table.learning_rate, strict=True)]]


def main(argv: list[str]) -> int:
    """Run the comparison and print its table."""
    transformers.utils.logging.disable_progress_bar()
    try:
        table = run_all(parse_config(FormsConfig, argv, prog="compare_forms.py"))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(table))
    return 0


if __name__ == "__main__":
    run_script(main)
