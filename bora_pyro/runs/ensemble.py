"""A deep ensemble of MAP fits, from a configuration to a run folder (Lakshminarayanan et al., 2017).

    bora ensemble --members 4 --data speeches.csv --output_dir runs/ensemble

The members are fitted one after another, with the documents and the options of one MAP fit. Each has a seed of its own, and
with it a start and an order of the documents. Clipping, a learned τ, the mean of the steps and the kept epoch are also its own.
A member is a run in ``members/<k>``, the same as that of ``bora map-fit`` with its seed and ``--split_seed``.

The ensemble is a posterior whose draws are the members, so every command that reads posteriors reads its folder. Its adapters are
those of the best member, the one with the lowest validation perplexity. ``bora fold`` makes one adapter a task of all members.

One step on the joined batches of four members would cost as much as four steps: on a CPU a step's time goes into the products of
its tokens, and those are the same.

If the command is interrupted, give it again with ``--resume true``: finished members are kept.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bora_pyro.errors import InputError
from bora_pyro.guides import ENSEMBLE
from bora_pyro.inference.ensemble import check_adapter, ensemble
from bora_pyro.inference.fitted import Fitted
from bora_pyro.likelihoods import measure_of
from bora_pyro.predict.posterior import Posterior
from bora_pyro.runs.build import adapter_of
from bora_pyro.runs.command import Command
from bora_pyro.runs.config.ensemble import EnsembleConfig
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import CONFIG, MEMBERS
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.progress import print_table
from bora_pyro.runs.results import add_mixture, metrics_of
from bora_pyro.runs.resume import as_written, resolve_folder
from bora_pyro.runs.run import Run
from bora_pyro.runs.saved import SavedRun, load_run


def run_ensemble(config: EnsembleConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Fit the members, make one posterior of them, predict the test documents, and write a run folder.

    Args:
        config: the checked configuration.
        quiet: show no progress and no notes.

    Returns:
        The content of ``metrics.json``: the numbers of the best member, ``members`` with those of each one, and ``mixture``, with
        the calibration of the ensemble.

    Raises:
        InputError: as for a MAP fit; or there are several processes, the run to resume is no ensemble, or one model cannot have
            the tensors of all members.
        RunStopped: the process got Ctrl-C or SIGTERM; the state of the fits is saved.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("an ensemble is fitted by one process; start it without torchrun, or fit the members with map-fit")
    config, folder = resolve_folder(config)
    check_adapter(adapter_of(config))
    if config.resume and MEMBERS not in folder.read_config():
        raise InputError(f"the run in {folder.path} is no ensemble; give the folder of one to resume, or another output_dir")
    folder.take(overwrite=config.overwrite, resume=bool(config.resume))
    with folder:
        folder.remove_metrics()
        folder.write_config(as_written(config))
        for number in range(config.members):
            member = _member(config, number)
            if not quiet:
                print(f"member {number + 1} of {config.members} (seed {member.seed})", file=sys.stderr)
            run_map_fit(member, quiet=quiet)
        members = _Members(config)
        fitted, run = ensemble(members), members.first
        assert run is not None
        folder.write_split(run.folder.read_split())
        run.data.notes.extend(members.notes)

        def measure() -> dict[str, Any]:
            return _metrics(config, fitted, run, members.rows)

        saving = Run(folder, config.base_model, guide=ENSEMBLE, quiet=quiet, adapters=config.export_adapters)
        return saving.save(fitted, run.data, measure)


class _Members:
    """Reads the finished members one after another, so that only one of them has its base model in memory beside the first.

    Attributes:
        first: the first member, once it is read.
        rows: the numbers of each member, for ``metrics.json``.
        notes: what the members say beyond the notes on the data that they share.
    """

    def __init__(self, config: EnsembleConfig) -> None:
        self.config = config
        self.first: SavedRun | None = None
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def __iter__(self) -> Iterator[Fitted]:
        for number in range(self.config.members):
            member = _member(self.config, number)
            run = load_run(member.output_dir, device=self.config.device, trust_remote_code=self.config.trust_remote_code)
            self.first = self.first or run
            measure = run.fitted.model.likelihood.measure.name
            names = (f"test_{measure}", f"validation_{measure}", "best_epoch", "fit_seconds")
            self.rows.append({"seed": member.seed} | {name: run.metrics.get(name) for name in names})
            own = [note for note in run.metrics.get("notes") or () if note not in self.first.data.notes]
            self.notes += [f"member {number}: {note}" for note in own]
            yield run.fitted


def _member(config: EnsembleConfig, number: int) -> MapFitConfig:
    return config.member(number, _place(config.output_dir, number))


def _place(path: str, number: int) -> str:
    return str(Path(path) / MEMBERS / str(number))


def _metrics(config: EnsembleConfig, fitted: Fitted, run: SavedRun, members: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = metrics_of(fitted, run.data, tau=config.tau, learning_rate=config.learning_rate, seed=config.seed)
    metrics |= {"guide": ENSEMBLE, "draws": config.members, "predict": "draws", "members": members}
    if run.data.test.num_tokens:
        posterior = Posterior(fitted)
        add_mixture(metrics, fitted, run.data, fitted.model, lambda: posterior.draws(config.members))
    return metrics


def member_folders(path: str) -> list[str]:
    """The run folders of the members, if the run in a folder is an ensemble; otherwise the folder itself.

    Raises:
        InputError: there is no run in the folder.
    """
    folder = RunFolder.open(path)
    members = folder.read_config().get(MEMBERS)
    if members is None:
        return [path]
    if not isinstance(members, int) or not 2 <= members <= 100:
        raise InputError(f"{folder.path / CONFIG} has no number of members; fit the ensemble again")
    return [_place(path, number) for number in range(members)]


def show_ensemble(config: EnsembleConfig, metrics: Mapping[str, Any]) -> None:
    """Print the table of the tasks, the scores of the members and of their mixture, and the folders."""
    print_table(metrics)
    measure, members = measure_of(metrics), metrics["members"]
    print(f"{len(members)} members, an adapter for each of {len(metrics['tasks'])} tasks in each; the table is of the best one")
    if "mixture" in metrics:
        scores = [row[f"test_{measure.name}"] for row in members]
        low, mean, high, mixture = (
            f"{score:.{measure.digits}f}"
            for score in (min(scores), sum(scores) / len(scores), max(scores), metrics[f"mixture_test_{measure.name}"])
        )
        print(f"test {measure.title}: members {low} to {high}, on average {mean}; their mixture {mixture}")
        print(f"calibration error (ECE): best member {metrics['mean']['ece']:.3f}, mixture {metrics['mixture']['ece']:.3f}")
    print(f"run folder: {config.output_dir} (one adapter a task of all members: bora fold {config.output_dir})")


COMMAND = Command("ensemble", EnsembleConfig, run_ensemble, show_ensemble)
