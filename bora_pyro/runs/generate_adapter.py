"""Make the adapters of new tasks from their documents by a generator, without training.

    bora generate-adapter runs/generator --data new.csv --held_out 0.5 --output_dir runs/generated

The vector of a task is the mean of the base's hidden states over its documents, and the generator makes an adapter of it. The
folder has ``adapters/<task>/`` in PEFT form and ``generated.json``: what was read, and the perplexities of the documents that the
vectors did not see, with no adapter, with the mean adapter of the generator's tasks, and with the generated one.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from bora_pyro.data import TaskData
from bora_pyro.data.counts import counted
from bora_pyro.data.splitters import ForNewTasks
from bora_pyro.errors import InputError, shown
from bora_pyro.exchange.factors import check_gives_change
from bora_pyro.exchange.names import write_task_names
from bora_pyro.exchange.save import save_peft
from bora_pyro.files.atomic import check_place, whole_folder, write_record
from bora_pyro.files.slugs import adapter_folders
from bora_pyro.files.text import NAME_LENGTH, name_line
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.likelihoods import LIKELIHOODS, measure_of
from bora_pyro.model import BoRA, Weights
from bora_pyro.priors import Given
from bora_pyro.runs.build import build_run
from bora_pyro.runs.command import Command
from bora_pyro.runs.config.generate_adapter import GenerateAdapterConfig
from bora_pyro.runs.generator_folder import SavedGenerator, read_generator
from bora_pyro.runs.layout import ADAPTERS
from bora_pyro.runs.new_documents import with_options_of_fit
from bora_pyro.runs.progress import print_fitted

#: The record of generated adapters.
GENERATED = "generated.json"


def run_generate_adapter(config: GenerateAdapterConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Read the generator and the documents, make the adapters, measure them, and write their folder.

    Args:
        config: the checked configuration.
        quiet: show no notes.

    Returns:
        The content of ``generated.json``.

    Raises:
        InputError: the generator, its base or the documents cannot be used, or the folder is taken.
    """
    check_place(config.output_dir, record=GENERATED, overwrite=config.overwrite)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    saved = read_generator(config.generator)
    if config.draws and not saved.generator.method.has_draws:
        raise InputError(
            f"draws is {config.draws}, but the generator in {saved.path} gives one adapter and no draws; leave it out"
        )
    model, data, config = _build(config, saved, quiet=quiet)
    check_gives_change(model.adapter, model.backbone)
    assert config.token_budget is not None
    how: dict[str, Any] = {"documents": config.documents_read, "token_budget": config.token_budget, "seed": config.seed}
    vectors, theta = saved.generate(model, data.train, **how)
    if 0 in vectors.documents:
        task = data.tasks[vectors.documents.index(0)]
        raise InputError(f"task {shown(task)} has no training document for its vector; give it one, or leave the task out")
    slugs, scores = adapter_folders(data.tasks), _scores(model, data, saved, theta, token_budget=config.token_budget)
    record = {
        "generator": str(saved.path),
        "method": saved.record["method"],
        "base": saved.record["base"],
        "states": saved.record["vector"]["states"],
        "held_out": config.held_out,
        "draws": config.draws,
        "test_documents": data.test.num_documents,
        **scores[None],
        "notes": data.notes,
        "tasks": {
            slugs[task]: {"name": task, "documents_read": vectors.documents[d], "tokens_read": vectors.tokens[d]}
            | {"test_documents": data.test.documents_per_task[d]}
            | scores[d]
            for d, task in enumerate(data.tasks)
        },
    }
    base = config.base_model or saved.fit.base_model
    with whole_folder(config.output_dir, record=GENERATED, overwrite=config.overwrite) as aside:
        for d, task in enumerate(data.tasks):
            own = {name: value[d] for name, value in theta.items()}
            save_peft(aside / ADAPTERS / slugs[task], model, own, base_model=base)
            for number in range(config.draws):
                drawn = saved.generator.generate(vectors.vectors[d], draw=number)
                save_peft(aside / ADAPTERS / f"{slugs[task]}--draw-{number}", model, drawn, base_model=base)
        write_task_names(aside / ADAPTERS, {slug: task for task, slug in slugs.items()})
        write_record(aside, GENERATED, record)
    return record


def _build(config: GenerateAdapterConfig, saved: SavedGenerator, *, quiet: bool) -> tuple[BoRA, TaskData, GenerateAdapterConfig]:
    """The model of the generator with the documents of the new tasks, and the configuration with the options of the fit."""
    reads_options = LIKELIHOODS[saved.fit.likelihood].reads_options
    config = with_options_of_fit(config, saved.fit, reads_options=reads_options, run=str(saved.path))
    assert config.token_budget is not None
    fit = dataclasses.replace(
        saved.fit, data=config.data, **config.documents, base_model=config.base_model or saved.fit.base_model,
        token_budget=config.token_budget, device=config.device, threads=config.threads, split_seed=None,
        trust_remote_code=config.trust_remote_code, num_tasks=None, max_eval_documents=None, streaming=False, task_weights=None,
    )  # fmt: skip
    # nothing is inferred here, so the prior has nothing to say; under this one a single task is enough
    split, prior = ForNewTasks(config.held_out, config.seed), Given({}, {})
    model, data = build_run(fit, quiet=quiet, split=split, prior=prior, seed=saved.fit.seed)
    saved.restore(model)
    return model, data, config


def _scores(
    model: BoRA, data: TaskData, saved: SavedGenerator, theta: Weights, *, token_budget: int
) -> dict[int | None, dict[str, float | None]]:
    """The measure of the test documents with no adapter, the mean adapter and the generated one, by task; None: over all."""
    if not len(data.test):
        return {d: {} for d in [None, *range(len(data.tasks))]}
    centre = saved.generator.layout.unflatten(saved.generator.space.standard.centre.to(model.backbone.device))
    mean = {name: value.expand(len(data.tasks), *value.shape) for name, value in centre.items()}
    found = evaluate(model, data.test, None, mean, theta, token_budget=token_budget)
    names = [f"{of}test_{model.likelihood.measure.name}" for of in ("base_", "mean_", "")]
    return {
        d: {name: scores.value(d) for name, scores in zip(names, found, strict=True)} for d in [None, *range(len(data.tasks))]
    }


def show(config: GenerateAdapterConfig, record: Mapping[str, Any]) -> None:
    """Print what was read of each task, the perplexities of the documents held out, and where the adapters are."""
    measure = measure_of(record)
    columns = {"documents\nread": "documents_read", "tokens\nread": "tokens_read"}
    if record["test_documents"]:
        columns |= {"held-out\ndocuments": "test_documents", f"base\n{measure.title}": f"base_test_{measure.name}"}
        columns |= {
            f"mean adapter\n{measure.title}": f"mean_test_{measure.name}",
            f"generated\n{measure.title}": f"test_{measure.name}",
        }
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("task", overflow="fold", max_width=NAME_LENGTH)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in record["tasks"].values():
        cells = [_cell(row.get(key), measure.digits) for key in columns.values()]
        table.add_row(Text(name_line(row["name"], characters=None)), *cells)
    table.add_section()
    rows = record["tasks"].values()
    sums = {key: sum(row[key] for row in rows) for key in ("documents_read", "tokens_read", "test_documents")}
    table.add_row(
        "all tasks",
        *(
            _cell((sums | {k: v for k, v in record.items() if k not in sums}).get(key), measure.digits)
            for key in columns.values()
        ),
    )
    print_fitted(table)
    if not record["test_documents"]:
        print("no document was held out, so nothing says how good the adapters are; give --held_out 0.5", file=sys.stderr)
    print(f"adapters: {config.output_dir}/{ADAPTERS} ({record['method']}, {counted(len(record['tasks']), 'task')})")


def _cell(value: float | int | None, digits: int) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


COMMAND = Command("generate-adapter", GenerateAdapterConfig, run_generate_adapter, show)
