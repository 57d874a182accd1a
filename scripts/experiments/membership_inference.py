"""Measure membership inference on federated fits: can one see from an adapter which documents it was trained on?

    python scripts/experiments/membership_inference.py --output results/membership.csv

The attack scores a document by how much better the adapter predicts it than the base does, in nats a token. The table has the
area under its ROC curve (0.5 is guessing) on the training documents against the validation and test documents, which no arm
uses, and the perplexity of the test documents. The arms:

- ``ordinary``: the usual steps, without privacy.
- ``clipped``: private steps without noise: samples of documents, and gradients that are shortened.
- ``epsilon 8``, ...: private steps, whose noise is solved for each ε of ``--epsilons``.

``--fit_config`` is a YAML of options of ``bora federated``; the default is a small fit that learns its few documents
by heart. ``seed``, ``noise_seed``, ``threads`` and the options of the arms are overridden. The noise has a seed, so
that the table can be made again: the numbers are those of the mechanism, and no adapter of them should be given away. Needs
Opacus (pip install 'bora_pyro[privacy]').
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers

from bora_pyro.diagnostics.membership import membership_auroc, membership_scores
from bora_pyro.errors import InputError
from bora_pyro.federated.deal import deal
from bora_pyro.federated.loop import Federation
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.strategies import STRATEGIES
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option, part_of
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.federated import FederatedConfig
from bora_pyro.runs.results_table import read_results, write_results
from bora_pyro.runs.stored_options import NOT_OF_RESULT, check_options, with_options

KEYS = ["seed", "arm"]
#: The options of the fits without ``--fit_config``.
USUAL = {
    "strategy": "ffa", "clients": 2, "num_tasks": 4, "max_tokens": 32, "max_train_documents": 8, "max_eval_documents": 8,
    "rank": 8, "targets": "q_proj,v_proj,fc1,fc2", "rounds": 12, "local_steps": 4, "learning_rate": 0.03, "patience": 0,
}  # fmt: skip


@dataclass(kw_only=True)
class MembershipConfig:
    """Measure how well training documents can be told from others, without and with privacy."""

    fit_config: str | None = option(None, "YAML of the options of the federated fits (default: those of the script)")
    epsilons: list[str] = option(["8", "3", "1"], "epsilon of each private arm (default: 8 3 1)", positive=True)
    delta: float = option(0.01, "delta of the private arms", positive=True)
    sample_rate: float = option(0.5, "sample_rate of the private arms", positive=True)
    document_clip: float = option(1.0, "document_clip of the private arms", positive=True)
    seeds: int = option(1, "number of seeds, from 0", least=1)
    threads: int = option(1, "CPU threads", least=1)
    output: str = option("results/membership.csv", "the table, one row for each seed and arm", filled=True)

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)
        if self.fit_config is not None and not Path(self.fit_config).is_file():
            raise InputError(f"fit_config {self.fit_config} does not exist; give a YAML file of federated.py's options")


def chosen_options(config: MembershipConfig, seed: int) -> FederatedConfig:
    """The options of the fits of a seed, without privacy."""
    given: dict[str, Any] = {"config": config.fit_config} if config.fit_config is not None else dict(USUAL)
    given |= {"seed": seed, "threads": config.threads}
    found = parse_config(FederatedConfig, [word for name, value in given.items() for word in (f"--{name}", str(value))])
    if found.private:
        raise InputError(f"{config.fit_config} has epsilon or noise_multiplier, which the arms have of their own; leave it out")
    return found


def arms(config: MembershipConfig, chosen: FederatedConfig, seed: int) -> Iterator[tuple[str, FederatedConfig]]:
    """The options of each arm."""
    yield "ordinary", chosen
    private = {name: getattr(config, name) for name in ("delta", "sample_rate", "document_clip")} | {"noise_seed": seed}
    yield "clipped", replace(chosen, noise_multiplier=0.0, **private)
    for epsilon in config.epsilons:
        yield f"epsilon {float(epsilon):g}", replace(chosen, epsilon=float(epsilon), **private)


def measure(arm: str, options: FederatedConfig, seed: int) -> dict[str, Any]:
    """Fit an arm, and attack it."""
    options = options.resolved
    model, data = build_run(options.map_fit, quiet=True)
    nothing = data.validation.subset(torch.arange(0))
    clients = deal(data.tasks, options.dealt, seed=options.seed)
    # no arm chooses its round by the documents that the attack compares with
    own = replace(data, validation=nothing)
    federation = Federation(model, own, STRATEGIES[options.strategy](), part_of(options, FederatedOptions), clients=clients)
    fitted = federation.run()
    theta = fitted.weights()[0]
    trained, *others = (membership_scores(model, split, theta) for split in (data.train, data.validation, data.test))
    scores = fitted.evaluate(data.test)
    spent = fitted.history[-1].get("privacy", {})
    return {
        "seed": seed,
        "arm": arm,
        "epsilon": spent.get("epsilon"),
        "delta": spent.get("delta"),
        "training_documents": len(trained),
        "other_documents": sum(map(len, others)),
        "auroc": membership_auroc(trained, torch.cat(others)),
        "gain_training": float(trained.mean()),
        "gain_others": float(torch.cat(others).mean()),
        "test_perplexity": scores["test_perplexity"],
        "base_test_perplexity": scores["base_test_perplexity"],
    }


def main(argv: list[str]) -> int:
    """Measure every arm of every seed, write the table, and print its means."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(MembershipConfig, argv, prog="membership_inference.py")
        torch.set_num_threads(config.threads)
        table = read_results(config.output, KEYS)
        first, usual = chosen_options(config, 0), FederatedConfig()
        names = [field.name for field in dataclasses.fields(first) if field.name not in NOT_OF_RESULT]
        options = {name: getattr(first, name) for name in names if getattr(first, name) != getattr(usual, name)}
        options |= {name: getattr(config, name) for name in ("delta", "sample_rate", "document_clip")}
        check_options(table, options, output=config.output)
        for _, of_arm in arms(config, first, 0):
            of_arm.validate()
        for seed in range(config.seeds):
            for arm, of_arm in arms(config, chosen_options(config, seed), seed):
                if len(table) and ((table["seed"] == seed) & (table["arm"] == arm)).any():
                    continue
                row = measure(arm, of_arm, seed)
                print(f"seed {seed}, {arm}: AUROC {row['auroc']:.3f}", file=sys.stderr)
                rows = pd.DataFrame(with_options([row], options))
                table = pd.concat([table, rows], ignore_index=True) if len(table) else rows
                write_results(table, config.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    columns = ["epsilon", "auroc", "gain_training", "gain_others", "test_perplexity", "base_test_perplexity"]
    print(table.groupby("arm", sort=False)[columns].mean().round(3).to_string())
    print(f"table: {config.output}")
    return 0


if __name__ == "__main__":
    run_script(main)
