"""New tasks under a finished fit, from run folder to run folder: what ``scripts/adapt.py`` does.

>>> from bora_pyro.runs.config.adapt import AdaptConfig
>>> config = AdaptConfig(run="runs/demo", data="new.csv", output_dir="runs/new")
>>> metrics = run_adapt(config)  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from bora_pyro.data.chat import load_chat_template
from bora_pyro.errors import InputError
from bora_pyro.inference.adapt import adapt, load_new_tasks
from bora_pyro.runs.config.adapt import CONTENT, NEW_DOCUMENTS, AdaptConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.results import GIVEN, metrics_of, write_adapters, write_posterior
from bora_pyro.runs.saved import SavedRun, load_run


def run_adapt(config: AdaptConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Read the fit, infer the new tasks' deviations, and leave a run folder of the new tasks alone.

    ``config.yaml`` holds the options of the adaptation, ``fit.yaml`` those of the fit, and the posterior Θ and τ, so that
    ``load_run`` needs neither the fit's folder nor its documents. The run that it began from is left alone.

    Args:
        config: the checked configuration.
        quiet: show no notes.

    Returns:
        What ``metrics.json`` holds; test perplexities where ``split_column`` says that there are test documents.

    Raises:
        InputError: something in the configuration, the run or the data cannot be used; nothing is written then.
    """
    if Path(config.output_dir).resolve() == Path(config.run).resolve():
        raise InputError(f"output_dir {config.output_dir} is the run itself; give another folder for the new tasks")
    RunFolder.check(config.output_dir, overwrite=config.overwrite, resume=None)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code)
    config = _resolved(config, run)
    documents = {name: getattr(config, name) for name in NEW_DOCUMENTS}
    data = load_new_tasks(config.data, run.fitted, long_documents=run.config.long_documents, **documents)
    if not quiet:
        for note in data.notes:
            print(f"note: {note}", file=sys.stderr)
    options = {name: getattr(config, name) for name in ("guide", "steps", "learning_rate", "token_budget", "scale", "seed")}
    fitted = adapt(run.fitted, data, **options)
    metrics = metrics_of(dataclasses.replace(run.config, learning_rate=config.learning_rate, seed=config.seed), fitted, data)
    # of the prior that the tasks have had: the configuration knows neither a τ of a posterior nor that of a task among others
    metrics |= {"tau": fitted.tau(), "tau_by_group": fitted.tau_by_group(), "guide": config.guide}
    with RunFolder.create(config.output_dir, overwrite=config.overwrite, resume=None) as folder:
        folder.write_config(dataclasses.asdict(config) | {"overwrite": False})
        folder.write_fit(dataclasses.asdict(run.config))
        folder.write_split(data.split_record)
        write_adapters(folder, fitted, run.config.base_model)
        write_posterior(folder, fitted, data, config.guide, prior=GIVEN)
        folder.write_metrics(metrics)
    return metrics


def _resolved(config: AdaptConfig, run: SavedRun) -> AdaptConfig:
    """The configuration with the fit's values where it has none of its own.

    Where one column of the documents is given the others are not the fit's: a text is then no completion of its prompts.
    """
    names = ("task_column", "max_tokens", "token_budget", "chat_template")
    values = {name: getattr(config, name) or getattr(run.config, name) for name in names}
    if not any(getattr(config, name) for name in CONTENT):
        values |= {name: getattr(run.config, name) for name in CONTENT}
    elif config.text_column is None:
        values["text_column"] = "text"  # which says nothing beside a prompt or a chat
    values["chat_template"] = load_chat_template(values["chat_template"])
    return dataclasses.replace(config, **values)
