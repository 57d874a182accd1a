"""Export the adapters of a finished run as one folder to share: tasks, Θ, posterior draws, and model cards.

    >>> import tempfile
    >>> from bora_pyro.runs.config.map_fit import MapFitConfig
    >>> from bora_pyro.runs.map_fit import run_map_fit
    >>> from bora_pyro.runs.saved import load_run
    >>> options = {"num_tasks": 2, "rank": 2, "max_tokens": 32, "max_train_documents": 2, "max_eval_documents": 2, "epochs": 1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     metrics = run_map_fit(MapFitConfig(output_dir=f"{folder}/run", **options), quiet=True)
    ...     exported = export_adapters(load_run(f"{folder}/run"), f"{folder}/export")
    ...     sorted(entry.name for entry in exported.iterdir())[:3]
    ['README.md', 'algorithms', 'algorithms-approximation']

All adapters lie side by side in one folder, as ``<task>``, ``global-mean`` and ``<task>--draw-<k>``. Servers find adapters by
the name of such a folder: vLLM's file system resolver reads ``<folder>/<name>/adapter_config.json``, LoRAX takes a local path or
a name, and PEFT loads ``subfolder=<name>`` of a repository on the hub. A request names an adapter by its folder. The folder of a
task never has two dashes in a row, so it cannot be confused with the folder of a draw.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from matplotlib.figure import Figure

from bora_pyro.diagnostics import plots
from bora_pyro.errors import InputError, nearest
from bora_pyro.exchange.check import CHECKS, ExportChecks
from bora_pyro.exchange.factors import EXPORT_RANK
from bora_pyro.exchange.merge import MERGED, save_merged
from bora_pyro.exchange.names import EXPORT
from bora_pyro.exchange.save import check_exportable, save_peft
from bora_pyro.exchange.vllm import serve_command
from bora_pyro.files.atomic import check_place, whole_folder, write_record
from bora_pyro.files.slugs import GLOBAL_MEAN, adapter_folders
from bora_pyro.model import Weights
from bora_pyro.options.field import check_fields, option
from bora_pyro.report.hub import check_repo_id, push_folder
from bora_pyro.report.model_card import PICTURE, CardFacts, adapter_card, export_card
from bora_pyro.runs.command import Command
from bora_pyro.runs.saved import SavedRun, load_run

DRAW = "draw {} of the posterior"


@dataclass(frozen=True)
class _Exported:
    folder: str
    d: int | None  # index of the task; None: Θ
    weights: Weights
    draw: int | None = None


def export_adapters(
    run: SavedRun,
    output_dir: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    draws: int = 0,
    seed: int = 0,
    base_name: str | None = None,
    license: str | None = None,
    repo_id: str | None = None,
    rank: int = EXPORT_RANK,
    check: str = "peft",
    overwrite: bool = False,
) -> Path:
    """Write the adapters of a run as PEFT folders in one folder. The folder appears once it is complete and checked.

    Args:
        run: the run, a MAP fit or a posterior.
        output_dir: the folder to make.
        tasks: the tasks to export, by their names or the names of their folders; default: all.
        draws: number K of posterior draws. Each draw adds a folder for every task and one for Θ. Draw k of a seed equals
            draw k of :class:`~bora_pyro.predict.posterior.Posterior` with that seed.
        seed: the seed of the draws.
        base_name: the name of the base model in the adapters' files, as the server knows it; default: the run's name of it.
        license: the license of the adapters, as an identifier of the hub; default: none is stated.
        repo_id: ``USER/NAME`` of the repository that the code in the cards loads from; default: the exported folder.
        rank: rank of the approximation of an adapter that has no exact LoRA form. Its error stands in the cards.
        check: how the folders are checked, one of :data:`~bora_pyro.exchange.check.CHECKS`. For ``vllm`` they get a rank that it
            serves, and a scale α/r of 1.
        overwrite: replace an earlier export.

    Returns:
        The folder.

    Raises:
        InputError: a task is not in the run; ``draws`` is negative, or not 0 for a point estimate; the folder exists already or
            cannot be written.
    """
    chosen, base_model = _chosen(run, tasks), base_name or run.config.base_model
    if draws < 0:
        raise InputError(f"draws is {draws}; give a whole number from 0 up")
    if draws:
        run.posterior(seed=seed)  # raises for a point estimate
    privacy = run.metrics.get("federated", {}).get("privacy", {}).get("statement", "")
    facts = CardFacts(base_model, license, repo_id, repr(run.fitted.model), run.adapted, privacy)
    scores = {folder: run.metrics["tasks"][folder] for folder in chosen.values()}
    kind = run.centre
    described: dict[str, dict[str, Any]] = {}
    checks = ExportChecks(check, base_model)
    with whole_folder(output_dir, record=EXPORT, overwrite=overwrite) as aside:
        for one in _adapters(run, chosen, draws, seed):
            place, model = aside / one.folder, run.fitted.model
            error = save_peft(place, model, one.weights, base_model=base_model, task=one.d, rank=rank, ranks=checks.ranks)
            checks(place, model, one.weights, task=one.d, exact=not error)
            task, what = None if one.d is None else run.fitted.tasks[one.d], kind if one.draw is None else DRAW.format(one.draw)
            of_task = scores.get(one.folder.partition("--")[0])
            adapter_card(facts, task, one.folder, what, of_task, relative_error=error).save(place / "README.md")
            described[one.folder] = {"task": task, "what": what} | ({} if one.draw is None else {"draw": one.draw})
            described[one.folder] |= {"relative_error": error} if error else {}
        picture = _picture(run, aside / PICTURE)
        title = f"{len(chosen)} tasks over {Path(base_model).name}"
        export_card(facts, title, scores, list(described), picture=picture).save(aside / "README.md")
        content = {"base_model": base_model, "model": repr(run.fitted.model), "seed": seed if draws else None}
        write_record(aside, EXPORT, content | checks.record() | {"adapters": described})
    return Path(output_dir)


def export_merged(run: SavedRun, output_dir: str | Path, task: str, *, overwrite: bool = False) -> tuple[Path, float]:
    """Write the base with one adapter merged into it, as a folder that loads without PEFT.

    Args:
        run: the run, a MAP fit or a posterior.
        output_dir: the folder to make.
        task: the task, by its name or the name of its folder; ``global-mean``: Θ.
        overwrite: replace an earlier merged base.

    Returns:
        The folder, and the relative error as :func:`~bora_pyro.exchange.merge.save_merged` returns it.

    Raises:
        InputError: the task is not in the run, or as for :func:`~bora_pyro.exchange.merge.save_merged`.
    """
    fitted = run.fitted
    if task == GLOBAL_MEAN:
        weights, d = next(of_all for _, _, of_all in fitted.each_task()), None
    else:
        d = fitted.tasks.index(next(iter(_chosen(run, [task]))))
        weights = next(theta for index, theta, _ in fitted.each_task() if index == d)
    return Path(output_dir), save_merged(output_dir, fitted.model, weights, task=d, overwrite=overwrite)


def _chosen(run: SavedRun, tasks: Sequence[str] | None) -> dict[str, str]:
    """Folder names of the chosen tasks, by task name."""
    slugs = adapter_folders(run.fitted.tasks)
    if tasks is None:
        return slugs
    names = {slug: name for name, slug in slugs.items()} | {name: name for name in slugs}
    if unknown := [task for task in tasks if task not in names]:
        raise InputError(f"task {unknown[0]!r} is not in this run, which has {len(slugs)}{nearest(unknown[0], names)}")
    wanted = {names[task] for task in tasks}
    return {name: slug for name, slug in slugs.items() if name in wanted}


def _adapters(run: SavedRun, chosen: dict[str, str], draws: int, seed: int) -> Iterator[_Exported]:
    """Yield each adapter with its folder: first the run's own adapters, then draw after draw."""
    fitted, mean = run.fitted, None
    for d, theta, of_all in fitted.each_task():
        mean = mean or of_all
        if fitted.tasks[d] in chosen:
            yield _Exported(chosen[fitted.tasks[d]], d, theta)
    yield _Exported(GLOBAL_MEAN, None, mean or {})
    if not draws:
        return
    posterior = run.posterior(seed=seed)
    for draw in posterior.numbers(draws):
        drawn, of_draw = fitted.model.weights_given(posterior.sites(draw))
        for name, folder in chosen.items():
            d = fitted.tasks.index(name)
            yield _Exported(f"{folder}--draw-{draw}", d, {latent: value[d] for latent, value in drawn.items()}, draw)
        yield _Exported(f"{GLOBAL_MEAN}--draw-{draw}", None, of_draw, draw)


def _picture(run: SavedRun, file: Path) -> bool:
    """Draw each task's distance from Θ. Draw nothing and return False if all distances are 0."""
    if all(row["deviation_norm"] == 0 for row in run.scores):
        return False
    task = {"task": run.fitted.tasks}
    distance = xr.DataArray([[[row["deviation_norm"] for row in run.scores]]], dims=("chain", "draw", "task"), coords=task)
    documents = xr.DataArray([row["train_documents"] for row in run.scores], dims="task", coords=task)
    container = {"posterior": {"distance": distance}, "constant_data": {"train_documents": documents}}
    with plots.style():
        figure = Figure(figsize=(7.0, 1.5 + 0.22 * len(run.scores)))
        plots.shrinkage_forest(container, figure.subplots())
        figure.savefig(file)
    return True


#: Options that a merged base has no use for.
ADAPTERS_ONLY = ("tasks", "draws", "seed", "rank", "check", "base_name", "license", "push_to_hub", "private")


@dataclass(kw_only=True)
class ExportConfig:
    """Export the adapters of a finished run as PEFT folders in one folder."""

    run: str = option("", "folder of the run, a fit's output_dir", positional=True)
    output_dir: str = option("", "the folder to make")
    overwrite: bool = option(False, "replace an earlier export")
    tasks: list[str] | None = option(None, "names of tasks, or of their folders (default: all)")
    draws: int = option(0, "number of posterior draws; each draw adds a folder for every task", least=0)
    seed: int = option(0, "seed of the draws")
    rank: int = option(EXPORT_RANK, "rank of the approximation of adapters that have no exact LoRA form", least=1)
    merged: str | None = option(
        None, "write the base with the adapter of this task merged into it, or of global-mean (default: PEFT folders)"
    )
    check: str = option(
        "peft",
        "peft: the adapters give the run's logits in PEFT, if it is installed; rules: only the names of the layers are checked; "
        "vllm: as peft, with ranks that vLLM serves, and the command that serves them",
        choices=CHECKS,
    )
    base_name: str | None = option(
        None, "name of the base model in the adapters' files, as the server knows it (default: the run's base_model)"
    )
    license: str | None = option(None, "license of the adapters, as an identifier of the hub (default: none is stated)")
    push_to_hub: str | None = option(None, "upload the folder to this repository of the hub, USER/NAME (default: no upload)")
    private: bool = option(False, "make the repository private if it is a new one")
    trust_remote_code: bool = option(
        False, "let a base model run code of its own on this machine; allowed on the command line only", line_only=True
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps")
    threads: int | None = option(None, "CPU threads (default: torch's own choice)", least=1)

    def validate(self) -> None:
        """Check the values."""
        if not self.run.strip():
            raise InputError(
                "no run is given; name its folder, as in export_adapters.py runs/map_fit --output_dir exports/map_fit"
            )
        if not self.output_dir.strip():
            raise InputError("no output_dir is given; name the folder to make, as in --output_dir exports/map_fit")
        check_fields(self)
        if self.push_to_hub is not None:
            check_repo_id(self.push_to_hub)
        if self.merged is not None:
            changed = [name for name in ADAPTERS_ONLY if getattr(self, name) != getattr(ExportConfig(), name)]
            if changed:
                raise InputError(f"{changed[0]} is of exported adapters; leave it out with --merged, which writes a whole base")


def export(config: ExportConfig) -> Path:
    """Export the adapters of a run, and upload them to the hub if ``push_to_hub`` is given; return the folder.

    Raises:
        InputError: the run cannot be read, the folder is taken, or the hub refuses the upload.
    """
    check_place(config.output_dir, record=EXPORT if config.merged is None else MERGED, overwrite=config.overwrite)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code)
    if config.merged is not None:
        folder, error = export_merged(run, config.output_dir, config.merged, overwrite=config.overwrite)
        print(f"merged base: {folder} (relative error of the rounding {error:.2g})")
        return folder
    try:
        check_exportable(run.fitted.model.backbone)
    except InputError as error:
        raise InputError(f"{error}, or export a merged base of a task (--merged)") from None
    folder = export_adapters(
        run,
        config.output_dir,
        tasks=config.tasks,
        draws=config.draws,
        seed=config.seed,
        base_name=config.base_name,
        license=config.license,
        repo_id=config.push_to_hub,
        rank=config.rank,
        check=config.check,
        overwrite=config.overwrite,
    )
    made = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
    adapters = made["adapters"]
    print(f"adapters: {folder} ({len(adapters)} folders)")
    print(made["check"])
    if relative_error := max(of_one.get("relative_error", 0.0) for of_one in adapters.values()):
        print(
            f"note: they have no exact LoRA form; rank {config.rank} has a relative error of up to {relative_error:.2g}",
            file=sys.stderr,
        )
    if (largest := made.get("max_lora_rank")) is not None:
        print(f"serve them with: {serve_command(folder, made['base_model'], largest)}")
    if config.push_to_hub is not None:
        print(f"on the hub: {push_folder(folder, config.push_to_hub, private=config.private)}")
    return folder


COMMAND = Command("export-adapters", ExportConfig, export)
