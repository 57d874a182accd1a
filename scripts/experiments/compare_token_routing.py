"""Compare ways to read a text whose task is unknown, or changes in the text.

    python scripts/experiments/compare_token_routing.py runs/demo --output results/token_routing.csv
    python scripts/experiments/compare_token_routing.py --adapters peft --fit_config documents.yaml --output table.csv

Texts: the test documents of the run, whose task is hidden (``unknown``), and composite texts (``composite-M``), in which M tasks
follow one another, a switch every ``--segment`` tokens. Their parts are the beginnings of test documents. Arms:

- ``oracle``: each token by the adapter of its task, which reads the whole text.
- ``filter``: the hidden Markov model over tasks, with the switch rate that is most likely for validation texts of the same kind.
- ``tempered filter``: the same with the pair of a switch rate and a temperature that is best for these validation texts.
- ``whole text``: p(d | tokens before) for texts of one task, as ``infer_task``: the filter at switch rate 0.
- ``mixture``: all tasks with their prior weights at each token: the filter at switch rate 1.
- ``meteora k=1``, ``meteora k=2``: gates, fitted here to the training documents, at the learning rate of ``--learning_rate`` with
  the best validation perplexity.
- ``average``: one adapter, the mean of ΔW over all tasks. ``theta``: Θ. ``base``: no adapter.
- the name of a folder in ``--pooled``: a fit of one adapter for all tasks to the same documents (``map_fit.py --tau inf``), such
  as one LoRA, or SMoRA, whose gates need no task (``--adapter smora``).

Columns: perplexity; its ratio to the oracle's; the share of tokens at which the most probable task is the right one, before the
token is read; and for composite texts the mean number of tokens after a switch until that task is the new one (a switch that is
not found counts as a whole segment), and the share of switches that are found. Then what was chosen on validation documents; the
numbers of the adapters, those that a token is multiplied by and all; and the tokens a second on some test documents (of processor
time, if the device is a CPU). Rows that the table has are not computed again. The rows of several seeds, each of another run, go
into one table.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import transformers
from composite_texts import Texts, composites, until_found
from token_routing_arms import COMPOSITE, FILTERS, GATES, UNKNOWN, Comparison

from bora_pyro.errors import InputError
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import Weights
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option
from bora_pyro.runs.config.route_fit import RouteFitConfig
from bora_pyro.runs.results_table import read_results, write_results
from bora_pyro.runs.route_fit import check_run
from bora_pyro.runs.routed_adapters import RoutedAdapters, read_folders
from bora_pyro.runs.saved import load_run
from bora_pyro.runs.stored_options import check_options, options_json

__all__ = ["Comparison", "Texts", "TokenRoutingConfig", "composites", "main", "until_found"]

KEYS = ["seed", "text", "arm"]
NUMBERS = ["perplexity", "ratio", "accuracy", "tokens_until_found", "found", "switch_rate", "temperature", "learning_rate"]
NUMBERS += ["best_epoch", "active_parameters", "total_parameters", "tokens_per_second", "tokens"]
COLUMNS = [*KEYS, *NUMBERS, "run", "options"]


@dataclass(kw_only=True)
class TokenRoutingConfig:
    """Compare the filter by tokens, MeteoRA's gates and single adapters on texts of unknown or changing task."""

    run: str = option("", "folder of a finished fit, its output_dir; or leave it out and give --adapters", positional=True)
    adapters: str | None = option(None, "folder with a PEFT folder for each task, of adapters that were trained elsewhere")
    fit_config: str | None = option(None, "with --adapters: YAML file of map-fit's options that name the base and documents")
    pooled: list[str] | None = option(None, "folders of fits of one adapter for all tasks to the same documents (default: none)")
    composite: list[str] = option(["2", "3", "5", "10"], "numbers of tasks in a composite text (default: 2 3 5 10)")
    texts: int = option(50, "composite texts of each kind", least=1)
    segment: int = option(64, "tokens of each task in a composite text", least=2)
    epochs: int = option(6, "epochs of the fit of the gates", least=1)
    learning_rate: list[str] = option(["0.01"], "learning rates of the gates, of which validation chooses", positive=True)
    gate_weight: float = option(50.0, "weight of the task of a token in the fit of the gates", positive=True)
    prior: str = option("flat", "p(d): flat, or in proportion to the training documents", choices=("flat", "documents"))
    seed: int = option(0, "seed of the composite texts", least=0)
    gate_seed: int = option(0, "seed of the gates, and of the rows: give the rows of another run another one", least=0)
    trust_remote_code: bool = option(
        False, "allow the base model to run its own code on this machine; only on the command line", line_only=True
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps")
    output: str = option("results/token_routing.csv", "the table; rows that it has are not repeated")

    def validate(self) -> None:
        """Check the values."""
        if bool(self.run.strip()) == (self.adapters is not None):
            given = "both are given" if self.run.strip() else "no run is given"
            raise InputError(f"{given}; name the folder of a fit, as in compare_token_routing.py runs/map_fit, or --adapters")
        if (self.adapters is None) != (self.fit_config is None):
            raise InputError("adapters and fit_config belong together; give both, or the folder of a run alone")
        check_fields(self)
        for text in self.composite:
            if not (text.isdigit() and int(text) >= 2):
                raise InputError(f"composite has {text!r}; give whole numbers from 2 up")
        names = [Path(path).name for path in self.pooled or ()]
        taken = ["oracle", *FILTERS, *GATES, "average", "theta", "base"]
        for number, name in enumerate(names):
            if name in [*taken, *names[:number]]:
                raise InputError(f"pooled has two arms called {name!r}: the folders' names are those of the arms; rename one")

    def of_result(self) -> dict[str, Any]:
        """What all rows of a table share."""
        names = ("texts", "segment", "epochs", "learning_rate", "gate_weight", "prior", "seed")
        return {name: getattr(self, name) for name in names}


def read_source(config: TokenRoutingConfig) -> RoutedAdapters:
    """The adapters of the run or of the PEFT folders, with their documents."""
    if config.adapters is None:
        run = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code)
        check_run(run)
        return RoutedAdapters.of_run(run)
    return read_folders(
        RouteFitConfig(
            adapters=config.adapters, fit_config=config.fit_config, device=config.device,
            trust_remote_code=config.trust_remote_code,
        )
    )  # fmt: skip


def read_pooled(config: TokenRoutingConfig, source: RoutedAdapters) -> dict[str, Fitted]:
    """The fits of one adapter for all tasks, by the name of their folder.

    Raises:
        InputError: one has other documents, or an adapter for each task.
    """
    found = {}
    for path in config.pooled or ():
        run = load_run(path, device=config.device, trust_remote_code=config.trust_remote_code)
        same = [one.data.test.tokens.tolist() for one in (run, source)]
        if run.fitted.tasks != source.fitted.tasks or same[0] != same[1]:
            where = config.run or config.fit_config
            raise InputError(f"the run in {path} has other documents than that in {where}; fit both to the same ones")
        if not math.isinf(run.fitted.tau()):
            raise InputError(f"the run in {path} has an adapter for each task; give one that was fitted with --tau inf")
        found[Path(path).name] = run.fitted
    return found


def digest(weights: Weights) -> str:
    """What the adapters of a run are known by in the table."""
    whole = hashlib.sha256()
    for name in sorted(weights):
        whole.update(name.encode() + weights[name].detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


def rows(comparison: Comparison, config: TokenRoutingConfig, done: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """The rows that the table does not have, one after another."""
    for kind in (UNKNOWN, *(f"{COMPOSITE}-{number}" for number in config.composite)):
        if not (missing := [arm for arm in comparison.arms if (kind, arm) not in done]):
            continue
        texts = comparison.texts(kind)
        if texts is None or not len(texts.split):
            context = comparison.fitted.model.backbone.context
            print(
                f"note: {kind} is left out: it needs more than the {context} tokens that the base reads, or too few tasks have "
                f"test documents of more than {config.segment} tokens",
                file=sys.stderr,
            )
            continue
        for arm in missing:
            yield comparison.row(kind, arm, texts)


def main(argv: list[str]) -> int:
    """Compare, write each row when it is done, and print the table."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(TokenRoutingConfig, argv, prog="compare_token_routing.py")
        table = read_results(config.output, KEYS)
        options = config.of_result()
        if len(table):
            check_options(table, options, output=config.output)
        source = read_source(config)
        if not len(source.data.test) or not len(source.data.validation):
            where = config.run or config.fit_config
            raise InputError(f"the run in {where} has no validation or no test documents; give one that has both")
        pooled, own = read_pooled(config, source), digest(source.fitted.weights()[0])
        of_seed = table[table.seed == config.gate_seed]
        if len(others := of_seed[of_seed.run != own] if len(of_seed) else of_seed):
            raise InputError(
                f"output {config.output} has rows of other adapters with gate_seed {config.gate_seed} ({others.run.iloc[0]}); "
                "give another --gate_seed or another --output"
            )
        done = set(zip(of_seed.text, of_seed.arm, strict=True))
        known = {"seed": config.gate_seed, "run": own, "options": options_json(options)}
        for row in rows(Comparison(source, config, pooled), config, done):
            whole = pd.DataFrame([dict.fromkeys(COLUMNS) | row | known])[COLUMNS].astype(object)
            table = pd.concat([table, whole], ignore_index=True) if len(table) else whole
            write_results(table, config.output)
            print(f"{row['text']}, {row['arm']}: {row['perplexity']:.3f}", file=sys.stderr, flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = table[[*KEYS, *NUMBERS]].copy()
    shown[NUMBERS] = shown[NUMBERS].apply(pd.to_numeric)
    means = shown.groupby(["text", "arm"], sort=False)[[*NUMBERS]].mean()
    print(means.round(3).dropna(axis=1, how="all").to_string())
    print(f"table: {config.output}, seeds {', '.join(map(str, sorted(table.seed.unique())))}")
    return 0


if __name__ == "__main__":
    run_script(main)
