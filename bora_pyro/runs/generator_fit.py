"""Fit a generator of adapters to a finished run, and measure it on tasks left out.

    bora generator-fit runs/demo-posterior --method cvae --output_dir runs/generator

A generator predicts the adapter of a task from a vector of its documents (ICM-LoRA, arXiv 2501.17635). It learns from the
adapters of the tasks of one run: the centre of the posterior of each, and draws from it. The run of a MAP fit has one adapter a
task.

Each task is left out in turn, and its adapter is predicted by a generator of the others, by the mean adapter, by the adapter of
the task with the nearest vector, and by ridge regression. The command prints how far each one is from the adapter of the task,
and how well it predicts the test documents. The fit itself has read the documents of the task: Θ has moved with them, and with Θ
the other adapters. A test without this fits without some tasks and gives them to ``bora generate-adapter``.

What the folder has: :mod:`bora_pyro.runs.generator_folder`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from bora_pyro.errors import InputError
from bora_pyro.exchange.save import check_exportable
from bora_pyro.files.atomic import check_place
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.likelihoods import MEASURES
from bora_pyro.predict.generators import METHODS, Method
from bora_pyro.predict.generators.generator import Generator
from bora_pyro.predict.generators.layout import Layout
from bora_pyro.predict.generators.left_out import check_tasks, leave_one_out
from bora_pyro.predict.task_vector import TaskVectors, task_vectors
from bora_pyro.routers import ByTask
from bora_pyro.runs.command import Command
from bora_pyro.runs.config.ensemble import EnsembleConfig
from bora_pyro.runs.config.generator_fit import DRAWS, GeneratorFitConfig
from bora_pyro.runs.ensemble import member_folders
from bora_pyro.runs.generator_folder import RECORD, write_generator
from bora_pyro.runs.progress import print_fitted
from bora_pyro.runs.saved import SavedRun, load_run

#: Methods that every generator is compared with.
BASELINES = ("mean", "nearest", "ridge")


def run_generator_fit(config: GeneratorFitConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Read the run, compute the vectors of its tasks, fit the generator, measure it, and write its folder.

    Args:
        config: the checked configuration.
        quiet: show no progress.

    Returns:
        The content of ``generator.json``.

    Raises:
        InputError: the run cannot be used, for example because it has too few tasks or no draws; or the folder is taken.
    """
    if Path(config.output_dir).resolve() == Path(config.run).resolve():
        raise InputError(f"output_dir {config.output_dir} is the run itself; give another folder for the generator")
    check_place(config.output_dir, record=RECORD, overwrite=config.overwrite)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code)
    check_run(run)
    draws = _number_of_draws(config, run)
    model, tasks = run.fitted.model, run.fitted.tasks
    vectors = task_vectors(
        model.backbone, run.data.train, documents=config.documents, states=config.states, token_budget=config.token_budget,
        seed=config.seed,
    )  # fmt: skip
    if 0 in vectors.documents:
        raise InputError(
            f"task {tasks[vectors.documents.index(0)]!r} has no training document for its vector; leave it out of the fit"
        )
    layout, latents, of_draws = _adapters(run, draws, seed=config.seed)
    if not quiet:
        print(_read(vectors, layout, draws), file=sys.stderr)
    given: dict[str, Any] = {"layout": layout, "draws": of_draws, "components": config.components, "seed": config.seed}
    generator = Generator.fit(config.build_method(), vectors.vectors, latents, **given)
    left_out: dict[str, Any] = {}
    if config.left_out:
        if not quiet:
            print(f"leaving out each of {len(tasks)} tasks in turn", file=sys.stderr)
        left_out = _left_out(config, run, vectors.vectors, latents, given)
    content = {
        "run": config.run,
        "posterior_sha256": run.folder.digest_of("posterior"),
        "tasks": tasks,
        "vector": {
            "documents": config.documents, "states": config.states, "seed": config.seed, "size": vectors.vectors.shape[1],
            "documents_read": vectors.documents, "tokens_read": vectors.tokens,
        },
        "draws": draws,
        "components": generator.space.components,
        "variance_share": generator.space.share,
        "seed": config.seed,
        "left_out": left_out,
    }  # fmt: skip
    return write_generator(config.output_dir, generator, model, run.config, content, overwrite=config.overwrite)


def check_run(run: SavedRun) -> None:
    """Check that the tasks of a run have adapters that a generator can learn from.

    Raises:
        InputError: they have no common form, there are too few tasks, or PEFT folders cannot describe the adapters.
    """
    model, folder = run.fitted.model, run.folder.path
    if isinstance(run.config, EnsembleConfig):
        raise InputError(
            f"the run in {folder} is an ensemble: its members began at different starts, so their adapters have no common form; "
            f"use one of them, such as {member_folders(str(folder))[0]}"
        )
    if not isinstance(model.router, ByTask):
        raise InputError(f"{model.router} reads a token by several adapters, so one adapter says little; use the router by_task")
    if own := model.tensors.masks_by_task:
        raise InputError(
            f"each task has a mask of its own for {own[0]!r}, so the adapters have no common form; use another adapter"
        )
    check_tasks(len(run.fitted.tasks))
    check_exportable(model.backbone)


def _number_of_draws(config: GeneratorFitConfig, run: SavedRun) -> int:
    if not run.is_point:
        return DRAWS if config.draws is None else config.draws
    if config.draws:
        raise InputError(
            f"draws is {config.draws}, but the run in {config.run} is a point estimate, which has none; leave draws out, or give "
            f"the posterior of scripts/posterior_fit.py {config.run} (with --guide swag its draws are from the steps of a fit)"
        )
    return 0


def _adapters(run: SavedRun, draws: int, *, seed: int) -> tuple[Layout, Tensor, Tensor | None]:
    """The layout of an adapter, the centres (D, P) and the draws (D, K, P)."""
    layout = Layout.of(run.fitted.model.starts)
    latents = layout.flatten(run.fitted.weights()[0]).detach().float().cpu()
    if not draws:
        return layout, latents, None
    posterior = run.posterior(seed=seed)
    rows = [layout.flatten(posterior.draw(number)).detach().float().cpu() for number in posterior.numbers(draws)]
    return layout, latents, torch.stack(rows, 1)


def _left_out(
    config: GeneratorFitConfig, run: SavedRun, vectors: Tensor, latents: Tensor, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The errors of each method on tasks left out, in all and by task, and how well it predicts their test documents."""
    methods: dict[str, Callable[[], Method]] = {name: METHODS[name] for name in BASELINES}
    methods[config.method] = config.build_method
    predicted = leave_one_out(methods, vectors, latents, **given)
    model, tasks, layout = run.fitted.model, run.fitted.tasks, given["layout"]
    rows: dict[str, dict[str, Any]] = {}
    for name, found in predicted.items():
        norms = (found.double() - latents.double()).norm(dim=1)  # (D,)
        by_task = dict(zip(tasks, norms.tolist(), strict=True))
        rows[name] = {"error": float(norms.square().mean().sqrt()), "error_by_task": by_task}
    if not len(run.data.test):
        return {"methods": rows}
    device, measure = model.backbone.device, model.likelihood.measure.name
    own = run.fitted.weights_of()
    of_methods = [{key: v.to(device) for key, v in layout.unflatten(found).items()} for found in predicted.values()]
    scores = evaluate(model, run.data.test, None, *of_methods, lambda index: own(index)[0])
    rows = {"base": {}} | rows | {"own": {"error": 0.0}}
    for row, score in zip(rows.values(), scores, strict=True):
        row[f"test_{measure}"] = score.value()
    return {"methods": rows}


def _read(vectors: TaskVectors, layout: Layout, draws: int) -> str:
    """What was read, in one line."""
    return (
        f"{len(vectors.documents)} tasks; vectors of {vectors.vectors.shape[1]} numbers from {sum(vectors.documents):,} training "
        f"documents ({sum(vectors.tokens):,} tokens), {min(vectors.documents)} to {max(vectors.documents)} a task; adapters of "
        f"{layout.size:,} numbers, {f'{draws} draws of each' if draws else 'one of each task'}"
    )


#: What the rows of the table are called.
_ROWS = {"base": "no adapter", "mean": "mean adapter", "nearest": "nearest", "own": "the task's own"}


def show(config: GeneratorFitConfig, record: Mapping[str, Any]) -> None:
    """Print the errors of tasks left out, what to think of them, and where the generator is."""
    methods = record["left_out"].get("methods", {})
    if methods:
        measure = next((one for one in MEASURES if f"test_{one.name}" in methods[config.method]), None)
        columns = {"error": 3} | ({} if measure is None else {f"test_{measure.name}": measure.digits})
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("adapter of a task\nleft out")
        for heading in ("error", *([] if measure is None else [f"test\n{measure.title}"])):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, row in methods.items():
            cells = ["–" if row.get(key) is None else f"{row[key]:,.{digits}f}" for key, digits in columns.items()]
            table.add_row(_ROWS.get(name, name), *cells)
        print_fitted(table)
        for note in notes(config.method, methods):
            print(f"note: {note}", file=sys.stderr)
    if record["chosen"]:
        print(f"{config.method} chose {', '.join(f'{name} {value:g}' for name, value in record['chosen'].items())}")
    if record["components"]:
        print(f"{record['components']} directions, {record['variance_share']:.1%} of the variance between tasks")
    size = record["bytes"]
    print(f"generator: {config.output_dir} ({size['generator'] / size['adapters']:.0%} of the bytes of all adapters)")


def notes(method: str, methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a user should know of a method that does not beat the baselines."""
    found, own = [], methods[method]["error"]
    for other, name in (("mean", "the mean adapter"), ("ridge", "ridge regression")):
        if method not in (other, "mean") and own >= (error := methods[other]["error"]):
            found.append(f"{method} is no nearer to the adapters of tasks left out than {name} ({own:.3f} and {error:.3f})")
    return found


COMMAND = Command("generator-fit", GeneratorFitConfig, run_generator_fit, show)
